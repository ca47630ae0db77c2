"""Runners as tasks of ECS: Amazon's part by moto, what runs in the tasks is real (A3, A8, D4, G3).

Nothing here has been seen by Amazon.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import platform
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import distributed
import psutil
import pytest
from distributed import Security

from flame_dask import BootError, CallTimeout, FlamePool, PoolOptionsError
from flame_dask.backends import reap
from support import states, wait_for_file

pytest.importorskip("dask_cloudprovider.aws", reason="dask-cloudprovider[aws] is missing")
pytest.importorskip("moto.server", reason="moto or flask-cors is missing")

from dask_cloudprovider.aws import ECSCluster, FargateCluster

from ecs_agent import ECS, denied, no_capacity, throttled

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = [
    pytest.mark.backend,
    # The service comes first, so that it is looked at last: when all pools are closed.
    pytest.mark.usefixtures("ecs", "kills_runners"),
    # moto knows of no such error at ECS, and sends it all the same.
    pytest.mark.filterwarnings(r"ignore:Exception\(Throttled\)"),
]


@pytest.fixture
def no_retries() -> Iterator[None]:
    """Have a pool give up at the first boot that fails."""
    with dask.config.set({"flame.boot-retries": 0}):
        yield


def program(folder: Path, text: str) -> list[str]:
    path = folder / "task.py"
    path.write_text(textwrap.dedent(text))
    return [sys.executable, str(path)]


def test_d4_no_task_of_any_kind_without_work(
    make_ecs_pool: MakePool, ecs: ECS, until: Until
) -> None:
    pool = make_ecs_pool(max=2, idle_shutdown_after=0.2)
    assert ecs.requests == []
    assert pool.call(os.getpid) != os.getpid()
    until(lambda: pool.status().runners == (), 20)
    assert len(ecs.requests) == 1
    assert ecs.unstopped() == []


def test_c2_a_burst_starts_its_tasks_at_once(
    make_ecs_pool: MakePool, ecs: ECS, tmp_path: Path, until: Until
) -> None:
    """None waits until another one has connected."""
    held, gate = threading.Event(), tmp_path / "gate"
    ecs.holds = [held] * 3
    pool = make_ecs_pool(max=3, max_concurrency=1)
    futures = [pool.submit(wait_for_file, str(gate)) for _ in range(6)]
    until(lambda: len(ecs.requests) == 3, 5)
    assert states(pool) == ["booting"] * 3
    held.set()
    until(lambda: states(pool) == ["ready"] * 3, 20)
    gate.touch()
    assert len({future.result(20) for future in futures}) == 3
    assert ecs.most == 3


@pytest.mark.parametrize("what", ["request", "task"])
def test_c2_a_slow_boot_delays_no_other_and_no_stop(
    make_ecs_pool: MakePool, ecs: ECS, tmp_path: Path, until: Until, what: str
) -> None:
    """It lasts as long as all the rest, be it that ECS doesn't answer, or starts the task late."""
    held, gate = threading.Event(), tmp_path / "gate"
    if what == "task":
        ecs.holds = [held]
    else:
        ecs.faults = [held.wait]
    pool = make_ecs_pool(max=2, max_concurrency=1, idle_shutdown_after=0.1, boot_timeout=60)
    try:
        futures = [pool.submit(wait_for_file, str(gate)) for _ in range(2)]
        until(lambda: states(pool) == ["booting", "ready"], 20)
        gate.touch()
        assert len({future.result(20) for future in futures}) == 1
        until(lambda: [task.last_status for task in ecs.tasks()[-2:]].count("STOPPED"), 20)
    finally:
        held.set()


def test_c1_c6_three_of_ten_requests_are_refused(make_ecs_pool: MakePool, ecs: ECS) -> None:
    """Each in another way. All calls are served, and there is never a task too many."""
    ecs.faults = [None, throttled, None, None, no_capacity, None, None, "RESOURCE:MEMORY"]
    pool = make_ecs_pool(max=3, max_concurrency=1, single_use=True, boot_timeout=60)
    futures = [pool.submit(os.getpid, timeout=50) for _ in range(7)]
    assert len({future.result(50) for future in futures}) == 7
    assert len(ecs.requests) >= 10
    assert ecs.most == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (throttled, "Rate exceeded"),
        (no_capacity, "Capacity is unavailable"),
        ("RESOURCE:MEMORY", "RESOURCE:MEMORY"),
    ],
)
def test_a5_f4_what_amazon_says_is_told_soon(
    make_ecs_pool: MakePool, ecs: ECS, fault: Any, words: str
) -> None:
    """The vendor's class would try for a minute and tell nothing of it."""
    ecs.faults = [fault] * 50
    start = time.monotonic()
    with pytest.raises(BootError, match=words):
        make_ecs_pool(min=1, max=1)
    assert time.monotonic() - start < 15


# -- boots that fail on the way -------------------------------------------------------------------

FAILING = f"""
import sys
for number in range(30):
    print("line", number)
print("{"-" * 5}BEGIN PRIVATE KEY-----")
for _ in range(25):
    print("s3cr3t" * 10)
print("-----END PRIVATE KEY-----")
for number in range(5):
    print("last", number)
sys.exit("the disk is full")
"""


def test_a5_f4_a_task_that_stops_during_its_boot(
    make_ecs_pool: MakePool, ecs: ECS, tmp_path: Path, no_retries: None
) -> None:
    """How it ended is told, and the end of its log, without the keys in it."""
    ecs.commands = [program(tmp_path, FAILING)]
    with pytest.raises(
        BootError, match=r"Essential container in task exited.*exit code 1"
    ) as caught:
        make_ecs_pool(min=1, max=1)
    tail = caught.value.log_tail
    assert tail[-7:] == ("<hidden>", *(f"last {n}" for n in range(5)), "the disk is full")
    assert len(tail) == 20
    assert "s3cr3t" not in " ".join(tail)


def test_c1_c6_f4_a_task_that_never_connects(
    make_ecs_pool: MakePool, ecs: ECS, tmp_path: Path
) -> None:
    """It is stopped before another one starts, though it does not end; its log is read."""
    text = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("installing 100 packages", flush=True)
    time.sleep(60)
    """
    ecs.commands = [program(tmp_path, text)]
    first, others = threading.Event(), threading.Event()
    first.set()
    ecs.holds = [first, *[others] * 9]
    pool = make_ecs_pool(max=1, boot_timeout=3)
    with pytest.raises(CallTimeout) as caught:
        pool.call(int, queue_timeout=6.5)  # the next boot is under way by then
    assert caught.value.boot_error is not None
    assert caught.value.boot_error.log_tail == ("installing 100 packages",)
    others.set()
    assert pool.call(int, queue_timeout=30) == 0
    assert len(ecs.requests) >= 2
    assert ecs.most == 1


@pytest.mark.parametrize("why", ["denied", "elsewhere", "empty"])
def test_f4_a_log_that_can_not_be_read_is_no_error(
    make_ecs_pool: MakePool,
    ecs: ECS,
    fargate_options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_retries: None,
    why: str,
) -> None:
    monkeypatch.setattr("flame_dask.backends.ecs_logs.LIMIT", 0.5)
    given = {}
    if why == "denied":
        monkeypatch.setattr("moto.logs.responses.LogsResponse.get_log_events", denied)
    elif why == "elsewhere":
        container = {"name": "dask-worker", "image": "dask", "memory": 2048}
        definition = ecs.client("ecs").register_task_definition(
            family="other", networkMode="awsvpc", containerDefinitions=[container]
        )
        given["worker_task_definition_arn"] = definition["taskDefinition"]["taskDefinitionArn"]
    said = "" if why == "empty" else "print('hello'); "
    ecs.commands = [program(tmp_path, f"{said}raise SystemExit(3)")]
    with pytest.raises(BootError, match="exit code 3") as caught:
        make_ecs_pool(min=1, max=1, cluster=given)
    assert caught.value.log_tail == ()


# -- what is in a task ----------------------------------------------------------------------------


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """All that libraries log, at the lowest level: Amazon's shows what it sends and gets."""
    text = io.StringIO()
    # Not at the root: Dask has the handlers there be silent.
    loggers = [logging.getLogger(name) for name in ("aiobotocore", "botocore", "flame_dask")]
    handler = logging.StreamHandler(text)
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    yield text
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_a8_f4_the_package_comes_along_and_no_secret_is_seen(
    make_ecs_pool: MakePool,
    ecs: ECS,
    fargate_options: dict[str, Any],
    logged: io.StringIO,
) -> None:
    """From an interpreter that has Dask and not flame_dask; with TLS, as on any real network."""
    secret = {"aws_secret_access_key": "s3cr3t", "aws_access_key_id": "me"}
    pool = make_ecs_pool(
        max=1, security=Security.temporary(), env={"MINE": "t0k3n"}, cluster=secret
    )
    assert pool.cluster.scheduler.address.startswith("tls://")

    def look() -> tuple[str, str, list[str]]:
        import flame_dask

        keys = [name for name, value in os.environ.items() if "PRIVATE KEY" in value]
        return flame_dask.__file__, os.environ["MINE"], keys

    path, mine, keys = pool.call(look)
    assert "flame_dask-package" in path
    assert mine == "t0k3n"
    assert keys == []
    assert reap((FargateCluster, {"cluster_arn": fargate_options["cluster_arn"]})) == []
    # What a task runs has its certificates in its environment; nothing of them is to be seen.
    [task] = ecs.unstopped()
    [override] = task.overrides["containerOverrides"]
    secrets = [each["value"] for each in override["environment"] if "TLS" in each["name"]]
    assert any("PRIVATE KEY" in value for value in secrets)
    member = next(iter(pool.cluster.workers.values()))
    ps = [" ".join(each.info["cmdline"] or ()) for each in psutil.process_iter(["cmdline"])]
    assert any(str(member.name) in line for line in ps)
    assert "RunTask" in logged.getvalue()
    shown = [repr(pool), repr(pool.options), repr(pool.cluster), repr(member)]
    shown += [*ps, *override["command"], ecs.log_of(task), logged.getvalue()]
    for text in shown:
        assert "PRIVATE KEY" not in text
        assert "s3cr3t" not in text
        assert "t0k3n" not in text
        assert not any(value in text for value in secrets if len(value) > 20)


@pytest.mark.parametrize(
    ("variable", "there", "here"),
    [
        ("ANOTHER_PYTHON", "3.9.1", platform.python_version()),
        ("ANOTHER_DISTRIBUTED", "2020.1.0", distributed.__version__),
    ],
)
def test_a8_another_version_there(
    make_ecs_pool: MakePool, ecs: ECS, no_retries: None, variable: str, there: str, here: str
) -> None:
    ecs.extra_environment = {variable: there}
    with pytest.raises(BootError, match=f"has .* {there}, the parent has {here}"):
        make_ecs_pool(min=1, max=1)


def test_memory_is_what_is_known_of_it(make_ecs_pool: MakePool, ecs: ECS) -> None:
    """The vendor's default of 16 GiB says nothing about somebody's own definition of tasks."""
    for options, limit in (({}, "auto"), ({"worker_mem": 1024}, "1024MiB")):
        ecs.requests.clear()
        make_ecs_pool(max=1, cluster=options).call(int)
        [request] = ecs.requests
        [override] = request["task"].overrides["containerOverrides"]
        command = override["command"]
        assert command[command.index("--memory-limit") + 1] == limit


def test_watching_is_modest(make_ecs_pool: MakePool, ecs: ECS, until: Until) -> None:
    """One request for all tasks of a pool; and fewer of them, if ECS says there are too many."""
    pool = make_ecs_pool(min=2, max=2)
    until(lambda: ecs.asked[-1] == 2, 5)
    ecs.asked.clear()
    ecs.throttle_describe = 4
    until(lambda: ecs.asked, 5)
    start = time.monotonic()
    until(lambda: len(ecs.asked) >= 4, 20)
    assert time.monotonic() - start > 1.2  # pauses of 0.2, 0.4 and 0.8 s
    assert set(ecs.asked) == {2}
    pool.close()
    assert ecs.unstopped() == []


def test_a4_an_asynchronous_pool(fargate_options: dict[str, Any], ecs: ECS) -> None:
    async def main() -> int:
        options: dict[str, Any] = {"host": "127.0.0.1", "boot_timeout": 20}
        backend = (FargateCluster, fargate_options)
        async with FlamePool("async", max=1, asynchronous=True, backend=backend, **options) as pool:
            answer: int = await pool.call(int)
            return answer

    assert asyncio.run(main()) == 0
    assert ecs.unstopped() == []


def test_f4_a_cluster_that_is_not_there(make_ecs_pool: MakePool) -> None:
    arn = "arn:aws:ecs:us-east-1:123456789012:cluster/nobody"
    with pytest.raises(BootError):
        make_ecs_pool(max=1, cluster={"cluster_arn": arn})


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"n_workers": 2}, "options `min` and `max`"),
        ({"worker_nthreads": 2}, "max_concurrency"),
        ({"scheduler_cpu": 1024}, "scheduler is in the parent"),
        ({"skip_cleanup": False}, "empty just now"),
        ({"security_groups": []}, "ids of some"),
        ({"tags": {"flame-pool": "x"}}, "leave out flame-pool"),
        ({"worker_extra_args": ["--nanny"]}, "leave out --nanny"),
        ({"worker_task_kwargs": {"overrides": {}}}, "leave out overrides"),
        ({"no_such": 1}, "is no option of FargateCluster"),
    ],
)
def test_a2_options_are_checked(
    make_ecs_pool: MakePool, cluster: dict[str, Any], words: str
) -> None:
    with pytest.raises(PoolOptionsError, match=words):
        make_ecs_pool(max=1, cluster=cluster)


def test_a2_an_environment_that_is_too_large(make_ecs_pool: MakePool) -> None:
    with pytest.raises(PoolOptionsError, match="ECS allows 8192") as caught:
        make_ecs_pool(max=1, env={"MINE": "s3cr3t" * 1500})
    assert "s3cr3t" not in str(caught.value)


def test_a2_a_cluster_of_ones_own_is_needed_without_fargate(make_pool: MakePool) -> None:
    with pytest.raises(PoolOptionsError, match="cluster_arn"):
        make_pool(max=1, backend=ECSCluster)


def test_a2_a_scheduler_elsewhere_is_refused(make_ecs_pool: MakePool) -> None:
    with pytest.raises(PoolOptionsError, match="scheduler is in the parent"):
        make_ecs_pool(max=1, scheduler="remote")

"""Runners that are jobs of a real SLURM (A3, A8, C2, D4, F2, G3)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Security

from flame_dask import BootError, CallTimeout, FlamePool, PoolOptionsError, RunnerLost
from support import alive, lines, pids, states, wait_for_file

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("kills_runners")]


def wait_and_tell(path: str) -> str:
    wait_for_file(path)
    return os.environ["SLURM_JOB_ID"]


def sleep(log: str) -> None:
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.05)


def command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout


def queue() -> list[str]:
    """The jobs that wait, run, or are being ended."""
    return command("squeue", "--noheader", "--format=%i").split()


@pytest.fixture
def cluster(slurm: Path, tmp_path: Path) -> Iterator[tuple[type, dict[str, Any]]]:
    """The class, and options for this SLURM."""
    from dask_jobqueue import SLURMCluster

    shared = tmp_path / "shared"
    shared.mkdir()
    options = {"cores": 1, "memory": "1GiB", "shared_temp_directory": str(shared)}
    yield SLURMCluster, options
    assert queue() == []
    assert list(shared.iterdir()) == []


@pytest.fixture
def make_job_pool(cluster: Any, make_pool: MakePool) -> MakePool:
    def make(**options: Any) -> FlamePool:
        kind, given = cluster
        given = {**given, **options.pop("cluster", {})}
        options.setdefault("host", "127.0.0.1")
        return make_pool(backend=(kind, given), **options)

    return make


def test_c2_d1_d4_two_jobs_on_demand_and_then_none(
    make_job_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    pool = make_job_pool(max=2, max_concurrency=1, idle_shutdown_after=0.5)
    assert (pool.status().runners, queue()) == ((), [])
    gate = tmp_path / "gate"
    futures = [pool.submit(wait_and_tell, str(gate)) for _ in range(2)]
    until(lambda: states(pool) == ["ready", "ready"], 30)
    jobs = queue()
    gate.touch()
    assert sorted(future.result(10) for future in futures) == sorted(jobs)
    until(lambda: pool.status().runners == (), 20)
    assert queue() == []


def test_a8_f4_the_package_comes_along_and_no_key_is_seen(
    make_job_pool: MakePool, python_without_flame: str
) -> None:
    """With TLS, since it was asked for."""
    pool = make_job_pool(
        max=1,
        max_concurrency=3,
        security=Security.temporary(),
        cluster={"python": python_without_flame},
    )
    assert pool.cluster.scheduler.address.startswith("tls://")

    def look() -> tuple[str, int, list[str], list[str]]:
        import flame_dask

        keys = [name for name, value in os.environ.items() if "PRIVATE KEY" in value]
        me = psutil.Process()
        arguments = [word for process in [me, *me.parents()] for word in process.cmdline()]
        return (
            flame_dask.__file__,
            len(keys),
            [a for a in arguments if "PRIVATE KEY" in a],
            me.cmdline(),
        )

    path, keys, arguments, own = pool.call(look)
    assert "flame_dask-package" in path
    assert (keys, arguments) == (0, [])
    assert own[own.index("--nthreads") + 1] == "3"
    [job] = queue()
    shown = command("scontrol", "show", "job", job)
    script = command("scontrol", "write", "batch_script", job, "-")
    assert f"JobId={job}" in shown
    assert "distributed.cli.dask_worker" in script
    [member] = pool.cluster.workers.values()
    for text in (shown, script, repr(pool), repr(pool.options), repr(member)):
        assert "PRIVATE KEY" not in text
        assert "BEGIN" not in text


def test_e5_f2_a_job_is_cancelled_by_somebody_else(
    make_job_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    pool = make_job_pool(max=1, min=1, shutdown_timeout=1)
    log = tmp_path / "log"
    future = pool.submit(sleep, str(log))
    until(lambda: len(lines(log)) == 1, 20)
    [job] = queue()
    command("scancel", job)
    with pytest.raises(RunnerLost) as caught:
        future.result(20)
    assert caught.value.cause == "preempted"
    until(lambda: not alive(*pids(log)), 10)
    assert pool.call(wait_and_tell, "/", queue_timeout=20) != job


def test_f2_a_runner_is_killed(make_job_pool: MakePool, tmp_path: Path, until: Until) -> None:
    pool = make_job_pool(max=1)
    log = tmp_path / "log"
    future = pool.submit(sleep, str(log))
    until(lambda: len(lines(log)) == 1, 20)
    os.kill(pids(log)[0], signal.SIGKILL)
    with pytest.raises(RunnerLost) as caught:
        future.result(20)
    assert (caught.value.cause, caught.value.signal) == ("signal", signal.SIGKILL)
    assert pool.call(int, queue_timeout=20) == 0


def test_f1_a_job_that_is_queued_anew_is_no_second_runner(
    make_job_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """As SLURM does when a node has failed."""
    pool = make_job_pool(max=1, shutdown_timeout=1)
    log = tmp_path / "log"
    future = pool.submit(sleep, str(log))
    until(lambda: len(lines(log)) == 1, 20)
    [job] = queue()
    command("scontrol", "requeue", job)
    with pytest.raises(RunnerLost):
        future.result(20)
    until(lambda: job not in queue(), 20)
    assert len(lines(log)) == 1


def test_a4_a_pool_that_is_asynchronous_with_tls_of_its_own(cluster: Any) -> None:
    async def use() -> None:
        options: Any = {"asynchronous": True, "backend": cluster, "shutdown_timeout": 5}
        async with FlamePool("async", max=1, **options) as pool:
            assert pool.cluster.scheduler.address.startswith("tls://")
            assert await pool.call(int) == 0
            assert len(queue()) == 1
        assert queue() == []

    asyncio.run(use())


def test_g3_a_job_that_does_not_reach_the_parent_ends(
    make_job_pool: MakePool, until: Until
) -> None:
    pool = make_job_pool(
        max=1, contact_address="127.0.0.1:1", cluster={"death_timeout": 3}, boot_timeout=60
    )
    future = pool.submit(int)
    until(lambda: queue() != [], 10)
    [job] = queue()
    until(lambda: job not in queue(), 20)
    future.cancel()


@pytest.mark.parametrize(
    ("given", "cause", "log"),
    [
        ({"queue": "nowhere"}, "invalid partition specified: nowhere", "Invalid partition name"),
        ({"job_script_prologue": ["echo no licence >&2", "exit 3"]}, "exit code 3", "no licence"),
        ({"python": "/no-python"}, "exit code 127", "/no-python"),
    ],
)
def test_f4_a_boot_that_fails_tells_why(
    make_job_pool: MakePool, given: dict[str, Any], cause: str, log: str
) -> None:
    with pytest.raises(BootError, match=cause) as caught:
        make_job_pool(min=1, max=1, cluster=given)
    assert log in "\n".join(caught.value.log_tail)


def test_e2_f4_a_job_that_waits_too_long_is_cancelled(make_job_pool: MakePool) -> None:
    later = {"job_extra_directives": ["--begin=now+1hour"]}
    pool = make_job_pool(max=1, cluster=later, boot_timeout=2)
    with pytest.raises(CallTimeout) as caught:
        pool.call(int, queue_timeout=3.5)
    assert caught.value.phase == "booting"
    assert "was PENDING (BeginTime)" in "\n".join(caught.value.boot_error.log_tail)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cors": 1}, "is no option of SLURMCluster"),
        ({"nanny": True}, "has none"),
        ({"n_workers": 1}, "min and max"),
        ({"processes": 2}, "one process"),
        ({"security": None}, "option security"),
        ({"memory": None}, "how much cores and memory"),
        ({"job_extra_directives": "--x"}, "list of texts"),
        ({"worker_extra_args": ["--nthreads", "3"]}, "leave it out"),
    ],
)
def test_a2_options_are_checked(make_job_pool: MakePool, given: dict[str, Any], words: str) -> None:
    with pytest.raises(PoolOptionsError, match=words):
        make_job_pool(max=1, cluster=given)

"""Options that change while a pool runs (C8)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flame_dask import CallTimeout, FlamePool, PoolClosed, PoolOptionsError
from support import alive, on_local, runner_pid, states, wait_for_file

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]


def pid_when(path: str) -> int:
    wait_for_file(path)
    return os.getpid()


def nap(seconds: float) -> None:
    time.sleep(seconds)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.mark.slow
def test_c8_a_lower_max_kills_nobody(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    """Four runners work, and one is to be left: they finish first."""
    pool = make_pool(max=4, max_concurrency=1)
    futures = [pool.submit(pid_when, str(gate)) for _ in range(4)]
    until(lambda: pool.status().leases == 4, 20)
    processes = [pool.cluster.workers[runner.id].process.pid for runner in pool.status().runners]
    assert pool.configure(max=1) is None
    assert states(pool) == ["draining"] * 3 + ["ready"]
    later = pool.submit(pid_when, str(gate))
    until(lambda: pool.status().waiters == 1)
    assert sorted(alive(*processes)) == sorted(processes)
    gate.touch()
    assert {future.result(20) for future in futures} == set(processes)
    assert later.result(20) in processes
    until(lambda: states(pool) == ["ready"])
    counters = pool.status().counters
    assert (counters["boots"], counters["ended"], counters["lost"]) == (4, 5, 0)
    assert len(pool.cluster.workers) == 1


@on_local
def test_c8_a_higher_min_boots_at_once(make_pool: MakePool, backend: Any, until: Until) -> None:
    pool = make_pool(max=3)
    assert pool.status().runners == ()
    pool.configure(min=2)
    assert states(pool) == ["booting", "booting"]
    until(lambda: states(pool) == ["ready", "ready"], 20)
    assert {runner.kind for runner in pool.status().runners} == {"min"}
    assert (pool.options.min, pool.options.max) == (2, 3)
    assert pool.call(int) == 0


@on_local
def test_c8_a_buffer_keeps_one_more_than_are_busy(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    pool = make_pool(max=3, max_concurrency=1, idle_shutdown_after=0.5)
    pool.configure(buffer=1)
    until(lambda: states(pool) == ["ready"], 20)
    future = pool.submit(pid_when, str(gate))
    until(lambda: states(pool) == ["ready", "ready"], 20)
    assert sorted(runner.leases for runner in pool.status().runners) == [0, 1]
    gate.touch()
    future.result(10)
    until(lambda: states(pool) == ["ready"])
    assert pool.status().counters["boots"] == 2
    pool.configure(buffer=0)
    until(lambda: states(pool) == [])


def test_c8_d1_idle_times(make_pool: MakePool, until: Until) -> None:
    pool = make_pool(max=1, idle_shutdown_after=None)
    pool.call(int)
    pid = runner_pid(pool)
    pool.configure(idle_shutdown_after="100ms")
    assert pool.options.idle_shutdown_after == 0.1
    until(lambda: pool.status().runners == ())
    assert not psutil.pid_exists(pid)


def test_c8_d2_a_duration_leaves_the_check(
    make_pool: MakePool, tmp_path: Path, gate: Path, until: Until
) -> None:
    asked = str(tmp_path / "asked")
    may_go = str(gate)

    def check() -> bool:
        Path(asked).touch()
        return Path(may_go).exists()

    pool = make_pool(max=1, idle_shutdown_after=(None, check))
    pool.call(int)
    pool.configure(idle_shutdown_after=0.1)
    assert pool.options.idle_check is check
    until(lambda: Path(asked).exists())
    assert states(pool) == ["ready"]
    gate.touch()
    until(lambda: pool.status().runners == ())
    pool.configure(idle_shutdown_after=(5, check))
    with pytest.raises(PoolOptionsError, match=r"another check.*duration alone"):
        pool.configure(idle_shutdown_after=(1, bool))
    assert pool.options.idle_shutdown_after == 5.0


def test_c8_e1_new_calls_have_the_new_limits(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    """Those that wait keep the ones they came with."""
    pool = make_pool(max=1, max_concurrency=1, timeout=20, queue_timeout=20)
    running = pool.submit(pid_when, str(gate))
    until(lambda: pool.status().leases == 1, 20)
    waiting = pool.submit(pid_when, str(gate))
    pool.configure(queue_timeout=0.1)
    with pytest.raises(CallTimeout) as caught:
        pool.call(int)
    assert (caught.value.phase, caught.value.limit) == ("queued", 0.1)
    gate.touch()
    assert running.result(10) == waiting.result(10)
    pool.configure(timeout=0.1)
    with pytest.raises(CallTimeout) as caught:
        pool.call(nap, 20)
    assert (caught.value.phase, caught.value.limit) == ("running", 0.1)


def test_c8_c5_placement(make_pool: MakePool, gate: Path, until: Until) -> None:
    pool = make_pool(min=2, max=2, max_concurrency=3)
    pool.configure(placement="pack")
    futures = [pool.submit(pid_when, str(gate)) for _ in range(3)]
    until(lambda: pool.status().leases == 3)
    assert sorted(runner.leases for runner in pool.status().runners) == [0, 3]
    gate.touch()
    assert len({future.result(10) for future in futures}) == 1


def test_c8_c6_a_boot_has_the_new_limit(make_pool: MakePool, until: Until) -> None:
    """The runner itself is told of it, too, and does not give up earlier."""
    pool = make_pool(max=1, boot_timeout=0.01)
    with pytest.raises(CallTimeout):
        pool.call(int, queue_timeout=0.5)
    until(lambda: pool.status().runners == ())
    before = pool.status().counters["boot_failures"]
    pool.configure(boot_timeout=20)
    assert pool.options.queue_timeout == 20  # it follows, unless it was given
    assert pool.call(int) == 0
    assert pool.status().counters["boot_failures"] == before


def test_c8_dask_shows_the_new_bounds(make_pool: MakePool, until: Until) -> None:
    pool = make_pool(max=3)
    pool.configure(min=1, max=2)
    until(lambda: (pool._adaptive.minimum, pool._adaptive.maximum) == (1, 2))
    assert "1..2 runners" in repr(pool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max": 3, "shutdown_timeout": 5}, r"shutdown_timeout=5 can't be changed .*: close the"),
        ({"max": 3, "single_use": True}, r"single_use=True can't be changed on a running pool"),
        ({"min": 3}, r"min=3 is not valid: give at most max=2"),
        ({"max": 0}, r"max=0 is not valid"),
        ({"min": 1, "bufer": 1}, r"bufer=1 is not an option of FlamePool: did you mean buffer\?"),
        ({"min": 1, "idle_shutdown_after": "soon"}, r"idle_shutdown_after='soon' is not valid"),
        ({"idle_shutdown_after": (1, bool)}, r"another check"),
    ],
)
def test_c8_a2_what_can_not_be_changed_changes_nothing(
    shared_pool: FlamePool, change: dict[str, Any], message: str
) -> None:
    options, before = shared_pool.options, shared_pool.status()
    with pytest.raises(PoolOptionsError, match=message):
        shared_pool.configure(**change)
    assert shared_pool.options is options
    assert shared_pool.status().counters == before.counters


@pytest.fixture(scope="module")
def shared_pool(local_backend: Any, fast: dict[str, Any]) -> Any:
    """A pool without runners, for tests that change nothing."""
    with FlamePool("unchanged", max=2, backend=local_backend, **fast) as pool:
        pool.status()
        yield pool


def test_c8_a7_a_pool_in_a_runner_has_no_min(make_pool: MakePool) -> None:
    def open_another() -> Any:
        from distributed import LocalCluster

        quiet = {"scheduler_kwargs": {"dashboard": False}}
        with FlamePool("inner", max=2, backend=(LocalCluster, quiet)) as inner:
            inner.configure(min=2, buffer=0)
            return inner.options.min, len(inner.status().runners)

    pool = make_pool(max=1, isolation="process")
    assert pool.call(open_another) == (0, 0)


def test_c8_several_at_the_same_time_arrive_in_one_order(make_pool: MakePool, backend: Any) -> None:
    """What the host goes by is what ``pool.options`` shows, whoever was last."""
    pool = make_pool(max=50)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: pool.configure(max=50 + n), range(1, 40)))

    def look(dask_scheduler: Any) -> int:
        most: int = dask_scheduler.plugins["flame"].core.options.max
        return most

    assert pool.client.run_on_scheduler(look) == pool.options.max


def test_c8_a_closed_pool(make_pool: MakePool) -> None:
    pool = make_pool(max=1)
    pool.close()
    with pytest.raises(PoolClosed):
        pool.configure(max=2)
    assert pool.options.max == 1


def test_c8_f3_nobody_waits_for_a_scheduler_that_is_gone(
    make_pool: MakePool, until: Until, kills_runners: None, flame_log: Any
) -> None:
    from conftest import BACKENDS

    pool = make_pool(max=1, backend=BACKENDS["subprocess"])
    pid = pool.client.run_on_scheduler(os.getpid)
    process = psutil.Process(pid)
    process.suspend()
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        change = thread.submit(pool.configure, max=2)
        until(lambda: pool.options.max == 2)
        process.kill()
        with pytest.raises(PoolClosed):
            change.result(20)


@on_local
def test_c8_a4_it_is_awaitable(backend: Any, fast: dict[str, Any]) -> None:
    async def main() -> None:
        options = {**fast, "backend": backend, "asynchronous": True}
        async with FlamePool("async", max=2, **options) as pool:
            with pytest.raises(PoolOptionsError):
                pool.configure(min=3)
            assert await pool.configure(min=1) is None
            status = await pool.status()
            assert [runner.state for runner in status.runners] == ["booting"]
            assert pool.options.min == 1
            assert await pool.call(int) == 0

    asyncio.run(main())

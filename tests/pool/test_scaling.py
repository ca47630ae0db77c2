"""Growing and shrinking of real pools: the stories that the design promises."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import LocalCluster, wait

from flame_dask import BootError, CallTimeout, FlamePool, PoolClosed
from flame_dask.backends.processes import ProcessBackend
from flame_dask.options import PoolOptions

Waits = Any
MakePool = Any


def hold(gate: str, mark: str) -> int:
    """Hold a slot until the gate file is there; leave a mark when it has begun."""
    Path(mark).touch()
    while not Path(gate).exists():
        time.sleep(0.01)
    return os.getpid()


class Gate:
    """Lets calls begin, and end when the test wants it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "gate"
        self.numbers = itertools.count()

    def submit(self, pool: FlamePool, **reserved: Any) -> Any:
        mark = self.folder / f"mark{next(self.numbers)}"
        future = pool.submit(hold, str(self.file), str(mark), **reserved)
        future.mark = mark
        return future

    def open(self) -> None:
        self.file.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def states(pool: FlamePool) -> list[str]:
    return sorted(runner.state for runner in pool.status().runners)


@pytest.mark.usefixtures("backend")
def test_a5_c2_e2_d1_the_story_of_two_runners(
    make_pool: MakePool, gate: Gate, until: Waits
) -> None:
    """A5, C2, C4, E2, D1: min=1, max=2, two slots each."""
    pool = make_pool(min=1, max=2, max_concurrency=2, idle_shutdown_after=0.5)
    assert states(pool) == ["ready"]

    first = [gate.submit(pool) for _ in range(2)]
    until(lambda: all(f.mark.exists() for f in first))
    assert states(pool) == ["ready"]

    second = [gate.submit(pool) for _ in range(2)]  # the third call that is under way at once
    until(lambda: all(f.mark.exists() for f in second))
    assert states(pool) == ["ready", "ready"]

    late = [gate.submit(pool) for _ in range(2)]
    until(lambda: pool.status().waiters == 2)
    began = time.monotonic()
    with pytest.raises(CallTimeout) as caught:
        pool.call(int, timeout=0.1)
    assert time.monotonic() - began < 0.3
    assert caught.value.phase == "queued"
    assert caught.value.queued == pytest.approx(0.1, abs=0.1)
    assert caught.value.running == 0.0
    status = pool.status()
    assert (status.waiters, status.leases, len(status.runners)) == (2, 4, 2)
    assert not any(f.mark.exists() for f in late)

    gate.open()
    pids = {f.result(10) for f in first + second + late}
    assert len(pids) == 2
    until(lambda: states(pool) == ["ready"], 5)
    runner = pool.status().runners[0]
    assert runner.kind == "min"
    assert runner.id.endswith("-1")
    assert pool._desk._open == {}
    assert pool.client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) == 0


@pytest.mark.usefixtures("backend")
def test_c2_two_calls_on_an_empty_pool_share_one_runner(
    make_pool: MakePool, gate: Gate, until: Waits
) -> None:
    """C2: two calls at once, min=0, max=1, two slots."""
    pool = make_pool(max=1, max_concurrency=2)
    futures = [gate.submit(pool) for _ in range(2)]
    until(lambda: all(f.mark.exists() for f in futures), 15)
    gate.open()
    assert len({f.result(5) for f in futures}) == 1


@pytest.mark.usefixtures("backend")
def test_c2_fifty_slots_are_fifty_slots(make_pool: MakePool) -> None:
    """A1: max_concurrency=50 on one runner, whatever the number of cores."""
    pool = make_pool(min=1, max=1, max_concurrency=50)
    began = time.monotonic()
    futures = [pool.submit(time.sleep, 1) for _ in range(50)]
    wait(futures)
    assert time.monotonic() - began < 2.5


class Flaky(ProcessBackend):
    """Fails every third boot, and keeps the most runners that there were at once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(PoolOptions.check("flaky", **options), LocalCluster, {})
        self.numbers = itertools.count(1)
        self.started: list[float] = []
        self.alive = 0
        self.most = 0

    async def boot(self, runner: str) -> None:
        """Start a runner, or fail after a while."""
        self.started.append(time.monotonic())
        self.alive += 1
        self.most = max(self.most, self.alive)
        if next(self.numbers) % 3 == 0:
            self.alive -= 1
            raise RuntimeError("no capacity")
        await super().boot(runner)

    async def stop(self, runner: str) -> Any:
        """Stop a runner."""
        known = runner in self.cluster.workers
        tail = await super().stop(runner)
        self.alive -= known
        return tail


@pytest.mark.slow
def test_c1_c2_c6_eight_boots_at_once_and_never_more(gate: Gate, until: Waits) -> None:
    """C1, C2, C6: the boots start together, failures are made up for, max is never exceeded."""
    options: dict[str, Any] = {"max": 8, "max_concurrency": 1}
    backend = Flaky(**options)
    with FlamePool("flaky", backend=backend, **options) as pool:
        futures = [gate.submit(pool) for _ in range(8)]
        until(lambda: len(backend.started) >= 8)
        assert backend.started[7] - backend.started[0] < 0.5
        until(lambda: all(f.mark.exists() for f in futures), 30)
        assert pool.status().counters["boot_failures"] >= 2
        assert backend.most <= 8
        gate.open()
        assert len({f.result(5) for f in futures}) == 8


@pytest.mark.parametrize(
    ("preload", "said"),
    [("raise RuntimeError('no licence')", "no licence"), ("import os; os._exit(7)", "7")],
)
def test_a5_c6_e2_boots_that_always_fail(
    make_pool: MakePool, backend: Any, preload: str, said: str, tmp_path: Path
) -> None:
    """A5, C6, E2: the caller gets the cause and the last lines of the worker's log."""
    file = tmp_path / "fails.py"
    file.write_text(preload)
    spoilt = (backend[0], {**backend[1], "worker_kwargs": {"preload": str(file)}})
    pool = make_pool(max=2, backend=spoilt)
    with pytest.raises(CallTimeout) as caught:
        pool.call(int, timeout=3)
    assert caught.value.phase == "booting"
    error = caught.value.boot_error
    assert isinstance(error, BootError)
    assert error.attempts >= 1
    assert said in f"{error} {error.log_tail}"
    pool.close()

    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with pytest.raises(BootError) as refused:
        make_pool("never", min=1, max=1, backend=spoilt)
    assert said in f"{refused.value} {refused.value.log_tail}"
    assert refused.value.attempts == 3
    left = {p.pid for p in psutil.Process().children(recursive=True)} - before
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["spread", "pack"])
def test_c5_a_spike_and_a_trickle(
    make_pool: MakePool, gate: Gate, until: Waits, placement: str
) -> None:
    """C5, D1: 1 runner is left within three idle_shutdown_after, and no call waits for a boot."""
    idle = 1.5
    pool = make_pool(
        max=8,
        max_concurrency=1,
        idle_shutdown_after=idle,
        placement=placement,
        backend=LocalCluster,
    )
    spike = [gate.submit(pool) for _ in range(8)]
    until(lambda: all(f.mark.exists() for f in spike), 30)
    gate.open()
    for future in spike:
        future.result(5)
    boots = pool.status().counters["boots"]
    end = time.monotonic() + 3 * idle
    slowest = 0.0
    while time.monotonic() < end:
        began = time.monotonic()
        pool.call(time.sleep, 0.02)
        slowest = max(slowest, time.monotonic() - began)
    status = pool.status()
    assert status.counters["boots"] == boots
    assert [r.state for r in status.runners if r.state in ("ready", "booting")] == ["ready"]


def test_d4_nothing_is_left_of_an_idle_pool(make_pool: MakePool, until: Waits) -> None:
    """D4: min=0 and no work: no runner, and with the scheduler in the parent no process at all."""
    pool = make_pool(max=2, idle_shutdown_after=0.3, backend=LocalCluster)
    pid = pool.call(os.getpid)
    assert psutil.pid_exists(pid)
    until(lambda: not pool.status().runners, 5)
    assert not psutil.pid_exists(pid)
    assert psutil.Process().children(recursive=True) == []


@pytest.mark.usefixtures("backend")
def test_a6_closing_with_queued_and_running_calls(
    make_pool: MakePool, gate: Gate, until: Waits
) -> None:
    """A6: queued calls fail at once, running ones may end."""
    pool = make_pool(max=1, max_concurrency=1, shutdown_timeout=10)
    running = gate.submit(pool)
    until(running.mark.exists, 15)
    queued = gate.submit(pool)
    closer = threading.Thread(target=pool.close)
    closer.start()
    with pytest.raises(PoolClosed):
        queued.result(2)
    assert closer.is_alive()
    gate.open()
    assert running.result(5) > 0
    closer.join(10)
    assert not closer.is_alive()
    with pytest.raises(PoolClosed):
        pool.call(int)


@pytest.mark.usefixtures("backend")
def test_c9_hooks(make_pool: MakePool, gate: Gate, until: Waits) -> None:
    """C9: in the parent, not on an event loop, in order; an exception harms nothing."""
    seen: list[tuple[Any, ...]] = []

    def note(kind: str) -> Any:
        def hook(*args: Any) -> None:
            seen.append((kind, threading.current_thread().name, *args))

        return hook

    pool = make_pool(
        min=1,
        max=2,
        max_concurrency=1,
        idle_shutdown_after=0.3,
        on_grow_start=note("start"),
        on_grow_end=note("end"),
        on_shrink=note("shrink"),
    )
    assert seen == []  # the min group makes no news
    futures = [gate.submit(pool) for _ in range(2)]
    until(lambda: all(f.mark.exists() for f in futures), 15)
    gate.open()
    until(lambda: len(seen) == 3, 10)
    start, end, shrink = seen
    assert [start[0], end[0], shrink[0]] == ["start", "end", "shrink"]
    assert all("hook" in name for _, name, *_ in seen)
    assert start[2].name == pool.name
    assert start[2].count == 2
    assert end[2] == "ok"
    assert start[2].boot_id == end[3].boot_id == shrink[2].boot_id
    assert "idle" in shrink[2].reason


@pytest.mark.usefixtures("backend")
def test_c10_events_tell_why(make_pool: MakePool, gate: Gate, until: Waits) -> None:
    """C10: grow, hold, shrink, each with reason and figures."""
    pool = make_pool(max=1, max_concurrency=1, idle_shutdown_after=0.3)
    futures = [gate.submit(pool) for _ in range(2)]
    until(futures[0].mark.exists, 15)
    gate.open()
    for future in futures:
        future.result(5)
    until(lambda: not pool.status().runners, 5)
    events = pool.events()
    assert [event.action for event in events] == ["grow", "hold", "shrink"]
    assert all(event.reason and event.figures for event in events)
    assert events[-1].time == pytest.approx(time.time(), abs=5)

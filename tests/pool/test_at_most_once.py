"""A function starts once, on all paths on which Dask would start it again (F1, B2).

Each function leaves a line in a file when it starts: that, and nothing that the pool says, is how
starts are counted.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Nanny, Reschedule

from flame_dask import CallCancelled, CallTimeout, FlamePool, RunnerLost
from support import LOCAL, alive, pids, states, work

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("kills_runners")


LARGE = 3_000_000


def note(log: str) -> int:
    """Leave a line; return how many there are now."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    with open(log) as file:
        return len(file.readlines())


def make_bytes(log: str, size: int) -> bytes:
    """Return a result that stays on the runner until it is fetched."""
    note(log)
    return b"x" * size


def leave_until(log: str, last: int) -> int:
    """End the process at each start before the last one."""
    number = note(log)
    if number < last:
        os._exit(1)
    return number


def address_of(pool: FlamePool, pid: int) -> str:
    """The address of the runner that is this process."""
    [name] = [n for n, w in pool.cluster.workers.items() if w.process.pid == pid]
    [address] = [runner.address for runner in pool.status().runners if runner.id == name]
    assert address is not None
    return address


#: Two runners with room on both: Dask would find a place for what the other one has lost.
PAIR: dict[str, Any] = {"min": 2, "max": 2, "max_concurrency": 4, "placement": "pack"}


@pytest.fixture
def pair(make_pool: MakePool) -> FlamePool:
    return make_pool(**PAIR, backend=LOCAL)


@pytest.fixture
def pair_anywhere(make_pool: MakePool, backend: Any) -> FlamePool:
    """The same on each backend, for what the parent has a part in."""
    return make_pool(**PAIR, backend=backend)


# -- where Dask would start it again ---------------------------------------------------------------


def test_f1_a_runner_dies_under_its_call(
    pair_anywhere: FlamePool, tmp_path: Path, until: Until
) -> None:
    pair = pair_anywhere
    log, gate = tmp_path / "log", tmp_path / "gate"
    future = pair.submit(work, str(log), str(gate))
    until(lambda: pids(log))
    os.kill(pids(log)[0], signal.SIGKILL)
    with pytest.raises(RunnerLost):
        future.result(10)
    gate.touch()
    until(lambda: states(pair) == ["ready", "ready"], 20)
    assert pair.call(int) == 0
    assert len(pids(log)) == 1


class Fetching:
    """Holds back the fetching of large results, until it is let go."""

    def __init__(self, pool: FlamePool, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self._go = asyncio.Event()
        self._pool = pool
        fetch = pool.client.fetch

        async def late(key: str, *args: Any) -> Any:
            self.asked.append(key)
            await self._go.wait()
            return await fetch(key, *args)

        monkeypatch.setattr(pool.client, "fetch", late)

    def go(self) -> None:
        """Let all of them go on."""
        self._pool.loop.add_callback(self._go.set)


def test_f1_a_result_that_was_not_fetched(
    pair_anywhere: FlamePool, tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has been made, and its runner dies before it got away."""
    pair = pair_anywhere
    fetching = Fetching(pair, monkeypatch)
    log = tmp_path / "log"
    future = pair.submit(make_bytes, str(log), LARGE)
    until(lambda: fetching.asked)
    os.kill(pids(log)[0], signal.SIGKILL)
    until(lambda: pair.status().counters["runners_lost"] == 1)
    fetching.go()
    with pytest.raises(RunnerLost) as caught:
        future.result(10)
    assert caught.value.call == future.key
    until(lambda: states(pair) == ["ready", "ready"], 20)
    assert pair.call(int) == 0
    assert len(pids(log)) == 1


def test_f1_a_runner_dies_while_its_result_is_fetched(
    pair: FlamePool, tmp_path: Path, until: Until
) -> None:
    """Whoever is faster: the value is there, or the runner was lost."""
    for number in range(2):
        log = tmp_path / f"log{number}"
        until(lambda: states(pair) == ["ready", "ready"], 20)
        future = pair.submit(make_bytes, str(log), 30_000_000)
        until(lambda log=log: pids(log))
        os.kill(pids(log)[0], signal.SIGKILL)
        error = future.exception(10)
        if error is None:
            assert len(future.result()) == 30_000_000
        else:
            assert isinstance(error, RunnerLost)
        assert len(pids(log)) == 1


def test_f1_a_fetched_result_outlives_its_runner(
    pair: FlamePool, tmp_path: Path, until: Until
) -> None:
    log = tmp_path / "log"
    future = pair.submit(make_bytes, str(log), LARGE)
    until(future.done)
    os.kill(pids(log)[0], signal.SIGKILL)
    until(lambda: pair.status().counters["runners_lost"] == 1)
    assert len(future.result(10)) == LARGE
    assert len(pids(log)) == 1


def close_worker(dask_worker: Any) -> None:
    """Have a worker close in good order; it does not wait for that here."""
    dask_worker.loop.add_callback(dask_worker.close)


def test_f1_rescheduling_starts_nothing_anew(pair: FlamePool, tmp_path: Path, until: Until) -> None:
    """The worker closes, and tells the scheduler of what it runs."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    future = pair.submit(work, str(log), str(gate))
    until(lambda: pids(log))
    [pid] = pids(log)
    pair.client.run(close_worker, workers=[address_of(pair, pid)])
    with pytest.raises(RunnerLost):
        future.result(15)
    gate.touch()
    until(lambda: not alive(pid), 15)
    until(lambda: states(pair) == ["ready", "ready"], 20)
    assert pair.call(int) == 0
    assert len(pids(log)) == 1


def reschedule(dask_scheduler: Any) -> int:
    """Do what a scheduler does when a worker tells it that a task is to run once more."""
    tasks = [task for task in dask_scheduler.tasks.values() if task.state == "processing"]
    for task in tasks:
        dask_scheduler._reschedule(key=task.key, stimulus_id="test-reschedule")
    return len(tasks)


def test_f1_rescheduling_on_a_living_runner(pair: FlamePool, tmp_path: Path, until: Until) -> None:
    """There is room on it and on the other one, and the first run still goes on."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    future = pair.submit(work, str(log), str(gate))
    until(lambda: pids(log))
    assert pair.client.run_on_scheduler(reschedule) == 1
    with pytest.raises(RunnerLost):
        future.result(10)
    gate.touch()
    until(lambda: pair.status().leases == 0)
    for number in range(10):
        assert pair.call(abs, -number) == number
    assert len(pids(log)) == 1


def test_f1_retiring_starts_nothing_anew(pair: FlamePool, tmp_path: Path, until: Until) -> None:
    """Somebody uses Dask's own way of taking a worker away, which moves its tasks elsewhere."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    future = pair.submit(work, str(log), str(gate))
    until(lambda: pids(log))
    [pid] = pids(log)
    pair.client.retire_workers(workers=[address_of(pair, pid)], close_workers=True)
    gate.touch()
    error = future.exception(15)
    if error is None:
        assert future.result() == pid
    else:
        assert isinstance(error, RunnerLost)
    until(lambda: not alive(pid), 15)
    until(lambda: states(pair) == ["ready", "ready"], 20)
    assert pair.call(int) == 0
    assert len(pids(log)) == 1


def test_f1_a_runner_lives_once(make_pool: MakePool, tmp_path: Path, until: Until) -> None:
    """There is no nanny that would start its worker anew."""
    pool = make_pool(min=1, max=1, backend=LOCAL)
    [first] = pool.status().runners
    [member] = pool.cluster.workers.values()
    assert not isinstance(member, Nanny)
    pid = pool.call(os.getpid)
    assert psutil.Process(pid).ppid() == os.getpid()
    os.kill(pid, signal.SIGKILL)
    until(lambda: states(pool) == ["ready"] and pool.status().runners[0].id != first.id, 20)
    [second] = pool.status().runners
    assert second.address != first.address
    names = pool.client.run_on_scheduler(
        lambda dask_scheduler: [str(worker.name) for worker in dask_scheduler.workers.values()]
    )
    assert names == [second.id]


def test_f1_reschedule_is_an_exception_like_others(shared: FlamePool, tmp_path: Path) -> None:
    def again(log: str) -> None:
        note(log)
        raise Reschedule

    async def again_async(log: str) -> None:
        note(log)
        raise Reschedule

    for fn in (again, again_async):
        log = tmp_path / fn.__name__
        with pytest.raises(Reschedule):
            shared.call(fn, str(log), retries=3)
        assert shared.call(int) == 0
        assert len(pids(log)) == 1


def balance(dask_scheduler: Any) -> list[tuple[set[str], set[str]]]:
    """Let Dask steal work. Say of each task where it may run, as it was told and as it reads it."""
    dask_scheduler.extensions["stealing"].balance()
    tasks = [task for task in dask_scheduler.tasks.values() if task.state == "processing"]
    return [
        (task.worker_restrictions, {ws.address for ws in dask_scheduler.valid_workers(task)})
        for task in tasks
    ]


def test_f1_pinned_tasks_stay(pair: FlamePool, tmp_path: Path, until: Until) -> None:
    """One runner is full, the other one has nothing to do."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    futures = [pair.submit(work, str(log), str(gate)) for _ in range(4)]
    until(lambda: len(pids(log)) == 4)
    [pid] = set(pids(log))
    only = {address_of(pair, pid)}
    assert pair.client.run_on_scheduler(balance) == [(only, only)] * 4
    gate.touch()
    assert [future.result(10) for future in futures] == [pid] * 4
    assert len(pids(log)) == 4


# -- retries ---------------------------------------------------------------------------------------


@pytest.fixture
def isolated(make_pool: MakePool) -> FlamePool:
    """A runner that outlives the processes of its calls."""
    return make_pool(min=1, max=1, max_concurrency=4, isolation="process", backend=LOCAL)


def test_f1_retries_of_a_call_whose_process_dies(isolated: FlamePool, tmp_path: Path) -> None:
    """Never more than n+1 starts, and no more than it takes."""
    for retries, last, begun in ((2, 3, 3), (2, 2, 2), (5, 1, 1)):
        log = tmp_path / f"fine-{retries}-{last}"
        assert isolated.call(leave_until, str(log), last, retries=retries) == last
        assert len(pids(log)) == begun
    log = tmp_path / "hopeless"
    with pytest.raises(RunnerLost) as caught:
        isolated.call(leave_until, str(log), 100, retries=2)
    assert caught.value.cause == "exited"
    assert caught.value.exit_code == 1
    assert len(pids(log)) == 3
    assert len(set(pids(log))) == 3
    counters = isolated.status().counters
    assert (counters["retried"], counters["lost"], counters["runners_lost"]) == (5, 1, 0)


def test_f1_retries_of_a_call_whose_runner_dies(
    make_pool: MakePool, backend: Any, tmp_path: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=2)
    log, other_log, gate = tmp_path / "log", tmp_path / "other", tmp_path / "gate"
    once = pool.submit(work, str(other_log), str(gate))
    until(lambda: pids(other_log), 20)
    assert pool.call(leave_until, str(log), 2, retries=1) == 2
    with pytest.raises(RunnerLost):
        once.result(10)
    assert len(set(pids(log))) == 2
    assert len(pids(other_log)) == 1
    counters = pool.status().counters
    assert (counters["retried"], counters["lost"], counters["runners_lost"]) == (1, 1, 1)


def test_f1_retries_of_a_call_whose_result_was_not_fetched(
    make_pool: MakePool, tmp_path: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(min=1, max=1, backend=LOCAL)
    fetching = Fetching(pool, monkeypatch)
    log = tmp_path / "log"
    future = pool.submit(make_bytes, str(log), LARGE, retries=1)
    until(lambda: fetching.asked)
    os.kill(pids(log)[0], signal.SIGKILL)
    until(lambda: pool.status().counters["runners_lost"] == 1)
    fetching.go()
    assert len(future.result(20)) == LARGE
    assert len(pids(log)) == 2


def test_f1_retries_of_a_call_with_a_large_result(isolated: FlamePool, tmp_path: Path) -> None:
    """That of the second run is fetched, not that of the first, which has none."""

    def run(log: str, size: int) -> bytes:
        if note(log) == 1:
            os._exit(1)
        return b"y" * size

    log = tmp_path / "log"
    future = isolated.submit(run, str(log), LARGE, retries=1)
    assert future.result(10) == b"y" * LARGE
    assert isolated.call(len, future) == LARGE
    assert len(pids(log)) == 2


def test_f1_retries_are_not_for_errors_limits_and_cancelling(
    isolated: FlamePool, tmp_path: Path, until: Until
) -> None:
    def fail(log: str) -> None:
        note(log)
        raise ValueError("no")

    error, late, left = tmp_path / "error", tmp_path / "late", tmp_path / "left"
    gate = tmp_path / "gate"
    with pytest.raises(ValueError, match="no"):
        isolated.call(fail, str(error), retries=3)
    with pytest.raises(CallTimeout):
        isolated.call(work, str(late), str(gate), retries=3, timeout=0.5)
    future = isolated.submit(work, str(left), str(gate), retries=3)
    until(lambda: pids(left))
    future.cancel()
    with pytest.raises(CallCancelled):
        future.result(10)
    until(lambda: isolated.status().leases == 0)
    assert isolated.call(int) == 0
    assert [len(pids(log)) for log in (error, late, left)] == [1, 1, 1]
    assert isolated.status().counters["retried"] == 0


def test_f1_a_cancelled_call_is_not_started_anew(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """Its runner dies as it is being ended: that must not look like a loss to be made good."""
    pool = make_pool(max=1, backend=LOCAL)
    log = tmp_path / "log"
    future = pool.submit(_sleep, str(log), retries=3)
    until(lambda: pids(log), 20)
    future.cancel()
    os.kill(pids(log)[0], signal.SIGKILL)
    with pytest.raises(CallCancelled):
        future.result(10)
    until(lambda: not alive(pids(log)[0]) and pool.status().counters["runners_stopped"] == 1)
    assert pool.call(os.getpid) not in pids(log)
    assert len(pids(log)) == 1
    assert pool.status().counters["retried"] == 0


def _sleep(log: str) -> None:
    note(log)
    time.sleep(60)


def test_f1_late_news_of_an_earlier_run(isolated: FlamePool, tmp_path: Path, until: Until) -> None:
    """The first run fails once more, as a Dask task, when the second one is under way."""

    def run(log: str, gate: str) -> int:
        if note(log) == 1:
            os._exit(1)
        end = time.monotonic() + 30
        while time.monotonic() < end and not os.path.exists(gate):
            time.sleep(0.005)
        return os.getpid()

    log, gate = tmp_path / "log", tmp_path / "gate"
    future = isolated.submit(run, str(log), str(gate), retries=1)
    until(lambda: len(pids(log)) == 2)
    # These come and go by the same streams, behind whatever there is to hear of the first run.
    for number in range(20):
        assert isolated.call(abs, -number) == number
    assert not future.done()
    assert isolated.status().leases == 1
    gate.touch()
    assert future.result(10) == pids(log)[1]
    assert len(pids(log)) == 2
    until(lambda: isolated.status().leases == 0)


def test_f1_overlapping_runs(make_pool: MakePool, tmp_path: Path, until: Until) -> None:
    """The first run goes on, on a runner that was given up: it is ended, the second one is not."""
    pool = make_pool(max=1, max_concurrency=2, backend=LOCAL)
    log, gate = tmp_path / "log", tmp_path / "gate"
    future = pool.submit(work, str(log), str(gate), retries=1)
    until(lambda: pids(log), 20)
    [first] = pids(log)
    address = address_of(pool, first)

    async def cut(dask_scheduler: Any) -> None:
        dask_scheduler.stream_comms[address].abort()

    pool.client.run_on_scheduler(cut)
    until(lambda: len(pids(log)) == 2, 20)
    assert pids(log)[1] != first
    until(lambda: not alive(first), 15)
    assert pool.call(int) == 0
    assert not future.done()
    gate.touch()
    assert future.result(10) == pids(log)[1]
    assert len(pids(log)) == 2


def test_f1_retries_within_the_limit(isolated: FlamePool, tmp_path: Path) -> None:
    """``timeout`` bounds all runs together, so that no caller waits longer than it said (F3)."""

    def run(log: str) -> None:
        note(log)
        time.sleep(0.25)
        os._exit(1)

    log = tmp_path / "log"
    began = time.monotonic()
    with pytest.raises(CallTimeout):
        isolated.call(run, str(log), retries=100, timeout=1)
    assert time.monotonic() - began < 2
    assert 2 <= len(pids(log)) <= 5


def test_b2_identical_calls_are_different(isolated: FlamePool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    futures = [isolated.submit(note, str(log)) for _ in range(8)]
    for future in futures:
        future.result(10)
    assert len(pids(log)) == 8

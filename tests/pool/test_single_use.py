"""Runners for one call (D5)."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flame_dask import CallCancelled, FlamePool
from support import LOCAL, alive, states, wait_for_file

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]


def work(log: str, seconds: float) -> int:
    """Leave a line at the start and one at the end, each with the time of the machine's clock."""

    def note(what: str) -> None:
        with open(log, "a") as file:
            file.write(f"{what} {os.getpid()} {time.monotonic()}\n")

    note("start")
    time.sleep(seconds)
    note("end")
    return os.getpid()


def fail() -> None:
    raise ValueError(os.getpid())


class Note(NamedTuple):
    """What a call has left."""

    what: str
    pid: int
    at: float


def notes(log: Path) -> list[Note]:
    """All that calls have left, in the order of time."""
    parts = [line.split() for line in log.read_text().splitlines()]
    return sorted((Note(w, int(pid), float(at)) for w, pid, at in parts), key=lambda n: n.at)


def processes(pool: FlamePool) -> set[int]:
    """The processes of the pool's runners."""
    members = [getattr(w, "process", None) for w in list(pool.cluster.workers.values())]
    return {member.pid for member in members if member is not None}


class Census:
    """Counts again and again how many runners there are, and how many of their processes run."""

    def __init__(self, pool: FlamePool) -> None:
        self.runners: list[int] = []
        self.running: list[int] = []
        self._pool = pool
        self._seen: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count)

    def _count(self) -> None:
        while not self._over.wait(0.02):
            self._seen |= processes(self._pool)
            self.running.append(len(alive(*self._seen)))
            self.runners.append(len(self._pool.status().runners))

    def __enter__(self) -> Census:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.slow
def test_d5_c1_c3_each_call_has_a_runner_of_its_own(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """20 calls, and never more than 4 runners at once. Then ``min`` of them are there again."""
    pool = make_pool(min=2, max=4, max_concurrency=1, single_use=True, backend=LOCAL)
    log = tmp_path / "log"
    with Census(pool) as census:
        futures = [pool.submit(work, str(log), 0.05, queue_timeout=50) for _ in range(20)]
        pids = [future.result(50) for future in futures]
        until(lambda: states(pool) == ["ready", "ready"], 20)
    assert len(set(pids)) == 20
    assert max(census.runners) == 4
    assert max(census.running) <= 4
    level = most = 0
    for note in notes(log):
        level += 1 if note.what == "start" else -1
        most = max(most, level)
    assert most <= 4
    fresh = processes(pool)
    assert len(fresh) == 2
    assert fresh.isdisjoint(pids)
    until(lambda: not alive(*pids))
    counters = pool.status().counters
    assert (counters["started"], counters["ended"], counters["lost"]) == (20, 20, 0)
    assert counters["boots"] == 22
    assert counters["runners_lost"] == 0


def test_d5_no_call_starts_after_one_has_ended(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """Four at once on a runner, and others in the queue for each slot that becomes free."""
    pool = make_pool(max=2, max_concurrency=4, single_use=True, backend=LOCAL)
    log = tmp_path / "log"
    futures = [pool.submit(work, str(log), 0.2 + 0.1 * (i % 4)) for i in range(12)]
    pids = [future.result(30) for future in futures]
    ended: set[int] = set()
    for note in notes(log):
        if note.what == "end":
            ended.add(note.pid)
        else:
            assert note.pid not in ended
    assert max(Counter(pids).values()) <= 4
    until(lambda: pool.status().runners == ())  # min=0
    assert not alive(*pids)


def test_d5_the_other_calls_of_a_used_runner_finish(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    pool = make_pool(min=1, max=2, max_concurrency=4, single_use=True, backend=LOCAL)
    gate = tmp_path / "gate"
    long = pool.submit(wait_for_file, str(gate))
    until(lambda: pool.status().leases == 1)
    first = pool.call(os.getpid)
    until(lambda: "draining" in states(pool))
    # It has three free slots, and gets no call.
    second = pool.call(os.getpid)
    assert second != first
    assert not long.done()
    gate.touch()
    assert long.result(10) == first
    until(lambda: not alive(first) and not alive(second))
    until(lambda: states(pool) == ["ready"], 20)
    assert processes(pool).isdisjoint({first, second})


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_d5_failed_and_cancelled_calls_have_used_it_too(
    make_pool: MakePool, tmp_path: Path, until: Until, isolation: str
) -> None:
    pool = make_pool(min=1, max=2, single_use=True, isolation=isolation, backend=LOCAL)
    seen = processes(pool)
    with pytest.raises(ValueError):
        pool.call(fail)
    until(lambda: states(pool) == ["ready"] and processes(pool).isdisjoint(seen), 20)
    seen |= processes(pool)
    future = pool.submit(wait_for_file, str(tmp_path / "gate"))
    until(lambda: pool.status().leases == 1)
    future.cancel()
    with pytest.raises(CallCancelled):
        future.result(5)
    until(lambda: states(pool) == ["ready"] and processes(pool).isdisjoint(seen), 20)
    assert len(seen) == 2
    assert pool.status().counters["runners_lost"] == 0


def test_d5_a_queued_call_that_leaves_uses_nothing(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    pool = make_pool(min=1, max=1, max_concurrency=1, single_use=True, backend=LOCAL)
    gate = tmp_path / "gate"
    running = pool.submit(wait_for_file, str(gate))
    until(lambda: pool.status().leases == 1)
    queued = pool.submit(os.getpid)
    until(lambda: pool.status().waiters == 1)
    queued.cancel()
    until(lambda: pool.status().waiters == 0)
    gate.touch()
    used = running.result(10)
    until(lambda: states(pool) == ["ready"] and used not in processes(pool), 20)
    assert pool.status().counters["boots"] == 2


def test_d5_map_over_single_use_runners(make_pool: MakePool, until: Until) -> None:
    """The look-ahead of a map, and the queue, wait for new runners."""
    pool = make_pool(max=3, max_concurrency=2, single_use=True, backend=LOCAL)
    pids = list(pool.map(lambda _: os.getpid(), range(6)))
    assert max(Counter(pids).values()) <= 2
    until(lambda: not alive(*pids))

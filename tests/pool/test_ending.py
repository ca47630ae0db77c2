"""How work ends that is out of time, or that nobody wants any more (E2-E4)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed.deploy.subprocess import SubprocessCluster

from flame_dask import CallCancelled, CallTimeout, FlamePool, RunnerLost
from support import (
    LOCAL,
    QUIET,
    alive,
    all_children_end,
    lines,
    pids,
    runner_pid,
    states,
    wait_for_file,
    work,
)

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("processes_end")

#: Seconds that a call gets here, and by how many its caller may hear of the end later.
LIMIT = 0.5
LATE = 0.5

#: Seconds between two rungs of the ladder, in these tests.
GRACE = "0.3s"

#: A library that is busy on all cores would hold up the test as well.
ONE_CORE = {"OPENBLAS_NUM_THREADS": "1"}

REMOTE = (SubprocessCluster, QUIET)


# -- what calls do -------------------------------------------------------------------------------


def note(log: str, line: object = None) -> None:
    """Leave a line: the process that the call runs in, or what is given."""
    with open(log, "a") as file:
        file.write(f"{os.getpid() if line is None else line}\n")


def sleep(log: str) -> None:
    """Hang in a call of the system, without the interpreter's lock."""
    note(log)
    time.sleep(60)


def loop(log: str) -> None:
    """Never leave the interpreter."""
    note(log)
    try:
        while True:
            pass
    finally:
        note(log, "over")


def run(log: str) -> None:
    """Wait for a program which has started another one; tell the pids of both."""
    note(log)
    script = 'sleep 60 & echo "$!" >> "$0"; echo "$$" >> "$0"; wait'
    subprocess.run(["sh", "-c", script, log], check=False)


def crunch(log: str) -> None:
    """Be in a C library for a minute or more, in one call."""
    data = np.ones(2_000_000)
    note(log)
    np.correlate(data, data, "full")


async def nap(log: str) -> None:
    note(log)
    try:
        await asyncio.sleep(60)
    finally:
        note(log, "over")


#: Each with the number of lines that it leaves when it is under way.
WORKS: dict[str, tuple[Callable[[str], Any], int]] = {
    "sleep": (sleep, 1),
    "loop": (loop, 1),
    "run": (run, 3),
    "crunch": (crunch, 1),
    "nap": (nap, 1),
}

#: What can't be ended in a thread.
STUCK = {"sleep", "crunch"}

#: What the events of the pool say about it, by isolation.
RUNGS = {
    "process": dict.fromkeys(WORKS, "to its processes"),
    "thread": {
        "sleep": "can't be ended",
        "loop": "an exception in its thread",
        "run": "to its processes",
        "crunch": "can't be ended",
        "nap": "cancelling its coroutine",
    },
}


def threads_in(*names: str) -> list[str]:
    """Which of the functions are being run by threads of this process."""
    found = []
    for frame in sys._current_frames().values():
        at: Any = frame
        while at is not None:
            if at.f_code.co_name in names and at.f_code.co_filename.endswith("test_ending.py"):
                found.append(at.f_code.co_name)
            at = at.f_back
    return found


def reasons(pool: FlamePool, call: str) -> str:
    """What the pool's events say about a call."""
    return "; ".join(event.reason for event in pool.events() if call in event.reason)


# -- five kinds of work, two of isolation, two ways of ending --------------------------------------


@pytest.fixture(scope="module", autouse=True)
def short_grace() -> Iterator[None]:
    with dask.config.set({"flame.terminate-grace": GRACE}):
        yield


@pytest.fixture(scope="module")
def pools(fast: dict[str, Any], until: Until) -> Iterator[Callable[[str, Any], FlamePool]]:
    """Pools with one runner that may be replaced, for many tests: ``pools(isolation, backend)``.

    Where the scheduler is decides how an order gets to the runner, not how work ends: so each way
    of ending is tried on one backend.
    """
    opened: dict[str, FlamePool] = {}
    with all_children_end(until), contextlib.ExitStack() as stack:

        def pool(isolation: str, backend: Any) -> FlamePool:
            name = f"{isolation}-{backend[0].__name__}"
            if name not in opened:
                options = {**fast, "backend": backend, "isolation": isolation, "env": ONE_CORE}
                made = FlamePool(name, min=1, max=2, max_concurrency=4, **options)
                opened[name] = stack.enter_context(made)
                made.call(int)
            return opened[name]

        yield pool
    opened.clear()


@pytest.mark.parametrize("work", list(WORKS))
@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize("way", ["timeout", "cancel"])
def test_e2_e3_e4_the_work_ends(
    pools: Callable[[str, Any], FlamePool],
    tmp_path: Path,
    until: Until,
    way: str,
    isolation: str,
    work: str,
) -> None:
    """Its caller hears in time, the work goes with all that it has started, the others stay."""
    pool = pools(isolation, LOCAL if way == "timeout" else REMOTE)
    until(lambda: states(pool) == ["ready"] and pool.status().leases == 0, 20)
    before = runner_pid(pool)
    fn, count = WORKS[work]
    log, gate = tmp_path / "log", tmp_path / "gate"
    neighbour = pool.submit(wait_for_file, str(gate))
    until(lambda: pool.status().leases == 1)
    began = time.monotonic()
    if way == "timeout":
        future = pool.submit(fn, str(log), timeout=LIMIT)
        with pytest.raises(CallTimeout) as caught:
            future.result(10)
        assert LIMIT * 0.9 < time.monotonic() - began < LIMIT + LATE
        assert caught.value.phase == "running"
        assert caught.value.call == future.key
        assert caught.value.running > 0
        assert len(lines(log)) >= count, "it had not started: nothing is shown"
    else:
        future = pool.submit(fn, str(log))
        until(lambda: len(lines(log)) >= count)
        began = time.monotonic()
        future.cancel()
        with pytest.raises(CallCancelled):
            future.result(10)
        assert time.monotonic() - began < LATE
    stuck = isolation == "thread" and work in STUCK
    if stuck:
        # E3: the runner gets no new work, its other call goes on, another runner takes over.
        until(lambda: states(pool) == ["draining", "ready"], 20)
        assert runner_pid(pool) != before
        assert alive(before) == [before]
        assert pool.call(int) == 0
        assert not neighbour.done()
    else:
        started = [pid for pid in pids(log) if pid != before]
        assert bool(started) == (isolation == "process" or work == "run")
        until(lambda: not alive(*started), 5)
        until(lambda: pool.status().leases == 1, 5)  # that of the neighbour
        assert runner_pid(pool) == before
        if isolation == "thread":
            assert pool.call(threads_in, "loop", "run") == []
            if work in ("loop", "nap"):
                assert lines(log)[-1] == "over"
        assert states(pool) == ["ready"]
        assert pool.call(int) == 0
    assert RUNGS[isolation][work] in reasons(pool, str(future.key))
    gate.touch()
    assert (neighbour.result(10) == before) == (isolation == "thread")
    until(lambda: states(pool) == ["ready"], 20)
    if stuck:
        until(lambda: not alive(*pids(log)))
    until(lambda: pool.status().leases == 0)


def test_e2_of_call(pools: Callable[[str, Any], FlamePool], tmp_path: Path, until: Until) -> None:
    pool = pools("process", LOCAL)
    log = tmp_path / "log"
    began = time.monotonic()
    with pytest.raises(CallTimeout) as caught:
        pool.call(sleep, str(log), timeout=LIMIT)
    assert time.monotonic() - began < LIMIT + LATE
    assert caught.value.phase == "running"
    assert caught.value.limit == LIMIT
    until(lambda: not alive(*pids(log)), 5)


def test_e1_the_pools_own_limit(make_pool: MakePool, tmp_path: Path, until: Until) -> None:
    """``timeout`` of the pool bounds the running alone; the boot is not part of it."""
    pool = make_pool(max=1, timeout=LIMIT, isolation="process", backend=LOCAL)
    log = tmp_path / "log"
    with pytest.raises(CallTimeout) as caught:
        pool.call(sleep, str(log))
    assert caught.value.phase == "running"
    assert caught.value.running == pytest.approx(LIMIT, abs=LATE)
    until(lambda: not alive(*pids(log)), 5)
    assert pool.call(int) == 0


# -- the ladder ----------------------------------------------------------------------------------


def wait_for_a_stubborn_program(log: str, myself: bool) -> None:
    """Run a program that SIGTERM does not end; be as stubborn, in a process of one's own."""
    if myself:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note(log)
    script = 'trap "" TERM; echo "$$" >> "$0"; while :; do sleep 0.1; done'
    subprocess.run(["sh", "-c", script, log], check=False)


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_e3_sigkill_after_the_grace(
    pools: Callable[[str, Any], FlamePool], tmp_path: Path, until: Until, isolation: str
) -> None:
    pool = pools(isolation, LOCAL)
    until(lambda: states(pool) == ["ready"], 20)
    before = runner_pid(pool)
    log = tmp_path / "log"
    future = pool.submit(wait_for_a_stubborn_program, str(log), isolation == "process")
    until(lambda: len(pids(log)) == 2)
    future.cancel()
    until(lambda: not alive(*(pid for pid in pids(log) if pid != before)), 5)
    until(lambda: pool.status().leases == 0, 5)
    until(lambda: "SIGKILL to its processes" in reasons(pool, str(future.key)), 2)
    assert pool.call(int) == 0
    assert runner_pid(pool) == before


def test_e3_children_of_a_call_have_the_grace_too(
    pools: Callable[[str, Any], FlamePool], tmp_path: Path, until: Until
) -> None:
    """The process of the call goes with SIGTERM, and frees its slot; its child needs SIGKILL."""
    pool = pools("process", LOCAL)
    log = tmp_path / "log"
    future = pool.submit(wait_for_a_stubborn_program, str(log), False)
    until(lambda: len(pids(log)) == 2)
    future.cancel()
    until(lambda: not alive(*pids(log)), 5)
    assert pool.call(int) == 0


def swallow_once(log: str) -> None:
    note(log)
    for _ in range(2):
        try:
            while True:
                time.sleep(0.001)
        except BaseException:
            note(log, "swallowed")
    while True:
        time.sleep(0.001)


async def swallow_once_async(log: str) -> None:
    note(log)
    for _ in range(2):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            note(log, "swallowed")
    await asyncio.sleep(60)


@pytest.mark.parametrize("fn", [swallow_once, swallow_once_async])
def test_e3_what_swallows_it_is_told_again(
    pools: Callable[[str, Any], FlamePool],
    tmp_path: Path,
    until: Until,
    fn: Callable[[str], Any],
) -> None:
    pool = pools("thread", LOCAL)
    until(lambda: states(pool) == ["ready"], 20)
    before = runner_pid(pool)
    log = tmp_path / "log"
    future = pool.submit(fn, str(log))
    until(lambda: lines(log))
    future.cancel()
    until(lambda: pool.status().leases == 0, 5)
    assert lines(log)[1:] == ["swallowed", "swallowed"]
    assert runner_pid(pool) == before
    assert pool.call(os.getpid) == before


def swallow_for_ever(log: str) -> None:
    note(log)
    while True:
        with contextlib.suppress(BaseException):
            while True:
                time.sleep(0.001)


def test_e3_what_swallows_all_costs_its_runner(
    pools: Callable[[str, Any], FlamePool], tmp_path: Path, until: Until
) -> None:
    pool = pools("thread", LOCAL)
    until(lambda: states(pool) == ["ready"], 20)
    log = tmp_path / "log"
    future = pool.submit(swallow_for_ever, str(log), timeout=LIMIT)
    with pytest.raises(CallTimeout):
        future.result(10)
    until(lambda: not alive(*pids(log)), 10)
    assert "can't be ended" in reasons(pool, str(future.key))
    assert pool.call(os.getpid) not in pids(log)
    until(lambda: states(pool) == ["ready"], 20)


def hold_the_lock(log: str) -> None:
    """Stop the whole interpreter of the runner, its event loop too."""
    note(log)
    sum(itertools.repeat(1, 10**12))


def test_e3_a_call_that_holds_the_interpreters_lock(
    pools: Callable[[str, Any], FlamePool], tmp_path: Path, until: Until
) -> None:
    """Nothing on the runner can act any more; the pool can."""
    pool = pools("thread", LOCAL)
    until(lambda: states(pool) == ["ready"], 20)
    log = tmp_path / "log"
    began = time.monotonic()
    with pytest.raises(CallTimeout) as caught:
        pool.call(hold_the_lock, str(log), timeout=LIMIT)
    assert time.monotonic() - began < LIMIT + LATE
    assert caught.value.phase == "running"
    until(lambda: not alive(*pids(log)), 10)
    assert len(pids(log)) == 1
    assert pool.call(int) == 0
    until(lambda: states(pool) == ["ready"], 20)


def test_e3_the_other_calls_of_a_stuck_one_have_shutdown_timeout(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """Then they are lost with their runner, which has to go."""
    pool = make_pool(max=1, max_concurrency=2, shutdown_timeout=0.5, backend=LOCAL)
    log, gate = tmp_path / "log", tmp_path / "gate"
    other = pool.submit(wait_for_file, str(gate))
    future = pool.submit(sleep, str(log))
    until(lambda: lines(log), 20)
    future.cancel()
    with pytest.raises(RunnerLost) as caught:
        other.result(10)
    assert caught.value.cause == "preempted"
    until(lambda: not alive(*pids(log)), 5)
    # C3: there was no room for another one before (C1).
    assert pool.call(os.getpid) not in pids(log)


def test_e3_no_other_call_is_hit(
    pools: Callable[[str, Any], FlamePool], tmp_path: Path, until: Until
) -> None:
    """Calls are cancelled as they end, or just before: their threads go on to the next ones."""

    def work(seconds: float, value: int) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return value

    pool = pools("thread", LOCAL)
    until(lambda: states(pool) == ["ready"], 20)
    before = runner_pid(pool)
    dice = random.Random(3)
    kept = []
    for number in range(150):
        doomed = pool.submit(work, 0.004, -1)
        kept.append(pool.submit(work, 0.001, number))
        pause = time.monotonic() + dice.uniform(0.002, 0.009)
        while time.monotonic() < pause:
            pass
        doomed.cancel()
    assert [future.result(10) for future in kept] == list(range(150))
    until(lambda: pool.status().leases == 0)
    assert pool.call(os.getpid) == before


def test_e3_threads_of_a_call_go_with_its_process(
    pools: Callable[[str, Any], FlamePool], tmp_path: Path, until: Until
) -> None:

    def start(log: str) -> None:
        import threading

        note(log)
        thread = threading.Thread(target=time.sleep, args=(60,))
        thread.start()
        thread.join()

    pool = pools("process", LOCAL)
    log = tmp_path / "log"
    future = pool.submit(start, str(log))
    until(lambda: lines(log))
    future.cancel()
    until(lambda: not alive(*pids(log)), 5)
    until(lambda: pool.status().leases == 0)


# -- who ends it ---------------------------------------------------------------------------------


def test_e2_the_runner_keeps_the_deadline_itself(
    pools: Callable[[str, Any], FlamePool], tmp_path: Path, until: Until
) -> None:
    """The host that would have ordered it is frozen."""
    pool = pools("process", REMOTE)
    until(lambda: states(pool) == ["ready"] and pool.status().leases == 0, 20)
    log = tmp_path / "log"
    future = pool.submit(sleep, str(log), timeout=LIMIT)
    until(lambda: pids(log))
    host = pool.cluster.scheduler.process.pid
    os.kill(host, signal.SIGSTOP)
    try:
        until(lambda: not alive(*pids(log)), 5)
    finally:
        os.kill(host, signal.SIGCONT)
    with pytest.raises(CallTimeout) as caught:
        future.result(10)
    assert caught.value.phase == "running"
    assert pool.call(int) == 0


def test_e3_a_frozen_runner_is_replaced(
    pools: Callable[[str, Any], FlamePool], tmp_path: Path, until: Until
) -> None:
    """F3: its call ends at its deadline, and the pool does not wait for it."""
    pool = pools("thread", REMOTE)
    until(lambda: states(pool) == ["ready"] and pool.status().leases == 0, 20)
    log = tmp_path / "log"
    future = pool.submit(loop, str(log), timeout=LIMIT)
    until(lambda: pids(log))
    [frozen] = pids(log)
    os.kill(frozen, signal.SIGSTOP)
    with pytest.raises(CallTimeout):
        future.result(LIMIT + 2)
    until(lambda: not alive(frozen), 10)
    assert pool.call(os.getpid) != frozen
    until(lambda: states(pool) == ["ready"], 20)


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_e4_a_cancelled_awaiting_task(
    fast: dict[str, Any], tmp_path: Path, until: Until, isolation: str
) -> None:
    """Of a call, and of a future: the work on the runner is gone."""
    first, second = tmp_path / "first", tmp_path / "second"

    async def begun(log: Path) -> None:
        async with asyncio.timeout(20):
            while not lines(log):
                await asyncio.sleep(0.005)

    async def idle(pool: FlamePool) -> None:
        async with asyncio.timeout(5):
            while (await pool.status()).leases:
                await asyncio.sleep(0.005)

    async def main() -> None:
        options = {**fast, "backend": LOCAL, "isolation": isolation, "asynchronous": True}
        async with FlamePool("async", max=1, max_concurrency=2, **options) as pool:
            call = asyncio.ensure_future(pool.call(loop, str(first)))
            await begun(first)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await idle(pool)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(LIMIT):
                    await pool.call(nap, str(second))
            await idle(pool)
            if isolation == "process":
                assert not alive(*pids(first), *pids(second))
            else:
                assert (lines(first)[-1], lines(second)[-1]) == ("over", "over")
            assert await pool.call(int) == 0
            assert (await pool.status()).counters["boots"] == 1

    asyncio.run(main())


def test_e3_the_slots_of_ended_calls_are_all_there(
    pools: Callable[[str, Any], FlamePool], tmp_path: Path, until: Until
) -> None:
    """After many endings four calls still run at once on one runner."""
    pool = pools("process", LOCAL)
    until(lambda: states(pool) == ["ready"] and pool.status().leases == 0, 20)
    before = runner_pid(pool)
    for number in range(3):
        log = tmp_path / f"log{number}"
        futures = [pool.submit(sleep, str(log)) for _ in range(4)]
        until(lambda log=log: len(pids(log)) == 4)
        for future in futures:
            future.cancel()
        until(lambda log=log: not alive(*pids(log)), 5)
        until(lambda: pool.status().leases == 0, 5)
    assert len(pool.status().runners) == 1
    log, gate = tmp_path / "log", tmp_path / "gate"
    futures = [pool.submit(work, str(log), str(gate)) for _ in range(4)]
    until(lambda: len(pids(log)) == 4)
    gate.touch()
    assert {future.result(10) for future in futures} == set(pids(log))
    assert len(set(pids(log))) == 4
    assert runner_pid(pool) == before


def test_e4_a_call_that_has_ended_can_be_cancelled_without_effect(
    pools: Callable[[str, Any], FlamePool],
) -> None:
    pool = pools("process", LOCAL)
    future = pool.submit(pow, 2, 3)
    assert future.result(10) == 8
    future.cancel()
    assert pool.call(int) == 0

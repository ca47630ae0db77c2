"""How a pool grows and shrinks (A5, C1-C5, D1, D3, D4)."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import psutil
import pytest

from flame_dask import CallTimeout, FlamePool, PoolFuture
from support import on_both, on_local, states, wait_for_file

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def traces(pool: FlamePool, key: str) -> dict[str, bool]:
    """Where anything of a call is left: on the scheduler, with the host, desk or client."""

    def look(dask_scheduler: Any) -> dict[str, bool]:
        host = dask_scheduler.plugins["flame"]
        return {
            "scheduler": key in dask_scheduler.tasks,
            "host": key in host.calls,
            "core": key in host.core.calls or key in host.core.queue,
        }

    found: dict[str, bool] = pool.client.run_on_scheduler(look)
    found["desk"] = key in pool._desk._open
    found["client"] = key in pool.client.futures or key in pool.client.refcount
    return found


@pytest.mark.slow
def test_story_of_one_and_two_runners(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    """min=1, max=2, max_concurrency=2: A5, C1, C2, C4, D1, D3, E1 and E2 in one go."""
    pool = make_pool(min=1, max=2, max_concurrency=2, idle_shutdown_after=0.5)
    # A5: it returns when the first runner is there.
    [first] = pool.status().runners
    assert (first.state, first.kind) == ("ready", "min")
    assert first.address is not None

    # Two calls have room on it.
    futures = [pool.submit(wait_for_file, str(gate)) for _ in range(2)]
    until(lambda: pool.status().leases == 2)
    assert len(pool.status().runners) == 1
    # C2: the third boots the second runner, at once.
    futures.append(pool.submit(wait_for_file, str(gate)))
    until(lambda: len(pool.status().runners) == 2, 0.5)
    futures.append(pool.submit(wait_for_file, str(gate)))
    until(lambda: states(pool) == ["ready", "ready"])
    until(lambda: pool.status().leases == 4)
    # C1, C4: the fifth and the sixth wait.
    futures += [pool.submit(wait_for_file, str(gate)) for _ in range(2)]
    until(lambda: pool.status().waiters == 2)
    assert (pool.status().leases, len(pool.status().runners)) == (4, 2)

    # E2: one that does not want to wait.
    began = time.monotonic()
    with pytest.raises(CallTimeout) as caught:
        pool.call(nap, 0, timeout=0.1)
    assert time.monotonic() - began < 0.3
    assert caught.value.phase == "queued"
    assert caught.value.queued == pytest.approx(0.1, abs=0.1)
    assert (caught.value.running, caught.value.booting) == (0, 0)
    assert caught.value.limit == 0.1
    assert caught.value.call is not None
    assert not any(traces(pool, caught.value.call).values())
    assert pool.status().waiters == 2

    gate.touch()
    pids = {future.result(20) for future in futures}
    assert len(pids) == 2
    # D1, D3: the second runner goes, the first one stays.
    until(lambda: len(pool.status().runners) == 1)
    assert pool.status().runners[0].id == first.id
    assert pool.status().runners[0].state == "ready"
    assert len(pool.cluster.workers) == 1
    assert [event.action for event in pool.events()].count("grow") == 2
    assert pool.status().counters["expired"] == 1
    assert pool.call(nap, 0) in pids


def test_e2_a_queued_submit_that_times_out_leaves_no_trace(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=1)
    running = pool.submit(wait_for_file, str(gate))
    until(lambda: pool.status().leases == 1)
    future = pool.submit(nap, 0, timeout=0.1)
    key = future.key
    assert isinstance(future.exception(timeout=5), CallTimeout)
    with pytest.raises(CallTimeout, match="queued"):
        future.result()
    del future
    until(lambda: not any(traces(pool, key).values()))
    gate.touch()
    running.result(10)


def test_c2_two_calls_at_once_share_one_runner(make_pool: MakePool, tmp_path: Path) -> None:
    """On an empty pool min=0, max=1, max_concurrency=2, side by side."""
    pool = make_pool(max=1, max_concurrency=2)
    assert pool.status().runners == ()

    def meet(mine: str, other: str) -> int:
        Path(mine).touch()
        end = time.monotonic() + 10
        while not Path(other).exists():
            if time.monotonic() > end:
                raise TimeoutError("not side by side")
            time.sleep(0.005)
        return os.getpid()

    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    futures = [pool.submit(meet, one, two), pool.submit(meet, two, one)]
    assert len({future.result(20) for future in futures}) == 1
    assert pool.status().counters["boots"] == 1


@pytest.mark.slow
def test_b1_fifty_calls_at_once_on_one_runner(make_pool: MakePool) -> None:
    """max_concurrency=50, whatever the machine's core count."""
    pool = make_pool(min=1, max=1, max_concurrency=50)
    pool.call(nap, 0)
    took = []
    for _ in range(2):  # on a busy machine, once is enough
        began = time.monotonic()
        futures = [pool.submit(nap, 1.0) for _ in range(50)]
        pids = {future.result(20) for future in futures}
        took.append(time.monotonic() - began)
        assert len(pids) == 1
        if took[-1] < 2.5:
            break
    assert min(took) < 2.5


def test_b1_fifty_coroutines_at_once_on_one_runner(make_pool: MakePool) -> None:
    async def doze() -> None:
        import asyncio

        await asyncio.sleep(0.5)

    pool = make_pool(min=1, max=1, max_concurrency=50)
    began = time.monotonic()
    distributed.wait([pool.submit(doze) for _ in range(50)])
    assert time.monotonic() - began < 5  # 25 s one after the other


@pytest.mark.slow
def test_a5_min_runners_boot_at_the_same_time(make_pool: MakePool) -> None:
    pool = make_pool(min=3, max=3)
    assert states(pool) == ["ready"] * 3
    grown = [event for event in pool.events() if event.action == "grow"]
    assert [event.reason[:6] for event in grown] == ["3 more"]
    assert {runner.kind for runner in pool.status().runners} == {"min"}
    assert pool.status().wanted == 3


def test_d4_min_0_and_no_work(make_pool: MakePool, backend: Any, until: Until) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    pool = make_pool(max=2, idle_shutdown_after=0.2)
    assert pool.status().runners == ()
    opened = {child.pid for child in psutil.Process().children(recursive=True)} - before
    assert pool.call(nap, 0) not in opened
    until(lambda: pool.status().runners == ())
    until(
        lambda: (
            {child.pid for child in psutil.Process().children(recursive=True)} - before == opened
        )
    )
    if isinstance(pool.cluster.scheduler, distributed.Scheduler):
        assert opened == set()  # the scheduler is in this process: nothing at all runs elsewhere
    assert pool.cluster.workers == {}
    assert pool.cluster.worker_spec == {}
    # And it comes back.
    assert pool.call(nap, 0)
    assert pool.status().counters["boots"] == 2


def test_d1_the_idle_clock_starts_anew_with_each_lease(make_pool: MakePool, until: Until) -> None:
    pool = make_pool(max=1, idle_shutdown_after=1.0)
    pids = set()
    began = time.monotonic()
    while time.monotonic() - began < 2.0:
        pids.add(pool.call(nap, 0.05))
    assert len(pids) == 1
    assert pool.status().runners[0].idle < 1.0
    until(lambda: pool.status().runners == ())


def test_d1_min_runners_may_go_too(make_pool: MakePool, until: Until) -> None:
    pool = make_pool(min=1, max=1, min_idle_shutdown_after=0.2)
    until(lambda: pool.status().runners == ())
    assert pool.call(nap, 0)


def test_c2_buffer(make_pool: MakePool, until: Until) -> None:
    pool = make_pool(max=2, max_concurrency=1, buffer=1)
    until(lambda: states(pool) == ["ready"])
    pool.call(nap, 0)
    until(lambda: states(pool) == ["ready", "ready"] or pool.status().wanted == 1)


@pytest.mark.parametrize(
    ("backend", "placement"), [("local", "spread"), ("subprocess", "pack")], indirect=["backend"]
)
def test_c5_placement(
    make_pool: MakePool, backend: Any, gate: Path, until: Until, placement: str
) -> None:
    pool = make_pool(min=2, max=2, max_concurrency=4, placement=placement)
    futures = []
    for n in range(1, 4):
        futures.append(pool.submit(wait_for_file, str(gate)))
        until(lambda n=n: pool.status().leases == n)
    leases = sorted(runner.leases for runner in pool.status().runners)
    assert leases == ([1, 2] if placement == "spread" else [0, 3])
    gate.touch()
    distributed.wait(futures)


@on_local
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_c5_a_spike_and_then_a_trickle(make_pool: MakePool, backend: Any, until: Until) -> None:
    """8 runners, then work for one: 1 is left within three idle_shutdown_after."""
    idle = 2.0
    pool = make_pool(max=8, max_concurrency=1, idle_shutdown_after=idle, boot_timeout=60)
    spike = [pool.submit(nap, 0.5, timeout=60) for _ in range(8)]
    until(lambda: states(pool) == ["ready"] * 8, 60)
    distributed.wait(spike)
    boots = pool.status().counters["boots"]
    began = time.monotonic()
    waits = []
    while len(pool.status().runners) > 1:
        assert time.monotonic() - began < 3 * idle
        sent = time.monotonic()
        pool.call(nap, 0.05)
        waits.append(time.monotonic() - sent)
    for _ in range(10):
        pool.call(nap, 0.05)
    status = pool.status()
    assert states(pool) == ["ready"]
    assert status.counters["boots"] == boots  # no call waited for a boot
    assert status.counters["lost"] == 0
    assert max(waits) < idle


def test_d3_no_call_is_lost_while_a_pool_breathes(
    make_pool: MakePool, backend: Any, tmp_path: Path
) -> None:
    """Calls come about when runners go: each is done, once."""
    pool = make_pool(max=2, max_concurrency=1, idle_shutdown_after=0.05)

    def note(i: int, path: str) -> int:
        with open(path, "a") as file:
            file.write(f"{i}\n")
        return i

    log = tmp_path / "log"
    sent = 0
    while pool.status().counters["boots"] < 5:
        assert pool.call(note, sent, str(log)) == sent
        sent += 1
        pause = threading.Event()
        pause.wait(0.03 * (sent % 4))  # sometimes just before, sometimes just after the end
    assert [int(line) for line in log.read_text().split()] == list(range(sent))


def test_c4_waiters_are_served_in_order_and_by_priority(
    make_pool: MakePool, backend: Any, gate: Path, tmp_path: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=1)
    log = tmp_path / "log"

    def note(text: str, path: str) -> None:
        with open(path, "a") as file:
            file.write(text)

    first = pool.submit(wait_for_file, str(gate))
    until(lambda: pool.status().leases == 1)
    queued: list[PoolFuture[None]] = []
    for text, priority in (("a", 0), ("b", 0), ("c", 5), ("d", -1), ("e", 5)):
        queued.append(pool.submit(note, text, str(log), priority=priority))
    until(lambda: pool.status().waiters == 5)
    gate.touch()
    distributed.wait([first, *queued])
    assert log.read_text() == "ceabd"


@on_local
def test_c4_a_gone_waiter_costs_nothing(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=1)
    first = pool.submit(wait_for_file, str(gate))
    until(lambda: pool.status().leases == 1)
    queued = deque(pool.submit(nap, 5) for _ in range(20))
    last = pool.submit(nap, 0)
    until(lambda: pool.status().waiters == 21)
    queued.clear()
    until(lambda: pool.status().waiters == 1)
    gate.touch()
    last.result(4)
    first.result(1)


@on_local
def test_e2_a_waiter_for_a_boot_says_booting(make_pool: MakePool, backend: Any) -> None:
    pool = make_pool(max=1)
    with pytest.raises(CallTimeout) as caught:
        pool.call(nap, 0, timeout=0.05)
    assert caught.value.phase == "booting"
    assert caught.value.booting > 0
    assert caught.value.boot_error is None
    assert pool.call(nap, 0)


@on_both("how", ["timeout"], local=["queue_timeout"])
def test_e1_limits_of_the_pool(
    make_pool: MakePool, backend: Any, gate: Path, until: Until, how: str
) -> None:
    """Without a limit of its own, a call has the two of the pool, one after the other."""
    pool = make_pool(min=1, max=1, max_concurrency=1, timeout=0.4, queue_timeout=0.2)
    if how == "timeout":
        with pytest.raises(CallTimeout) as caught:
            pool.call(wait_for_file, str(gate))
        assert (caught.value.phase, caught.value.limit) == ("running", 0.4)
        assert caught.value.running == pytest.approx(0.4, abs=0.2)
    else:
        running = pool.submit(wait_for_file, str(gate), timeout=20)
        until(lambda: pool.status().leases == 1)
        with pytest.raises(CallTimeout) as caught:
            pool.call(nap, 0)
        assert (caught.value.phase, caught.value.limit) == ("queued", 0.2)
        gate.touch()
        running.result(10)
    gate.touch()


@on_local
def test_e1_a_limit_of_its_own_bounds_all(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    pool = make_pool(min=1, max=1, max_concurrency=1, timeout=0.1)
    began = time.monotonic()
    assert pool.call(nap, 0.3, timeout=10)
    with pytest.raises(CallTimeout) as caught:
        pool.call(nap, 1.0, timeout=0.4)
    assert (caught.value.phase, caught.value.limit) == ("running", 0.4)
    assert time.monotonic() - began < 5


@on_local
def test_e1_the_slot_stays_taken_until_the_function_has_ended(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    """As long as a thread can't be ended, no other call may be put beside it (E3)."""
    pool = make_pool(min=1, max=1, max_concurrency=1)
    with pytest.raises(CallTimeout):
        pool.call(time.sleep, 1, timeout=0.2)  # it ends by itself, within the grace
    assert pool.status().leases == 1
    later = pool.submit(nap, 0)
    until(lambda: pool.status().waiters == 1)
    later.result(10)
    until(lambda: pool.status().leases == 0)
    assert pool.status().counters["boots"] == 1


def test_e1_waiting_for_an_argument_counts_for_the_calls_own_limit(
    make_pool: MakePool, backend: Any, gate: Path
) -> None:
    pool = make_pool(min=1, max=1, max_concurrency=2)
    late = pool.submit(wait_for_file, str(gate))
    began = time.monotonic()
    with pytest.raises(CallTimeout) as caught:
        pool.call(lambda x: x, late, timeout=0.3)
    assert time.monotonic() - began < 2
    assert (caught.value.phase, caught.value.limit) == ("queued", 0.3)
    future = pool.submit(lambda x: x, late, timeout=0.1)
    with pytest.raises(CallTimeout):
        future.result(5)
    gate.touch()
    assert pool.call(lambda x: x, late, timeout=10) == late.result()


@on_local
def test_e1_waiting_for_an_argument_does_not_count_for_the_pools_limits(
    make_pool: MakePool, backend: Any, gate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even for how long the parent waits for an answer that is overdue (F3)."""
    monkeypatch.setattr("flame_dask.parent.pool.GRACE", 0.1)
    pool = make_pool(min=1, max=1, max_concurrency=2, timeout=0.2, queue_timeout=0.1)
    late = pool.submit(wait_for_file, str(gate), timeout=20)
    threading.Timer(0.8, gate.touch).start()
    assert pool.call(lambda x: x, late) == late.result()

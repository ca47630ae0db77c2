"""How children of ``place_child`` end, and what of their runners and pools (H)."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flame_dask import (
    CallCancelled,
    CallTimeout,
    Child,
    ChildSpec,
    FlamePool,
    PoolClosed,
    RunnerLost,
    place_child,
)
from support import (
    LOCAL,
    Broken,
    Counter,
    Hanging,
    Wide,
    alive,
    lines,
    note,
    pids,
    runner_pid,
    spin,
    spin_async,
    states,
    wait_for_file,
)

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("processes_end")


# -- its end ---------------------------------------------------------------------------------------


def test_h2_on_exit(place: Callable[..., Child], until: Until) -> None:
    child = place(Counter)
    ended: list[Any] = []
    child.on_exit(lambda child: ended.append((child.alive, child.exception())))
    assert ended == []
    child.stop()
    until(lambda: ended == [(False, None)])
    child.on_exit(lambda child: ended.append("at once"))
    until(lambda: ended[1:] == ["at once"])


def test_h2_kill(lasting: FlamePool, place: Callable[..., Child], log: Path, until: Until) -> None:
    """Without its stop; also in the middle of a method."""
    idle, busy = place(Counter), place(Counter)
    spun = Path(f"{log}-spun")
    future = busy.submit("spin", str(spun))
    until(lambda: lines(spun))
    ended: list[Any] = []
    for child in (idle, busy):
        child.on_exit(ended.append)
        child.kill()
        with pytest.raises(CallCancelled):
            child.result(5)
    with pytest.raises(CallCancelled):
        future.result(5)
    until(lambda: lasting.status().leases == 0, 4)
    until(lambda: len(ended) == 2)
    assert "stopped" not in lines(log)
    assert states(lasting) == ["ready"]


def test_h2_e3_kill_takes_the_programs_along(place: Callable[..., Child], until: Until) -> None:
    class Starter(Counter):
        def start(self) -> int:
            self.program = subprocess.Popen(["sleep", "60"])
            return self.program.pid

    child = place(Starter)
    pid = child.start()
    assert alive(pid)
    child.kill()
    until(lambda: not alive(pid), 5)


def test_h2_e3_kill_with_methods_in_several_threads(
    lasting: FlamePool, place: Callable[..., Child], tmp_path: Path, until: Until
) -> None:
    child = place(Wide)
    futures = [child.submit("spin", str(tmp_path / f"spun{i}")) for i in range(3)]
    until(lambda: all(lines(tmp_path / f"spun{i}") for i in range(3)))
    child.kill()
    for future in futures:
        with pytest.raises(CallCancelled):
            future.result(5)
    until(lambda: lasting.status().leases == 0, 4)
    assert states(lasting) == ["ready"]


def test_h2_stop_comes_after_what_it_has_to_do(
    place: Callable[..., Child], log: Path, tmp_path: Path, until: Until
) -> None:
    child = place(Counter)
    gate = tmp_path / "gate"
    first = child.submit("gate", str(log), str(gate))
    until(lambda: len(lines(log)) == 2)
    second = child.submit("add")
    stopper = threading.Thread(target=child.stop)
    stopper.start()
    gate.touch()
    assert isinstance(first.result(10), int)
    assert second.result(10) == 1
    stopper.join(10)
    assert lines(log)[2:] == ["stopped"]
    assert child.result() is None


def test_h2_e3_a_stop_that_hangs(
    lasting: FlamePool, place: Callable[..., Child], log: Path, until: Until
) -> None:
    child = place(Hanging)
    began = time.monotonic()
    child.stop(0.5)
    assert 0.4 < time.monotonic() - began < 2
    with pytest.raises(CallCancelled):
        child.result()
    until(lambda: lasting.status().leases == 0, 4)
    assert lines(log)[1:] == ["stopping"]
    assert states(lasting) == ["ready"]


def test_h4_the_last_reference_goes(
    lasting: FlamePool, place: Callable[..., Child], log: Path, tmp_path: Path, until: Until
) -> None:
    """A linked child is stopped decently then; one that is not linked goes on."""
    gate = tmp_path / "gate"
    linked: Any = lasting.place_child(Counter, str(log))
    unlinked: Any = lasting.place_child(wait_for_file, str(gate), link=False)
    assert linked.add() == 1
    linked.on_exit(lambda child: note(str(log), "exit"))
    del linked, unlinked
    gc.collect()
    until(lambda: lines(log)[1:] == ["stopped", "exit"], 3)
    until(lambda: lasting.status().leases == 1, 3)
    assert states(lasting) == ["ready"]
    gate.touch()
    until(lambda: lasting.status().leases == 0, 3)


def test_h4_a_request_keeps_its_child(
    lasting: FlamePool, log: Path, tmp_path: Path, until: Until
) -> None:
    future = lasting.place_child(Counter, str(log)).submit(
        "gate", str(tmp_path / "began"), str(tmp_path / "gate")
    )
    gc.collect()
    until(lambda: lines(tmp_path / "began"))
    (tmp_path / "gate").touch()
    assert isinstance(future.result(10), int)
    until(lambda: lines(log)[1:] == ["stopped"], 3)


# -- slots and runners -----------------------------------------------------------------------------


def test_h1_c2_d1_it_holds_a_slot_and_its_runner(
    make_pool: MakePool, own: dict[str, Any], log: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=1, idle_shutdown_after=0.3, **own)
    child = pool.place_child(Counter, str(log))
    born = time.monotonic()
    with pytest.raises(CallTimeout) as caught:
        pool.call(int, queue_timeout=0.2)
    assert caught.value.phase == "queued"
    with pytest.raises(CallTimeout):
        pool.place_child(Counter, str(log), queue_timeout=0.2)
    until(lambda: time.monotonic() > born + 1.2)  # four times its time
    assert states(pool) == ["ready"]
    assert child.add() == 1
    waiting = pool.submit(os.getpid, queue_timeout=20)
    until(lambda: pool.status().waiters == 1)
    child.stop()
    assert waiting.result(10)
    until(lambda: states(pool) == [], 10)


def test_h2_f2_its_own_process_is_killed(make_pool: MakePool, log: Path, until: Until) -> None:
    pool = make_pool(max=1, max_concurrency=2, isolation="process", backend=LOCAL)
    child = pool.place_child(Counter, str(log))
    ended: list[Any] = []
    child.on_exit(ended.append)
    spun = Path(f"{log}-spun")
    future = child.submit("spin", str(spun))
    until(lambda: lines(spun))
    before = child.runner
    os.kill(int(lines(log)[0]), signal.SIGKILL)
    assert child.wait(5)
    for failed in (child.result, lambda: future.result(5), child.add):
        with pytest.raises(RunnerLost) as caught:
            failed()
        assert (caught.value.cause, caught.value.signal) == ("signal", 9)
    until(lambda: len(ended) == 1)
    until(lambda: pool.status().leases == 0)
    assert pool.call(int) == 0
    assert [runner.id for runner in pool.status().runners] == [before]
    assert len(ended) == 1
    assert lines(log)[1:] == [], "it is not started anew"


def test_h2_f2_its_runner_is_killed(
    make_pool: MakePool, kind: dict[str, Any], log: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=2, **kind)
    children = [pool.place_child(Counter, str(log)), pool.place_child(spin, str(log))]
    ended: list[Any] = []
    for child in children:
        child.on_exit(ended.append)
    until(lambda: len(pids(log)) == 2)  # a function is placed as it begins
    os.kill(runner_pid(pool), signal.SIGKILL)
    for child in children:
        assert child.wait(10)
        with pytest.raises(RunnerLost) as caught:
            child.result()
        assert (caught.value.cause, caught.value.signal) == ("signal", 9)
    with pytest.raises(RunnerLost):
        children[0].add()
    until(lambda: len(ended) == 2)
    counters = pool.status().counters
    assert (counters["lost"], counters["retried"]) == (2, 0)
    assert pool.call(int, queue_timeout=20) == 0
    assert len(ended) == 2
    assert len(pids(log)) == 2


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_e5_its_runner_is_told_to_go(
    make_pool: MakePool, log: Path, until: Until, isolation: str
) -> None:
    """It has ``shutdown_timeout``, and is stopped decently towards the end of that."""
    pool = make_pool(
        max=2, max_concurrency=2, shutdown_timeout=2.5, isolation=isolation, backend=LOCAL
    )
    child = pool.place_child(Counter, str(log))
    began = time.monotonic()
    os.kill(runner_pid(pool), signal.SIGTERM)
    until(lambda: "draining" in states(pool), 3)
    assert child.add() == 1
    assert child.wait(8)
    assert time.monotonic() - began > 0.8
    with pytest.raises(RunnerLost) as caught:
        child.result()
    assert caught.value.cause == "preempted"
    until(lambda: lines(log)[1:] == ["stopped"], 5)
    assert pool.call(int, queue_timeout=20) == 0


# -- the pool's end --------------------------------------------------------------------------------


def test_a6_g1_close_ends_linked_children_at_once(
    make_pool: MakePool, own: dict[str, Any], log: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=4, **{**own, "shutdown_timeout": 20})
    function = Path(f"{log}-function")
    children = [
        pool.place_child(Counter, str(log)),
        pool.place_child(spin, str(function)),
        pool.place_child(spin_async, str(function)),
        pool.place_child(ChildSpec(start=subprocess.Popen, args=(["sleep", "60"],))),
    ]
    ended: list[Any] = []
    for child in children:
        child.on_exit(ended.append)
    until(lambda: len(pids(function)) == 2)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 8
    assert lines(log)[1:] == ["stopped"]
    assert all(child.wait(0) for child in children)
    assert len(ended) == 4
    with pytest.raises(PoolClosed):
        children[0].add()
    with pytest.raises(PoolClosed):
        pool.place_child(Counter, str(log))
    children[0].stop()
    children[0].kill()
    children[0].on_exit(ended.append)
    until(lambda: len(ended) == 5)


def test_a6_g2_close_gives_unlinked_children_their_time(
    make_pool: MakePool, log: Path, tmp_path: Path
) -> None:
    pool = make_pool(max=1, max_concurrency=4, shutdown_timeout=1.5, backend=LOCAL)
    gate = tmp_path / "gate"
    short = pool.place_child(wait_for_file, str(gate), link=False)
    long = pool.place_child(Counter, str(log), link=False)
    with ThreadPoolExecutor(1) as executor:
        began = time.monotonic()
        closing = executor.submit(pool.close)
        assert not short.wait(0.3)
        gate.touch()
        assert isinstance(short.result(3), int)
        closing.result(20)
    assert 1 < time.monotonic() - began < 10
    with pytest.raises((PoolClosed, RunnerLost)):
        long.result(0)


def test_a6_a_stop_that_hangs_as_the_pool_closes(make_pool: MakePool, log: Path) -> None:
    pool = make_pool(max=1, shutdown_timeout=1, backend=LOCAL)
    child = pool.place_child(Hanging, str(log))
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 8
    assert child.wait(0)
    assert isinstance(child.exception(), PoolClosed | CallCancelled | RunnerLost)


# -- by name, and in a pool that is asynchronous ---------------------------------------------------


def test_a4_by_the_name_of_the_pool(lasting: FlamePool, log: Path) -> None:
    child = place_child("lasting", Counter, str(log), start=2)
    assert child.add() == 3
    child.stop()
    assert lines(log)[1:] == ["stopped"]


def test_a4_asynchronous(kind: dict[str, Any], fast: dict[str, Any], log: Path) -> None:
    async def main() -> None:
        async with FlamePool("async", max=1, asynchronous=True, **fast, **kind) as pool:
            child = await pool.place_child(Counter, str(log), start=1)
            assert await child.add() == 2
            assert await child.call("nap", 0.01) == 0.01
            assert await child.submit("add") == 3
            assert await asyncio.gather(*(child.add() for _ in range(5))) == [4, 5, 6, 7, 8]
            with pytest.raises(LookupError):
                await child.fail("on purpose")
            with pytest.raises(CallTimeout):
                await child.call("nap", 60, timeout=0.3)
            assert not await child.wait(0.05)
            with pytest.raises(TimeoutError):
                await child.result(0.05)
            with pytest.raises(LookupError):
                await pool.place_child(Broken, str(log))
            giving_up = asyncio.create_task(child.call("nap", 60))
            await asyncio.sleep(0.1)
            giving_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await giving_up
            assert await child.add() == 9
            await child.stop()
            assert await child.result() is None
            assert await child.exception() is None
            placing = asyncio.create_task(pool.place_child(spin, str(log), queue_timeout=10))
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            function = await placing
            function.on_exit(lambda child: loop.call_soon_threadsafe(ended.set))
            function.kill()
            await asyncio.wait_for(ended.wait(), 5)
            await pool.place_child(Counter, str(log))  # and dropped at once

    asyncio.run(main())
    assert lines(log).count("stopped") == 2


# -- at random -------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_h1_h2_f2_chaos(make_pool: MakePool, own: dict[str, Any], log: Path, until: Until) -> None:
    """Children are placed, used, stopped, killed and dropped, and runners killed: all add up."""
    dice = random.Random(5)
    pool = make_pool(max=2, max_concurrency=3, timeout=10, queue_timeout=10, **own)
    pool.call(int)
    children: list[Any] = []
    exits: collections.Counter[int] = collections.Counter()
    hooked = 0
    ended = (RunnerLost, CallCancelled, CallTimeout)

    def place() -> None:
        nonlocal hooked
        spec = dice.choice([Counter, Wide, spin])
        with contextlib.suppress(*ended):
            child = pool.place_child(spec, str(log), queue_timeout=0.5)
            number = hooked = hooked + 1
            child.on_exit(lambda child: exits.update([number]))
            children.append((child, spec))

    def use() -> None:
        for child, spec in children:
            if spec is not spin:
                with contextlib.suppress(*ended):
                    child.submit("add").result(15)

    def remove(how: Callable[[Any], object]) -> None:
        if children:
            how(children.pop(dice.randrange(len(children)))[0])

    def lose_a_runner() -> None:
        ready = [runner for runner in pool.status().runners if runner.state == "ready"]
        if ready:
            os.kill(pool.cluster.workers[dice.choice(ready).id].process.pid, signal.SIGKILL)

    steps: list[tuple[Callable[[], object], int]] = [
        (place, 6),
        (use, 3),
        (lambda: remove(lambda child: child.stop(1)), 2),
        (lambda: remove(lambda child: child.kill()), 2),
        (lambda: remove(lambda child: None), 2),
        (lose_a_runner, 1),
    ]
    population = [step for step, weight in steps for _ in range(weight)]
    for _ in range(30):
        dice.choice(population)()
    for child, _ in children:
        child.kill()
        assert child.wait(10)
    children.clear()
    gc.collect()
    until(lambda: pool.status().leases == 0, 15, about="a slot is still taken")
    until(lambda: len(exits) == hooked, 10, about="somebody was not told")
    assert set(exits.values()) <= {1}
    assert pool.call(int, queue_timeout=20) == 0

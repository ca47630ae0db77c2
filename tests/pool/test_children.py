"""``place_child``: what lives on a runner for as long as it likes (H)."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flame_dask import (
    CallCancelled,
    CallTimeout,
    Child,
    ChildSpec,
    FlamePool,
    PoolOptionsError,
    SerializationError,
)
from support import (
    Broken,
    Counter,
    Failing,
    Wide,
    alive,
    lines,
    note,
    pids,
    runner_pid,
    spin,
    spin_async,
    wait_for_file,
    work,
)

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("processes_end")


# -- kinds of children -----------------------------------------------------------------------------


def test_h1_h2_an_object(
    lasting: FlamePool, place: Callable[..., Child], log: Path, until: Until
) -> None:
    child = place(Counter, start=3)
    assert child.alive
    assert child.add() == 4
    assert child.call("add", by=6) == 10
    assert child.submit("add", 5).result(10) == 15
    assert child.pid() == int(lines(log)[0])
    assert child.runner in {runner.id for runner in lasting.status().runners}
    assert repr(child) == f"<Child Counter: on {child.runner}>"
    assert lasting.status().leases == 1
    assert not child.wait(0.05)
    with pytest.raises(TimeoutError):
        child.result(0.05)
    with pytest.raises(TimeoutError):
        child.exception(0.05)
    with pytest.raises(AttributeError):
        child._private  # noqa: B018
    assert child.stop() is None
    assert not child.alive
    assert child.wait(0)
    assert child.result() is None
    assert child.exception() is None
    assert lines(log)[1:] == ["stopped"]
    assert repr(child) == "<Child Counter: ended>"
    until(lambda: lasting.status().leases == 0, 2)
    with pytest.raises(CallCancelled):
        child.add()
    child.stop()  # again: it has ended
    child.kill()
    assert lines(log)[1:] == ["stopped"]


def test_h1_h2_a_function(lasting: FlamePool, place: Callable[..., Child], tmp_path: Path) -> None:
    def grow(log: str, gate: str) -> bytes:
        wait_for_file(gate)
        return bytes(3_000_000)

    def fail(log: str) -> None:
        raise LookupError("at last", 3)

    gate = tmp_path / "gate"
    child = place(grow, str(gate))
    assert child.alive
    assert "grow" in repr(child)
    with pytest.raises(TypeError, match="has no method 'add'"):
        child.add(1)
    with pytest.raises(SerializationError, match="a function that runs"):
        lasting.call(str, child)
    gate.touch()
    assert child.result(10) == bytes(3_000_000)  # more than travels along with news
    failing = place(fail)
    with pytest.raises(LookupError) as caught:
        failing.result(10)
    assert caught.value.args == ("at last", 3)
    assert isinstance(failing.exception(), LookupError)


@pytest.mark.parametrize("function", [spin, spin_async])
def test_h1_h2_a_function_is_ended_at_once(
    place: Callable[..., Child], log: Path, until: Until, function: Any
) -> None:
    child = place(function, timeout=1)
    until(lambda: lines(log))
    began = time.monotonic()
    child.stop(20)
    assert time.monotonic() - began < 2
    with pytest.raises(CallCancelled):
        child.result()
    until(lambda: lines(log)[1:] == ["over"] or not alive(*pids(log)), 3)


def test_h1_what_calls_like_a_function(
    lasting: FlamePool, place: Callable[..., Child], tmp_path: Path
) -> None:
    from functools import partial

    child = place(partial(work, gate=str(tmp_path / "gate")))
    assert "work" in repr(child)
    (tmp_path / "gate").touch()
    assert isinstance(child.result(10), int)


def test_h1_an_object_that_is_made_by_a_coroutine(place: Callable[..., Child], log: Path) -> None:
    async def make(log: str, *, start: int) -> Counter:
        await asyncio.sleep(0)
        return Counter(log, start)

    async def end(child: Counter) -> None:
        await asyncio.sleep(0)
        note(child.log, "ended")

    child = place(ChildSpec(start=make, kwargs={"start": 4}, stop=end, id="made"))
    assert "made" in repr(child)
    assert child.add() == 5
    assert child.nap(0.01) == 0.01
    child.stop()
    assert lines(log)[1:] == ["ended"]


def test_h2_ways_to_stop(place: Callable[..., Child], log: Path) -> None:
    class Closing:
        def __init__(self, log: str) -> None:
            self.log = log

        def close(self) -> None:
            note(self.log, "close")

    class Leaving:
        def __init__(self, log: str) -> None:
            self.log = log

        def __exit__(self, *exc_info: object) -> None:
            note(self.log, exc_info == (None, None, None))

    class Bare:
        def __init__(self, log: str) -> None:
            self.log = log

        def halt(self) -> None:
            note(self.log, "halt")

    specs = [
        Closing,
        Leaving,
        Bare,
        ChildSpec(start=Bare, stop="halt"),
        ChildSpec(start=Bare, stop=lambda child: note(child.log, "function")),
    ]
    for spec in specs:
        child = place(spec)
        child.stop()
        assert child.result() is None
    assert lines(log) == ["close", "True", "halt", "function"]


def test_h2_a_stop_that_fails(place: Callable[..., Child]) -> None:
    child = place(Failing)
    child.stop()
    with pytest.raises(OSError, match="won't"):
        child.result()


def test_h1_h2_a_process(lasting: FlamePool, until: Until) -> None:
    script = ["sh", "-c", 'read line; exit "$line"']
    spec = ChildSpec(start=subprocess.Popen, args=(script,), kwargs={"stdin": subprocess.PIPE})
    child = lasting.place_child(spec)
    pid = lasting.call(lambda popen: popen.pid, child)
    assert alive(pid)
    assert child.poll() is None
    lasting.call(lambda popen: popen.communicate(b"3\n"), child)
    assert child.wait(10)
    assert child.result() == 3
    assert not alive(pid)
    sleeping = lasting.place_child(ChildSpec(start=subprocess.Popen, args=(["sleep", "60"],)))
    pid = lasting.call(lambda popen: popen.pid, sleeping)
    sleeping.stop(20)
    assert sleeping.result() == -signal.SIGTERM
    assert not alive(pid)
    stubborn = 'trap "" TERM; echo; while :; do sleep 0.05; done'
    spec = ChildSpec(
        start=subprocess.Popen, args=(["sh", "-c", stubborn],), kwargs={"stdout": subprocess.PIPE}
    )
    refusing = lasting.place_child(spec)
    pid = lasting.call(lambda popen: popen.stdout.readline() and popen.pid, refusing)
    refusing.stop(0.3)
    until(lambda: not alive(pid), 5)


# -- the start -------------------------------------------------------------------------------------


def test_h3_a_start_that_fails(lasting: FlamePool, log: Path) -> None:
    with pytest.raises(LookupError) as caught:
        lasting.place_child(Broken, str(log))
    assert caught.value.args == ("no such thing", 5)
    assert lasting.status().leases == 0
    with pytest.raises(TypeError, match="log"):
        lasting.place_child(Counter)
    with pytest.raises(AttributeError, match="halt"):
        lasting.place_child(ChildSpec(start=Counter, stop="halt"), str(log))
    with pytest.raises(FileNotFoundError):
        lasting.place_child(ChildSpec(start=subprocess.Popen, args=(["no-such-program"],)))
    with pytest.raises(SerializationError):
        lasting.place_child(Counter, threading.Lock())


def test_h1_a2_what_can_not_be_placed(lasting: FlamePool) -> None:
    with pytest.raises(TypeError, match="5 can't be placed"):
        lasting.place_child(5)
    with pytest.raises(PoolOptionsError, match="a child starts once"):
        lasting.place_child(Counter, "log", retries=1)


def test_h3_e2_a_start_out_of_time(lasting: FlamePool, log: Path, until: Until) -> None:
    class Slow:
        def __init__(self, log: str) -> None:
            spin(log)

    with pytest.raises(CallTimeout) as caught:
        lasting.place_child(Slow, str(log), timeout=0.5)
    assert caught.value.phase == "running"
    until(lambda: lines(log)[1:] == ["over"] or not alive(*pids(log)), 3)
    until(lambda: lasting.status().leases == 0, 3)


def test_h3_timeout_bounds_the_start_not_the_life(
    place: Callable[..., Child], tmp_path: Path, until: Until
) -> None:
    """Neither by the host's clock nor by the runner's."""
    began = time.monotonic()
    children = [place(spec, timeout=0.5) for spec in (Counter, spin, spin_async)]
    until(lambda: time.monotonic() > began + 2)
    assert all(child.alive for child in children)
    assert children[0].add() == 1


# -- its methods -----------------------------------------------------------------------------------


def test_h2_a_thousand_calls_from_ten_threads(place: Callable[..., Child]) -> None:
    """Those of each thread come in order, and none is lost."""
    child = place(Counter)

    def take(thread: int) -> list[int]:
        futures = [child.submit("take", thread, number) for number in range(50)]
        called = [child.take(thread, number) for number in range(50, 100)]
        return [*(future.result(30) for future in futures), *called]

    with ThreadPoolExecutor(10) as executor:
        results = list(executor.map(take, range(10)))
    assert results == [list(range(100))] * 10
    assert child.taken() == {thread: list(range(100)) for thread in range(10)}


def test_h2_b1_b6_what_goes_wrong_in_a_method(place: Callable[..., Child]) -> None:
    child = place(Counter)
    with pytest.raises(LookupError) as caught:
        child.fail("on purpose")
    assert caught.value.args == ("on purpose", 7)
    with pytest.raises(AttributeError, match="no_such_method"):
        child.no_such_method()
    with pytest.raises(SerializationError):
        child.give()
    with pytest.raises(SerializationError):
        child.add(threading.Lock())
    with pytest.raises(TypeError):
        child.add(1, 2, 3)
    assert child.submit("fail", "later").exception(10).args == ("later", 7)
    assert child.add() == 1


@pytest.mark.parametrize(("method", "args"), [("spin", ["spun"]), ("nap", [60])])
def test_h2_e2_a_method_out_of_time(
    place: Callable[..., Child], tmp_path: Path, method: str, args: list[Any]
) -> None:
    child = place(Counter)
    args = [str(tmp_path / arg) if isinstance(arg, str) else arg for arg in args]
    late = child.submit(method, *args, timeout=0.5)
    queued = child.submit("add", timeout=0.2)
    later = child.submit("add", queue_timeout=10)
    with pytest.raises(CallTimeout) as caught:
        queued.result(10)
    assert caught.value.phase == "queued"
    with pytest.raises(CallTimeout) as caught:
        late.result(10)
    assert caught.value.phase == "running"
    assert later.result(10) == 1  # it was ended, and the one that gave up has not run
    if method == "spin":
        assert lines(tmp_path / "spun")[1:] == ["over"]
    assert child.add() == 2


def test_h2_e1_the_two_limits_of_a_method(place: Callable[..., Child], tmp_path: Path) -> None:
    """``queue_timeout`` alone is for its turn, the pool's ``timeout`` counts from that."""
    child = place(Counter)
    first = child.submit("gate", str(tmp_path / "began"), str(tmp_path / "gate"))
    with pytest.raises(CallTimeout) as caught:
        child.call("add", queue_timeout=0.2)
    assert caught.value.phase == "queued"
    assert 0.15 < caught.value.queued < 5
    (tmp_path / "gate").touch()
    assert isinstance(first.result(10), int)
    assert child.add() == 1


def test_h2_e2_queued_is_what_never_begins(
    lasting: FlamePool, place: Callable[..., Child], tmp_path: Path, until: Until
) -> None:
    """Who hears it may call the method again; of one that may have begun it is not said.

    The runner is frozen as the time passes. The method's turn comes then, though nobody hears of it
    who could say so: in a process of its own at once, in a thread as the runner goes on.
    """
    child = place(Counter)
    began, gate = tmp_path / "began", tmp_path / "gate"
    first = child.submit("gate", str(began), str(gate))
    late = child.submit("add", queue_timeout=1)
    until(lambda: lines(began))
    runner = runner_pid(lasting)
    lasting.call(abs, -1)  # the method has arrived before that
    os.kill(runner, signal.SIGSTOP)
    try:
        gate.touch()
        sent = time.monotonic()
        with pytest.raises(CallTimeout) as caught:
            late.result(10)
        assert time.monotonic() - sent < 3
    finally:
        os.kill(runner, signal.SIGCONT)
    assert caught.value.phase == "running"
    assert isinstance(first.result(10), int)
    assert child.call("add", timeout=10) in (1, 2)


def test_h2_e4_a_method_is_cancelled(
    place: Callable[..., Child], tmp_path: Path, until: Until
) -> None:
    child = place(Counter)
    spun = tmp_path / "spun"
    running, queued = child.submit("spin", str(spun)), child.submit("add", 100)
    dropped = child.submit("add", 1000)
    until(lambda: lines(spun))
    queued.cancel()
    del dropped
    gc.collect()
    running.cancel()
    for future in (running, queued):
        with pytest.raises(CallCancelled):
            future.result(10)
    until(lambda: lines(spun)[1:] == ["over"], 3)
    assert child.add() == 1


def test_h2_a_method_that_refuses_to_end(
    place: Callable[..., Child], tmp_path: Path, until: Until
) -> None:
    """It is struck again and again."""

    class Stubborn(Counter):
        def refuse(self, log: str) -> None:
            for _ in range(3):
                try:
                    spin(log)
                except BaseException:
                    note(log, "refused")

    child = place(Stubborn)
    with pytest.raises(CallTimeout):
        child.call("refuse", str(tmp_path / "spun"), timeout=0.3)
    assert child.call("add", timeout=10) == 1
    assert lines(tmp_path / "spun").count("refused") == 3


def test_h2_methods_at_the_same_time(
    place: Callable[..., Child], tmp_path: Path, until: Until
) -> None:
    """As many as the class says; the next one's turn comes when one of them is over."""
    child = place(Wide)
    began, gate = tmp_path / "began", tmp_path / "gate"
    futures = [child.submit("gate", str(began), str(gate)) for _ in range(3)]
    until(lambda: len(lines(began)) == 3)
    with pytest.raises(CallTimeout) as caught:
        child.call("add", 0, timeout=0.2)
    assert caught.value.phase == "queued"
    last = child.submit("add")
    gate.touch()
    assert len({future.result(10) for future in futures}) == 1
    assert last.result(10) == 1
    # Each of the three has its own time.
    spins = [child.submit("spin", str(tmp_path / f"spun{i}"), timeout=0.5) for i in range(3)]
    for future in spins:
        with pytest.raises(CallTimeout) as caught:
            future.result(10)
        assert caught.value.phase == "running"
    assert child.call("add", timeout=5) == 2


def test_h2_b3_large_values_futures_and_itself_as_arguments(
    lasting: FlamePool, place: Callable[..., Child]
) -> None:
    child = place(Counter)
    array = np.arange(2_500_000, dtype="f8")
    assert (child.double(array) == array * 2).all()
    future = lasting.submit(pow, 2, 10)
    assert child.add(future) == 1024
    assert child.add(child.submit("add", 1)) == 2050
    with pytest.raises(LookupError):
        child.add(child.submit("fail", "before"))
    # In a function it is the object itself.
    assert lasting.call(id, child) == child.identity()
    assert lasting.call(lambda found: found["child"][0].add(1), {"child": [child]}) == 2051


def test_h2_e1_waiting_for_an_argument_counts(
    lasting: FlamePool, place: Callable[..., Child], tmp_path: Path, until: Until
) -> None:
    child = place(Counter)
    never = lasting.submit(wait_for_file, str(tmp_path / "gate"))
    began = time.monotonic()
    with pytest.raises(CallTimeout):
        child.call("add", never, timeout=0.4)
    assert time.monotonic() - began < 3
    (tmp_path / "gate").touch()
    never.result(10)
    assert child.add() == 1

"""Work in threads is ended, and nothing else is (E3): with real threads, without Dask."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from flame_dask.payload import pack_call
from flame_dask.runner import execution, offspring, threads
from flame_dask.runner.execution import CallRaised, run_in_thread
from flame_dask.runner.terminator import Terminator
from flame_dask.runner.threads import CallTerminated, Terms, ThreadRun

Until = Callable[..., Any]

#: Where functions that are sent by value find what the test looks at.
SEEN: dict[str, Any] = {}


class Loop:
    """An event loop in a thread, with a terminator."""

    def __init__(self, grace: float = 0.3) -> None:
        self.loop = asyncio.new_event_loop()
        self.news: list[dict[str, Any]] = []
        self.known: set[str] = set()
        self.unlinked: list[int] = []
        self.terminator = Terminator(
            self.loop,
            grace=grace,
            report=self.news.append,
            known=self.known,
            count_unlinked=self.unlinked.append,
        )
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop")
        self._thread.start()
        self.executor = ThreadPoolExecutor(2)

    def call(self, fn: Callable[..., Any], *args: Any, task: str = "t", **terms: Any) -> Any:
        """Run a call in a thread, as Dask does it; return a future."""
        given = {"limit": None, "link": True, "inline_limit": -1, "asynchronous": False, **terms}
        self.known.add(task)
        payload = pack_call(fn, args, {})
        return self.executor.submit(
            run_in_thread, self.terminator, payload, None, Terms(call="c", task=task, **given)
        )

    def soon(self, function: Callable[..., Any], *args: Any) -> None:
        self.loop.call_soon_threadsafe(function, *args)

    def terminate(self, task: str = "t") -> None:
        self.soon(self.terminator.terminate, task, "order")

    def close(self) -> None:
        self.soon(self.terminator.close)
        self.soon(self.loop.stop)
        self._thread.join()
        self.executor.shutdown()
        self.loop.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(autouse=True)
def processes_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a runner's own process, for the test alone."""
    import _posixsubprocess
    import os

    for module, name in ((subprocess, "_fork_exec"), (_posixsubprocess, "fork_exec")):
        monkeypatch.setattr(module, name, getattr(module, name))
    for name in ("fork", "forkpty", "posix_spawn", "posix_spawnp"):
        monkeypatch.setattr(os, name, getattr(os, name))
    monkeypatch.setattr(offspring, "_installed", False)
    offspring.install()
    SEEN.clear()


def seen() -> dict[str, Any]:
    """The dictionary of this very module, for a function that was sent by value."""
    module = next(m for n, m in sys.modules.items() if n.endswith("test_threads"))
    found: dict[str, Any] = module.SEEN
    return found


def loops() -> None:
    seen()["begun"] = threading.get_ident()
    while True:
        pass


def swallows(times: int) -> None:
    seen()["begun"] = 0
    while True:
        try:
            while True:
                pass
        except BaseException:
            seen()["begun"] += 1
            if seen()["begun"] > times:
                raise


def waits_for(*command: str) -> None:
    seen()["begun"] = True
    subprocess.run(command, check=False)


def leaves(*command: str) -> None:
    """Start a process and forget it."""
    seen()["child"] = subprocess.Popen(command)
    while True:
        time.sleep(0.01)


def ended(future: Any) -> None:
    assert future.result(5) is None


def test_e3_a_tight_loop_is_ended_and_its_thread_goes_on(loop: Loop, until: Until) -> None:
    future = loop.call(loops)
    until(lambda: "begun" in seen())
    loop.terminate()
    ended(future)
    until(lambda: loop.news)
    assert loop.news == [
        {"what": "terminated", "how": "an exception in its thread", "reason": "order", "task": "t"}
    ]
    assert not loop.terminator.runs
    # The same threads are there for the next calls.
    idents = {loop.executor.submit(threading.get_ident).result(5) for _ in range(20)}
    assert SEEN["begun"] in idents or len(idents) == 1


def test_e3_an_exception_that_is_swallowed_comes_again(loop: Loop, until: Until) -> None:
    future = loop.call(swallows, 3)
    until(lambda: "begun" in seen())
    loop.terminate()
    ended(future)
    assert SEEN["begun"] == 4


def test_e3_an_error_of_the_work_that_is_ended_is_no_answer(loop: Loop, until: Until) -> None:
    def turns_it_into_an_error() -> None:
        try:
            loops()
        except BaseException:
            raise ValueError("something else") from None

    future = loop.call(turns_it_into_an_error)
    until(lambda: "begun" in seen())
    loop.terminate()
    ended(future)


def test_e3_a_call_that_has_not_begun_never_starts(loop: Loop, until: Until) -> None:
    loop.known.add("t")
    loop.terminate()
    until(lambda: loop.terminator._doomed)
    ended(loop.call(loops))
    assert "begun" not in seen()
    until(lambda: loop.news)
    assert loop.news[0]["how"] == "not starting it"
    assert not loop.terminator._doomed


def test_e3_an_order_for_what_is_over_is_forgotten(loop: Loop, until: Until) -> None:
    loop.call(int).result(5)
    loop.known.clear()
    loop.terminate()
    loop.terminate("other")
    done = threading.Event()
    loop.soon(done.set)
    assert done.wait(5)
    assert not loop.terminator._doomed
    assert not loop.news


def test_e3_children_are_ended_too(loop: Loop, until: Until) -> None:
    before = set(psutil.Process().children(recursive=True))

    def started() -> set[psutil.Process]:
        return set(psutil.Process().children(recursive=True)) - before

    future = loop.call(waits_for, "sh", "-c", "sleep 60 & wait")
    until(lambda: len(started()) >= 2)
    family = started()
    begun = time.monotonic()
    loop.terminate()
    ended(future)
    assert time.monotonic() - begun < 1
    until(lambda: not any(map(offspring.is_running, family)))
    until(lambda: loop.news)
    assert loop.news[0]["how"] == "an exception in its thread and SIGTERM to its processes"


def test_e3_children_that_refuse_are_killed(loop: Loop, until: Until) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print(1, flush=True); time.sleep(60)"
    )

    def stubborn(code: str) -> None:
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        seen()["child"] = child
        child.wait()

    future = loop.call(stubborn, code)
    until(lambda: "child" in seen())
    loop.terminate()
    ended(future)
    until(lambda: loop.news)
    assert loop.news[0]["how"] == "an exception in its thread and SIGKILL to its processes"
    SEEN["child"].wait(5)
    SEEN["child"].stdout.close()


def test_e3_a_child_of_another_call_lives(loop: Loop, until: Until) -> None:
    """Also one that an earlier call in the same thread has left."""
    with subprocess.Popen(["sleep", "60"]) as mine:
        first = loop.call(leaves, "sleep", "60", task="1")
        other = until(lambda: seen().get("child"))
        second = loop.call(loops, task="2")
        until(lambda: "begun" in seen())
        loop.terminate("2")
        ended(second)
        assert other.poll() is None
        assert mine.poll() is None
        loop.terminate("1")
        ended(first)
        assert other.wait(5) == -15
        assert mine.poll() is None
        mine.kill()


def test_e2_the_runner_knows_the_deadline(loop: Loop, until: Until) -> None:
    begun = time.monotonic()
    future = loop.call(loops, limit=0.1)
    ended(future)
    assert 0.6 <= time.monotonic() - begun < 1.5
    until(lambda: loop.news)
    assert loop.news[0]["reason"] == "deadline"


def test_e2_a_shorter_deadline_is_not_behind_a_longer_one(loop: Loop) -> None:
    long = loop.call(loops, task="long", limit=30)
    short = loop.call(loops, task="short", limit=0.1)
    ended(short)
    assert not long.done()
    loop.terminate("long")
    ended(long)


def test_e2_clocks_of_calls_that_are_over_ring_for_nobody(loop: Loop, until: Until) -> None:
    for number in range(50):
        loop.call(int, task=str(number), limit=0.0).result(5)
    until(lambda: loop.terminator._clock is None, 5)
    assert not loop.news
    assert not loop.terminator.runs


def test_g1_only_linked_calls_end_with_the_parent(loop: Loop, until: Until) -> None:
    linked = loop.call(loops, task="linked")
    until(lambda: "begun" in seen())
    other = loop.call(loops, task="other", link=False)
    until(lambda: len(loop.terminator.runs) == 2)
    loop.soon(lambda: loop.terminator.terminate_all("parent gone", linked_only=True))
    ended(linked)
    assert loop.terminator.has_unlinked()
    assert loop.unlinked == [1]
    wait = asyncio.run_coroutine_threadsafe(loop.terminator.quiet(0.1), loop.loop)
    assert wait.result(5) is False
    loop.soon(lambda: loop.terminator.terminate_all("parent gone"))
    ended(other)
    assert loop.unlinked == [1, -1]
    wait = asyncio.run_coroutine_threadsafe(loop.terminator.quiet(5), loop.loop)
    assert wait.result(5) is True


def test_b1_what_a_call_raises_is_not_taken_for_its_end(loop: Loop) -> None:
    with pytest.raises(CallRaised):
        loop.call(divmod, 1, 0).result(5)
    assert not loop.news


# -- the window ----------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_e3_the_exception_never_strikes_when_the_call_is_over(loop: Loop) -> None:
    """Thousands of calls that end at about the moment in which they are ended."""
    stop = threading.Event()
    terms = Terms("c", "t", 0, None, True, False)
    payload = pack_call(busy, (200,), {})
    escaped: list[BaseException] = []
    outcomes = {"ended": 0, "finished": 0}

    def calls() -> None:
        sys.settrace(None)  # a measurement of coverage is not made for being struck so often
        try:
            while not stop.is_set():
                result = run_in_thread(loop.terminator, payload, None, terms)
                outcomes["ended" if result is None else "finished"] += 1
        except BaseException as error:
            escaped.append(error)

    def strikes() -> None:
        # Far more often than the terminator would.
        sys.settrace(None)
        while not stop.is_set():
            run = loop.terminator.runs.get("t")
            if isinstance(run, ThreadRun):
                run.reason = "order"
                run.press(0.3)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    # What hypothesis has the collector call would be struck too, and can only report it.
    gc.disable()
    both = [threading.Thread(target=target) for target in (calls, strikes)]
    try:
        for thread in both:
            thread.start()
        end = time.monotonic() + 4
        while time.monotonic() < end and not escaped:
            stop.wait(0.05)
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        for thread in both:
            thread.join()
        gc.enable()
    assert not escaped
    assert outcomes["ended"] > 50
    assert outcomes["finished"] > 10


def busy(n: int) -> int:
    return sum(i for i in range(n))


def test_e3_an_exception_under_way_at_the_end_of_the_call_is_waited_for(
    loop: Loop, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminator has seen that the call goes on, and then it ends."""
    real = threads._set_exception
    go_on = threading.Event()
    struck: list[int] = []

    def slow(ident: int, error: Any) -> int:
        monkeypatch.setattr(threads, "_set_exception", real)
        go_on.set()
        until(lambda: not runs[0].open)
        struck.append(ident)
        return int(real(ident, error))

    monkeypatch.setattr(threads, "_set_exception", slow)
    seen()["go on"] = go_on

    def ends() -> None:
        seen()["begun"] = True
        seen()["go on"].wait(5)

    loop.executor.shutdown()
    loop.executor = ThreadPoolExecutor(1)
    future = loop.call(ends)
    until(lambda: "begun" in seen())
    runs: list[Any] = list(loop.terminator.runs.values())
    loop.terminate()
    ended(future)
    assert struck
    for _ in range(3):  # the thread is there, and unharmed
        assert loop.call(int).result(5) is None


def test_e3_a_pending_exception_is_met() -> None:
    """Nobody can raise it any more once the thread has sealed the call."""
    run = ThreadRun(Terms("c", "t", -1, None, True, False))
    run.open = True

    def be_pressed() -> None:
        for _ in range(50):
            # Where code is traced the exception is there for a moment only: it may be missed.
            other = threading.Thread(target=run.press, args=(0.3,))
            other.start()
            while other.is_alive():
                pass
            for _ in range(20_000):
                pass

    with pytest.raises(CallTerminated):
        be_pressed()
    run.open = False
    with pytest.raises(CallTerminated):  # whether one was pending can't be known
        run.seal()
    run.seal()
    run.open = True  # even so
    be_pressed()


def test_e3_a_traced_thread_goes_on(loop: Loop, until: Until) -> None:
    """By a debugger, or a measurement of coverage: CPython looks for exceptions in its own way."""
    threading.settrace(lambda *event: None)
    try:
        loop.executor.shutdown()
        loop.executor = ThreadPoolExecutor(1)
        assert loop.call(int).result(5) is None
        future = loop.call(loops)
        until(lambda: "begun" in seen())
        loop.terminate()
        ended(future)
        assert loop.call(int).result(5) is None
    finally:
        threading.settrace(None)  # type: ignore[arg-type]


def test_e3_traced_threads_do_not_wait_for_a_stuck_one(until: Until) -> None:
    """It can't meet its exception as long as it is in C code. The others go on."""

    def sleeps() -> None:
        seen()["begun"] = True
        time.sleep(1.5)

    threading.settrace(lambda *event: None)
    try:
        loop = Loop()
        stuck = loop.call(sleeps)
        until(lambda: "begun" in seen())
        run = loop.terminator.runs["t"]
        loop.terminate()
        until(lambda: run._struck, 1)
        for _ in range(20):
            assert loop.call(int, task="other").result(1) is None
        assert not stuck.done()
        ended(stuck)
        loop.close()
    finally:
        threading.settrace(None)  # type: ignore[arg-type]


def test_e3_running_costs_microseconds(loop: Loop) -> None:
    """The call path is hot: no timer, thread or message for a call that just runs."""
    payload = pack_call(int, (), {})
    terms = Terms("c", "t", -1, 30.0, True, False)

    def plain(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            execution.work(payload, None, terms)
        return (time.perf_counter() - begun) / count

    def registered(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            run_in_thread(loop.terminator, payload, None, terms)
        return (time.perf_counter() - begun) / count

    costs = min(registered(500) for _ in range(5)) - min(plain(500) for _ in range(5))
    assert costs < 100e-6
    print(f"{costs * 1e6:.1f} us")


def test_e3_a_signal_while_the_exception_is_pending() -> None:
    """Its handler is a function of Python: CPython 3.11 does not call that if it is traced."""
    program = """if True:
        import signal, sys, threading, time
        from flame_dask.runner.threads import strike

        signal.signal(signal.SIGALRM, lambda *_: None)
        stuck = threading.Thread(target=time.sleep, args=(60,), daemon=True)
        stuck.start()
        sys.settrace(lambda *_: None)
        for _ in range(5):
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            strike(stuck.ident)
        print("done")
    """
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "done\n"

"""Calls in processes of their own: they end with all that they started (B1, E3, F2)."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from flame_dask.constants import OOM_EXIT
from flame_dask.payload import Payload, pack_call
from flame_dask.runner import here, memory, offspring, wire
from flame_dask.runner.execution import CallRaised
from flame_dask.runner.guard import Guard
from flame_dask.runner.isolated import CallProcesses
from flame_dask.runner.memory import MemoryWatch
from flame_dask.runner.terminator import Terminator
from flame_dask.runner.threads import Terms

Until = Callable[..., Any]


class Loop:
    """An event loop in a thread, with a terminator and processes for calls."""

    def __init__(self, grace: float = 0.4) -> None:
        self.loop = asyncio.new_event_loop()
        self.news: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []
        self.terminator = Terminator(self.loop, grace=grace, report=self.news.append)
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop")
        self._thread.start()
        self.executor = ThreadPoolExecutor(5)
        self.guard = Guard()
        info = here.describe("pool", "Bench")._replace(process="another")
        self.processes = CallProcesses(info, "runner-1", self.guard, grace)
        self.processes.warm()

    def call(self, fn: Callable[..., Any], *args: Any, task: str = "t", **terms: Any) -> Any:
        """Run a call in a process, as Dask does it; return a future."""
        given = {"limit": None, "link": True, "inline_limit": 1, "asynchronous": False, **terms}
        payload = pack_call(fn, args, {})
        return self.executor.submit(
            self.processes.run,
            self.terminator,
            payload,
            None,
            Terms(call="c", task=task, **given),
            self.notes.append,
        )

    def value(self, fn: Callable[..., Any], *args: Any, **terms: Any) -> Any:
        return loaded(self.call(fn, *args, **terms))

    def soon(self, function: Callable[..., Any], *args: Any) -> None:
        self.loop.call_soon_threadsafe(function, *args)

    def terminate(self, task: str = "t") -> None:
        self.soon(self.terminator._end, self.terminator.runs[task], "order")

    def nursery(self) -> int:
        assert self.processes.nursery is not None
        return self.processes.nursery

    def close(self) -> None:
        self.processes.close()
        self.executor.shutdown()
        self.soon(self.terminator.close)
        self.soon(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self.guard.close()


def loaded(future: Any) -> Any:
    """Return the value of a call, or raise what it raised."""
    try:
        payload: Payload | None = future.result(10)
    except CallRaised as error:
        raise error.payload.load() from None
    return None if payload is None else payload.load()


@pytest.fixture(scope="module")
def shared_loop(temporary_folder: Path, until: Until) -> Iterator[Loop]:
    before = psutil.Process().children(recursive=True)
    loop = Loop()
    yield loop
    loop.close()
    until(lambda: set(psutil.Process().children(recursive=True)) <= set(before))


@pytest.fixture(autouse=True)
def nothing_is_left() -> None:
    """Not looked for after each test: processes come and go in the pool of them all."""


@pytest.fixture
def loop(shared_loop: Loop) -> Iterator[Loop]:
    """The processes, for a test that leaves them usable."""
    shared_loop.news.clear()
    yield shared_loop
    assert not shared_loop.terminator.runs
    assert not shared_loop.processes._busy
    assert shared_loop.value(divmod, 7, 2) == (3, 1)


@pytest.fixture
def own_loop(temporary_folder: Path) -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def begin(path: str) -> None:
    Path(path + ".new").write_text(str(os.getpid()))
    os.replace(path + ".new", path)


def sleep(path: str, seconds: float = 60) -> None:
    begin(path)
    time.sleep(seconds)


def spin(path: str) -> None:
    begin(path)
    while True:
        pass


def run(path: str, *command: str) -> None:
    begin(path)
    subprocess.run(command, check=False)


def compute(path: str) -> None:
    import numpy as np

    begin(path)
    np.linalg.svd(np.random.default_rng(1).random((4000, 4000)))


async def sleep_async(path: str) -> None:
    begin(path)
    await asyncio.sleep(60)


def swallow(path: str) -> None:
    """Do what can be done against an end that is meant well."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begin(path)
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(60)


def fork(path: str) -> None:
    """Fork without exec, as multiprocessing does: the child has all descriptors."""
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    begin(path)
    os.waitpid(pid, 0)


# -- calls ---------------------------------------------------------------------------------------


def test_b1_values_and_errors_travel(loop: Loop) -> None:
    assert loop.value(pow, 2, 10) == 1024
    assert loop.value(lambda x: x * 2, "ab") == "abab"
    with pytest.raises(ZeroDivisionError) as caught:
        loop.value(lambda: 1 // 0)
    assert "ZeroDivisionError" in repr(caught.value)
    assert caught.value.__traceback__ is not None
    with pytest.raises(SystemExit) as left:
        loop.value(sys.exit, 3)
    assert left.value.code == 3
    assert loop.value(divmod, 7, 2, inline_limit=-1) is None


def test_b1_large_values_travel(loop: Loop) -> None:
    data = bytes(range(256)) * 40_000
    assert loop.value(lambda x: (len(x), x[::-1]), data) == (len(data), data[::-1])
    array = loop.value(lambda: bytearray(5_000_000))
    assert len(array) == 5_000_000
    array[0] = 1


def test_b1_a_coroutine_function_has_a_loop_of_its_own(loop: Loop) -> None:
    async def later(x: int) -> int:
        await asyncio.sleep(0)
        return x + 1

    assert loop.value(later, 1, asynchronous=True) == 2


def test_b1_processes_are_kept_and_one_is_warm(loop: Loop) -> None:
    pids = {loop.value(os.getpid) for _ in range(5)}
    assert len(pids) == 1
    assert os.getpid() not in pids
    assert len(loop.processes._idle) >= 2


def test_b1_a_call_finds_its_process_in_order(loop: Loop) -> None:
    def look() -> Any:
        return (
            os.getpgrp() == os.getpid(),
            os.getsid(0),
            sys.stdin.read(),
            os.read(0, 10),
            signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
            signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL,
            threading.current_thread() is threading.main_thread(),
        )

    assert loop.value(look) == (True, os.getsid(0), "", b"", True, True, True)


def test_b1_a_call_has_nothing_open_that_it_should_not(loop: Loop) -> None:
    """In particular nothing that would hide the end of another call's process."""

    def look() -> list[str]:
        found = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # that by which it is listed
                found.append(os.readlink(f"/proc/self/fd/{name}"))
        return found

    calls = [loop.call(time.sleep, 0.2, task=str(n)) for n in range(3)]
    sockets = [name for name in loop.value(look) if "socket" in name]
    pipes = [name for name in loop.value(look) if "pipe" in name]
    mine = {
        os.readlink(f"/proc/self/fd/{n}") for n in (1, 2) if os.path.exists(f"/proc/self/fd/{n}")
    }
    assert len(sockets) == 1
    assert set(pipes) <= mine
    for call in calls:
        call.result(5)

    def look_after_exec() -> str:
        return subprocess.run(
            ["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, check=True
        ).stdout

    assert "socket" not in loop.value(look_after_exec)


def test_a7_a_call_knows_its_parent(loop: Loop) -> None:
    parent = loop.value(here.parent)
    assert (parent.pool, parent.runner, parent.backend) == ("pool", "runner-1", "Bench")


def test_b1_calls_run_in_parallel(loop: Loop) -> None:
    """CPU-bound ones, without a common interpreter lock."""

    def meet(folder: str, count: int) -> int:
        Path(folder, str(os.getpid())).touch()
        while len(os.listdir(folder)) < count:  # spins
            pass
        return os.getpid()

    with tempfile.TemporaryDirectory() as folder:
        calls = [loop.call(meet, folder, 4, task=str(n)) for n in range(4)]
        assert len({loaded(call) for call in calls}) == 4


# -- their end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [sleep, spin, compute, sleep_async, fork])
def test_e3_work_is_ended(loop: Loop, tmp_path: Path, until: Until, fn: Any) -> None:
    path = tmp_path / "begun"
    future = loop.call(fn, str(path), asynchronous=fn is sleep_async)
    until(path.exists)
    group = int(path.read_text())
    begun = time.monotonic()
    loop.terminate()
    assert future.result(5) is None
    assert time.monotonic() - begun < 0.4
    until(lambda: not offspring.members(group))
    until(lambda: loop.news)
    assert loop.news[0]["how"] == "SIGTERM to its processes"


def test_e3_what_a_call_has_started_is_ended_too(loop: Loop, tmp_path: Path, until: Until) -> None:
    path = tmp_path / "begun"
    future = loop.call(run, str(path), "sh", "-c", "trap '' TERM; sleep 60 & sleep 61 & wait")
    until(path.exists)
    group = int(path.read_text())
    until(lambda: len(offspring.members(group)) == 4)
    loop.terminate()
    assert future.result(5) is None
    # They refused SIGTERM.
    until(lambda: loop.news)
    assert loop.news[0]["how"] == "SIGKILL to its processes"
    until(lambda: not offspring.members(group), 1)


def test_e3_work_that_refuses_is_killed_after_the_grace(
    loop: Loop, tmp_path: Path, until: Until
) -> None:
    path = tmp_path / "begun"
    future = loop.call(swallow, str(path))
    until(path.exists)
    begun = time.monotonic()
    loop.terminate()
    assert future.result(5) is None
    assert 0.4 <= time.monotonic() - begun < 1.2
    until(lambda: loop.news)
    assert loop.news[0]["how"] == "SIGKILL to its processes"


def test_e2_the_deadline_is_known_to_the_runner(loop: Loop, tmp_path: Path, until: Until) -> None:
    future = loop.call(sleep, str(tmp_path / "begun"), limit=0.1)
    assert future.result(5) is None
    until(lambda: loop.news)
    assert loop.news[0]["reason"] == "deadline"


def test_e3_a_call_that_is_ended_leaves_the_others_alone(
    loop: Loop, tmp_path: Path, until: Until
) -> None:
    path = tmp_path / "begun"
    future = loop.call(sleep, str(path), task="1")
    other = loop.call(time.sleep, 0.5, task="2")
    until(path.exists)
    loop.terminate("1")
    assert future.result(5) is None
    assert loaded(other) is None


# -- their death ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "cause", "exit_code", "number"),
    [
        (lambda: os._exit(3), "exited", 3, None),
        (lambda: os._exit(0), "exited", 0, None),
        (lambda: ctypes.string_at(0), "signal", None, signal.SIGSEGV),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "signal", None, signal.SIGKILL),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "signal", None, signal.SIGTERM),
    ],
)
def test_f2_the_death_of_a_process_is_the_death_of_its_call(
    loop: Loop, until: Until, fn: Any, cause: str, exit_code: int | None, number: int | None
) -> None:
    other = loop.call(time.sleep, 0.3, task="other")
    assert loop.call(fn).result(5) is None
    until(lambda: loop.news)
    assert loop.news == [
        {
            "what": "call-lost",
            "task": "t",
            "cause": cause,
            "exit_code": exit_code,
            "signal": number,
        }
    ]
    assert loaded(other) is None


def test_f2_what_a_dead_call_has_started_goes_with_it(
    loop: Loop, tmp_path: Path, until: Until
) -> None:
    def leave(path: str) -> None:
        subprocess.Popen(["sleep", "60"])
        begin(path)
        os._exit(1)

    path = tmp_path / "begun"
    assert loop.call(leave, str(path)).result(5) is None
    until(lambda: not offspring.members(int(path.read_text())))


def test_f2_a_process_that_dies_while_a_child_holds_its_socket(loop: Loop, until: Until) -> None:
    def fork_and_die() -> None:
        if os.fork():
            os._exit(4)
        time.sleep(60)

    assert loop.call(fork_and_die).result(5) is None
    until(lambda: loop.news)
    assert loop.news[0]["exit_code"] == 4


def test_f1_a_process_that_dies_between_two_calls_costs_none(loop: Loop, until: Until) -> None:
    def die_later() -> int:
        threading.Timer(0.05, os._exit, (1,)).start()
        return os.getpid()

    pid = loop.value(die_later)
    until(lambda: not psutil.pid_exists(pid))
    assert loop.value(os.getpid) != pid
    assert not loop.news


def test_f1_the_nursery_dies(loop: Loop, until: Until) -> None:
    """Calls that run go on, and the next ones find another nursery."""
    dead = loop.nursery()
    running = loop.call(time.sleep, 0.5)
    until(lambda: len(loop.processes._busy) == 1)
    os.kill(dead, signal.SIGKILL)
    until(lambda: not offspring.is_running(psutil.Process(dead)))
    for process in list(loop.processes._idle):
        process.signal(signal.SIGKILL)
    assert loop.value(pow, 2, 2, task="2") == 4
    assert loaded(running) is None
    assert loop.nursery() != dead


def test_f2_a_call_that_takes_too_much_memory_is_lost(own_loop: Loop, until: Until) -> None:
    """That one, not the others and not the runner."""

    def fill() -> None:
        time.sleep(0.2)
        blocks = [bytearray(b"x") * 2**20 for _ in range(400)]
        time.sleep(len(blocks))

    watch = MemoryWatch(2**62, own_loop.processes, lambda: bool(own_loop.terminator.runs))
    try:
        watch._look_around()
        watch._limit = watch.in_use() + 200 * 2**20
        other = own_loop.call(time.sleep, 2, task="other")
        assert own_loop.call(fill).result(10) is None
        until(lambda: own_loop.news)
        assert own_loop.news[0]["cause"] == "oom"
        assert loaded(other) is None
    finally:
        watch.close()


def test_f2_a_call_is_not_blamed_for_what_the_runner_has(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, flame_log: Any, until: Until
) -> None:
    """Large results that wait, say. Processes that wait, and what they share, don't count."""
    ends: list[int] = []
    monkeypatch.setattr(offspring, "end_process", ends.append)
    watch = MemoryWatch(2**62, loop.processes, lambda: False)
    running = loop.call(time.sleep, 0.5)
    until(loop.processes.busy)
    try:
        watch._look_around()
        own = memory.resident(os.getpid())
        assert own < watch.in_use() < own + 300 * 2**20
        watch._limit = own
        watch._relieve(own + 1)
    finally:
        watch.close()
    assert ends == [OOM_EXIT]
    assert "out of memory" in flame_log.texts()[0]
    assert loaded(running) is None


def test_a6_closing_leaves_nothing(own_loop: Loop, tmp_path: Path, until: Until) -> None:
    path = tmp_path / "begun"
    running = own_loop.call(swallow, str(path))
    until(path.exists)
    pids = [p.pid for p in own_loop.processes.all()] + [own_loop.nursery()]
    assert len(pids) >= 2
    own_loop.processes.close()
    assert running.result(5) is None
    until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    with pytest.raises(OSError, match="closing"):
        own_loop.call(int).result(5)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_g3_processes_go_with_a_runner_that_is_killed(
    tmp_path: Path, until: Until, number: int
) -> None:
    """Whether they are idle, or busy and deaf."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from tests.runner.test_isolated import Loop, swallow, begin;"
        "import os, time;"
        "loop = Loop(); a = loop.call(swallow, sys.argv[2], task='1');"
        "b = loop.call(os.getpid, task='2'); b.result(10);"
        "begin(sys.argv[2] + '2'); time.sleep(60)"
    )
    root = str(Path(__file__).parents[2])
    path = tmp_path / "begun"
    with subprocess.Popen(
        [sys.executable, "-c", code, root, str(path)], start_new_session=True
    ) as process:
        until(lambda: path.exists() and Path(str(path) + "2").exists(), 20)
        below = psutil.Process(process.pid).children(recursive=True)
        assert len(below) >= 4
        process.send_signal(number)
        process.wait(10)
    until(lambda: not any(map(offspring.is_running, below)))


# -- the wire ------------------------------------------------------------------------------------


def test_b1_values_on_the_wire() -> None:
    one, other = socket.socketpair()
    with one, other, other.makefile("rb") as stream:
        for value in (None, [1, "x"], pack_call(pow, (2, 3), {})):
            wire.send(one, value)
            back = wire.receive(stream)
            if isinstance(value, Payload):
                assert back.load() == value.load()
            else:
                assert back == value
        large = pack_call(len, (bytes(3_000_000), bytearray(1_000_000)), {})
        sender = threading.Thread(target=wire.send, args=(one, large))
        sender.start()
        back = wire.receive(stream)
        sender.join()
        assert back.nbytes == large.nbytes
        assert back.writable == large.writable == (False, True)
        one.sendall(b"\1\0")
        one.close()
        with pytest.raises(EOFError):
            wire.receive(stream)

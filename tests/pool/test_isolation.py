"""Calls in processes of their own: ``isolation="process"`` (B1, B6, E3)."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from flame_dask import FlamePool, SerializationError
from support import LOCAL, alive, all_children_end, runner_pid

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("processes_end")


SLOTS = 4

#: A global of this module, which travels with the functions that use it.
counter = {"calls": 0}


def inc(x: int) -> int:
    return x + 1


@pytest.fixture(scope="module")
def isolated(fast: dict[str, Any], until: Until) -> Iterator[FlamePool]:
    """A pool with one runner of four slots, for all tests that leave it as it was."""
    options = {**fast, "backend": LOCAL, "isolation": "process", "max_concurrency": SLOTS}
    options["env"] = {"GREETING": "hello"}
    with all_children_end(until), FlamePool("isolated", min=1, max=1, **options) as pool:
        yield pool


def test_b1_values_of_all_kinds(isolated: FlamePool) -> None:
    offset = 5
    assert isolated.call(divmod, 7, 2) == (3, 1)
    assert isolated.call(int, "ff", base=16) == 255
    assert isolated.call(lambda x: x + offset, 3) == 8
    assert isolated.call(functools.partial(pow, 2), 10) == 1024
    assert isolated.call(lambda: inc(2)) == 3
    assert isolated.call(print, "of a call") is None
    assert isolated.call(print, "of a call", flush=True) is None
    assert isolated.call(lambda: os.environ.get("GREETING")) == "hello"


def test_b1_it_is_not_the_runner(isolated: FlamePool) -> None:
    pids = {isolated.call(os.getpid) for _ in range(5)}
    assert runner_pid(isolated) not in pids
    assert os.getpid() not in pids
    # They are below it, whoever forks them.
    below = {child.pid for child in psutil.Process(runner_pid(isolated)).children(recursive=True)}
    assert pids <= below


def test_b1_processes_are_warm(isolated: FlamePool) -> None:
    """One call after another needs no new process for each, nor new imports."""

    def warm() -> tuple[int, bool]:
        import sys

        known = "wave" in sys.modules
        import wave  # noqa: F401

        return os.getpid(), known

    seen = [isolated.call(warm) for _ in range(30)]
    pids = [pid for pid, _ in seen]
    assert len(set(pids)) <= SLOTS + 1
    for number, (pid, known) in enumerate(seen):
        assert known == (pid in pids[:number])


def test_b1_as_many_at_once_as_there_are_slots(isolated: FlamePool, tmp_path: Path) -> None:
    """Each waits for the others, in a process of its own."""

    def meet(folder: str) -> int:
        Path(folder, str(os.getpid())).touch()
        end = time.monotonic() + 20
        while len(os.listdir(folder)) < SLOTS:
            if time.monotonic() > end:
                raise TimeoutError(os.listdir(folder))
            time.sleep(0.005)
        return os.getpid()

    futures = [isolated.submit(meet, str(tmp_path)) for _ in range(SLOTS)]
    assert len({future.result(30) for future in futures}) == SLOTS


def burn_together(folder: str, count: int) -> int:
    """Compute until so many calls do; say in which process."""
    Path(folder, str(os.getpid())).touch()
    end = time.monotonic() + 30
    while len(os.listdir(folder)) < count and time.monotonic() < end:
        sum(range(1000))
    return os.getpid()


def test_b1_computing_calls_run_in_parallel(isolated: FlamePool, tmp_path: Path) -> None:
    """Each has an interpreter of its own, and so no lock of it between them."""
    futures = [isolated.submit(burn_together, str(tmp_path), SLOTS) for _ in range(SLOTS)]
    processes = {future.result(30) for future in futures}
    assert len(processes) == SLOTS
    assert processes == {int(name) for name in os.listdir(tmp_path)}


def test_b1_errors_keep_type_arguments_and_remote_traceback(isolated: FlamePool) -> None:
    class Refused(Exception):
        def __init__(self, code: int) -> None:
            super().__init__(f"code {code}")
            self.code = code

    def deep(x: int) -> None:
        raise LookupError("not there", x)

    def outer() -> None:
        try:
            deep(7)
        except LookupError as error:
            raise Refused(403) from error

    with pytest.raises(Refused, match="code 403") as caught:
        isolated.call(outer)
    assert caught.value.code == 403
    cause = caught.value.__cause__
    assert isinstance(cause, LookupError)
    assert cause.args == ("not there", 7)
    text = "".join(traceback.format_exception(caught.value))
    assert 'raise LookupError("not there", x)' in text
    assert "deep(7)" in text


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_b1_not_even_an_exit_ends_the_process(
    isolated: FlamePool, kind: type[BaseException]
) -> None:
    def leave() -> None:
        raise kind(3)

    async def leave_async() -> None:
        raise kind(3)

    for fn in (leave, leave_async):
        with pytest.raises(kind) as caught:
            isolated.call(fn)
        assert caught.value.args == (3,)
    with pytest.raises(SystemExit):
        isolated.call(sys.exit, 0)
    assert isolated.status().counters["lost"] == 0
    assert isolated.call(int) == 0


def test_b1_async_functions(isolated: FlamePool) -> None:
    async def nap(value: str) -> tuple[str, int, bool]:
        await asyncio.sleep(0.01)
        task = asyncio.ensure_future(asyncio.sleep(0))
        await asyncio.gather(task, asyncio.to_thread(int))
        return value, os.getpid(), asyncio.get_running_loop().is_running()

    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("no such thing")

    value, pid, running = isolated.call(nap, "slept")
    assert (value, running) == ("slept", True)
    assert pid != runner_pid(isolated)
    with pytest.raises(KeyError, match="no such thing"):
        isolated.call(fail)
    assert isolated.call(nap, "again")[0] == "again"


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 66_000, 1_000_000, 40_000_000])
def test_b1_results_and_arguments_of_all_sizes(isolated: FlamePool, size: int) -> None:
    assert isolated.call(len, os.urandom(size)) == size
    assert isolated.call(bytes, size) == bytes(size)


def test_b1_arrays(isolated: FlamePool) -> None:
    array = np.arange(1_000_000, dtype="f8").reshape(1000, -1)

    def twice(array: Any) -> Any:
        return array * 2

    doubled = isolated.call(twice, array)
    assert (doubled == array * 2).all()
    future = isolated.submit(twice, array)
    assert isolated.call(np.sum, future) == array.sum() * 2


def test_b3_futures_as_arguments(isolated: FlamePool) -> None:
    small, large = isolated.submit(inc, 1), isolated.submit(bytes, 1_000_000)
    assert isolated.call(inc, small) == 3
    assert isolated.call(lambda pair: len(pair["large"]), {"large": large}) == 1_000_000


def test_b1_globals_stay_in_the_process(isolated: FlamePool) -> None:
    """What a call sets is gone or not, but never seen by the parent."""

    def count() -> int:
        counter["calls"] += 1
        return counter["calls"]

    assert isolated.call(count) >= 1
    assert counter == {"calls": 0}

    def set_variable() -> int:
        os.environ["SET_BY_A_CALL"] = "1"
        return os.getpid()

    isolated.call(set_variable)
    assert "SET_BY_A_CALL" not in os.environ


def test_b6_what_can_not_travel(isolated: FlamePool) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return int, ("not a number",)

    def make() -> dict[str, Any]:
        return {"fine": 1, "rows": [0, threading.Lock()]}

    with pytest.raises(SerializationError, match="rows") as caught:
        isolated.call(make)
    assert "rows" in caught.value.part
    with pytest.raises(SerializationError, match="ValueError"):
        isolated.call(inc, Trap())
    with pytest.raises(SerializationError, match="ValueError"):
        isolated.call(Trap)
    assert isolated.call(inc, 1) == 2


def test_b1_nothing_to_read_on_standard_input(make_pool: MakePool, isolated: FlamePool) -> None:
    """Above all not what tells a runner that its parent lives (G3)."""
    assert isolated.call(os.read, 0, 1) == b""
    pool = make_pool(max=1, backend=LOCAL)
    assert pool.call(os.read, 0, 1) == b""
    assert pool.call(int) == 0


def test_b1_a_call_may_have_processes_of_its_own(isolated: FlamePool) -> None:
    """A pool of Python's own, too: it refuses to work in a process that is a daemon."""

    def fan_out() -> list[int]:
        import concurrent.futures
        import multiprocessing

        context = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
            return list(executor.map(abs, [-1, -2, -3]))

    assert isolated.call(fan_out) == [1, 2, 3]
    assert isolated.call(int) == 0


def test_b1_what_a_call_has_started_may_stay(isolated: FlamePool, until: Until) -> None:
    """It ends with the process of the call, or at the latest with the pool, not with the call."""

    def start() -> int:
        import subprocess

        return subprocess.Popen(["sleep", "60"]).pid

    child = isolated.call(start)
    assert isolated.call(int) == 0
    assert alive(child) == [child]
    os.kill(child, signal.SIGKILL)
    until(lambda: not alive(child))


def test_a6_nothing_is_left_of_its_processes(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """Warm ones, busy ones, and what they have started."""

    def busy(log: str) -> None:
        import subprocess

        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        script = 'sleep 60 & echo "$!" >> "$0"; echo "$$" >> "$0"; wait'
        subprocess.run(["sh", "-c", script, log], check=False)

    options = {"isolation": "process", "shutdown_timeout": 0.2, "backend": LOCAL}
    pool = make_pool(max=1, max_concurrency=3, **options)
    warm = {pool.call(os.getpid) for _ in range(3)}
    log = tmp_path / "log"
    futures = [pool.submit(busy, str(log)) for _ in range(2)]
    until(lambda: log.exists() and len(log.read_text().split()) == 6)
    below = {p.pid for p in psutil.Process(runner_pid(pool)).children(recursive=True)}
    pool.close()
    until(lambda: not alive(*warm, *below, *map(int, log.read_text().split())), 3)
    del futures


def test_b1_the_slots_are_a_limit(isolated: FlamePool, tmp_path: Path, until: Until) -> None:
    """However many calls there are: never more processes at work than slots."""

    def work(folder: str) -> int:
        mark = Path(folder, f"{os.getpid()}-{time.monotonic_ns()}")
        mark.touch()
        level = len(os.listdir(folder))
        time.sleep(0.02)
        mark.unlink()
        return level

    futures = [isolated.submit(work, str(tmp_path)) for _ in range(40)]
    assert max(future.result(30) for future in futures) <= SLOTS


def test_b1_what_calls_are_forked_of_is_no_runner(isolated: FlamePool) -> None:
    """It was forked itself, before the runner was one."""

    def look() -> tuple[int, list[str], str, list[str]]:
        nursery = psutil.Process(os.getppid())
        mine = [name for name in os.environ if name.startswith("FLAME_")]
        return nursery.ppid(), nursery.cmdline(), os.readlink(f"/proc/{nursery.pid}/fd/0"), mine

    runner, command, standard_input, mine = isolated.call(look)
    assert runner == runner_pid(isolated)
    assert command == psutil.Process(runner).cmdline()
    assert standard_input == os.devnull  # not what tells the runner of its parent's end
    assert mine == []

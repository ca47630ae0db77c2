"""What tests of pools ask of the world around them, and what they have runners do.

Runners can't import this module: its functions go there by value, like those of the tests.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import LocalCluster

from flame_dask import FlamePool

#: Options of a cluster that nobody watches, and one that is quickly there.
QUIET: dict[str, Any] = {"scheduler_kwargs": {"dashboard": False}}
LOCAL = (LocalCluster, QUIET)

#: For tests of what is the same wherever the scheduler is; others prove on both that it is.
on_local = pytest.mark.parametrize("backend", ["local"], indirect=True)


def on_both(name: str, both: list[object], *, local: list[object]) -> pytest.MarkDecorator:
    """Run a test with some values of a parameter on both backends, and with others on one."""
    values = [("local", value) for value in [*both, *local]]
    values += [("subprocess", value) for value in both]
    return pytest.mark.parametrize(("backend", name), values, indirect=["backend"])


def lines(log: Path) -> list[str]:
    """Return what calls have left in a file; nothing if there is no file yet."""
    return log.read_text().split() if log.exists() else []


def pids(log: Path) -> list[int]:
    """Return the processes that calls have left in a file, among other lines."""
    return [int(line) for line in lines(log) if line.isdigit()]


def alive(*candidates: int) -> list[int]:
    """Return which of the processes run: a zombie does not."""
    running = []
    for pid in candidates:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                running.append(pid)
    return running


def new_children(before: set[psutil.Process]) -> list[int]:
    """Return the processes below this one that run and did not before."""
    now = psutil.Process().children(recursive=True)
    return alive(*(process.pid for process in now if process not in before))


@contextlib.contextmanager
def all_children_end(until: Callable[..., object]) -> Iterator[None]:
    """Wait at the end until no process below this one runs that did not at the beginning."""
    before = set(psutil.Process().children(recursive=True))
    yield
    until(lambda: not new_children(before))


def states(pool: FlamePool) -> list[str]:
    """Return the states of a pool's runners."""
    return sorted(runner.state for runner in pool.status().runners)


def free(pool: FlamePool) -> bool:
    """Tell whether no slot is taken."""
    return bool(pool.status().leases == 0)


def runner_pid(pool: FlamePool) -> int:
    """Return the process of the one runner that is ready."""
    [ready] = [runner for runner in pool.status().runners if runner.state == "ready"]
    pid: int = pool.cluster.workers[ready.id].process.pid
    return pid


class Program:
    """A program in a folder that runners know nothing of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, path: str, text: str) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return file

    def load(self, name: str) -> Any:
        importlib.invalidate_caches()
        return importlib.import_module(name)


#: Run by an interpreter first that is to be one of another environment (A8).
_SITECUSTOMIZE = """
import importlib.metadata as metadata
import os
import sys

sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p, "flame_dask"))]
original = metadata.version


def version(package):
    if package.replace("_", "-") == "flame-dask":
        raise metadata.PackageNotFoundError(package)
    if package == "distributed" and "ANOTHER_DISTRIBUTED" in os.environ:
        return os.environ["ANOTHER_DISTRIBUTED"]
    return original(package)


metadata.version = version
if "ANOTHER_PYTHON" in os.environ:
    sys.version = " ".join([os.environ["ANOTHER_PYTHON"], *sys.version.split()[1:]])
"""


def make_site(folder: Path) -> str:
    """Make a folder for PYTHONPATH by which an interpreter is one that has no flame_dask.

    The variables ANOTHER_PYTHON and ANOTHER_DISTRIBUTED say which versions of these it has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    return str(folder)


# -- what calls do --------------------------------------------------------------------------------


def doze(path: str) -> None:
    """Sleep in small pieces, so that an exception gets through."""
    Path(path).write_text(str(os.getpid()))
    while True:
        time.sleep(0.01)


def sleep(path: str, seconds: float) -> str:
    """Hang in a call of the system; leave another file if it comes to its end."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(seconds)
    Path(path).with_suffix(".done").write_text("done")
    return "slept"


def run(path: str, *command: str) -> None:
    """Wait for a program."""
    Path(path).write_text(str(os.getpid()))
    subprocess.run(command, check=False)


def wait_for_file(path: str) -> int:
    """Run until a file is there; say in which process."""
    end = time.monotonic() + 30
    while time.monotonic() < end and not os.path.exists(path):
        time.sleep(0.005)
    return os.getpid()


def work(log: str, gate: str) -> int:
    """Leave a line with the process, then run until a file is there; say in which process."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    return wait_for_file(gate)


def note(log: str, line: object = None) -> None:
    with open(log, "a") as file:
        file.write(f"{os.getpid() if line is None else line}\n")


class Counter:
    """Counts, and leaves a line when it starts and when it is stopped."""

    def __init__(self, log: str, start: int = 0) -> None:
        self.log = log
        self.value = start
        self.calls: dict[int, list[int]] = {}
        note(log)

    def add(self, by: int = 1) -> int:
        self.value += by
        return self.value

    def take(self, thread: int, number: int) -> int:
        self.calls.setdefault(thread, []).append(number)
        return number

    def taken(self) -> dict[int, list[int]]:
        return self.calls

    def fail(self, text: str) -> None:
        raise LookupError(text, 7)

    def give(self) -> Any:
        return threading.Lock()

    def double(self, array: Any) -> Any:
        return array * 2

    def pid(self) -> int:
        return os.getpid()

    def identity(self) -> int:
        return id(self)

    def spin(self, log: str) -> None:
        note(log)
        try:
            while True:
                time.sleep(0.005)
        finally:
            note(log, "over")

    def gate(self, log: str, gate: str) -> int:
        return work(log, gate)

    async def nap(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    def stop(self) -> None:
        note(self.log, "stopped")


class Hanging(Counter):
    def stop(self) -> None:
        note(self.log, "stopping")
        while True:
            time.sleep(0.005)


class Broken(Counter):
    def __init__(self, log: str) -> None:
        super().__init__(log)
        raise LookupError("no such thing", 5)

    def stop(self) -> None:
        raise AssertionError("it has never started")


class Failing(Counter):
    def stop(self) -> None:
        raise OSError("won't")


class Wide(Counter):
    __flame_concurrency__ = 3


def spin(log: str) -> None:
    note(log)
    try:
        while True:
            time.sleep(0.005)
    finally:
        note(log, "over")


async def spin_async(log: str) -> None:
    note(log)
    try:
        await asyncio.sleep(60)
    finally:
        note(log, "over")

"""What runs on the runners of a chaos run: each function records its own start, then its end.

It needs the standard library alone, and every runner can import it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

#: The run that a process belongs to, and which of its parents, as ``run/parent``: every process
#: below a parent inherits it.
MARKER: Final = "FLAME_CHAOS"

#: A process that a call has started, and which call.
CALL_MARKER: Final = "FLAME_CHAOS_CALL"

#: The folder in which this run keeps its records.
FOLDER: Final = "FLAME_CHAOS_FOLDER"

#: What the random choices of the run are made with.
SEED: Final = "FLAME_CHAOS_SEED"

#: The percentage of boots that fail.
FAILING: Final = "FLAME_CHAOS_FAILING_BOOTS"

#: The pid of the runner: a call may run in a process below it.
RUNNER: Final = "FLAME_CHAOS_RUNNER"

#: How often work without an end says that it goes on, in seconds.
BEAT: Final = 0.5

#: Seconds that work without an end would take. Much longer than any call may.
WITHOUT_END: Final = 60.0

CHUNK: Final = 16 * 2**20


def append(path: Path, what: str, **fields: Any) -> None:
    """Add a line to a file: with one write, so it is there or it is not, whoever dies when.

    Parameters
    ----------
    path
        The file. It is made if there is none.
    what
        The kind of line.
    fields
        What else it says. The time is added: monotonic, and the same clock in all processes.
    """
    line = json.dumps({"what": what, "at": time.monotonic(), **fields}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def note(what: str, call: str) -> None:
    """Record what a call does, from inside of it."""
    # Without the variable: a runner leads a session, in which all that it starts stays.
    runner = int(os.environ.get(RUNNER, os.getsid(0)))
    path = Path(os.environ[FOLDER], "starts.jsonl")
    append(path, what, call=call, pid=os.getpid(), runner=runner)


@contextlib.contextmanager
def running(call: str) -> Iterator[None]:
    """Record that a call has started (F1), and how it ends: by itself, or by an exception."""
    note("start", call)
    try:
        yield
    except BaseException:
        note("broke", call)
        raise
    note("end", call)


# -- work that ends --------------------------------------------------------------------------------


def quick(call: str) -> str:
    """Do nothing."""
    with running(call):
        return call


def large(call: str, payload: bytes) -> tuple[str, bytes]:
    """Take and return what is too large to travel with the news that the call is done."""
    with running(call):
        return call, payload


def work(call: str, seconds: float) -> str:
    """Take a while."""
    with running(call):
        time.sleep(seconds)
        return call


async def wait(call: str, seconds: float) -> str:
    """Take a while on the runner's event loop."""
    with running(call):
        await asyncio.sleep(seconds)
        return call


def raises(call: str) -> str:
    """Fail as functions do."""
    with running(call):
        raise ValueError(call)


def exits(call: str) -> str:
    """End the process without a word."""
    with running(call):
        os._exit(3)


def dies(call: str) -> str:
    """Die by a signal."""
    with running(call):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(WITHOUT_END)
        return call


def fills_memory(call: str, most: int) -> str:
    """Take memory, up to ``most`` bytes, and keep it."""
    with running(call):
        taken: list[bytes] = []
        while len(taken) * CHUNK < most:
            taken.append(b"x" * CHUNK)  # unlike zeros, it really takes the memory
            time.sleep(0.02)
        time.sleep(WITHOUT_END)
        return call


# -- work without an end, which has to be ended ----------------------------------------------------


def sleeps(call: str) -> str:
    """Hang in a system call, where no exception reaches a thread."""
    with running(call):
        time.sleep(WITHOUT_END)
        return call


def spins(call: str) -> str:
    """Loop in Python code."""
    with running(call):
        end = time.monotonic() + WITHOUT_END
        beat = 0.0
        while (now := time.monotonic()) < end:
            if now > beat:
                note("beat", call)
                beat = now + BEAT
        return call


def never_returns(call: str) -> str:
    """Stay in C code that gives the interpreter free, but does not come back to it."""
    with running(call):
        hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000_000)
        return call


def swallows(call: str) -> str:
    """Take no notice of any exception, nor of SIGTERM where it can."""
    with running(call):
        with contextlib.suppress(ValueError):  # in a thread there is no way
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end = time.monotonic() + WITHOUT_END
        beat = 0.0
        while (now := time.monotonic()) < end:
            with contextlib.suppress(BaseException):
                if now > beat:
                    note("beat", call)
                    beat = now + BEAT
                time.sleep(0.02)
        return call


async def waits_for_ever(call: str) -> str:
    """Wait on the event loop."""
    with running(call):
        await asyncio.sleep(WITHOUT_END)
        return call


def starts_program(call: str) -> str:
    """Wait for another program."""
    with running(call):
        subprocess.run(["sleep", f"{WITHOUT_END:g}"], env=_marked(call), check=True)
        return call


def starts_family(call: str) -> str:
    """Wait for a program that has started another one."""
    with running(call):
        script = f"sleep {WITHOUT_END:g} & sleep {WITHOUT_END:g}; wait"
        subprocess.run(["sh", "-c", script], env=_marked(call), check=True)
        return call


def _marked(call: str) -> dict[str, str]:
    return {**os.environ, CALL_MARKER: call}


ENDLESS: Final[dict[str, Callable[[str], Any]]] = {
    function.__name__: function
    for function in (
        sleeps,
        spins,
        never_returns,
        swallows,
        waits_for_ever,
        starts_program,
        starts_family,
    )
}
"""All of them, by name."""


# -- what lives on ---------------------------------------------------------------------------------


class Tally:
    """Counts. It is placed as a child, or kept (H, I)."""

    def __init__(self, call: str) -> None:
        note("start", call)
        self.call = call
        self.total = 0

    def add(self, seconds: float) -> int:
        """Count one, and take a while."""
        time.sleep(seconds)
        self.total += 1
        return self.total

    def stop(self) -> None:
        """Come to an end in good order."""
        note("end", self.call)


def keeps(call: str) -> Any:
    """Return something that stays here."""
    from flame_dask import keep

    return call, [keep(Tally(call))]


def counts(call: str, most: int) -> Iterator[int]:
    """Yield numbers."""
    with running(call):
        yield from range(most)


# -- what a pool asks its runners ------------------------------------------------------------------


def is_idle() -> bool:
    """Answer an idle check: yes, no, or not at all (D2)."""
    answer = random.random()
    if answer < 0.2:
        raise RuntimeError("this idle check fails on purpose")
    return answer < 0.7

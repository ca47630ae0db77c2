"""A watch on the memory of a runner: what takes too much is ended before the machine suffers (F2).

Dask's own watch is made for data: it pauses a worker and writes results to disk. A call that fills
the memory is not ended by it without a nanny, and with one the whole worker is.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import psutil

from flame_dask.constants import OOM_EXIT
from flame_dask.runner import offspring

if TYPE_CHECKING:
    from flame_dask.runner.isolated import CallProcess, CallProcesses

logger = logging.getLogger("flame_dask.runner")

#: Seconds between two looks while calls run.
EVERY: Final = 0.05

#: A look for other processes than the known ones costs more, so it is taken every so many looks.
ALL_EVERY: Final = 10

#: The part of the limit that a call must have taken for its end to be of use.
WORTH_IT: Final = 0.1

#: Seconds for a process that was killed to give its memory back.
AFTERWARDS: Final = 1.0

_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


def resident(pid: int) -> int:
    """Return the bytes of memory that a process has; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError, ValueError):
        pass  # gone, or not Linux
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def growth(process: CallProcess) -> int:
    """Return the bytes that the process of a call has taken beyond what it shares."""
    return max(resident(process.pid) - process.baseline, 0)


def taken(process: CallProcess) -> int:
    """Return the bytes that a call has taken, with all that it has started."""
    rest = [member.pid for member in offspring.members(process.pid) if member.pid != process.pid]
    return growth(process) + sum(map(resident, rest))


class MemoryWatch:
    """Ends what takes more memory than the runner may have.

    That is the process of a call, if calls have processes of their own: of those the one that has
    taken most. Otherwise nobody can tell which call it was, and it is the runner.

    Parameters
    ----------
    limit
        Bytes, for the runner with all processes below it.
    processes
        The processes of calls, if they have their own.
    busy
        Tells whether calls run.
    """

    def __init__(
        self, limit: int, processes: CallProcesses | None, busy: Callable[[], bool]
    ) -> None:
        self._limit = limit
        self._processes = processes
        self._busy = busy
        self._others: list[int] = []
        self._stop = threading.Event()
        # A thread: the event loop may be blocked by the very call that takes the memory.
        self._thread = threading.Thread(target=self._watch, name="flame-memory", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        looks = 0
        while not self._stop.wait(EVERY):
            if not self._busy():
                continue
            looks += 1
            if looks % ALL_EVERY == 1:
                self._look_around()
            if self.in_use() > self._limit:
                self._look_around()  # some of them may have ended since
                used = self.in_use()
                if used > self._limit:
                    self._relieve(used)

    def in_use(self) -> int:
        """Return the bytes in use: what processes share by a fork counts once."""
        own = resident(os.getpid())
        calls = [] if self._processes is None else self._processes.all()
        return own + sum(map(growth, calls)) + sum(map(resident, self._others))

    def _look_around(self) -> None:
        """Find what else runs, but for processes of calls: those that wait share all they have."""
        nursery = None if self._processes is None else self._processes.nursery
        others = []
        with suppress(psutil.Error):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if nursery is None or process.ppid() != nursery:
                        others.append(process.pid)
        self._others = others

    def _relieve(self, used: int) -> None:
        told = f"{used / 2**20:,.0f} of {self._limit / 2**20:,.0f} MiB in use"
        takes = {} if self._processes is None else {p: taken(p) for p in self._processes.busy()}
        process = max(takes, key=lambda process: takes[process], default=None)
        if process is None or takes[process] < self._limit * WORTH_IT:
            logger.error("the runner is out of memory: %s", told)
            offspring.end_process(OOM_EXIT)
            return
        logger.warning("a call is out of memory: %s; its process is killed", told)
        process.out_of_memory = True
        process.signal(signal.SIGKILL)
        # Its memory is free in a moment: no other one is to blame until then.
        end = time.monotonic() + AFTERWARDS
        while process.has_group() and time.monotonic() < end:
            self._stop.wait(EVERY)

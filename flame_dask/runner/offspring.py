"""The processes that calls have started, and their end (E3).

Linux would know which thread has started a process, but many a kernel is built without telling
(``/proc/PID/task/TID/children``). So it is written down where Python starts one: the few functions
by which ``subprocess`` and ``multiprocessing`` do it are wrapped, in the processes of runners only.
A process that C code starts, ``os.system`` for instance, is not seen.
"""

from __future__ import annotations

import _posixsubprocess
import functools
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, Final

import psutil

from flame_dask.system import is_running

#: Seconds between two looks whether a process has ended.
_PAUSE: Final = 0.02

#: The list into which the pids of processes go that are started in the present context, which is
#: that of a call: in its thread or coroutine, and where ``asyncio.to_thread`` takes it.
ledger: ContextVar[list[int] | None] = ContextVar("flame_offspring", default=None)

_lock = threading.Lock()
_installed = False


def install() -> None:
    """Have the processes written down that are started in this process from now on."""
    global _installed  # noqa: PLW0603  # it is done once a process
    with _lock:
        if _installed:
            return
        _installed = True
    for module, name in (
        (_posixsubprocess, "fork_exec"),
        (subprocess, "_fork_exec"),
        (os, "fork"),
        (os, "forkpty"),
        (os, "posix_spawn"),
        (os, "posix_spawnp"),
    ):
        real = getattr(module, name, None)
        if real is not None:
            setattr(module, name, _noting(real))


def _noting(start: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(start)
    def start_and_note(*args: Any, **kwargs: Any) -> Any:
        result = start(*args, **kwargs)
        book = ledger.get()
        if book is not None:
            pid = result[0] if type(result) is tuple else result  # forkpty gives two
            if pid:
                book.append(pid)
            else:
                book.clear()  # the forked child: those were its parent's
        return result

    return start_and_note


def family(pids: Iterable[int]) -> list[psutil.Process]:
    """Find those of these children of this process that still run, with all that they started."""
    found = []
    mine = os.getpid()
    for pid in pids:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if process.ppid() == mine:  # not another one that has got its number
                found += [process, *process.children(recursive=True)]
    return [process for process in found if is_running(process)]


def members(group: int) -> list[psutil.Process]:
    """Find the processes of a process group."""
    found = []
    for pid in psutil.pids():
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            if os.getpgid(pid) == group:
                found.append(psutil.Process(pid))
    return [process for process in found if is_running(process)]


def send(processes: Iterable[psutil.Process], number: int) -> None:
    """Send a signal to processes, as far as they are there."""
    for process in processes:
        with suppress(psutil.Error, OSError):
            process.send_signal(number)


def outlast(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until processes have ended; return those that have not after so many seconds.

    Not by ``waitpid``: whoever has started them waits for their exit codes.
    """
    end = time.monotonic() + seconds
    while True:
        processes = [process for process in processes if is_running(process)]
        if not processes or time.monotonic() >= end:
            return processes
        time.sleep(_PAUSE)


def kill_children() -> None:
    """Kill all processes below this one."""
    with suppress(psutil.Error):
        send(psutil.Process().children(recursive=True), signal.SIGKILL)


def end_process(code: int | None = None) -> None:
    """End this process and all that it has started, at once; it does not return.

    Parameters
    ----------
    code
        Its exit code. Without one it is killed by a signal along with its process group, if it
        leads one.
    """
    kill_children()
    if code is None and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1 if code is None else code)


def end_process_after(seconds: float) -> None:
    """End this process after a time, unless it has ended by then.

    Threads that a call has left behind would keep it for ever from its ordinary end.
    """

    def wait() -> None:
        time.sleep(seconds)
        end_process()

    # A daemon, so that it does not keep the process itself.
    threading.Thread(target=wait, name="flame-last-resort", daemon=True).start()

"""Preload of a scheduler process: it ends with the parent that started it (G3).

The parent holds the only write end of the pipe that is the process's standard input. When the pipe
ends, the parent is gone. A pool's plugin winds the pool up then, for as long as work that is not
linked may go on (G2), and ends the scheduler. What is here is for a scheduler that has no plugin
yet, and for one whose plugin doesn't come to its end.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flame_dask.constants import LAST_RESORT
from flame_dask.system import take_lifeline

if TYPE_CHECKING:
    from distributed import Scheduler


async def dask_setup(scheduler: Scheduler) -> None:
    """Watch the pipe from now on; called by Dask when the scheduler starts."""
    # A daemon: it must not keep the process from its ordinary end.
    watch = threading.Thread(
        target=_watch, args=(take_lifeline(), scheduler), name="flame-parent-watch", daemon=True
    )
    watch.start()


async def dask_teardown(scheduler: Scheduler) -> None:
    """Remove the file in which the scheduler told its address: its parent may be gone."""
    _remove_file(scheduler)


def _remove_file(scheduler: Any) -> None:
    if scheduler.scheduler_file:
        Path(scheduler.scheduler_file).unlink(missing_ok=True)


def _watch(pipe: int, scheduler: Scheduler) -> None:
    while os.read(pipe, 1024):
        pass
    host: Any = scheduler.plugins.get("flame")
    if host is not None:
        with suppress(RuntimeError):  # the loop is closed, and the process about to end
            host.scheduler.loop.asyncio_loop.call_soon_threadsafe(host.parent_is_gone)
    limit = 0.0 if host is None else host.options.shutdown_timeout
    if limit is None:
        return  # work that isn't linked may take as long as it likes
    wait = threading.Event()
    wait.wait(limit + LAST_RESORT if host is not None else limit)
    _remove_file(scheduler)
    os.kill(os.getpid(), signal.SIGKILL)

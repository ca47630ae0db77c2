"""A runner that the parent has started itself ends with its parent, however that dies (G3).

The parent holds the only write end of the pipe that is the runner's standard input. When the pipe
ends, the parent is gone: linked work is ended, other work may go on for the pool's
``shutdown_timeout`` (G1, G2), and the process ends. It also ends if it has not become a runner
within the boot timeout, because it can't reach its scheduler for instance.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from flame_dask.constants import LAST_RESORT
from flame_dask.runner import offspring
from flame_dask.runner.guard import Guard
from flame_dask.system import take_lifeline

if TYPE_CHECKING:
    from flame_dask.runner.plugin import FlameRunner

logger = logging.getLogger("flame_dask.runner")

#: Seconds that a runner with nothing left to do may take for its end.
CLOSING: Final = LAST_RESORT / 2

#: Seconds between two looks whether unlinked work goes on.
_PAUSE: Final = 0.2


class ParentWatch:
    """Watches the pipe to the parent.

    That is done in a thread, which goes on when the event loop is blocked.

    Parameters
    ----------
    folder
        The runner's own folder, which goes with it.
    boot_timeout
        Seconds within which this process has to be a runner; ``None`` is no limit.

    Attributes
    ----------
    guard
        Ends what is left when this process dies.
    """

    def __init__(self, folder: str, boot_timeout: float | None) -> None:
        self._runner: FlameRunner | None = None
        self._boot_timeout = boot_timeout
        self._due = None if boot_timeout is None else time.monotonic() + boot_timeout
        self._pipe = take_lifeline()  # it is not for what a call reads from its standard input
        group = os.getpid() if os.getpgrp() == os.getpid() else None
        self.guard = Guard(group, folder, self._pipe)
        # A daemon: it must not keep the process from its ordinary end.
        threading.Thread(target=self._watch, name="flame-parent-watch", daemon=True).start()

    def ready(self, runner: FlameRunner) -> None:
        """Take note that this process is a runner now."""
        self._runner = runner
        self.guard.limit = runner.shutdown_timeout

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        while True:
            left = None
            if self._due is not None and self._runner is None:
                left = max(self._due - time.monotonic(), 0.0) * 1000
            if poll.poll(left):
                if not os.read(self._pipe, 1024):
                    break
            elif self._runner is None:
                logger.error("no runner of a pool after %g s: ending", self._boot_timeout)
                offspring.end_process(1)
        self._end()

    def _end(self) -> None:
        """End this process, since the parent is gone."""
        runner = self._runner
        if runner is None:
            offspring.end_process()
            return
        runner.parent_is_gone()
        # It sees to its own end now; what follows is for one that can't.
        limit = runner.shutdown_timeout
        end = float("inf") if limit is None else time.monotonic() + limit
        while runner.terminator.has_unlinked() and time.monotonic() < end:
            time.sleep(_PAUSE)
        time.sleep(CLOSING)
        offspring.end_process()


def _nothing() -> None:
    pass


#: Stops the clock of a runner that has come from elsewhere; see ``flame_dask.runner.arrival``.
arrived: Callable[[], object] = _nothing

#: This process's watch, if it was started as a runner by its parent.
watch: ParentWatch | None = None

"""Preload of a runner process that the parent starts itself: it ends with its parent (G3).

To import it is all that has to be done. Dask does so before the worker connects to its scheduler.
In a process that was started in another way nothing happens.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from flame_dask.constants import BOOT_TIMEOUT, RUNNER_FOLDER
from flame_dask.runner import lifeline

# Not for the processes that calls start: they are no runners.
_folder = os.environ.pop(RUNNER_FOLDER, None)
_timeout = os.environ.pop(BOOT_TIMEOUT, None)

with suppress(OSError):  # there need not be a standard input
    if _folder is not None and stat.S_ISFIFO(os.fstat(0).st_mode):
        limit = None if _timeout is None else float(_timeout)
        lifeline.watch = lifeline.ParentWatch(_folder, limit)

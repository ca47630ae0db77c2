"""Preload of a runner process that the parent starts itself: it ends with its parent (G3).

To import it is all that has to be done. Dask does so before the worker connects to its scheduler.
In a process that was started in another way nothing happens.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress

import dask

from flame_dask.constants import BOOT_TIMEOUT, ENVIRONMENT, RUNNER_FOLDER
from flame_dask.runner import lifeline


def dask_setup(worker: object) -> None:
    """Forget what was in the environment for this runner alone; called by Dask."""
    forget_secrets()


def forget_secrets() -> None:
    """Take the certificates out of what calls can see; the worker has them by now.

    What calls start is no part of the pool, and needs no encryption on its account either.
    """
    mine = [name for name in os.environ if name.startswith(ENVIRONMENT)]
    for name in mine:
        del os.environ[name]
    if mine:
        dask.config.refresh()


# Not for the processes that calls start: they are no runners.
_folder = os.environ.pop(RUNNER_FOLDER, None)
_timeout = os.environ.pop(BOOT_TIMEOUT, None)

with suppress(OSError):  # there need not be a standard input
    mode = os.fstat(0).st_mode
    # A server for SSH may give a pipe or a socket.
    if _folder is not None and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        limit = None if _timeout is None else float(_timeout)
        lifeline.watch = lifeline.ParentWatch(_folder, limit)

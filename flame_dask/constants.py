"""What the parts of a pool agree upon that live in different processes."""

from __future__ import annotations

from typing import Final

#: Environment variable: the folder that belongs to a runner alone, and goes with it.
RUNNER_FOLDER: Final = "FLAME_RUNNER_FOLDER"

#: Environment variable: the seconds within which a runner has to be ready; absent is no limit.
BOOT_TIMEOUT: Final = "FLAME_BOOT_TIMEOUT"

#: How the environment variables begin that are for a runner's own part of Dask, not for its calls.
ENVIRONMENT: Final = ("DASK_DISTRIBUTED__COMM__", "DASK_DISTRIBUTED__WORKER__PRELOAD")

#: Exit code of a runner that has run out of memory.
OOM_EXIT: Final = 86

#: Seconds that the runner and the host grant each other for a deadline that both watch.
GRACE_MARGIN: Final = 0.5

#: Why work is ended on a runner that has been told to go (E5).
LEAVES: Final = "runner leaves"

#: Seconds after which a process that ought to have ended by itself is killed.
LAST_RESORT: Final = 10.0

"""A runner's own folder, which goes with it, however that ends."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

#: How these folders are called, and the files beside them that are locked as long as they live.
PREFIX: Final = "flame-code-"
_LOCK: Final = ".lock"


class OwnFolder:
    """A folder of this process alone.

    A process that is killed leaves it behind. So it is locked while it is in use, and whoever makes
    the next one in the same place removes those that nobody holds any more.

    Parameters
    ----------
    base
        Where it is made.

    Attributes
    ----------
    path
        The folder.

    Raises
    ------
    OSError
        It can't be made.
    """

    def __init__(self, base: Path) -> None:
        base.mkdir(parents=True, exist_ok=True)
        remove_abandoned(base)
        # The lock comes first: a folder without one would be taken for abandoned.
        self._lock, self._file = _locked(base)
        self.path = Path(str(self._file).removesuffix(_LOCK))
        self.path.mkdir(mode=0o700)

    def remove(self) -> None:
        """Remove it with all that is in it."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            self._file.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = -1


def _locked(base: Path) -> tuple[int, Path]:
    """Make a file and lock it."""
    while True:
        lock, name = tempfile.mkstemp(prefix=PREFIX, suffix=_LOCK, dir=base)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return lock, Path(name)
        # Another process has found it before it was locked, and taken it for abandoned.
        os.close(lock)


def remove_abandoned(base: Path) -> None:
    """Remove what processes have left behind that did not come to their end."""
    for file in base.glob(f"{PREFIX}*{_LOCK}"):
        with suppress(OSError):
            lock = os.open(file, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(str(file).removesuffix(_LOCK), ignore_errors=True)
                file.unlink()
            finally:
                os.close(lock)

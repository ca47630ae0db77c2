"""The watched code of a parent: which revision of it there is (J3)."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from flame_dask.code_sync.archive import Member, sendable
from flame_dask.code_sync.inotify import Inotify
from flame_dask.code_sync.manifest import Difference, Entry, Revisions
from flame_dask.code_sync.trees import Folder, Tree

#: Seconds after which all files are looked at though the kernel knows of no change: it does not
#: hear of what other machines write to a shared folder.
LOOK_EVERY: Final = 2.0

#: Where the kernel tells of nothing, the looks take at most this part of the time.
SHARE: Final = 0.1

#: Nanoseconds. The clock of a file system has ticks: what was written to a file as late as this
#: before it was looked at may be followed by more that shows in no time stamp.
_YOUNG: Final = 50_000_000

_Stat = tuple[int, int, int, int, int]

logger = logging.getLogger("flame_dask")


class CodeWatch:
    """Knows the files of some trees, and counts their revisions.

    Parameters
    ----------
    trees
        What is watched.
    """

    def __init__(self, trees: Sequence[Tree]) -> None:
        self._trees = list(trees)
        self._revisions = Revisions()
        self._lock = threading.Lock()
        self._stats: dict[Path, tuple[_Stat, Entry]] = {}
        self._sources: dict[str, Path] = {}
        self._inotify: Inotify | None = None
        self._folders: set[Folder] = set()
        self._suspects: set[Path] = set()
        self._paths: dict[Path, list[str]] = {}
        self._targets: set[Path] = set()  # of links, which are not known by their own path
        self._unreadable: set[Path] = set()
        self._all = True  # whether everything has to be looked at
        self._looked = float("-inf")
        self._took = 0.0
        self._closed = False

    def revision(self) -> int:
        """Return the number of what is on disk now; in any thread.

        Where the kernel tells of changes, that is exact. Elsewhere files are looked at, at most
        ``SHARE`` of the time.
        """
        with self._lock:
            if self._is_due():
                # The usual case by far: files that are known were written to, and nothing else.
                if (
                    self._suspects
                    and not self._all
                    and self._suspects <= self._paths.keys()
                    and self._suspects.isdisjoint(self._targets)
                ):
                    self._look_at_suspects()
                else:
                    self._look()
            return self._revisions.number

    def suspect(self) -> None:
        """Look at everything next time: something is not as it was thought to be."""
        with self._lock:
            self._looked = float("-inf")
            self._all = True
            self._stats.clear()

    def since(self, revision: int) -> tuple[int, Difference, list[Member]]:
        """Return the present revision, what has changed since another one, and where it lies."""
        with self._lock:
            found = self._revisions.since(revision)
            members = [
                Member(path, self._sources[path], self._revisions.entries[path].digest)
                for path in found.changed
            ]
            return self._revisions.number, found, members

    def close(self) -> None:
        """Watch no longer."""
        with self._lock:
            self._closed = True
            if self._inotify is not None:
                self._inotify.close()
                self._inotify = None

    def _is_due(self) -> bool:
        if self._closed or not self._trees:
            return False
        ago = time.monotonic() - self._looked
        if self._inotify is None:
            return ago >= self._took / SHARE
        news = self._inotify.news()
        if news is None:
            self._inotify.close()
            self._inotify, self._folders, self._all = None, set(), True
            return True
        self._suspects |= news.named
        # A log, say, that is written in the same folder is none of the files.
        self._suspects |= {
            file for file in news.written if file in self._paths or file in self._targets
        }
        self._all = self._all or ago >= max(LOOK_EVERY, self._took / SHARE)
        return bool(self._suspects) or self._all

    def _look_at_suspects(self) -> None:
        present = dict(self._revisions.entries)
        now = time.time_ns()
        for source in self._suspects:
            entry = self._entry(source, now)
            for path in self._paths[source]:
                present.pop(path, None)
                if entry is not None:
                    present[path] = entry
        self._revisions.advance(present)
        self._suspects.clear()

    def _look(self) -> None:
        begun = time.monotonic()
        now = time.time_ns()
        found = self._find()
        # What is seen in a file that was young when it was last looked at need not be all.
        entries = {path: self._entry(source, now) for path, source in found.items()}
        present = {path: entry for path, entry in entries.items() if entry is not None}
        self._sources = found
        self._sources = found
        self._paths = {}
        for path, source in found.items():
            self._paths.setdefault(source, []).append(path)
        self._revisions.advance(present)
        self._suspects.clear()
        if len(self._stats) > 2 * len(found):
            known = set(found.values())
            self._stats = {path: seen for path, seen in self._stats.items() if path in known}
        self._all = False
        self._looked = time.monotonic()
        self._took = self._looked - begun

    def _find(self) -> dict[str, Path]:
        """Find the files, after whatever has to be watched is being watched."""
        while True:
            found: dict[str, Path] = {}
            folders: set[Folder] = set()
            targets: set[Path] = set()
            for tree in self._trees:
                walk = tree.walk()
                found |= walk.files
                folders |= walk.folders
                targets |= walk.targets
                for folder, error in walk.unreadable.items():
                    self._complain(folder, error)
            if self._folders == folders:
                self._targets = targets
                return found
            if self._inotify is not None:
                self._inotify.close()
            try:
                self._inotify = Inotify(folder for folder, _, _ in folders)
            except FileNotFoundError:  # one has gone meanwhile: the next walk finds others
                self._inotify = None
            except OSError as error:  # no such thing here, or no more of it
                self._inotify = None
                logger.info("watched code is looked at from time to time: %s", error)
            self._folders = folders

    def _entry(self, source: Path, now: int) -> Entry | None:
        try:
            status = os.stat(source)  # noqa: PTH116  # half the time, and there are many
            # That of its last change can't be set: a file may be written to and have its old time.
            changed = status.st_ctime_ns
            seen = changed, status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode
            known = self._stats.get(source)
            if known is not None and known[0] == seen and source not in self._suspects:
                return known[1]
            entry = Entry(status.st_size, stat.S_IMODE(status.st_mode), _digest(source))
        except (FileNotFoundError, NotADirectoryError):
            return None  # it has gone meanwhile
        except OSError as error:
            self._complain(source, error)
            return None
        if now - changed > _YOUNG:
            self._stats[source] = seen, entry
        else:
            self._stats.pop(source, None)
        return entry

    def _complain(self, source: Path, error: OSError) -> None:
        if source not in self._unreadable:
            self._unreadable.add(source)
            text = sendable(f"{source} can't be read, and so is not on the runners: {error}")
            logger.warning("%s", text)


def _digest(source: Path) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

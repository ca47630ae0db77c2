"""What a tree of files holds, and in what it differs from what it held before. Pure.

The parent counts *revisions*: each time that it finds something changed, there is one more. For
each path it remembers the revision in which that changed last, also for one that is gone. So what
a runner lacks follows from one number, however long it has not been heard of, and nothing has to
be remembered for each runner.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Entry(NamedTuple):
    """What makes one file different from another.

    Examples
    --------
    >>> Entry(3, 0o644, "ab") == Entry(3, 0o755, "ab")
    False
    """

    size: int
    """Bytes."""
    mode: int
    """Permission bits."""
    digest: str
    """SHA-256 of what is in it."""


class Difference(NamedTuple):
    """What one side has to do to have what the other one has: paths, each in order."""

    changed: tuple[str, ...] = ()
    """New, or not as they were."""
    deleted: tuple[str, ...] = ()
    """Not there any more."""


def difference(old: Mapping[str, Entry], new: Mapping[str, Entry]) -> Difference:
    """Compare two manifests.

    Parameters
    ----------
    old, new
        Entries by path.

    Returns
    -------
    Difference
        What leads from the one to the other.

    Examples
    --------
    >>> a, b = Entry(1, 0o644, "a"), Entry(1, 0o644, "b")
    >>> difference({"x": a, "y": a}, {"y": b, "z": a})
    Difference(changed=('y', 'z'), deleted=('x',))
    """
    changed = sorted(path for path, entry in new.items() if old.get(path) != entry)
    return Difference(tuple(changed), tuple(sorted(old.keys() - new.keys())))


class Revisions:
    """The revisions of a manifest.

    Attributes
    ----------
    number
        The present revision; 0 is that of one in which there has never been anything.
    entries
        What is there, by path.

    Examples
    --------
    >>> revisions = Revisions()
    >>> revisions.advance({"a": Entry(1, 0o644, "1"), "b": Entry(1, 0o644, "1")})
    1
    >>> revisions.advance({"a": Entry(1, 0o644, "2")})
    2
    >>> revisions.since(1)
    Difference(changed=('a',), deleted=('b',))
    >>> revisions.since(2)
    Difference(changed=(), deleted=())
    """

    def __init__(self) -> None:
        self.number = 0
        self.entries: dict[str, Entry] = {}
        self._latest: dict[str, int] = {}

    def advance(self, new: Mapping[str, Entry]) -> int:
        """Take what is there now; return the present revision, another one if it differs."""
        changed, deleted = difference(self.entries, new)
        if changed or deleted:
            self.number += 1
            self._latest.update(dict.fromkeys([*changed, *deleted], self.number))
            self.entries = dict(new)
        return self.number

    def since(self, revision: int) -> Difference:
        """Return what has changed since a revision."""
        paths = sorted(path for path, number in self._latest.items() if number > revision)
        return self.among(paths)

    def among(self, paths: Iterable[str]) -> Difference:
        """Part paths into those that are there and those that are not."""
        changed: list[str] = []
        deleted: list[str] = []
        for path in paths:
            (changed if path in self.entries else deleted).append(path)
        return Difference(tuple(changed), tuple(deleted))

"""Where a program is: in a runner of a pool, or not (A7)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flame_dask import package

#: Tells this process from all others, also from one that has its pid later.
_process = uuid.uuid4().hex


@dataclass(frozen=True)
class Parent:
    """What a runner knows of the process that started it.

    Attributes
    ----------
    pool
        The name of the pool.
    runner
        The id of the runner that this is.
    backend
        Where runners come from: the name of the cluster class.
    versions
        The parent's versions: of ``python``, ``dask``, ``distributed`` and ``flame_dask``.
    files
        The folder with the files of the pool's ``copy_paths``; ``None`` without code sync (J2).
    """

    pool: str
    runner: str
    backend: str
    versions: Mapping[str, str]
    files: Path | None = None


class ParentInfo(NamedTuple):
    """What a parent tells its runners of itself; :func:`describe` makes it."""

    pool: str
    backend: str
    versions: dict[str, str]
    process: str


_parent: Parent | None = None


def describe(pool: str, backend: str) -> ParentInfo:
    """Say what runners are to know of this process.

    Parameters
    ----------
    pool
        The name of the pool.
    backend
        The name of its cluster class.
    """
    return ParentInfo(pool, backend, package.versions(), _process)


def process() -> str:
    """Return what tells this process from all others; a forked one has its own."""
    return f"{_process}-{os.getpid()}"


def is_parent(info: ParentInfo | None) -> bool:
    """Tell whether this process is the parent itself: a cluster may have its workers in it."""
    return info is not None and info.process == _process


def become_another() -> None:
    """Take note that this process was forked, and is to be told from the one that it comes from."""
    global _process  # noqa: PLW0603  # there is one such thing a process
    _process = uuid.uuid4().hex


def arrive(info: ParentInfo | None, runner: str, files: Path | None = None) -> None:
    """Take note that this process is a runner, unless it is the parent itself."""
    global _parent  # noqa: PLW0603  # there is one such thing a process
    if info is not None and not is_parent(info):
        _parent = Parent(info.pool, runner, info.backend, info.versions, files)


def depart() -> None:
    """Take note that this process is no runner any more."""
    global _parent  # noqa: PLW0603
    _parent = None


def parent() -> Parent | None:
    """Say whether this is a runner, and of which pool (A7).

    An application can so leave out in a runner what only its parent needs, such as a web server.

    Returns
    -------
    Parent or None
        In a runner, also in threads and processes that run its calls, what it knows of its
        parent; ``None`` everywhere else.

    Examples
    --------
    >>> parent() is None
    True
    """
    return _parent


__all__ = [
    "Parent",
    "ParentInfo",
    "arrive",
    "become_another",
    "depart",
    "describe",
    "is_parent",
    "parent",
]

"""The parent's side: what its runners are to have, and the streams in which they get it."""

from __future__ import annotations

import importlib.metadata
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from flame_dask.code_options import CodeSync
from flame_dask.code_sync.archive import (
    ChangedMeanwhile,
    Member,
    Packer,
    Refused,
    pack,
    sendable,
)
from flame_dask.code_sync.manifest import Difference
from flame_dask.code_sync.packages import used
from flame_dask.code_sync.trees import Tree, app_trees, copied_members, copied_paths, sync_trees
from flame_dask.code_sync.watch import CodeWatch

logger = logging.getLogger("flame_dask")

#: Bytes of one answer, as far as whole chunks go: each is a trip there and back.
ANSWER: Final = 1 << 20

Message = dict[str, Any]


class CodeSource:
    """What the runners of one pool get of the parent's code and files.

    Parameters
    ----------
    options
        What that is.
    pool
        The pool's name, for the log.

    Raises
    ------
    PoolOptionsError
        If a module is not there, or two paths would have the same place.
    """

    def __init__(self, options: CodeSync, pool: str) -> None:
        self.options = options
        self._pool = pool
        self._places = copied_paths(options, Path.cwd())
        self._watched = sync_trees(options)
        self._apps = app_trees() if options.copy_apps else []
        self._watch = CodeWatch(self._watched)
        self._streams: dict[str, _Stream] = {}
        self._numbers = itertools.count(1)

    def revision(self) -> int:
        """Return the revision that the next call is to run with; in any thread."""
        return self._watch.revision()

    def answer(self, runner: str, since: int, stream: int = 0) -> Message:
        """Answer a runner that asks for code; in one thread only.

        Parameters
        ----------
        runner
            Its id.
        since
            The revision that it has; negative if it has nothing yet.
        stream
            The number of the stream that it wants more of; 0 for a new one.

        Returns
        -------
        dict
            What msgpack can carry: ``chunks``, and ``digest`` with the last of them. The first
            answer of a stream also has its number, the ``revision``, and what is ``deleted``; the
            very first one says what else there is to do. If it has to be tried again, there is a
            text ``again``, if that is of no use, ``refused``.
        """
        try:
            if not stream:
                return self._begin(runner, since)
            open_stream = self._streams.get(runner)
            if open_stream is None or open_stream.number != stream:
                return {"again": "this copy is not going on any more"}
            return self._more(runner, open_stream)
        except ChangedMeanwhile as error:
            self._watch.suspect()
            self.drop(runner)
            return {"again": sendable(str(error))}
        except (Refused, OSError) as error:
            self.drop(runner)
            return {"refused": sendable(str(error))}

    def _begin(self, runner: str, since: int) -> Message:
        self.drop(runner)
        self._watch.revision()
        message: Message = {}
        stream: Iterator[Member]
        if since < 0:
            revision, found, members = self._watch.since(0)
            message |= self._first()
            found = Difference(found.changed)
            stream = itertools.chain(copied_members(self._places), self._app_members(), members)
        else:
            revision, found, members = self._watch.since(since)
            stream = iter(members)
        packer = Packer(
            pack(stream), chunk_size=self.options.chunk_size, compress=self.options.compress
        )
        opened = self._streams[runner] = _Stream(next(self._numbers), packer)
        message |= {"stream": opened.number, "revision": revision}
        message["deleted"] = [os.fsencode(path) for path in found.deleted]
        if self.options.verbose and since >= 0:
            names = sendable(", ".join(sum(found, ())))
            logger.info("pool %s: %s gets %s", self._pool, runner, names)
        return message | self._more(runner, opened)

    def _first(self) -> Message:
        options = self.options
        trees = [*self._watched, *self._apps]
        return {
            "on_path": [os.fsencode(self._path_of(tree)) for tree in trees],
            "packages": used(trees) if options.packages != "ignore" else {},
            "only_warn": options.packages == "warn",
            "apps": self._app_names(),
            "compressed": options.compress,
        }

    @staticmethod
    def _path_of(tree: Tree) -> str:
        [*pieces] = tree.pieces
        archive = len(pieces) == 1 and pieces[0][0].endswith((".zip", ".egg"))
        return f"{tree.name}/{pieces[0][0]}" if archive else tree.name

    def _app_names(self) -> list[str]:
        chosen = self.options.start_apps
        if isinstance(chosen, bool):
            found = importlib.metadata.entry_points(group="flame_dask.apps") if chosen else ()
            return [f"{entry.module}:{entry.attr}" for entry in found]  # not its extras
        return list(chosen)

    def _app_members(self) -> Iterator[Member]:
        # What is watched has one place on the runner: else it would still be there, in the other
        # one, when it has been deleted.
        without = frozenset(source for tree in self._watched for source in tree.sources)
        for tree in self._apps:
            for path, source in tree.walk(without).files.items():
                yield Member(path, source)

    def _more(self, runner: str, stream: _Stream) -> Message:
        chunks: list[bytes] = []
        total = 0
        for chunk in stream.packer:
            chunks.append(chunk)
            total += len(chunk)
            if total + self.options.chunk_size > ANSWER:
                return {"chunks": chunks}
        sent, digest = stream.packer.sent, stream.packer.digest
        self.drop(runner)
        if self.options.verbose:
            logger.info("pool %s: %s has been sent %d bytes", self._pool, runner, sent)
        return {"chunks": chunks, "digest": digest}

    def drop(self, runner: str) -> None:
        """Forget what a runner was getting: it has all, or is gone. In the same thread."""
        stream = self._streams.pop(runner, None)
        if stream is not None:
            stream.packer.close()

    def close(self) -> None:
        """Watch and send nothing more."""
        self._watch.close()
        for runner in list(self._streams):
            self.drop(runner)


class _Stream:
    def __init__(self, number: int, packer: Packer) -> None:
        self.number = number
        self.packer = packer

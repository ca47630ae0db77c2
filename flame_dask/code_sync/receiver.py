"""The runner's side: what comes in is put in its place, and out of it again."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from flame_dask.code_sync.archive import Chunks, Interrupted, Refused, inside, unpack
from flame_dask.code_sync.folder import OwnFolder
from flame_dask.code_sync.modules import module_name, unload
from flame_dask.code_sync.trees import CODE, FILES, is_library

#: How often a copy is begun anew whose files have changed under it.
ATTEMPTS: Final = 10

#: Seconds between two of them.
PAUSE: Final = 0.05

#: Seconds that an update gets to notice that the runner is closing.
LAST: Final = 5.0

#: How a file is called beside its place, before it is put there.
TEMPORARY: Final = ".flame-"

Message = dict[str, Any]


class Places(NamedTuple):
    """Where a runner puts what it gets, by the option; ``None`` is where it has its own files."""

    extract_dir: str | None
    tmp_dir: str | None


#: Asks the parent: takes the revision that is here, and the number of a stream.
Ask = Callable[[int, int], Message]


class NotCopied(Exception):
    """The parent's code could not be got; the text says why."""


class Receiver:
    """Gets code and files of the parent, and keeps them in a folder of its own.

    Parameters
    ----------
    ask
        Asks the parent, and waits for its answer.
    base
        Where the folder is made.
    tmp
        Where a folder is made for what has not arrived in full; ``None`` is within the other one.

    Attributes
    ----------
    revision
        The revision of the watched code that is here; negative if there is nothing yet.
    first
        What the parent said with the first copy.
    received
        Bytes of the last copy, as they came in.
    """

    def __init__(self, ask: Ask, base: Path, tmp: Path | None = None) -> None:
        self._ask = ask
        # Absolute, since a call may change the working folder.
        self._folder = OwnFolder(base.absolute())
        self._own_tmp = None if tmp is None else OwnFolder(tmp.absolute())
        self.revision = -1
        self.first: Message = {}
        self.received = 0
        self._on_path: list[str] = []
        self._stamp = 0
        self._updating = threading.Lock()
        self._closed = False
        self._texts: dict[str, bytes] = {}
        (self._folder.path / FILES).mkdir()
        (self._folder.path / CODE).mkdir()

    @property
    def files(self) -> Path:
        """Where the files of ``copy_paths`` are."""
        return self._folder.path / FILES

    def update(self) -> list[str]:
        """Get all, or what has changed since the last time.

        Returns
        -------
        list of str
            The modules that were unloaded.

        Raises
        ------
        NotCopied
            It did not work. What was there is there still.
        """
        with self._updating:
            reason = ""
            for attempt in range(ATTEMPTS):
                if attempt:
                    time.sleep(PAUSE)
                try:
                    return self._try()
                except _Again as again:
                    reason = str(again)
        raise NotCopied(f"the parent's files change all the time: {reason}")

    def _try(self) -> list[str]:
        answer = self._next(0)
        try:
            staging = Path(tempfile.mkdtemp(dir=(self._own_tmp or self._folder).path))
            try:
                paths = self._receive(answer, staging)
                return self._take_over(answer, staging, paths)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        except Refused as error:
            raise NotCopied(f"what the parent has sent is refused: {error}") from error
        except OSError as error:
            raise NotCopied(f"it can't be written: {error}") from error

    def _next(self, stream: int) -> Message:
        """Ask the parent."""
        answer = self._ask(self.revision, stream)
        if self._closed:
            raise NotCopied("the runner is closing")
        if "again" in answer:
            raise _Again(answer["again"])
        if "refused" in answer:
            raise NotCopied(answer["refused"])
        return answer

    def _receive(self, answer: Message, staging: Path) -> list[str]:
        """Unpack a copy, and check that all of it is there."""
        stream, current = answer["stream"], answer
        if self.revision < 0:
            self.first = {key: value for key, value in answer.items() if key != "chunks"}
        waiting = iter(current["chunks"])

        def take() -> bytes:
            nonlocal current, waiting
            while True:
                for chunk in waiting:
                    return bytes(chunk)
                if "digest" in current:
                    return b""
                current = self._next(stream)
                waiting = iter(current["chunks"])

        chunks = Chunks(take, compressed=self.first["compressed"])
        try:
            paths = unpack(chunks, staging)
        except Interrupted as error:
            raise NotCopied(str(error)) from error
        if chunks.digest != current.get("digest"):
            raise NotCopied("the copy is damaged: its hash is not that of what was sent")
        self.received = chunks.received
        return paths

    def _take_over(self, answer: Message, staging: Path, paths: list[str]) -> list[str]:
        """Put files in their places, and have new code run from now on."""
        first = self.revision < 0
        root = self._folder.path
        # As bytes, since a file's name need not be a text that can be sent as such.
        deleted = [inside(os.fsdecode(path)) for path in answer["deleted"]]
        folders = [each for path in deleted for each in self._delete(root / path)]
        # Python takes compiled code to be that of a source which is of the same second.
        self._stamp = max(self._stamp + 1, int(time.time()))
        for directory in (each for each in staging.rglob("*") if each.is_dir()):
            there = root / directory.relative_to(staging)
            there.mkdir(parents=True, exist_ok=True)
            there.chmod(directory.stat().st_mode & 0o777)
        for path in paths:
            target = root / path
            if path.startswith(f"{CODE}/"):
                os.utime(staging / path, (self._stamp, self._stamp))
            if target.is_dir():
                shutil.rmtree(target)
            _move(staging / path, target)
        if first:
            self._put_on_path(answer["on_path"])
            # Of the same name, from elsewhere: the runner's working folder, say.
            code = [each for each in paths if each.startswith(f"{CODE}/")]
            gone = unload(
                [
                    name
                    for each in code
                    for name in _names([each])
                    if _is_another(name, root / each)
                ],
                root / CODE,
                self._texts,
            )
        else:
            # A folder was a package, too, if nothing in it said otherwise.
            packages = [f"{folder.relative_to(root).as_posix()}/__init__.py" for folder in folders]
            gone = unload(_names([*paths, *deleted, *packages]), root / CODE, self._texts)
        self.revision = answer["revision"]
        return gone

    def _delete(self, file: Path) -> list[Path]:
        """Delete a file, and the folders that are empty without it; return these."""
        file.unlink(missing_ok=True)
        cache = file.parent / "__pycache__"
        for compiled in cache.glob(f"{file.stem}.*.pyc"):
            compiled.unlink(missing_ok=True)
        # A folder with nothing in it could still be imported.
        folder, gone = file.parent, []
        while folder.parent != self._folder.path / CODE and folder.is_dir():
            left = list(folder.iterdir())
            if any(each.name != "__pycache__" for each in left):
                break
            shutil.rmtree(folder, ignore_errors=True)
            gone.append(folder)
            folder = folder.parent
        return gone

    def _put_on_path(self, names: Iterable[bytes]) -> None:
        self._on_path = [str(self._folder.path / inside(os.fsdecode(name))) for name in names]
        for text in self._on_path:
            # Also if the parent has nothing there yet.
            if not os.path.exists(text):  # noqa: PTH110
                os.makedirs(text)  # noqa: PTH103
        sys.path[:0] = self._on_path

    def close(self) -> None:
        """Remove everything, and have nothing imported from here any more; once."""
        self._closed = True
        # What an update writes meanwhile would be left behind.
        idle = self._updating.acquire(timeout=LAST)
        for text in self._on_path:
            if text in sys.path:
                sys.path.remove(text)
        self._on_path = []
        self._folder.remove()
        if self._own_tmp is not None:
            self._own_tmp.remove()
        if idle:
            self._updating.release()


def _move(source: Path, target: Path) -> None:
    """Put a file in the place of another one, in one step: calls may be reading that."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # From another file system, so by way of this one.
        near = target.with_name(f"{TEMPORARY}{target.name[:200]}")
        shutil.copy2(source, near)
        near.replace(target)


class _Again(Exception):
    """A file has changed while it was copied."""


def _is_another(name: str, ours: Path) -> bool:
    """Tell whether a loaded module has other code, and is not what the runner itself runs on."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if not isinstance(file, str) or is_library(file):
        return False
    try:
        return not filecmp.cmp(file, ours, shallow=False)
    except OSError:
        return True


def _names(paths: Iterable[str]) -> list[str]:
    """Return the names of the modules at paths such as ``code/sync-0/package/module.py``."""
    names = (module_name(path.split("/", 2)[2]) for path in paths if path.count("/") > 1)
    return [name for name in names if name]

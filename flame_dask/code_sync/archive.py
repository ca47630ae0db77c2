"""Files as one stream of bytes, made from disk and unpacked to disk, never whole in memory (J5).

The stream is a tar archive, as :mod:`tarfile` knows it, which is compressed or not. There are only
files and folders in it: links are followed where it is made. So whoever unpacks it takes nothing
else, whatever it claims to lead to, and no path that leads out of its folder.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final, NamedTuple

#: Bytes that are read at a time. The memory that a copy takes does not depend on what is copied.
BLOCK: Final = 256 * 1024

#: How hard is tried to make it small: more than the least takes several times as long.
_LEVEL: Final = 1


class Member(NamedTuple):
    """One thing that is to be sent."""

    path: str
    """Where it is to be, under the folder of who unpacks it."""
    source: Path
    """Where it is here."""
    digest: str | None = None
    """The SHA-256 that it has to have; ``None`` if that is all one."""


class ChangedMeanwhile(Exception):
    """A file is not as it was when its copying began. It can be tried again."""


class Refused(Exception):
    """What has come is not what a parent sends."""


class Interrupted(Exception):
    """The stream has an end before its end, or is not what was sent."""


def sendable(text: str) -> str:
    """Return a text as it can be sent: a file's name may be in it which is none.

    Examples
    --------
    >>> sendable("plain.txt"), len(sendable(os.fsdecode(bytes([255]))))
    ('plain.txt', 6)
    """
    return text.encode("utf-8", "backslashreplace").decode()


def pack(members: Iterable[Member]) -> Iterator[bytes]:
    """Make a tar stream of files and folders.

    Parameters
    ----------
    members
        What is to be in it, folders before what is in them.

    Yields
    ------
    bytes
        A part of at most ``BLOCK`` bytes.

    Raises
    ------
    ChangedMeanwhile
        A file has been cut, changed or removed since it was found.

    Examples
    --------
    >>> b"".join(pack([])) == bytes(1024)
    True
    """
    for member in members:
        try:
            with open(member.source, "rb", opener=_no_waiting) as file:
                yield from _file(member, file)
        except IsADirectoryError:
            yield _header(member, member.source.stat(), tarfile.DIRTYPE)
        except FileNotFoundError as error:
            raise ChangedMeanwhile(f"{member.source} is gone") from error
    yield bytes(2 * tarfile.BLOCKSIZE)


def _no_waiting(path: str, flags: int) -> int:
    # To open a pipe would wait for somebody who writes to it.
    return os.open(path, flags | os.O_NONBLOCK)


def _file(member: Member, file: BinaryIO) -> Iterator[bytes]:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise Refused(f"{member.source} is neither a file nor a folder: it can't be copied")
    yield _header(member, status, tarfile.REGTYPE)
    digest, left = hashlib.sha256(), status.st_size
    while left:
        block = file.read(min(BLOCK, left))
        if not block:
            raise ChangedMeanwhile(f"{member.source} was cut while it was read")
        digest.update(block)
        left -= len(block)
        yield block
    if member.digest is not None and digest.hexdigest() != member.digest:
        raise ChangedMeanwhile(f"{member.source} was written to while it was read")
    if padding := -status.st_size % tarfile.BLOCKSIZE:
        yield bytes(padding)


def _header(member: Member, status: os.stat_result, kind: bytes) -> bytes:
    info = tarfile.TarInfo(member.path)
    info.type = kind
    info.mode = stat.S_IMODE(status.st_mode)
    info.mtime = status.st_mtime
    info.size = status.st_size if kind == tarfile.REGTYPE else 0
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


class Packer:
    """A stream that is taken in chunks, and what has gone through it.

    Parameters
    ----------
    parts
        What :func:`pack` yields.
    chunk_size
        Bytes of a chunk; the last one may be shorter.
    compress
        Whether to compress it.

    Examples
    --------
    >>> packer = Packer(pack([]), chunk_size=1000, compress=False)
    >>> [len(chunk) for chunk in packer]
    [1000, 24]
    >>> packer.sent
    1024
    """

    def __init__(self, parts: Iterator[bytes], *, chunk_size: int, compress: bool) -> None:
        self._parts = parts
        self._chunk_size = chunk_size
        self._compressor = zlib.compressobj(_LEVEL) if compress else None
        self._digest = hashlib.sha256()
        self._buffer = bytearray()
        self._over = False
        #: Bytes, as they have gone out.
        self.sent = 0

    @property
    def digest(self) -> str:
        """The SHA-256 of what has gone out so far."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        buffer, size = self._buffer, self._chunk_size
        while len(buffer) < size and not self._over:
            part = next(self._parts, None)
            if part is None:
                self._over = True
                if self._compressor is not None:
                    buffer += self._compressor.flush()
            elif self._compressor is not None:
                buffer += self._compressor.compress(part)
            else:
                buffer += part
        if not buffer:
            raise StopIteration
        chunk = bytes(memoryview(buffer)[:size])
        del buffer[:size]
        self._digest.update(chunk)
        self.sent += len(chunk)
        return chunk

    def close(self) -> None:
        """Close the file that is just being read."""
        close = getattr(self._parts, "close", None)
        if close is not None:
            close()


class Chunks:
    """Chunks that come in, as a file from which the archive can be read.

    Parameters
    ----------
    take
        Returns the next chunk, nothing at the end.
    compressed
        Whether they are.

    Attributes
    ----------
    received
        Bytes, as they came in.
    """

    def __init__(self, take: Callable[[], bytes], *, compressed: bool) -> None:
        self._take = take
        self._decompressor = zlib.decompressobj() if compressed else None
        self._digest = hashlib.sha256()
        self._buffer = bytearray()
        self._rest = b""
        self._over = False
        self.received = 0

    @property
    def digest(self) -> str:
        """The SHA-256 of what has come in so far."""
        return self._digest.hexdigest()

    def read(self, size: int) -> bytes:
        """Return so many bytes, fewer only at the end."""
        buffer = self._buffer
        while len(buffer) < size and not self._over:
            # A little that is compressed may become very much: it is let out bit by bit.
            if self._rest and self._decompressor is not None:
                buffer += self._decompressor.decompress(self._rest, BLOCK)
                self._rest = self._decompressor.unconsumed_tail
                continue
            chunk = self._take()
            if not chunk:
                self._over = True
                continue
            self.received += len(chunk)
            self._digest.update(chunk)
            if self._decompressor is None:
                buffer += chunk
            else:
                self._rest = chunk
        found = bytes(memoryview(buffer)[:size])
        del buffer[:size]
        return found

    def drain(self) -> None:
        """Read what is left: an archive is over before its stream is."""
        while self.read(BLOCK):
            pass


def unpack(stream: Chunks, folder: Path) -> list[str]:
    """Unpack a stream into a folder, which nobody uses before all has been checked.

    Parameters
    ----------
    stream
        What comes in.
    folder
        An empty folder.

    Returns
    -------
    list of str
        The paths of the files, under ``folder``.

    Raises
    ------
    Refused
        A member is neither file nor folder, or its path leads out of the folder.
    Interrupted
        The stream has ended too early.
    OSError
        It can't be written.
    """
    paths = []
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=BLOCK) as tar:  # type: ignore[call-overload]
            for info in tar:
                path = checked(info)
                target = folder / path
                if info.isdir():
                    target.mkdir(parents=True, exist_ok=True)
                    target.chmod(info.mode & 0o777 | stat.S_IRWXU)
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _write(tar, info, target)
                    paths.append(path)
                # It would keep all of them, to be able to go back.
                tar.members.clear()
        stream.drain()
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise Interrupted(f"the copy is damaged or not whole: {error}") from error
    return paths


def _write(tar: tarfile.TarFile, info: tarfile.TarInfo, target: Path) -> None:
    content = tar.extractfile(info)
    assert content is not None, "a file has content"
    # Exclusively: nothing is there before, and so no link that leads elsewhere.
    with target.open("xb") as file:
        left = info.size
        while left:
            block = content.read(min(BLOCK, left))
            if not block:
                raise Interrupted(f"{info.name} is not whole")
            file.write(block)
            left -= len(block)
    target.chmod(info.mode & 0o777)
    os.utime(target, (info.mtime, info.mtime))


def checked(info: tarfile.TarInfo) -> str:
    """Return the path of a member, if it is one that a parent sends.

    Raises
    ------
    Refused
        It is no file and no folder (but a link, or a device), or its path is absolute, or leads
        upwards.

    Examples
    --------
    >>> checked(tarfile.TarInfo("package/module.py"))
    'package/module.py'
    >>> checked(tarfile.TarInfo("../module.py"))
    Traceback (most recent call last):
    flame_dask.code_sync.archive.Refused: '../module.py' leads out of the folder of the copy
    """
    path = inside(info.name)
    if not (info.isreg() or info.isdir()) or info.issparse():
        raise Refused(f"{info.name!r} is neither a file nor a folder")
    return path


def inside(name: str) -> str:
    """Return a path, if it leads to something below the folder that it is relative to.

    Raises
    ------
    Refused
        It is absolute, leads upwards, or to the folder itself.

    Examples
    --------
    >>> inside("package/./module.py")
    'package/module.py'
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise Refused(f"{name!r} leads out of the folder of the copy")
    return str(path)

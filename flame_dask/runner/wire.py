"""Values on the sockets between a runner and the processes of its calls.

A value is pickled, and its large parts travel behind it as they are. For a call that is next to
nothing: what makes it up is a pickle stream already, and goes through unopened.
"""

from __future__ import annotations

import io
import pickle
import socket
import struct
from typing import Any, Final

#: Up to so many bytes are put together for one system call, which is cheaper than several.
_TOGETHER: Final = 64 * 1024

#: The first part of what a process says while its call runs; an answer begins with a bool.
NOTE: Final = "note"

_COUNT: Final = struct.Struct("=I")


def send(conn: socket.socket, value: object) -> None:
    """Send a value.

    Raises
    ------
    OSError
        If nobody is there to read it.
    """
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(stream), *[buffer.raw() for buffer in buffers]]
    sizes = [part.nbytes for part in parts]
    header = _COUNT.pack(len(parts)) + struct.pack(f"={len(parts)}Q", *sizes)
    if sum(sizes) <= _TOGETHER:
        conn.sendall(b"".join([header, *parts]))
    else:
        conn.sendall(header)
        for part in parts:
            conn.sendall(part)


def receive(stream: io.RawIOBase | io.BufferedIOBase) -> Any:
    """Read a value from the stream of a socket.

    Raises
    ------
    EOFError
        If the other side is gone.
    """
    (count,) = _COUNT.unpack(_read(stream, _COUNT.size))
    sizes = struct.unpack(f"={count}Q", _read(stream, 8 * count))
    first, *buffers = [_read(stream, size) for size in sizes]
    return pickle.loads(first, buffers=buffers)


def _read(stream: io.RawIOBase | io.BufferedIOBase, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        try:
            got = stream.readinto(view)
        except ConnectionError:  # it died with something unread
            got = 0
        if not got:
            raise EOFError("the other side is gone")
        view = view[got:]
    return data

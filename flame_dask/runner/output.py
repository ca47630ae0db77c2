"""What calls print and log, on its way to the parent (B8).

``sys.stdout`` and ``sys.stderr`` are replaced by ones that look who writes: the lines of a call go
to its parent, all else goes where it went before. A handler at the root logger does the same with
log records. Warnings are written to ``sys.stderr``, and so come along.

What the processes write that a call has started, and threads other than its own, is not seen here:
they have not inherited the context of the call.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TextIO

from flame_dask.runner.channel import Channel, current

#: The most characters of a line that are sent together.
_LONGEST: Final = 16 * 1024

#: Seconds after which a line is sent though its end has not been written: a progress bar, say.
_UNFINISHED: Final = 1.0

#: What this package and Dask have to say is the runner's business.
_OURS: Final = ("flame_dask", "distributed")

LEVELS: Final = {"stdout": logging.INFO, "stderr": logging.WARNING}


class CallOutput:
    """What one call has written, until a line is full.

    Parameters
    ----------
    tell
        Sends a note to the parent.
    """

    __slots__ = ("_lock", "_parts", "_since", "_tell")

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell
        self._lock = threading.Lock()
        self._parts: dict[str, str] = {}
        self._since = 0.0

    def write(self, stream: str, text: str) -> None:
        """Take what has been written to ``stdout`` or ``stderr``."""
        with self._lock:
            before = self._parts.pop(stream, "")
            now = time.monotonic()
            if not before:
                self._since = now
            lines = (before + text).splitlines(keepends=True)
            rest = "" if not lines or lines[-1].endswith(("\n", "\r")) else lines.pop()
            if len(rest) > _LONGEST or (rest and now - self._since > _UNFINISHED):
                lines.append(rest)
            elif rest:
                self._parts[stream] = rest
        self._send(stream, lines)

    def flush(self) -> None:
        """Send what is left: the call is over."""
        with self._lock:
            parts, self._parts = self._parts, {}
        for stream, rest in parts.items():
            self._send(stream, [rest])

    def _send(self, stream: str, lines: list[str]) -> None:
        told = [line.rstrip("\r\n")[:_LONGEST] for line in lines]
        if told:
            self._tell("log", source=stream, level=LEVELS[stream], lines=told)


class _Divided(io.TextIOBase):
    """Stands in for a standard stream: what a call writes goes to its parent."""

    def __init__(self, name: str, before: TextIO) -> None:
        self._name = name
        self._before = before

    def write(self, text: str) -> int:
        channel = current.get()
        output: CallOutput | None = None if channel is None else channel.output
        if output is None:
            return self._before.write(text)
        output.write(self._name, text)
        return len(text)

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        self._before.flush()

    def fileno(self) -> int:
        return self._before.fileno()

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._before, name)  # encoding, buffer and so on


class _Handler(logging.Handler):
    """Sends what a call logs to its parent."""

    def emit(self, record: logging.LogRecord) -> None:
        channel = current.get()
        if channel is None or channel.output is None or record.name.startswith(_OURS):
            return
        try:
            lines = self.format(record).splitlines()
        except Exception:
            self.handleError(record)
            return
        channel.tell("log", source=record.name, level=record.levelno, lines=lines)


def install() -> Callable[[], None]:
    """Have the output of calls in this process go to their parent; return what undoes it."""
    before = sys.stdout, sys.stderr
    handler = _Handler()
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    if level > logging.INFO:
        # As a program that wants to see its log would have it. Others filter at the parent.
        root.setLevel(logging.INFO)
    ours = _Divided("stdout", before[0]), _Divided("stderr", before[1])
    sys.stdout, sys.stderr = ours

    def undo() -> None:
        root.removeHandler(handler)
        root.setLevel(level)
        if sys.stdout is ours[0]:
            sys.stdout = before[0]
        if sys.stderr is ours[1]:
            sys.stderr = before[1]

    return undo


def finish(channel: Channel | None) -> None:
    """Send what a call has left unfinished; the call is over."""
    if channel is not None and channel.output is not None:
        with suppress(Exception):  # what it has written last is not worth its result
            channel.output.flush()

"""Streams, on the runner's side: items go to the parent as a generator makes them (B7).

As long as the parent keeps up an item is sent at once. When it doesn't, items are put together, and
the generator waits when there are as many as go into one message: so neither side ever holds more
than :data:`WINDOW` messages, and no more than one or two if their items are large.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from dask.sizeof import sizeof

from flame_dask.payload import pack_value
from flame_dask.runner.channel import Channel
from flame_dask.runner.channel import here as the_channel
from flame_dask.runner.coroutines import noted
from flame_dask.runner.threads import CallTerminated, Terms

#: Messages that may be on their way, or wait to be taken from the iterator, and their bytes.
WINDOW: Final = 8
WINDOW_BYTES: Final = 8 << 20

#: The most items, and about the most bytes, of one message.
BATCH: Final = 512
BATCH_BYTES: Final = 1 << 20

#: What is pickled with its message.
_CONSTANT: Final = frozenset({bool, bytes, complex, float, int, str, type(None)})

#: Seconds between two looks whether the stream is to end, while it waits.
_LOOK: Final = 0.05


def run_stream(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], terms: Terms
) -> None:
    """Send what a generator yields; return when it has ended, or the parent wants no more.

    Raises
    ------
    TypeError
        If the function returns nothing that can be iterated over.
    BaseException
        What the generator has raised, after the items before that.
    """
    channel = the_channel()
    channel.asked_first = 0.3
    found = fn(*args, **kwargs)
    sender = _Sender(channel)
    with _items(found) as items, sender:
        for item in items:
            if not sender.put(item):
                return
        sender.finish()


@contextmanager
def _items(found: Any) -> Iterator[Iterator[Any]]:
    """Iterate over whatever a function has returned, and close it in the end."""
    if inspect.isasyncgen(found):
        with asyncio.Runner() as runner:
            try:
                yield _in_turn(found, runner)
            finally:
                runner.run(noted(found.aclose()))
        return
    try:
        items = iter(found)
    except TypeError:
        what = type(found).__name__
        raise TypeError(
            f"a stream is of a generator, or of something to iterate over; this returned a {what}"
        ) from None
    try:
        yield items
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()


def _in_turn(found: Any, runner: asyncio.Runner) -> Iterator[Any]:
    while True:
        try:
            item = runner.run(noted(found.__anext__()))
        except StopAsyncIteration:
            return
        yield item


class _Sender:
    """Sends items, as long as they are taken."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._change = threading.Condition()
        # The sizes of the messages that the parent has not opened yet.
        self._under_way: deque[int] = deque()
        self._waiting: list[Any] = []
        self._bytes = 0
        self._closed = False
        self._failure: BaseException | None = None
        self._listener = threading.Thread(target=self._listen, name="flame-stream", daemon=True)

    def __enter__(self) -> None:
        self._listener.start()

    def __exit__(self, *exc_info: object) -> None:
        try:
            # Also what came before an error is the parent's, in this order.
            if exc_info[1] is not None and not isinstance(exc_info[1], CallTerminated):
                self.finish()
        finally:
            self._channel.put({"kind": "over"})
            self._listener.join()

    def put(self, item: Any) -> bool:
        """Take an item; say whether another one is wanted."""
        with self._change:
            # At once, unless it can't change: the generator may go on to work on it.
            if type(item) not in _CONSTANT:
                item = pack_value(item).snapshot()
            self._waiting.append(item)
            self._bytes += sizeof(item)
            self._flush()
            while not self._closed and self._is_full():
                self._change.wait(_LOOK)
            return not self._closed

    def finish(self) -> None:
        """Send what is left."""
        with self._change:
            while not self._closed and self._waiting:
                self._flush()
                if self._waiting:
                    self._change.wait(_LOOK)

    def _is_full(self) -> bool:
        return len(self._waiting) >= BATCH or self._bytes >= BATCH_BYTES

    def _flush(self) -> None:
        """Send what waits, if the parent is to have another message."""
        under_way = self._under_way
        if not self._waiting or len(under_way) >= WINDOW or sum(under_way) >= WINDOW_BYTES:
            return
        items, self._waiting, self._bytes = self._waiting, [], 0
        message = pack_value(items)
        under_way.append(message.nbytes)
        self._channel.tell("items", count=len(items), items=message.parts())

    def _listen(self) -> None:
        while True:
            order = self._channel.get()
            assert order is not None, "it waits without a limit"
            with self._change:
                if order["kind"] == "credit":
                    for _ in range(order["messages"]):
                        self._under_way.popleft()
                    self._flush()
                elif order["kind"] == "over":
                    return
                elif order["kind"] in ("stop", "give up"):
                    self._closed = True
                self._change.notify_all()

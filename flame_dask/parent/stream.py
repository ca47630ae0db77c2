"""Streams, on the parent's side: an iterator over what a generator on a runner yields (B7)."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

from flame_dask.parent.futures import CallState
from flame_dask.payload import Payload

if TYPE_CHECKING:
    from flame_dask.parent.desk import CallDesk


#: Sends the call: it is told what takes the items, since these may come at once.
Send = Callable[..., CallState]


class _Source:
    """What has come of a stream and has not been taken yet."""

    def __init__(self, desk: CallDesk) -> None:
        self._desk = desk
        self._state: CallState
        # Messages that have not been opened, and what is left of the one that has been.
        self._messages: deque[Any] = deque()
        self._items: deque[Any] = deque()
        self._lock = threading.Lock()  # of those who take items
        self._change = threading.Condition()
        self.wakers: list[Callable[[], object]] = []
        self.over = False

    def follow(self, state: CallState) -> None:
        """Be over when this call is."""
        self._state = state
        state.when_done(self._end)

    def take(self, items: Any, count: int) -> None:
        """Take a message; on the event loop."""
        with self._change:
            self._messages.append(items)
            self._wake()

    def _end(self) -> None:
        self._desk.streams.pop(str(self._state.key), None)
        with self._change:
            self.over = True
            self._wake()

    def _wake(self) -> None:
        self._change.notify_all()
        for waker in self.wakers:
            waker()

    def pop(self) -> tuple[bool, Any]:
        """Return whether there was an item, and the item."""
        with self._lock:
            if not self._items:
                with self._change:
                    if not self._messages:
                        return False, None
                    message = self._messages.popleft()
                self._items.extend(Payload.from_parts(message).load())
                # Only now: what waits here counts, too.
                key = str(self._state.key)
                order = {"what": "order", "key": key, "kind": "credit", "messages": 1}
                self._desk.post(order)
            item = self._items.popleft()
        return True, item.load() if type(item) is Payload else item

    def wait(self) -> None:
        """Wait in this thread until there is something, or the stream is over."""
        with self._change:
            while not self._messages and not self._items and not self.over:
                self._change.wait()

    def finish(self) -> None:
        """Raise what has ended the stream, if anything has."""
        self._state.load()


def _close(desk: CallDesk, state: CallState) -> None:
    if not state.done():
        desk.cancel(state)


class _Reader:
    """What the two kinds of streams have in common."""

    def __init__(self, desk: CallDesk, send: Send) -> None:
        self._source = source = _Source(desk)
        state = send(items=source.take)
        source.follow(state)
        self._finalizer = weakref.finalize(self, _close, desk, state)
        self._finalizer.atexit = False

    def _look(self) -> tuple[bool, Any]:
        """Return whether there was an item, and the item; at the end raise what has ended it."""
        over = self._source.over  # before the look for an item: the last ones come first
        there, item = self._source.pop()
        if over and not there:
            self._finalizer.detach()
            self._source.finish()
        return there, item


class Stream(_Reader):
    """An iterator over what a generator on a runner yields; :meth:`FlamePool.stream` makes it.

    Closing it, or dropping it, ends the generator.

    Examples
    --------
    >>> with pool.stream(follow, "/var/log/syslog") as lines:  # doctest: +SKIP
    ...     for line in lines:
    ...         print(line)
    """

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        while self._finalizer.alive:
            there, item = self._look()
            if there:
                return item
            if not self._finalizer.alive:
                break
            try:
                self._source.wait()
            except BaseException:
                # Ctrl-C above all: what nobody waits for must not go on (E4).
                self.close()
                raise
        raise StopIteration

    def close(self) -> None:
        """End the generator, and the iteration. It may be called again."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncStream(_Reader):
    """The same for an asynchronous pool.

    Examples
    --------
    >>> async for line in pool.stream(follow, "/var/log/syslog"):  # doctest: +SKIP
    ...     print(line)
    """

    def __init__(self, desk: CallDesk, send: Send) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(desk, send)
        self._event = event = asyncio.Event()
        # Not this object, which would never be dropped.
        self._source.wakers.append(lambda: loop.call_soon_threadsafe(event.set))

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        while self._finalizer.alive:
            self._event.clear()
            there, item = self._look()
            if there:
                return item
            if not self._finalizer.alive:
                break
            try:
                await self._event.wait()
            except asyncio.CancelledError:
                await self.aclose()
                raise
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """End the generator, and the iteration. It may be called again."""
        self._finalizer()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

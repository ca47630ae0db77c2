"""How a parent talks to the host of its pool: in the same process, or through a Dask client.

Messages may be posted from any thread, also by a garbage collector in the middle of anything.
They go out in order, from the event loop, never from within the call that posts them: the host
must not be entered while the scheduler is in the middle of a transition.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from flame_dask.dask_internals import PoolClient, ToPickle

if TYPE_CHECKING:
    from flame_dask.scheduler.plugin import FlameScheduler

Message = dict[str, Any]


class Port(Protocol):
    """The parent's way to the host of its pool."""

    def post(self, item: Message | Callable[[], object]) -> None:
        """Send a message, or run a function on the event loop, from any thread; don't wait."""

    async def ask(self, what: str) -> Any:
        """Ask for the host's ``status`` or ``events``."""

    def attach(self, receive: Callable[..., None]) -> None:
        """Let ``receive`` take the host's messages, on the event loop."""


class _Outbox:
    """Collects messages from all threads, and wakes the event loop once for many of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: deque[Message | Callable[[], object]] = deque()
        self._woken = False

    def post(self, item: Message | Callable[[], object]) -> None:
        self._waiting.append(item)
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._flush)
            except RuntimeError:
                # The loop is closed, and with it the pool: nobody is left to hear of anything.
                self._waiting.clear()

    def _flush(self) -> None:
        # In this order: a message that is appended meanwhile is sent now, or wakes the loop again.
        self._woken = False
        while self._waiting:
            item = self._waiting.popleft()
            if callable(item):
                item()
            else:
                self._emit(item)

    def _emit(self, message: Message) -> None:
        raise NotImplementedError


class LocalPort(_Outbox):
    """The host is in this process: a message is a function call."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, host: FlameScheduler, client: PoolClient
    ) -> None:
        super().__init__(loop)
        self._host = host
        self._client = client.id

    def _emit(self, message: Message) -> None:
        self._host.receive(client=self._client, **message)

    async def ask(self, what: str) -> Any:
        """Ask for the host's ``status`` or ``events``."""
        return self._host.tell(what)

    def attach(self, receive: Callable[..., None]) -> None:
        """Let ``receive`` take the host's messages, on the event loop."""
        self._host.sinks[self._client] = lambda message: receive(**message)


class CommPort(_Outbox):
    """The host is elsewhere: messages go over the stream of a Dask client."""

    def __init__(self, loop: asyncio.AbstractEventLoop, client: PoolClient) -> None:
        super().__init__(loop)
        self._client = client

    def _emit(self, message: Message) -> None:
        for name in ("payload", "inputs"):
            if message.get(name) is not None:
                # Pickled by the stream with its buffers out of band, and opened by the scheduler.
                message[name] = ToPickle(message[name])
        self._client.tell(message)

    async def ask(self, what: str) -> Any:
        """Ask for the host's ``status`` or ``events``."""
        return await self._client.ask(what)

    def attach(self, receive: Callable[..., None]) -> None:
        """Let ``receive`` take the host's messages, on the event loop."""
        self._client.listen(receive)
        self._client.hasten()

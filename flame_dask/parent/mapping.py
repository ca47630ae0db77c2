"""``map`` over a pool: lazy, with bounded look-ahead (B4)."""

from __future__ import annotations

import asyncio
import itertools
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from typing import Any

from flame_dask.parent.futures import CallState

Start = Callable[..., CallState]


def map_sync(
    items: Iterable[tuple[Any, ...]],
    *,
    start: Start,
    cancel: Callable[[CallState], None],
    ahead: int,
    ordered: bool,
    return_exceptions: bool,
) -> Iterator[Any]:
    """Yield the results of one call for each item; see :meth:`FlamePool.map`."""
    done: queue.SimpleQueue[CallState] = queue.SimpleQueue()
    window = _Window(items, start, ahead, None if ordered else done.put)
    pending = window.pending
    try:
        window.fill()
        while pending:
            if ordered:
                state = pending[0]
                state.join()
                pending.popleft()
            else:
                state = done.get()
                pending.remove(state)
            window.fill()
            yield _outcome(state, return_exceptions)
        window.end()
    finally:
        for state in pending:
            cancel(state)


async def map_async(
    items: Iterable[tuple[Any, ...]],
    *,
    start: Start,
    cancel: Callable[[CallState], None],
    ahead: int,
    ordered: bool,
    return_exceptions: bool,
) -> AsyncIterator[Any]:
    """Yield the results of one call for each item; see :meth:`FlamePool.map`."""
    done: asyncio.Queue[CallState] = asyncio.Queue()
    window = _Window(items, start, ahead, None if ordered else done.put_nowait)
    pending = window.pending
    try:
        window.fill()
        while pending:
            if ordered:
                state = pending[0]
                await state.wait()
                pending.popleft()
            else:
                state = await done.get()
                pending.remove(state)
            window.fill()
            yield _outcome(state, return_exceptions)
        window.end()
    finally:
        for state in pending:
            cancel(state)


class _Window:
    """The calls of a map that are under way, or are over and wait to be yielded.

    What goes wrong with an item (its iterator raises, it can't be pickled, the pool closes) is due
    when all results before it have been yielded.
    """

    def __init__(
        self,
        items: Iterable[tuple[Any, ...]],
        start: Start,
        ahead: int,
        over: Callable[[CallState], None] | None,
    ) -> None:
        self.pending: deque[CallState] = deque()
        self._source = iter(items)
        self._start = start
        self._ahead = ahead
        self._over = over
        self._failure: Exception | None = None

    def fill(self) -> None:
        """Start calls until there are as many as may be."""
        if self._failure is not None:
            return
        try:
            for item in itertools.islice(self._source, self._ahead - len(self.pending)):
                state = self._start(*item)
                self.pending.append(state)
                if self._over is not None:
                    state.when_done(partial(self._over, state))
        except Exception as error:  # the caller's iterator can raise anything
            self._failure = error

    def end(self) -> None:
        """Raise what has gone wrong, if something has."""
        if self._failure is not None:
            raise self._failure


def _outcome(state: CallState, return_exceptions: bool) -> Any:
    try:
        return state.load()
    except Exception as error:
        if return_exceptions:
            return error
        raise

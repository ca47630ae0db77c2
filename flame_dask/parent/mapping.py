"""``map`` over a pool: lazy, with bounded look-ahead (B4)."""

from __future__ import annotations

import asyncio
import itertools
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
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
    source = iter(items)
    done: queue.SimpleQueue[CallState] = queue.SimpleQueue()
    pending: deque[CallState] = deque()

    def fill() -> None:
        for item in itertools.islice(source, ahead - len(pending)):
            state = start(*item)
            pending.append(state)
            if not ordered:
                state.when_done(lambda state=state: done.put(state))  # type: ignore[misc]

    try:
        fill()
        while pending:
            if ordered:
                state = pending[0]
                state.join()
                pending.popleft()
            else:
                state = done.get()
                pending.remove(state)
            fill()
            yield _outcome(state, return_exceptions)
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
    source = iter(items)
    done: asyncio.Queue[CallState] = asyncio.Queue()
    pending: deque[CallState] = deque()

    def fill() -> None:
        for item in itertools.islice(source, ahead - len(pending)):
            state = start(*item)
            pending.append(state)
            if not ordered:
                state.when_done(lambda state=state: done.put_nowait(state))  # type: ignore[misc]

    try:
        fill()
        while pending:
            if ordered:
                state = pending[0]
                await state.wait()
                pending.popleft()
            else:
                state = await done.get()
                pending.remove(state)
            fill()
            yield _outcome(state, return_exceptions)
    finally:
        for state in pending:
            cancel(state)


def _outcome(state: CallState, return_exceptions: bool) -> Any:
    try:
        return state.load()
    except Exception as error:
        if return_exceptions:
            return error
        raise

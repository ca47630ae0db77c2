"""Coroutines that run in the thread of a call, not on the runner's event loop.

A thread that waits for its event loop to have something to do runs no Python code, and so meets no
exception that is raised in it. So it is written down which coroutine runs in which thread: that
one can be cancelled, which also wakes the loop up.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

#: By threads: the loop, and the task that runs on it. The last one is the innermost.
_running: dict[int, list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]]] = {}


def run(awaitable: Awaitable[Any]) -> Any:
    """Run a coroutine in this thread; :func:`cancel` can end it."""
    return asyncio.run(noted(awaitable))


async def noted(awaitable: Awaitable[Any]) -> Any:
    """Await something that :func:`cancel` can end."""
    task = asyncio.current_task()
    assert task is not None, "it runs"
    entry = asyncio.get_running_loop(), task
    stack = _running.setdefault(threading.get_ident(), [])
    stack.append(entry)
    try:
        return await awaitable
    finally:
        stack.remove(entry)
        if not stack:
            _running.pop(threading.get_ident(), None)


def cancel(thread: int) -> bool:
    """Cancel what a thread awaits, from another one; say whether there is anything."""
    found = False
    for loop, task in list(_running.get(thread, ())):
        with suppress(RuntimeError):  # the loop is closed: it was left in some other way
            loop.call_soon_threadsafe(task.cancel)
            found = True
    return found

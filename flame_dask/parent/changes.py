"""A pool's options on their way to its host: when it opens, and when they change (C8)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading

from flame_dask.constants import GRACE_MARGIN
from flame_dask.core.events import PoolOptionsView
from flame_dask.errors import PoolClosed
from flame_dask.options import PoolOptions
from flame_dask.parent.port import Message
from flame_dask.runner import here


def in_its_place(options: PoolOptions) -> PoolOptions:
    """Return the options that a pool has in this process.

    In a runner it has no ``min``: it may have been opened by a module that the parent imports too
    (A7).
    """
    return options if here.parent() is None else options.replace(min=0)


def view_of(options: PoolOptions, grace: float) -> PoolOptionsView:
    """Return what the core decides by.

    Parameters
    ----------
    options
        The options of the pool.
    grace
        Seconds that a call which has to end may take over it.
    """
    return PoolOptionsView(
        min=options.min,
        max=options.max,
        max_concurrency=options.max_concurrency,
        buffer=options.buffer,
        placement=options.placement,
        boot_timeout=options.boot_timeout,
        shutdown_timeout=options.shutdown_timeout,
        idle_shutdown_after=options.idle_shutdown_after,
        min_idle_shutdown_after=options.min_idle_shutdown_after,
        single_use=options.single_use,
        idle_check=options.idle_check is not None,
        grace=grace + GRACE_MARGIN,
    )


class Changes:
    """Changes that the host has not confirmed yet.

    Parameters
    ----------
    pool
        The pool's name.
    closed
        Is set when there is nobody left who could confirm anything.

    Attributes
    ----------
    lock
        Held while the options of a pool are changed and the host is told, so that it hears of
        several changes in the order in which they were made.
    """

    def __init__(self, pool: str, closed: asyncio.Event) -> None:
        self.lock = threading.Lock()
        self._pool = pool
        self._closed = closed
        self._numbers = itertools.count(1)
        self._open: dict[int, concurrent.futures.Future[None]] = {}

    def order(self, view: PoolOptionsView) -> tuple[Message, concurrent.futures.Future[None]]:
        """Return a message for the host, and a future of its answer. The lock has to be held.

        Raises
        ------
        PoolClosed
            If nobody would answer.
        """
        if self._closed.is_set():
            raise PoolClosed(self._pool)
        no = next(self._numbers)
        answer: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._open[no] = answer
        return {"what": "configure", "options": tuple(view), "no": no}, answer

    def carried_out(self, no: int) -> None:
        """Take the host's word that a change has been made."""
        answer = self._open.pop(no, None)
        # Its caller may have given up.
        if answer is not None and answer.set_running_or_notify_cancel():
            answer.set_result(None)

    def give_up(self) -> None:
        """Let nobody wait any longer: the pool is closed, or out of reach."""
        with self.lock:
            left, self._open = list(self._open.values()), {}
        for answer in left:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(PoolClosed(self._pool))

"""The user's hooks: in the parent, in order, never on an event loop (C9)."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger("flame_dask")


@dataclass(frozen=True, slots=True)
class ScaleEvent:
    """What a hook is told.

    Parameters
    ----------
    name
        The pool's name.
    count
        The runners that the pool is going to have (``on_grow_start``), or has.
    boot_id
        The runner that the news is about.
    reason
        Why.
    """

    name: str
    count: int
    boot_id: str
    reason: str


class HookThread:
    """Runs hooks one after the other in a thread of its own, which starts with the first one."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self._queue: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]] | None]
        self._queue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._closed = False

    def fire(self, hook: Callable[..., object], *args: Any) -> None:
        """Run a hook soon. What it raises is logged."""
        with self._starting:
            if self._thread is None:
                # A daemon: a hook that hangs must not keep the interpreter from its exit.
                self._thread = threading.Thread(
                    target=self._run, name=f"flame-hooks-{self._pool}", daemon=True
                )
                self._thread.start()
            self._queue.put((hook, args))
            if self._closed:  # for this one alone
                self._queue.put(None)
                self._thread = None

    def close(self, timeout: float) -> None:
        """Let the hooks that are due run, for at most ``timeout`` seconds."""
        with self._starting:
            thread, self._thread, self._closed = self._thread, None, True
            if thread is None:
                return
            self._queue.put(None)
        if thread is not threading.current_thread():  # a hook may close its pool
            thread.join(timeout)
            if thread.is_alive():
                logger.warning("pool %s: a hook still runs after %g s", self._pool, timeout)

    def _run(self) -> None:
        while (job := self._queue.get()) is not None:
            hook, args = job
            try:
                hook(*args)
            except Exception:
                logger.exception("pool %s: hook %r failed", self._pool, hook)
            # While it waits for the next one it must not keep a result alive, or a child.
            del job, hook, args

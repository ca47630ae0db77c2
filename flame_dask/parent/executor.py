"""A pool as a ``concurrent.futures.Executor`` (B4)."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from flame_dask.options import CallOptions
from flame_dask.parent.desk import CallDesk
from flame_dask.parent.futures import CallState
from flame_dask.parent.hooks import HookThread


class PoolExecutor(concurrent.futures.Executor):
    """Runs its calls on a pool. Made by :meth:`FlamePool.get_executor`.

    Cancelling a future ends its call, also one that is running, as with the pool's own futures.
    Callbacks run in a thread of the pool, which is for its executors alone.
    """

    def __init__(
        self,
        desk: CallDesk,
        thread: HookThread,
        check: Callable[[], tuple[CallOptions, dict[str, Any]]],
    ) -> None:
        self._desk = desk
        self._thread = thread
        self._check = check
        self._lock = threading.Lock()
        self._open: dict[concurrent.futures.Future[Any], CallState] = {}
        self._shut = False

    def submit(
        self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        """Start a call.

        Raises
        ------
        RuntimeError
            If the executor is shut down, or the pool closed.
        SerializationError
            If the call can't be pickled.
        """
        with self._lock:
            if self._shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            options, _ = self._check()
            state = self._desk.send(fn, args, kwargs, options)
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            self._open[future] = state
        future.add_done_callback(self._over)
        state.when_done(partial(self._thread.fire, self._settle, future, state))
        return future

    def _settle(self, future: concurrent.futures.Future[Any], state: CallState) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            value = state.load()
        except BaseException as error:  # the call's own, whatever it is
            future.set_exception(error)
        else:
            future.set_result(value)

    def _over(self, future: concurrent.futures.Future[Any]) -> None:
        state = self._open.pop(future, None)
        if state is not None and future.cancelled():
            self._desk.cancel(state)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; the pool stays open.

        Parameters
        ----------
        wait
            Whether to wait for the calls that are under way.
        cancel_futures
            Whether to end them.
        """
        with self._lock:
            self._shut = True
            futures = list(self._open)
        if cancel_futures:
            for future in futures:
                future.cancel()
        if wait:
            concurrent.futures.wait(futures)

"""Futures of calls: ``distributed.Future`` whose value lives in the parent (B3)."""

from __future__ import annotations

import asyncio
import copy
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, TypeVar

from distributed.client import FutureCancelledError

from flame_dask.dask_internals import Future, PoolClient, PooledState
from flame_dask.errors import CallCancelled
from flame_dask.payload import Payload
from flame_dask.runner.execution import input_value

T = TypeVar("T")

# One lock for all states: it is held for a few instructions, and a call would pay for its own.
_lock = threading.Lock()
_packing = threading.local()


class CancelledCall(CallCancelled, FutureCancelledError):  # type: ignore[misc]  # reason: str | None
    """A cancelled call, in the form that ``distributed.wait`` and ``as_completed`` know."""

    def __init__(self, key: str, reason: str | None = None, msg: str | None = None) -> None:
        # Its two bases have constructors that do not know each other.
        model = CallCancelled(key, reason)
        self.__dict__.update(model.__dict__)
        self.args = model.args
        self.key = key
        self.msg = msg

    def __str__(self) -> str:
        return CallCancelled.__str__(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return CancelledCall, (self.key, self.reason, self.msg)


class CallState(PooledState):
    """What has become of a call; shared by all its futures.

    It changes on the event loop only. Other threads wait for it without the loop's help, which
    saves two thread switches a call.
    """

    __slots__ = ("_error", "_wakers", "holds", "kept", "link", "payload", "raised", "sent")

    _error: BaseException | None

    def __init__(self, key: str, link: bool = True) -> None:
        # Whether the call ends with its last future (G1).
        self.link = link
        # What the call raised, in pickled form.
        self.raised: Payload | None = None
        # What of the result lives on a runner: it stays there as long as this does.
        self.holds: list[Any] = []
        # The call itself, if it lives on.
        self.kept: Any = None
        super().__init__(key)
        self.payload: Payload | None = None
        # When it was sent, or None: it waits for the futures among its arguments.
        self.sent: float | None = None
        self._wakers: list[Callable[[], object]] | None = []

    def deliver(self, payload: Payload) -> None:
        """Take the result."""
        if self._wakers is not None:
            self.payload = payload
            self.finish()
            self._wake()

    def fail(
        self,
        error: BaseException,
        traceback: TracebackType | None = None,
        raised: Payload | None = None,
    ) -> None:
        """Take the error, and its pickled form where it has one."""
        if self._wakers is not None:
            self.set_error(error, traceback)
            self.raised = raised
            if raised is not None:
                self._error = None
            self._wake()

    def inherit(self, other: CallState) -> None:
        """Fail, or be cancelled, as another call has (an argument of this one)."""
        if self._wakers is not None:
            self.status, self.traceback = other.status, other.traceback
            self.raised, self._error = other.raised, other._error
            self._get_event().set()
            self._wake()

    @property  # type: ignore[override]  # a plain None to mypy
    def exception(self) -> BaseException | None:
        """What the call raised, made anew each time.

        An exception that has been raised holds the frames that it went through, and these the
        call's futures: were it kept here, they would never be dropped. And two threads that raise
        the same one would write into one traceback.
        """
        if self.raised is not None:
            raised: BaseException = self.raised.load()
            return raised
        return None if self._error is None else renewed(self._error)

    @exception.setter
    def exception(self, error: BaseException | None) -> None:
        self._error = error

    def cancel(self, reason: str | None = None, msg: str | None = None) -> None:
        """Take note that the call is cancelled, if it is not over yet."""
        if self._wakers is not None:
            super().cancel(reason, msg)
            self.exception = CancelledCall(str(self.key), reason, msg)
            self._wake()

    def lose(self) -> None:
        """Dask says that the value was lost from the cluster; it is here."""

    def load(self) -> Any:
        """Return the value, or raise what the call raised. Only when it is over."""
        if self.payload is not None:
            return self.payload.load()
        error = self.exception
        assert error is not None
        try:
            raise error.with_traceback(self.traceback)
        finally:
            del error  # it holds this frame

    def when_done(self, waker: Callable[[], object]) -> None:
        """Call ``waker`` on the event loop when the call is over; now, if it is."""
        with _lock:
            if self._wakers is not None:
                self._wakers.append(waker)
                return
        waker()

    def join(self, timeout: float | None = None) -> bool:
        """Wait in this thread until the call is over; say whether it is."""
        if self._wakers is None:
            return True
        gate = threading.Lock()
        gate.acquire()
        self.when_done(gate.release)
        over = False
        try:
            over = gate.acquire(timeout=-1 if timeout is None else max(0.0, timeout))
        finally:
            if not over:  # who looks in again and again must not leave a trail
                self._forget(gate.release)
        return over

    async def wait(self, timeout: float | None = None) -> None:
        """Wait until the call is over, on any event loop: ``distributed.wait`` takes its own."""
        loop = asyncio.get_running_loop()
        over = loop.create_future()

        def settle() -> None:
            if not over.done():
                over.set_result(None)

        def waker() -> None:
            with suppress(RuntimeError):  # that loop is closed
                loop.call_soon_threadsafe(settle)

        self.when_done(waker)
        try:
            await asyncio.wait_for(over, timeout)
        finally:
            self._forget(waker)

    def patience(self, limit: float | None) -> float | None:
        """Return for how long to wait on; not more than 0 when the answer is overdue (F3)."""
        if limit is None or self.sent is None:
            return limit
        return self.sent + limit - time.monotonic()

    def _forget(self, waker: Callable[[], object]) -> None:
        with _lock:
            if self._wakers is not None and waker in self._wakers:
                self._wakers.remove(waker)

    def _wake(self) -> None:
        with _lock:
            wakers, self._wakers = self._wakers, None
        for waker in wakers or ():
            waker()


def renewed(error: BaseException) -> BaseException:
    """Copy an exception, without the frames that it has been raised through."""
    try:
        again = copy.copy(error)
    except Exception:  # a foreign class can fail in any way
        return error
    if type(again) is not type(error):
        return error
    again.__cause__, again.__context__ = error.__cause__, error.__context__
    again.__suppress_context__ = error.__suppress_context__
    return again


class PoolFuture(Future[T], Generic[T]):
    """The future of a call: a :class:`distributed.Future` whose value outlives its runner.

    It works wherever a Dask future does (``distributed.wait``, ``as_completed``, ``gather``,
    ``await``), and as an argument of a later call to a pool, where the function gets its value.

    Dropping the last reference to an unfinished one ends the call, as with any Dask future.

    Examples
    --------
    >>> future = pool.submit(pow, 2, 10)  # doctest: +SKIP
    >>> pool.call(pow, future, 2)  # doctest: +SKIP
    1048576
    """

    def __init__(
        self, key: str, client: PoolClient, state: CallState, post: Callable[[Any], None]
    ) -> None:
        client.adopt(key, state)
        self._post = post
        self.call = state
        super().__init__(key, client)

    def result(self, timeout: float | None = None) -> T:
        """Wait for the value.

        Parameters
        ----------
        timeout
            Seconds to wait; ``None`` is for as long as the call may take. The call goes on.

        Returns
        -------
        The value, or a coroutine if the pool is asynchronous.

        Raises
        ------
        TimeoutError
            If the call is not over in time.
        BaseException
            What the call raised, or a :class:`~flame_dask.errors.FlameError`.
        """
        if self.client.asynchronous:
            return super().result(timeout)
        if not self.call.join(timeout):
            raise TimeoutError(f"{self.key} is not over after {timeout} s")
        value: T = self.call.load()
        return value

    def exception(self, timeout: float | None = None, **kwargs: Any) -> Any:
        """Wait for the end of the call, and return what it raised.

        Parameters
        ----------
        timeout
            Seconds to wait; ``None`` is for as long as the call may take.
        kwargs
            As for :meth:`distributed.Future.exception`.

        Returns
        -------
        BaseException or None
            Or an awaitable of it, if the pool is asynchronous.

        Raises
        ------
        TimeoutError
            If the call is not over in time.
        """
        if self.call.done() and not self.client.asynchronous:
            # As with result: the pool may be closed by now, and the event loop with it.
            return self.call.exception if self.status == "error" else None
        return super().exception(timeout, **kwargs)

    async def _result(self, raiseit: bool = True) -> Any:
        await self.call.wait()
        if self.status == "finished":
            return self.call.load()
        return await super()._result(raiseit)

    def cancel(self, reason: str | None = None, msg: str | None = None, **kwargs: Any) -> Any:
        """End the call, and its work on the runner, if it is not over (E4).

        Parameters
        ----------
        reason, msg, kwargs
            As for :meth:`distributed.Future.cancel`.

        Returns
        -------
        None, or an awaitable if the pool is asynchronous.
        """
        if self.call.done() and not self.client.asynchronous:
            return None  # the pool may be closed by now, and the event loop with it
        return super().cancel(reason=reason, msg=msg, **kwargs)

    def terminate(self) -> None:
        """End the call wherever it is, without waiting; on the event loop only."""
        if not self.call.done():
            self._post({"what": "release", "keys": [self.key]})
            self.call.cancel("its caller")

    def release(self) -> None:
        """Let go of the value; the call ends if this was the last reference to it.

        It may be called by the garbage collector, in any thread.
        """
        if not self._cleared and self.client.generation == self._generation:
            self._cleared = True
            self._post({"what": "let-go", "key": self.key})

    def __reduce__(self) -> str | tuple[Any, ...]:
        found = collected()
        if found is None:
            return super().__reduce__()
        found.futures[str(self.key)] = self
        return input_value, (self.key,)


class Found:
    """What of the pool's there is among the arguments of a call.

    Attributes
    ----------
    futures
        By their keys.
    kept
        What lives on a runner: each is a call that keeps it, and its number there.
    """

    __slots__ = ("futures", "kept")

    def __init__(self) -> None:
        self.futures: dict[str, PoolFuture[Any]] = {}
        self.kept: list[tuple[Any, int]] = []


def collected() -> Found | None:
    """Return where to note what is found in the call that is pickled now, if one is."""
    found: Found | None = getattr(_packing, "found", None)
    return found


class collecting:  # a context manager, named like contextlib's
    """While a call is pickled, collect what of the pool's is among its arguments."""

    def __enter__(self) -> Found:
        self._outer = collected()
        _packing.found = found = Found()
        return found

    def __exit__(self, *exc_info: object) -> None:
        _packing.found = self._outer

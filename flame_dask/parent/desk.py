"""The desk where calls go out and their answers come in."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable
from functools import partial
from typing import Any

from dask.utils import funcname

from flame_dask.core.affinity import KEYS
from flame_dask.dask_internals import PoolClient, open_error
from flame_dask.errors import CallTimeout, FlameError, PoolClosed, RunnerLost
from flame_dask.options import CallOptions
from flame_dask.parent.function import PoolFunction
from flame_dask.parent.futures import CallState, PoolFuture, collecting
from flame_dask.parent.port import Message, Port
from flame_dask.payload import Payload, pack_call, pack_value
from flame_dask.runner.execution import CallRaised

logger = logging.getLogger("flame_dask")

Kwargs = dict[str, Any]


class CallDesk:
    """Sends the calls of one parent to its pool, and settles them when answers come.

    Parameters
    ----------
    pool
        The pool's name.
    client
        The pool's Dask client.
    port
        The way to the pool's host.
    """

    def __init__(self, pool: str, client: PoolClient, port: Port) -> None:
        self.pool = pool
        self.client = client
        self.port = port
        self.closed: FlameError | None = None
        self._open: dict[str, CallState] = {}
        self._base = uuid.uuid4().hex[:12]
        self._count = itertools.count()
        self._keys = _Keys(self._base)
        self._tasks: set[asyncio.Task[None]] = set()
        client.flame_release = self._released

    # -- going out: any thread -----------------------------------------------------------------

    def send(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Kwargs,
        options: CallOptions,
        *,
        keep: bool = True,
        waits: bool = False,
    ) -> CallState:
        """Send a call.

        Parameters
        ----------
        fn, args, kwargs
            The call.
        options
            Its reserved keywords, checked.
        keep
            Whether the result is wanted.
        waits
            Whether the caller waits for the end of the call, so that the arguments can't change
            meanwhile.

        Raises
        ------
        SerializationError
            If the function or an argument can't be pickled.
        PoolClosed
            If the pool is closed.
        """
        if self.closed is not None:
            raise self.closed
        with collecting() as found:
            payload = pack_call(fn, args, kwargs)
        if not waits:
            payload = payload.snapshot()
        key = f"{funcname(fn)}-{self._base}{next(self._count):06x}"
        state = CallState(key, options.link)
        self._open[key] = state
        message: Message = {
            "what": "call",
            "key": key,
            "payload": payload,
            "limits": limits_of(options),
            "priority": options.priority,
            "keep": keep,
            "asynchronous": is_async(fn),
            "link": options.link,
            "retries": options.retries,
        }
        if options.affinity is not None:
            message["affinity"] = self._keys.text_of(options.affinity)
        if found:
            self.port.post(partial(self._await_inputs, message, state, list(found.values())))
        else:
            state.sent = time.monotonic()
            self.port.post(message)
        return state

    def future(self, state: CallState) -> PoolFuture[Any]:
        """Return a future of a call."""
        return PoolFuture(str(state.key), self.client, state, self.post)

    def cancel(self, state: CallState) -> None:
        """End a call, from any thread, without waiting."""
        self.port.post(partial(self._cancel, state))

    def give_up(self, state: CallState) -> None:
        """End a call whose answer is overdue, from any thread, without waiting (F3)."""
        self.port.post(partial(self._give_up, state))

    def post(self, message: Message) -> None:
        """Take a message of a future: for the pool's host, or that the future has gone."""
        if message["what"] == "let-go":
            self.port.post(partial(self.client.let_go, message["key"]))
        else:
            self.port.post(message)

    def _await_inputs(
        self, message: Message, state: CallState, futures: list[PoolFuture[Any]]
    ) -> None:
        self._background(self._send_after(message, state, futures))

    def _background(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_after(
        self, message: Message, state: CallState, futures: list[PoolFuture[Any]]
    ) -> None:
        """Send a call when the futures among its arguments are done."""
        inputs: dict[str, Payload] = {}
        queue, run, total = message["limits"]
        since = time.monotonic()
        for future in futures:
            dependency = future.call
            try:
                await dependency.wait(left(total, since))
            except TimeoutError:
                waited = time.monotonic() - since
                key = str(state.key)
                self.error(key, CallTimeout("queued", queued=waited, limit=total, call=key))
                return
            if dependency.payload is None:
                # As in Dask: a call that depends on a failed one fails with its error.
                self._settle(str(state.key))
                state.inherit(dependency)
                return
            inputs[str(future.key)] = dependency.payload
        if str(state.key) in self._open:
            message["inputs"] = inputs
            message["limits"] = queue, run, left(total, since)
            state.sent = time.monotonic()
            self.port.post(message)

    # -- coming in: on the event loop ----------------------------------------------------------

    def result(self, key: str, result: tuple[Any, ...] | None) -> None:
        """Take a result that came along with its completion."""
        state = self._settle(key)
        if state is not None:
            state.deliver(NOTHING if result is None else Payload.from_parts(result))

    def fetch(self, key: str, task: str, address: str) -> None:
        """Fetch a large result from its runner, if anybody still wants it."""
        if key in self._open:
            self._background(self._fetch(key, task, address))
        else:
            self.port.post({"what": "delivered", "key": key, "task": task})

    async def _fetch(self, key: str, task: str, address: str) -> None:
        delivered = {"what": "delivered", "key": key, "task": task}
        try:
            payload = await self.client.fetch(task, address)
        except Exception as error:
            # The host answers: it may start the call anew (retries), or know what the runner died
            # of.
            logger.info("pool %s: the result of %s is lost: %s", self.pool, key, error)
            self.port.post({**delivered, "lost": True})
            return
        state = self._settle(key)
        if state is not None:
            state.deliver(payload)
        self.port.post(delivered)

    def failed(self, key: str, exception: object, traceback: object) -> None:
        """Take what the function raised."""
        state = self._settle(key)
        if state is None:
            return
        raised = None
        try:
            error, trace = open_error(exception, traceback)
            if isinstance(error, CallRaised):
                raised = error.payload
                error = raised.load()
                trace = error.__traceback__
        except Exception as cause:  # whatever can't be opened here, its caller must hear (F3)
            error, trace, raised = cause, cause.__traceback__, None
        state.fail(error, trace, raised)

    def error(self, key: str, error: FlameError) -> None:
        """Take an error of the pool's own."""
        state = self._settle(key)
        if state is not None:
            state.fail(error)

    def close(self) -> None:
        """Take no more calls, and fail those that are still open."""
        self.closed = PoolClosed(self.pool)
        for key in list(self._open):
            self.error(key, PoolClosed(self.pool))
        for task in self._tasks:
            task.cancel()

    def lose(self) -> None:
        """Do the same because the way to the pool's host is cut (F3)."""
        for key in list(self._open):
            self.error(key, RunnerLost("unreachable", call=key))
        self.close()

    def _settle(self, key: str) -> CallState | None:
        return self._open.pop(key, None)

    def _cancel(self, state: CallState) -> None:
        if self._settle(str(state.key)) is not None:
            self.port.post({"what": "release", "keys": [state.key]})
            state.cancel("its caller")

    def _give_up(self, state: CallState) -> None:
        if self._settle(str(state.key)) is not None:
            self.port.post({"what": "release", "keys": [state.key]})
            state.fail(RunnerLost("unreachable", call=str(state.key)))

    def _released(self, key: str, done: bool) -> None:
        """End a call whose last future has gone, if it is linked (G1, G2)."""
        state = self._settle(key)
        if state is not None and not done and state.link:
            self.port.post({"what": "release", "keys": [key]})
            state.cancel("the end of its last future")


class _Keys:
    """Texts for the keys of ``affinity``, which may be objects that can't travel (C7).

    Equal keys have one text, as a dict has one entry for them. They are told apart by what they
    are equal to, not by how they are pickled or shown: that may differ where they don't.

    Parameters
    ----------
    prefix
        How the texts begin, so that those of two parents differ.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._texts: OrderedDict[Hashable, str] = OrderedDict()
        self._count = itertools.count(1)
        self._lock = threading.Lock()

    def text_of(self, key: Hashable) -> str:
        """Return the text of a key. The pool remembers no more of them than this does."""
        with self._lock:
            text = self._texts.get(key)
            if text is None:
                text = f"{self._prefix}-{next(self._count):x}"
            self._texts[key] = text
            self._texts.move_to_end(key)
            if len(self._texts) > KEYS:
                self._texts.popitem(last=False)
        return text


NOTHING = pack_value(None)


def limits_of(options: CallOptions) -> tuple[float | None, ...]:
    """Return how long a call may queue, run, and take in all (E1)."""
    if options.timeout_is_total:
        return options.queue_timeout, None, options.timeout
    return options.queue_timeout, options.timeout, None


def left(total: float | None, since: float) -> float | None:
    """Return what is left of a limit that has run since then."""
    return None if total is None else max(0.0, total - (time.monotonic() - since))


def is_async(fn: Callable[..., Any]) -> bool:
    """Say whether a call of ``fn`` is to be awaited."""
    while isinstance(fn, partial | PoolFunction):
        fn = fn.func if isinstance(fn, partial) else fn.local
    return inspect.iscoroutinefunction(fn) or (
        not inspect.isroutine(fn)
        and not inspect.isclass(fn)
        and inspect.iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004
    )

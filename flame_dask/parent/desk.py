"""The desk where calls go out and their answers come in."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import logging
import threading
import time
import uuid
import weakref
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Hashable, Sequence
from functools import partial
from typing import Any

from dask.utils import funcname

from flame_dask.child_spec import ChildSpec
from flame_dask.core.affinity import KEYS
from flame_dask.dask_internals import PoolClient, open_error
from flame_dask.errors import CallTimeout, FlameError, PoolClosed, RunnerLost
from flame_dask.options import CallOptions
from flame_dask.parent.function import PoolFunction
from flame_dask.parent.futures import CallState, Found, PoolFuture, collecting
from flame_dask.parent.kept import Kept
from flame_dask.parent.port import Message, Port
from flame_dask.payload import Payload, pack_call, pack_value
from flame_dask.runner.execution import CallRaised

logger = logging.getLogger("flame_dask")

Kwargs = dict[str, Any]

#: Sends a call, with the values of the futures among its arguments.
Send = Callable[[dict[str, Payload]], None]


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
    fire
        Has a function called with arguments in a thread that may wait.
    code
        Says which revision of the code in this process's files there is, if that is watched (J3).
    """

    def __init__(
        self,
        pool: str,
        client: PoolClient,
        port: Port,
        fire: Callable[..., None],
        code: Callable[[], int] | None = None,
    ) -> None:
        self.pool = pool
        self.client = client
        self.port = port
        self._fire = fire
        self._code = code
        self.closed: FlameError | None = None
        self._open: dict[str, CallState] = {}
        #: Calls that live on, and what takes the items of streams, by their keys.
        self.kept: dict[str, Kept] = {}
        #: The same, also when they are over, as long as anybody has something of them.
        self.ever_kept: weakref.WeakValueDictionary[str, Kept] = weakref.WeakValueDictionary()
        self.streams: dict[str, Callable[..., None]] = {}
        self._base = uuid.uuid4().hex[:12]
        self._count = itertools.count()
        self._keys = _Keys(self._base)
        self._tasks: set[asyncio.Task[None]] = set()
        client.flame_release = self._released

    # -- going out: any thread -----------------------------------------------------------------

    def send(
        self,
        fn: Any,
        args: tuple[Any, ...],
        kwargs: Kwargs,
        options: CallOptions,
        *,
        keep: bool = True,
        waits: bool = False,
        mode: str = "",
        items: Callable[..., None] | None = None,
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
        mode
            ``child`` or ``stream``, if it is no ordinary call.
        items
            Takes the items of a stream.

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
        if found.kept and mode:
            raise ValueError(
                f"what lives on a runner can be an argument of an ordinary call, not of a {mode}: "
                "get() it, or call a function that uses it there"
            )
        if found.kept:
            return self._request(fn, payload, found, options)
        if not waits:
            payload = payload.snapshot()
        if options.track_resources and keep and not mode:
            mode = "track"
        code = 0 if self._code is None else self._code()
        name = fn.id if isinstance(fn, ChildSpec) else funcname(fn)
        key = f"{name}-{self._base}{next(self._count):06x}"
        state = CallState(key, options.link)
        self._open[key] = state
        if items is not None:
            self.streams[key] = items  # before the first one can come
        message: Message = {
            "what": "call",
            "key": key,
            "payload": payload,
            "limits": limits_of(options),
            "priority": options.priority,
            "keep": keep,
            # What is tracked waits in a thread, for as long as it is there.
            "asynchronous": is_async(fn) and mode in ("", "child"),
            "link": options.link,
            "retries": options.retries,
        }
        if mode:
            message["mode"] = mode
        if code:
            message["code"] = code
        if options.affinity is not None:
            message["affinity"] = self._keys.text_of(options.affinity)
        if found.futures:
            send = partial(self._send_with, message, state)
            self.port.post(partial(self._await_inputs, message, state, found, send))
        else:
            state.sent = time.monotonic()
            self.port.post(message)
        return state

    def _request(self, fn: Any, payload: Payload, found: Found, options: CallOptions) -> CallState:
        """Send a call to where what is among its arguments lives (I2)."""
        kept: Kept
        (kept, index), *others = found.kept
        if kept.desk is not self:
            raise ValueError(f"call {kept.key} of pool {kept.desk.pool} keeps it: call that pool")
        for other, _ in others:
            if other.process != kept.process:
                raise ValueError(
                    f"one call can't have what call {kept.key} keeps on {kept.runner} and what "
                    f"call {other.key} keeps on {other.runner}, since they are not in the same "
                    "process: get() one of them first"
                )
        state, begin = kept.send(
            index,
            payload,
            limits_of(options),
            others=[other.hold(number) for other, number in others],
            link=options.link,
            asynchronous=is_async(fn) and not options.track_resources,
            track=options.track_resources,
        )
        key = str(state.key)
        self._open[key] = state
        state.sent = time.monotonic()
        if found.futures:
            message: Message = {"limits": limits_of(options)}
            self.port.post(partial(self._await_inputs, message, state, found, begin))
        else:
            self.port.post(partial(begin, {}))
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

    def _await_inputs(self, message: Message, state: CallState, found: Found, send: Send) -> None:
        self._background(self._send_after(message, state, list(found.futures.values()), send))

    def _background(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send_after(
        self, message: Message, state: CallState, futures: list[PoolFuture[Any]], send: Send
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
            message["limits"] = queue, run, left(total, since)
            send(inputs)

    def _send_with(self, message: Message, state: CallState, inputs: dict[str, Payload]) -> None:
        message["inputs"] = inputs
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
        if key in self._open or key in self.kept:
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
        try:
            error, trace = open_error(exception, traceback)
        except Exception as cause:  # whatever can't be opened here, its caller must hear (F3)
            error, trace = cause, cause.__traceback__
        if isinstance(error, CallRaised):
            _fail(state, error.payload)
        else:
            state.fail(error, trace)

    def raised(self, key: str, raised: Payload) -> None:
        """Take what a function raised, pickled as a value."""
        state = self._settle(key)
        if state is not None:
            _fail(state, raised)

    def error(self, key: str, error: FlameError) -> None:
        """Take an error of the pool's own."""
        state = self._settle(key)
        if state is not None:
            state.fail(error)

    def note(self, key: str, kind: str, runner: str, **body: Any) -> None:
        """Take what a call says beside its result."""
        if kind == "kept":
            self._keep(key, runner, **body)
        elif kind == "answer" and key in self.kept:
            self.kept[key].answered(**body)
        elif kind == "items" and key in self.streams:
            self.streams[key](**body)
        elif kind == "log":
            self._fire(partial(self.log, key, runner, **body))

    def _keep(self, key: str, runner: str, process: str, result: Any, held: Any) -> None:
        """Take the result of a call that lives on (H1, I1)."""
        state = self._open.pop(key, None)
        if state is None:
            self.port.post({"what": "release", "keys": [key]})  # its caller is gone
            return
        kept = self.kept[key] = self.ever_kept[key] = Kept(
            self, key, runner, process, state.link, bool(held)
        )
        kept.take(state, held)
        state.kept = kept
        state.deliver(Payload.from_parts(result))

    def log(self, call: str, runner: str, source: str, level: int, lines: Sequence[str]) -> None:
        """Log what a call has printed or logged, a record a line (B8)."""
        extra = {"flame_pool": self.pool, "flame_runner": runner, "flame_call": call}
        heard = logging.getLogger(f"flame.{self.pool}")
        for line in lines:
            args = runner, call, line
            heard.log(level, "%s %s: %s", *args, extra={**extra, "flame_source": source})

    def stop_kept(self, limit: float | None) -> None:
        """Ask what lives on and is linked to end in so many seconds, since its parent does (G1)."""
        for kept in list(self.kept.values()):
            if kept.link:
                kept.stop(limit)

    def close(self) -> None:
        """Take no more calls, and fail those that are still open."""
        self.closed = PoolClosed(self.pool)
        for key in [*self._open, *self.kept]:
            self.error(key, PoolClosed(self.pool))
        for task in self._tasks:
            task.cancel()

    def lose(self) -> None:
        """Do the same because the way to the pool's host is cut (F3)."""
        for key in [*self._open, *self.kept]:
            self.error(key, RunnerLost("unreachable", call=key))
        self.close()

    def _settle(self, key: str) -> CallState | None:
        """Return the state of a call whose end is at hand; of one that has lived on, its life."""
        state = self._open.pop(key, None)
        if state is None and key in self.kept:
            kept = self.kept.pop(key)
            state = kept.life
            state.when_done(kept.ended)
        return state

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
        state = self._open.pop(key, None)
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


def _fail(state: CallState, raised: Payload) -> None:
    """Let a call fail with what its function raised."""
    try:
        error = raised.load()
    except Exception as cause:  # whatever can't be opened here, its caller must hear (F3)
        state.fail(cause, cause.__traceback__)
    else:
        state.fail(error, error.__traceback__, raised)


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

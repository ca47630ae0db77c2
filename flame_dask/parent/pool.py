"""The pool as its users see it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from flame_dask.child_spec import ChildSpec
from flame_dask.errors import PoolClosed, PoolOptionsError, RunnerLost
from flame_dask.options import RESERVED, CallOptions, split_reserved
from flame_dask.parent.changes import in_its_place, view_of
from flame_dask.parent.child import Child
from flame_dask.parent.executor import PoolExecutor
from flame_dask.parent.function import PoolFunction
from flame_dask.parent.futures import CallState, PoolFuture
from flame_dask.parent.life import GRACE, PoolLife
from flame_dask.parent.mapping import map_async, map_sync
from flame_dask.parent.spec import PoolSpec
from flame_dask.parent.status import PoolEvent, PoolStatus
from flame_dask.parent.stream import AsyncStream, Stream

logger = logging.getLogger("flame_dask")

T = TypeVar("T")


class FlamePool(PoolLife):
    """A pool of short-lived machines that run your functions.

    It opens at once, or when it is awaited if it is asynchronous, and is a context manager.

    Parameters
    ----------
    name
        Names the pool in this process, in logs, and on the dashboard.
    max
        The most runners that may exist at the same time, whatever happens. Required.
    min
        Runners that are kept, whether or not there is work. Opening waits for them.
    max_concurrency
        Calls that one runner runs at the same time.
    single_use
        Whether a runner takes no further call once one of its calls has ended.
    backend
        A Dask cluster class, ``(class, {options})``, its dotted path, a running cluster, or an
        object with the backend protocol. Left out: Dask config ``flame.backend``, else
        ``LocalCluster``.
    timeout, queue_timeout, boot_timeout, shutdown_timeout
        Seconds, a ``timedelta`` or a text such as ``"30s"``; ``None`` is no limit. How long a call
        may run, how long it may wait for a slot (default: ``boot_timeout``), how long a runner may
        take to get ready, how long calls may go on when the pool closes.
    idle_shutdown_after, min_idle_shutdown_after
        How long a runner may be without a call before it stops; the second one is for the ``min``
        runners, which by default never do. ``idle_shutdown_after=(duration, check)`` asks
        ``check()`` on the runner first: if it is false or raises, the runner stays.
    buffer
        Runners that are kept ready beyond what the calls of the moment need.
    placement
        ``"spread"`` gives a call to the emptiest runner, ``"pack"`` to the fullest.
    on_grow_start, on_grow_end, on_shrink, on_cast_error
        Hooks, called in a thread of the parent: ``on_grow_start(event)``,
        ``on_grow_end(result, event)`` with ``"ok"`` or an exception, ``on_shrink(event)``, with a
        :class:`ScaleEvent`; ``on_cast_error(error)``.
    isolation
        ``"thread"``: a call runs in a thread of its runner, ``"process"``: in a process of its own,
        which can be ended whatever it does.
    track_resources
        Whether what a call returns in a :class:`keep`, and processes and threads in its result,
        stay on its runner.
    env
        Environment variables of the runners.
    log
        Whether what calls print and log comes to the parent's logger ``flame.NAME``.
    asynchronous
        Whether methods return awaitables, as everywhere in Dask.

    Raises
    ------
    PoolOptionsError
        An option can't be used. Nothing has been started.
    BootError
        The cluster or one of the ``min`` runners did not start. Nothing runs on.

    Examples
    --------
    >>> with FlamePool("crunch", max=4) as pool:  # doctest: +SKIP
    ...     pool.call(pow, 2, 10)
    1024
    """

    @classmethod
    def child_spec(cls, name: str, **options: Any) -> PoolSpec:
        """Describe a pool for a :class:`Supervisor`, without starting it (K1).

        Parameters
        ----------
        name, options
            As for :class:`FlamePool`. They are checked at once, all but whether the name is free.

        Returns
        -------
        PoolSpec

        Raises
        ------
        PoolOptionsError
            An option can't be used.

        Examples
        --------
        >>> FlamePool.child_spec("web", min=1, max=4)
        <PoolSpec 'web': FlamePool, 1..4 runners>
        """
        return PoolSpec.check(cls, name, options)

    # -- calling -------------------------------------------------------------------------------

    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a function on a runner and return its value (B1).

        Parameters
        ----------
        fn
            Any function; closures, lambdas and functions of ``__main__`` too. An ``async def`` runs
            on the runner's event loop.
        args, kwargs
            Its arguments; futures of this pool among them are replaced by their values. Reserved
            keywords: ``timeout`` (seconds, for waiting and running together), ``queue_timeout``,
            ``priority`` (higher is earlier), ``link`` (whether it ends with its caller; default:
            True), ``retries`` (how often it may start anew when its runner is lost; default: 0),
            ``track_resources`` (whether what it returns in a :class:`keep` stays on its runner),
            ``affinity`` (a key: the call prefers the runner that got the last call with an equal
            one, for what that has in memory). Whatever can be a key of a dict can be one here, and
            keys are equal as they are there. It is no more than a preference: no call waits for its
            runner while another has a slot, and a runner that the pool can do without goes.

        Returns
        -------
        The function's value; an awaitable of it if the pool is asynchronous.

        Raises
        ------
        BaseException
            What the function raised, with its remote traceback.
        CallTimeout
            It did not get a slot, or did not end, in time.
        RunnerLost
            Its runner died, or its own process did.
        SerializationError
            The function, an argument or the result can't be pickled.
        PoolClosed
            The pool is closed.

        Examples
        --------
        >>> pool.call(divmod, 7, 2, timeout="10s")  # doctest: +SKIP
        (3, 1)
        """
        options, kwargs = self._split(kwargs)
        state = self._desk.send(fn, args, kwargs, options, waits=True)
        return self._outcome(state, self._patience(options))

    def _outcome(self, state: CallState, limit: float | None) -> Any:
        """Wait for what a call comes to, or return what does if the pool is asynchronous."""
        if self.asynchronous:
            return self._await_call(state, limit)
        try:
            patience = limit
            while not state.join(patience):
                patience = state.patience(limit)
                if patience is not None and patience <= 0:
                    self._desk.give_up(state)
                    if not state.join(GRACE):
                        raise RunnerLost("unreachable", call=str(state.key))
            return state.load()
        except BaseException:
            # Ctrl-C above all: what nobody waits for must not go on (E4).
            self._desk.cancel(state)
            raise

    async def _await_call(self, state: CallState, limit: float | None) -> Any:
        patience = limit
        try:
            while not state.done():
                try:
                    await state.wait(patience)
                except TimeoutError:
                    patience = state.patience(limit)
                    if patience is not None and patience <= 0:
                        self._desk.give_up(state)
                        patience = GRACE
        except asyncio.CancelledError:
            self._desk.cancel(state)
            raise
        return state.load()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> PoolFuture[Any]:
        """Start a call and return its future at once (B3).

        Parameters
        ----------
        fn, args, kwargs
            As for :meth:`call`. The arguments may be changed afterwards.

        Returns
        -------
        PoolFuture
            A :class:`distributed.Future`. Dropping the last reference to it ends the call.

        Raises
        ------
        SerializationError
            The function or an argument can't be pickled.
        PoolClosed
            The pool is closed.

        Examples
        --------
        >>> future = pool.submit(pow, 2, 10)  # doctest: +SKIP
        >>> future.result()  # doctest: +SKIP
        1024
        """
        options, kwargs = self._split(kwargs)
        return self._desk.future(self._desk.send(fn, args, kwargs, options))

    def map(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Any,
        ordered: bool = True,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Call a function for each item, and yield the results as they come (B4).

        It is lazy: at most as many calls as the pool has slots are under way or waiting to be
        yielded, so the iterables may be endless. Closing the iterator ends what is under way.

        Parameters
        ----------
        fn, iterables
            As for the built-in ``map``.
        ordered
            Whether results come in the order of the items, or as soon as they are there.
        return_exceptions
            Whether an exception is yielded in place of a result, or raised, which ends the map.
        kwargs
            Further arguments of ``fn``, and reserved keywords, as for :meth:`call`.

        Returns
        -------
        An iterator; an asynchronous one if the pool is asynchronous.

        Raises
        ------
        BaseException
            What :meth:`call` raises, when its result is due.

        Examples
        --------
        >>> list(pool.map(pow, [2, 3], [10, 2]))  # doctest: +SKIP
        [1024, 9]
        """
        options, kwargs = self._split(kwargs)

        def start(*args: Any) -> CallState:
            return self._desk.send(fn, args, kwargs, options)

        iterate = map_async if self.asynchronous else map_sync
        slots = self.options.max * self.options.max_concurrency
        return iterate(
            zip(*iterables),  # noqa: B905  # the shortest one ends it, as with the built-in map
            start=start,
            cancel=self._desk.cancel,
            ahead=slots,
            ordered=ordered,
            return_exceptions=return_exceptions,
        )

    def cast(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        """Run a function without waiting for it, and without a result (B5).

        It has no time limit unless one is given. A failure is logged, counted, and given to the
        pool's ``on_cast_error``.

        Parameters
        ----------
        fn, args, kwargs
            As for :meth:`call`.

        Raises
        ------
        SerializationError
            The function or an argument can't be pickled.
        PoolClosed
            The pool is closed.

        Examples
        --------
        >>> pool.cast(print, "hello from a runner")  # doctest: +SKIP
        """
        options, kwargs = self._split({"timeout": None, **kwargs})
        state = self._desk.send(fn, args, kwargs, options, keep=False)
        state.when_done(partial(self._cast_over, state))

    def _cast_over(self, state: CallState) -> None:
        error = state.exception
        if error is None:
            return
        self._cast_errors += 1
        trace = error.with_traceback(state.traceback)
        logger.error("pool %s: cast %s failed", self.name, state.key, exc_info=trace)
        if self.options.on_cast_error is not None:
            self._hooks.fire(self.options.on_cast_error, error)

    def place_child(self, spec: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Start something long-lived on a runner (H1).

        It holds one slot until it ends, and its runner stays as long. It is never started anew.

        Parameters
        ----------
        spec
            A function or an ``async def``, whose run is the child; a class, of which one is made
            there; or a :class:`ChildSpec`, which also says how to stop it.
        args, kwargs
            Arguments of the function, the class or the spec's ``start``. Reserved keywords are
            those of :meth:`call`; the limits of time are for the start, not for the life.

        Returns
        -------
        Child
            An awaitable of it if the pool is asynchronous.

        Raises
        ------
        BaseException
            What the start has raised. Its slot is free again then.
        CallTimeout
            It did not get a slot, or did not start, in time.
        TypeError
            It is nothing that can be started.
        RunnerLost, SerializationError, PoolClosed
            As for :meth:`call`.

        Examples
        --------
        >>> counter = pool.place_child(Counter, 10)  # doctest: +SKIP
        >>> counter.add(5)  # doctest: +SKIP
        15
        """
        if not callable(spec) and not isinstance(spec, ChildSpec):
            raise TypeError(f"{spec!r} can't be placed: give a function, a class or a ChildSpec")
        options, kwargs = self._split(kwargs)
        if options.retries:
            raise PoolOptionsError("retries", options.retries, "leave it out: a child starts once")
        state = self._desk.send(spec, args, kwargs, options, mode="child")
        if self.asynchronous:
            return self._place_async(spec, state, options)
        self._outcome(state, self._patience(options))
        return Child(self, spec, state.kept)

    async def _place_async(self, spec: Any, state: CallState, options: CallOptions) -> Child:
        await self._await_call(state, self._patience(options))
        return Child(self, spec, state.kept)

    def stream(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a generator on a runner, and yield its items as it makes them (B7).

        The generator goes on while the items are taken, and waits when they are not: neither side
        holds more than a few thousand of them, or a few megabytes; of large ones, two or three.

        Parameters
        ----------
        fn
            A generator function, an ``async def`` one too, or any function that returns something
            to iterate over.
        args, kwargs
            As for :meth:`call`. There is no limit of time unless ``timeout`` is given, which is
            for all of it. ``retries`` is refused, since items would come twice.

        Returns
        -------
        Stream
            An iterator with ``close``, and a context manager; an asynchronous one with ``aclose``
            if the pool is asynchronous. To close or drop it ends the generator.

        Raises
        ------
        BaseException
            What the generator has raised, after the items before that.
        CallTimeout, RunnerLost, SerializationError, PoolClosed
            As for :meth:`call`, while it is iterated over.

        Examples
        --------
        >>> for frame in pool.stream(frames, video):  # doctest: +SKIP
        ...     show(frame)
        """
        options, kwargs = self._split({"timeout": None, **kwargs})
        if options.retries:
            remedy = "leave it out: items would come twice"
            raise PoolOptionsError("retries", options.retries, remedy)
        send = partial(self._desk.send, fn, args, kwargs, options, mode="stream")
        return (AsyncStream if self.asynchronous else Stream)(self._desk, send)

    def get_executor(self) -> PoolExecutor:
        """Return a :class:`concurrent.futures.Executor` that runs its calls on this pool (B4).

        Its ``shutdown`` leaves the pool open.

        Examples
        --------
        >>> with pool.get_executor() as executor:  # doctest: +SKIP
        ...     executor.submit(pow, 2, 10).result()
        1024
        """
        return PoolExecutor(self._desk, self._settlers, partial(self._split, {}))

    def function(self, fn: Callable[..., T] | None = None, /, **reserved: Any) -> Any:
        """Wrap a function so that calling it calls the pool (B4).

        Parameters
        ----------
        fn
            The function.
        reserved
            Reserved keywords for each of its calls, such as ``timeout``.

        Returns
        -------
        PoolFunction
            With ``submit``, ``map`` and ``cast``, and ``local`` for the function itself.

        Examples
        --------
        >>> @pool.function(timeout="1m")  # doctest: +SKIP
        ... def square(x):
        ...     return x * x
        >>> square(7), square.local(7)  # doctest: +SKIP
        (49, 49)
        """
        CallOptions.check(self.options, **reserved)
        if fn is None:
            return partial(self.function, **reserved)
        return PoolFunction(self, fn, reserved)

    def _split(self, kwargs: dict[str, Any]) -> tuple[CallOptions, dict[str, Any]]:
        """Part the reserved keywords from the function's own."""
        if self._state != "open":
            raise PoolClosed(self.name)
        if not kwargs or RESERVED.isdisjoint(kwargs):
            return self.options.call_defaults, kwargs
        own, reserved = split_reserved(kwargs)
        return CallOptions.check(self.options, **reserved), own

    def _patience(self, options: CallOptions) -> float | None:
        """How long to wait for an answer before something must have gone wrong (F3)."""
        limit = options.timeout
        if limit is not None and not options.timeout_is_total:
            limit = None if options.queue_timeout is None else limit + options.queue_timeout
            limit = None if limit is None else limit * (1 + options.retries)
        return None if limit is None else limit + GRACE

    # -- changing ------------------------------------------------------------------------------

    def configure(self, **options: Any) -> Any:
        """Change options while the pool runs (C8).

        Everything is checked before anything changes. A runner above a lowered ``max`` takes no new
        call, finishes those it has, and stops. Calls that wait keep the limits they came with.

        Parameters
        ----------
        options
            Any of ``min``, ``max``, ``buffer``, ``placement``, ``timeout``, ``queue_timeout``,
            ``boot_timeout``, ``idle_shutdown_after`` and ``min_idle_shutdown_after``, as for
            :class:`FlamePool`. ``idle_shutdown_after`` is a duration; a check stays as it is.

        Returns
        -------
        None, when the pool goes by them; an awaitable if the pool is asynchronous.

        Raises
        ------
        PoolOptionsError
            An option can't be used, or can't be changed any more. Nothing has changed.
        PoolClosed
            The pool is closed.

        Examples
        --------
        >>> pool.configure(max=20, buffer=1)  # doctest: +SKIP
        """
        if self._state != "open":
            raise PoolClosed(self.name)
        with self._changes.lock:
            new = in_its_place(self.options.configure(**options))
            order, answer = self._changes.order(view_of(new, self._settings.grace))
            self.options = new
            self._port.post(partial(self._reconfigured, new))
            self._port.post(order)
        return self.sync(asyncio.wrap_future, answer)

    # -- looking -------------------------------------------------------------------------------

    def status(self) -> Any:
        """Return a snapshot of the pool (C10).

        Returns
        -------
        PoolStatus
            Or an awaitable of it, if the pool is asynchronous.

        Examples
        --------
        >>> [runner.state for runner in pool.status().runners]  # doctest: +SKIP
        ['ready', 'booting']
        """
        self._require_open()
        return self.sync(self._status)

    async def _status(self) -> PoolStatus:
        snapshot, addresses = await self._ask("status")
        snapshot.counters["cast_errors"] = self._cast_errors
        return PoolStatus.of(self.name, snapshot, addresses)

    def events(self) -> Any:
        """Return the last decisions of the pool, oldest first, each with its reason (C10).

        Returns
        -------
        list of PoolEvent
            Or an awaitable of it, if the pool is asynchronous.

        Examples
        --------
        >>> print(pool.events()[-1].reason)  # doctest: +SKIP
        pool-2: idle for 30 s
        """
        self._require_open()
        return self.sync(self._events)

    async def _events(self) -> list[PoolEvent]:
        return [PoolEvent.of(line) for line in await self._ask("events")]

    async def _ask(self, what: str) -> Any:
        self._require_open()
        try:
            return await self._port.ask(what)
        except OSError as error:  # the way to the pool's host has just been cut
            raise PoolClosed(self.name) from error

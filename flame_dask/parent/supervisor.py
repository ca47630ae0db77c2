"""Keeps pools alive: starts several, restarts those that die, gives up if they do so too often.

A pool tells of its death by itself (``PoolLife._watch``), so nothing waits for it: no thread, no
timer. A restart is a thread of its own, which ends when the pool is up, or a task of the event loop
if the pools are asynchronous. Several pools that die at the same time, as they do when a network
goes, so don't wait for each other.

What is to be done is the same in both cases and written once, as coroutines. Where the pools are
not asynchronous nothing in these coroutines ever waits by ``await``: see :func:`_at_once`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import inspect
import logging
import threading
import time
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, Self, TypeVar

from flame_dask.errors import (
    Crash,
    FlameError,
    PoolClosed,
    PoolNotFound,
    SupervisorFailed,
)
from flame_dask.options import SupervisorOptions, duration
from flame_dask.parent import registry
from flame_dask.parent.death import cause_of, status_of
from flame_dask.parent.pool import FlamePool
from flame_dask.parent.restarts import Restarts
from flame_dask.parent.spec import PoolSpec, by_name

logger = logging.getLogger("flame_dask")

T = TypeVar("T")

#: Seconds after which a pool that is being opened is told again that it is not wanted: it can't
#: hear of it while its cluster starts.
TELL_AGAIN: Final = 0.1

#: The supervisors that have not ended.
_running: set[Supervisor] = set()


class Supervisor:
    """Starts several pools, restarts one whose scheduler or cluster died, and stops them (K1).

    It starts its pools at once, or when it is awaited if it is asynchronous, and is a context
    manager. They start in the order that they are given in, and stop in reverse. A pool that you
    close yourself is not restarted.

    Parameters
    ----------
    specs
        The pools, as :meth:`FlamePool.child_spec` describes them.
    max_restarts
        The most restarts of all pools together
    max_seconds
        within this time: seconds, a ``timedelta`` or a text such as ``"5s"``; ``None`` counts all
        restarts there ever were. Time during which a pool is down does not count. A restart that
        fails is followed by another one, and counts. One restart too many ends the supervisor: it
        stops all its pools, and ``error`` says why.
    on_failure
        Called as ``on_failure(error)`` when the supervisor has given up and stopped its pools, in a
        thread of the parent.
    asynchronous
        Whether its methods return awaitables. It is for pools that do so, too.

    Attributes
    ----------
    error
        ``None``, or why the supervisor has given up: a :class:`SupervisorFailed`.

    Raises
    ------
    PoolOptionsError
        An option or a specification can't be used, or the name of a pool is taken.
    BootError
        A pool did not start. Those before it have been stopped.

    Examples
    --------
    >>> web = FlamePool.child_spec("web", min=1, max=4)
    >>> nightly = FlamePool.child_spec("nightly", max=100)
    >>> with Supervisor([web, nightly]) as supervisor:  # doctest: +SKIP
    ...     supervisor["web"].call(pow, 2, 10)
    1024
    """

    def __init__(
        self,
        specs: Iterable[PoolSpec],
        *,
        max_restarts: int = 3,
        max_seconds: Any = 5,
        on_failure: Callable[[SupervisorFailed], object] | None = None,
        asynchronous: bool = False,
    ) -> None:
        self.options = SupervisorOptions.check(
            max_restarts=max_restarts,
            max_seconds=max_seconds,
            on_failure=on_failure,
            asynchronous=asynchronous,
        )
        self.error: SupervisorFailed | None = None
        self._specs = by_name(specs, asynchronous)
        self._pools: dict[str, FlamePool] = {}
        self._count = Restarts(self.options.max_restarts, self.options.max_seconds)
        self._restarts: set[Any] = set()
        self._lock = threading.Lock()
        self._state = "new"
        self._ended: Any = asyncio.Event() if asynchronous else threading.Event()
        self._closer: asyncio.Future[None] | None = None
        if not asynchronous:
            _at_once(self._open())

    @property
    def asynchronous(self) -> bool:
        """Whether its methods return awaitables."""
        return self.options.asynchronous

    def __repr__(self) -> str:
        state = "failed" if self.error is not None else self._state
        return f"<Supervisor: {state}, {', '.join(self._specs) or 'no pools'}>"

    # -- looking -------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> FlamePool:
        """Return the pool of this name, as it is after its last restart.

        Raises
        ------
        PoolNotFound
            It is none of its pools. While it restarts the pool, the error's ``restarting`` is true.
        SupervisorFailed
            It has given up.
        """
        pools = self.pools
        if name not in pools:
            restarting = name in self._specs and registry.is_restarting(name)
            raise PoolNotFound(name, pools, restarting=restarting)
        return pools[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.pools)

    @property
    def pools(self) -> dict[str, FlamePool]:
        """The pools by name, without those that are being restarted; none when it has ended.

        Raises
        ------
        SupervisorFailed
            It has given up.
        """
        self._require_success()
        with self._lock:
            up = self._specs.keys() - self._count.down if self._state == "open" else set()
            return {name: self._pools[name] for name in self._specs if name in up}

    def wait(self, timeout: Any = None) -> Any:
        """Wait until the supervisor is closed, or has given up and stopped its pools.

        Parameters
        ----------
        timeout
            For how long: seconds, a ``timedelta`` or a text such as ``"1m"``; ``None`` is for ever.

        Returns
        -------
        bool
            Whether it has ended; an awaitable of it if the supervisor is asynchronous.

        Raises
        ------
        SupervisorFailed
            It has given up.

        Examples
        --------
        >>> supervisor.wait("1s")  # doctest: +SKIP
        False
        """
        seconds = duration("timeout", timeout)
        if self.asynchronous:
            return self._wait(seconds)
        ended: bool = self._ended.wait(seconds)
        self._require_success()
        return ended

    async def _wait(self, seconds: float | None) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), seconds)
        self._require_success()
        ended: bool = self._ended.is_set()
        return ended

    def _require_success(self) -> None:
        if self.error is not None:
            raise self.error

    # -- starting ------------------------------------------------------------------------------

    async def _open(self) -> None:
        self._state = "open"
        _running.add(self)
        try:
            now = time.monotonic()
            for name in self._specs:
                self._count.fell(name, now)
            for spec in self._specs.values():
                await self._start(spec)
        except BaseException:
            await self._close()
            self._require_success()  # pools that were up may have crashed meanwhile
            raise

    async def _start(self, spec: PoolSpec) -> None:
        """Start a pool, and take care of it from then on."""
        with self._lock:
            if self._state != "open":
                raise PoolClosed(spec.name)
            # There before it opens, so that it can be closed while it does.
            pool = self._pools[spec.name] = spec.make()
        if self.asynchronous:
            await pool
        else:
            pool._open_sync()
        with self._lock:
            wanted = self._state == "open"
            if wanted:
                self._count.rose(spec.name, time.monotonic())
                registry.set_restarting(spec.name, False)
        if not wanted:
            # It could not be closed while its cluster started.
            await self._settle(pool.close())
            raise PoolClosed(spec.name)
        pool._watch(partial(self._died, pool))

    # -- restarting ----------------------------------------------------------------------------

    def _died(self, pool: FlamePool) -> None:
        """Take note that a pool has died; on its event loop, which must not be held up."""
        name = pool.name
        with self._lock:
            known = self._pools.get(name) is pool and name not in self._count.down
            if self._state != "open" or not known:
                return
            self._count.fell(name, time.monotonic())
            registry.set_restarting(name, True)
            self._go(self._restart(pool, datetime.now(UTC), status_of(pool.cluster)), name)

    def _go(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Have something done beside everything else."""
        job: Any
        if self.asynchronous:
            job = asyncio.ensure_future(work)
            job.add_done_callback(self._restarts.discard)
        else:
            # A daemon: a pool that does not start must not keep the interpreter from its exit.
            job = threading.Thread(
                target=self._in_thread, args=(work,), name=f"flame-restart-{name}", daemon=True
            )
            job.start()
        self._restarts.add(job)

    def _in_thread(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            _at_once(work)
        finally:
            with self._lock:
                self._restarts.discard(threading.current_thread())

    async def _restart(self, pool: FlamePool, at: datetime, status: str) -> None:
        """Restart a pool that has died, until it is up, or has crashed too often."""
        spec = self._specs[pool.name]
        try:
            # First, so that there are never more runners than max (C1). It also brings to light
            # what the pool has died of.
            await self._settle(pool.close())
        except Exception:
            logger.exception("pool %s: the end of the dead pool failed", pool.name)
        crash = Crash(pool.name, at, cause_of(pool, status))
        while self._state == "open":
            with self._lock:
                allowed = self._count.allows(crash, time.monotonic())
            if not allowed:
                await self._give_up()
                return
            logger.warning("restarting %s", crash)
            try:
                await self._start(spec)
            except Exception as error:
                crash = Crash(pool.name, datetime.now(UTC), error)
            else:
                logger.warning("pool %r is up again", pool.name)
                return

    async def _give_up(self) -> None:
        """End because of too many crashes."""
        with self._lock:
            if self._state != "open":
                return  # it ends already
            self._state = "closing"
            crashes = self._count.crashes
            error = SupervisorFailed(crashes, self._count.max_restarts, self._count.max_seconds)
            last = crashes[-1].cause
            error.__cause__ = last if isinstance(last, BaseException) else None
            self.error = error
        logger.error("%s", error)
        try:
            await self._close()
        except Exception:  # whoever closes the supervisor may hear of it, but need not be there
            logger.exception("a supervisor that gave up could not stop its pools")

    # -- stopping ------------------------------------------------------------------------------

    def close(self) -> Any:
        """Stop all pools, in reverse; nothing of them is left afterwards. It may be called again.

        Returns
        -------
        None, or an awaitable if the supervisor is asynchronous.

        Raises
        ------
        SupervisorFailed
            It has given up before.

        Examples
        --------
        >>> supervisor.close()  # doctest: +SKIP
        """
        closing = self._finish()
        return closing if self.asynchronous else _at_once(closing)

    async def _finish(self) -> None:
        await self._close()
        self._require_success()

    async def _close(self) -> None:
        if not self.asynchronous:
            await self._stop()
            return
        if self._closer is None:
            self._closer = asyncio.ensure_future(self._stop())
        # However many wait for it, and whoever gives up: it goes on.
        await asyncio.shield(self._closer)

    async def _stop(self) -> None:
        with self._lock:
            if self._state == "closed":
                return
            self._state = "closing"
            restarts = self._restarts - {threading.current_thread()}
        if self.asynchronous:
            await _end_tasks(restarts)
        else:
            for thread in restarts:
                self._join(thread)
        async with contextlib.AsyncExitStack() as pools:  # each is closed, in reverse
            pools.callback(self._over)
            for name in self._specs:
                if name in self._pools:
                    pools.push_async_callback(self._settle_close, self._pools[name])

    def _join(self, thread: threading.Thread) -> None:
        """Wait for the end of a restart, and keep its pool from opening."""
        while thread.is_alive():
            for name in list(self._count.down):
                if name in self._pools:
                    try:
                        self._pools[name].close()
                    except Exception:
                        logger.exception("pool %s: could not be closed", name)
            thread.join(TELL_AGAIN)

    async def _settle_close(self, pool: FlamePool) -> None:
        await self._settle(pool.close())

    async def _settle(self, done: Any) -> None:
        """Await what a method of a pool returned, if there is anything to await."""
        if inspect.isawaitable(done):
            await done

    def _over(self) -> None:
        with self._lock:
            if self._state == "closed":
                return
            self._state = "closed"
            for name in self._count.down:
                registry.set_restarting(name, False)
        _running.discard(self)
        self._ended.set()
        if self.error is not None and self.options.on_failure is not None:
            # In a thread that hangs on nothing, whatever the hook does.
            threading.Thread(
                target=self._tell, args=(self.options.on_failure,), name="flame-on-failure",
                daemon=True,
            ).start()  # fmt: skip

    def _tell(self, hook: Callable[..., object]) -> None:
        try:
            hook(self.error)
        except Exception:
            logger.exception("on_failure of a supervisor failed")

    def _close_at_exit(self) -> None:
        """Restart nothing any more, and stop the pools, because the interpreter exits."""
        if self.asynchronous:
            # The event loop is gone by now; the pools end what can be ended without it.
            self._state = "closed"
            return
        try:
            _at_once(self._close())
        except Exception:
            logger.exception("a supervisor could not stop its pools")

    # -- with ----------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self.asynchronous:
            raise TypeError("this supervisor is asynchronous: use `async with`")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        _at_once(self._exit(error))

    def __await__(self) -> Generator[Any, Any, Self]:
        return self._opened().__await__()

    async def _opened(self) -> Self:
        if not self.asynchronous:
            raise TypeError("this supervisor is not asynchronous: use it without `await`")
        if self._state == "new":
            await self._open()
        return self

    async def __aenter__(self) -> Self:
        return await self._opened()

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        await self._exit(error)

    async def _exit(self, error: BaseException | None) -> None:
        await self._close()
        # Calls in the block may have failed because the supervisor did. But what has nothing to do
        # with it, such as Ctrl-C, must get through, and so does the supervisor's own error.
        if error is None or (isinstance(error, FlameError) and error is not self.error):
            self._require_success()


def _at_once(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits by ``await``, because all that it calls blocks instead."""
    try:
        work.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    work.close()
    raise AssertionError("this coroutine waits")


async def _end_tasks(tasks: set[Any]) -> None:
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


@atexit.register  # after that of the registry, so it runs before it
def _close_all() -> None:
    for supervisor in list(_running):
        supervisor._close_at_exit()

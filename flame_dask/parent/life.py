"""The life of a pool: how its parts are put together, and taken down again."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import threading
from collections.abc import Callable, Generator
from functools import partial
from typing import Any, Self

import dask.config
from dask.utils import parse_bytes, parse_timedelta
from distributed import Scheduler, SpecCluster
from distributed.utils import SyncMethodMixin

from flame_dask import dask_internals as internals
from flame_dask.backends.resolve import resolve
from flame_dask.backends.spec import SpecBackend
from flame_dask.code_sync.receiver import Places
from flame_dask.code_sync.source import CodeSource
from flame_dask.core.backoff import Backoff
from flame_dask.dask_internals import PoolClient
from flame_dask.errors import BootError, FlameError, PoolClosed
from flame_dask.options import PoolOptions
from flame_dask.parent import registry
from flame_dask.parent.adaptive import PoolAdaptive, log_tail
from flame_dask.parent.changes import Changes, in_its_place, view_of
from flame_dask.parent.desk import CallDesk
from flame_dask.parent.hooks import HookThread, ScaleEvent
from flame_dask.parent.port import CommPort, LocalPort, Port
from flame_dask.parent.remote import install_remote, newcomer
from flame_dask.runner import here
from flame_dask.runner.plugin import FlameRunner
from flame_dask.scheduler.inquest import PATIENCE
from flame_dask.scheduler.plugin import FlameScheduler

logger = logging.getLogger("flame_dask")

#: Seconds that the parent grants the host beyond a deadline before it looks after itself (F3).
GRACE = 5.0


class PoolLife(SyncMethodMixin):
    """The parts of a pool, and how it opens and closes. :class:`FlamePool` adds what it is for.

    Parameters
    ----------
    name, options
        As for :class:`FlamePool`.
    """

    def __init__(self, name: str, **options: Any) -> None:
        self._prepare(PoolOptions.check(name, **options))
        if not self._asynchronous:
            self._open_sync()

    def _prepare(self, options: PoolOptions) -> None:
        """Get ready to open: take the name."""
        self.options = in_its_place(options)
        name = self.name = options.name
        self.cluster: Any = None
        self.client: Any = None
        self._backend = resolve(self.options)
        self._settings = _Settings.read()
        self._asynchronous = self.options.asynchronous
        self._loop: Any = None
        self._state = "new"
        self._started = False
        self._closing = threading.Lock()
        self._closer: asyncio.Future[None] | None = None
        self._hooks = HookThread(name)
        self._settlers = HookThread(f"{name}-executors")
        self._heard = HookThread(f"{name}-log")
        self._code_sender = HookThread(f"{name}-code")
        sync = self.options.code_sync
        self._code = None if sync is None else CodeSource(sync, name)
        self._cast_errors = 0
        self._died = False
        self._on_death: Callable[[], None] = lambda: None
        registry.register(self)

    @property
    def loop(self) -> Any:
        """The event loop that the pool's cluster and client run on."""
        return self._loop

    @property
    def dashboard_link(self) -> str | None:
        """The address of the Dask dashboard."""
        link: str | None = getattr(self.cluster, "dashboard_link", None)
        return link or None

    def _require_open(self) -> None:
        if self._state not in ("open", "closing") or self._closed.is_set():
            raise PoolClosed(self.name)

    def __repr__(self) -> str:
        o = self.options
        return f"<FlamePool {self.name!r}: {self._state}, {o.min}..{o.max} runners>"

    # -- opening -------------------------------------------------------------------------------

    def _open_sync(self) -> None:
        try:
            try:
                self.cluster = self._backend.open(asynchronous=False)
                self.client = PoolClient(self.cluster)
            except Exception as error:
                raise BootError("cluster", error, log_tail=log_tail(error)) from error
            self._loop = self.client.loop
            self.sync(self._start)
        except BaseException:
            with self._closing:
                if self._state != "closed":  # by another thread, which is why opening failed
                    self._wind_up_sync()
            raise

    async def _open_async(self) -> Self:
        if self._state != "new":
            return self
        self._state = "opening"
        try:
            try:
                # Held before it is awaited: whoever gives up meanwhile has it closed.
                self.cluster = self._backend.open(asynchronous=True)
                self.cluster = await self.cluster
                self.client = await PoolClient(self.cluster, asynchronous=True)
            except Exception as error:
                raise BootError("cluster", error, log_tail=log_tail(error)) from error
            self._loop = self.client.loop
            await self._start()
        except BaseException:
            await self._close_async()
            raise
        return self

    async def _start(self) -> None:
        """Put the plugins in place, and wait until the pool is open; on the event loop."""
        options, settings = self.options, self._settings
        host = FlameScheduler(
            self.name,
            view_of(options, settings.grace),
            settings.backoff,
            settings.inline_limit,
            own_thread=options.isolation == "process",
            owns_scheduler=self._backend_owns_scheduler(),
            adopts=self._adopts,
            patience=getattr(self._backend, "patience", PATIENCE),
            keep_awake=getattr(self._backend, "keep_awake", False),
            sends_code=self._code is not None,
        )
        runner = FlameRunner(
            self.name,
            isolation=options.isolation,
            grace=settings.grace,
            shutdown_timeout=options.shutdown_timeout,
            idle_check=options.idle_check,
            parent=here.describe(
                self.name, getattr(self._backend, "kind", type(self.cluster).__name__)
            ),
            log=options.log,
            places=None
            if options.code_sync is None
            else Places(options.code_sync.extract_dir, options.code_sync.tmp_dir),
        )
        self._host, self._runner = host, runner
        loop = asyncio.get_running_loop()
        scheduler = self._scheduler
        self._port: Port
        plugin = newcomer(runner, options) if self._comes_bare else runner
        if isinstance(scheduler, Scheduler):
            await internals.install_local(scheduler, host, plugin, runner.name)
            self._port = LocalPort(loop, host, self.client)
        else:
            await install_remote(self.client, host, plugin, runner.name)
            self._port = CommPort(loop, self.client)
        code, watched = self._code, None
        if code is not None:
            self._code_sender.fire(code.revision)  # the first look takes its time
            watched = code.revision
        self._desk = CallDesk(self.name, self.client, self._port, self._heard.fire, watched)
        # A cluster of another kind than SpecCluster has no place for it, or another `adapt`.
        adapt: Callable[..., Any] = partial(PoolAdaptive, self.cluster)
        if isinstance(self.cluster, SpecCluster):
            adapt = partial(self.cluster.adapt, Adaptive=PoolAdaptive)
        self._adaptive: PoolAdaptive = adapt(
            minimum=options.min,
            maximum=options.max,
            backend=self._backend,
            report=self._port.post,
        )
        self._opened: asyncio.Future[None] = loop.create_future()
        self._closed = asyncio.Event()
        self._changes = Changes(self.name, self._closed)
        self._news: dict[str, Callable[..., None]] = {
            "result": self._desk.result,
            "fetch": self._desk.fetch,
            "failed": self._desk.failed,
            "error": self._desk.error,
            "note": self._desk.note,
            "boot": lambda runner, **_: self._adaptive.boot(runner),
            "stop": lambda runner, force, **_: self._adaptive.halt(runner, force),
            "scaled": self._scaled,
            "configured": self._changes.carried_out,
            "opened": self._open_done,
            "open-failed": self._open_done,
            "closed": self._closed.set,
            "code": lambda **asked: self._code_sender.fire(partial(self._send_code, **asked)),
            "code-done": lambda runner: self._code_sender.fire(self._drop_code, runner),
        }
        self._port.attach(self._receive)
        self.client.flame_lost = self._lost
        self._started = True
        self._state = "open"
        self._port.post({"what": "open"})
        await self._opened

    def _backend_owns_scheduler(self) -> bool:
        """Say whether the scheduler has to end with the pool, and can't by itself (G3)."""
        own = isinstance(self._backend, SpecBackend) or self._adopts
        return own and not self._is_given and not isinstance(self._scheduler, Scheduler)

    @property
    def _is_given(self) -> bool:
        """Whether the cluster was there before the pool, and goes on without it."""
        return bool(getattr(self._backend, "given", True))

    @property
    def _adopts(self) -> bool:
        """Whether the cluster starts workers by their number alone."""
        return bool(getattr(self._backend, "adopts", False))

    @property
    def _comes_bare(self) -> bool:
        """Whether workers are started without the pool's part in it."""
        return self._adopts or bool(getattr(self._backend, "bare", False))

    @property
    def _scheduler(self) -> Any:
        """The cluster's scheduler, or what stands for it; ``None`` if it is out of reach."""
        return getattr(self.cluster, "scheduler", None)

    def _receive(self, what: str, **message: Any) -> None:
        """Take news of the pool's host. Never raises: the host is not to blame."""
        try:
            self._news[what](**message)
        except Exception:
            logger.exception("pool %s: message %r", self.name, what)

    def _send_code(self, runner: str, no: int, since: int, stream: int) -> None:
        """Answer a runner that asks for code (J2, J3); in a thread of its own."""
        assert self._code is not None, "only a pool that has code to send is asked"
        try:
            answer = self._code.answer(runner, since, stream)
        except Exception as error:  # it must not wait in vain
            logger.exception("pool %s: no code for %s", self.name, runner)
            answer = {"refused": repr(error)}
        self._port.post({"what": "code", "no": no, "answer": answer})

    def _drop_code(self, runner: str) -> None:
        if self._code is not None:
            self._code.drop(runner)

    def _open_done(self, error: FlameError | None = None) -> None:
        if self._opened.done():
            return  # whoever opened the pool has given up, or has been told already
        if error is None:
            self._opened.set_result(None)
        else:
            self._opened.set_exception(error)

    def _scaled(
        self, kind: str, runner: str, count: int, reason: str, error: BootError | None
    ) -> None:
        event = ScaleEvent(self.name, count, runner, reason)
        options = self.options
        if kind == "grow_start" and options.on_grow_start is not None:
            self._hooks.fire(options.on_grow_start, event)
        elif kind == "grow_end" and options.on_grow_end is not None:
            self._hooks.fire(options.on_grow_end, "ok" if error is None else error, event)
        elif kind == "shrink" and options.on_shrink is not None:
            self._hooks.fire(options.on_shrink, event)

    # -- closing -------------------------------------------------------------------------------

    def close(self) -> Any:
        """Close the pool (A6).

        Queued calls fail with :class:`PoolClosed` at once, running ones get ``shutdown_timeout`` to
        end. Afterwards nothing of the pool is left. It may be called again.

        Returns
        -------
        None, or an awaitable if the pool is asynchronous.

        Examples
        --------
        >>> pool.close()  # doctest: +SKIP
        """
        if self._asynchronous:
            return self._close_async()
        with self._closing:
            # "closing": an earlier close has been interrupted.
            if self._state in ("open", "closing"):
                self._wind_up_sync()
        return None

    async def _close_async(self) -> None:
        if self._state == "new":
            self._over()
        elif self._state != "closed":
            if self._closer is None:
                self._closer = asyncio.ensure_future(self._wind_up())
            # However many wait for it, and whoever gives up: it goes on.
            await asyncio.shield(self._closer)

    def _wind_up_sync(self) -> None:
        self._state = "closing"
        with contextlib.ExitStack() as parts:  # each is closed, whatever becomes of the others
            parts.callback(self._over)
            if self._loop is not None:
                # Somebody may be closing the cluster just now.
                parts.enter_context(internals.loop_held(self._loop))
            parts.callback(self._hooks.close, GRACE)
            parts.callback(self._settlers.close, GRACE)
            parts.callback(self._heard.close, GRACE)
            parts.callback(self._code_sender.close, GRACE)
            if self.cluster is not None:
                parts.callback(self._backend.close, self.cluster)
            if self.client is not None:
                parts.callback(self.client.close)
            if self._loop is not None:
                self.sync(self._shut)

    async def _wind_up(self) -> None:
        self._state = "closing"
        async with contextlib.AsyncExitStack() as parts:
            parts.callback(self._over)
            parts.push_async_callback(asyncio.to_thread, self._hooks.close, GRACE)
            parts.push_async_callback(asyncio.to_thread, self._settlers.close, GRACE)
            parts.push_async_callback(asyncio.to_thread, self._heard.close, GRACE)
            parts.push_async_callback(asyncio.to_thread, self._code_sender.close, GRACE)
            if self.cluster is not None:
                parts.push_async_callback(self._close_cluster)
            if self.client is not None:
                parts.push_async_callback(self.client.close)
            await self._shut()

    async def _close_cluster(self) -> None:
        closing = self._backend.close(self.cluster)
        if inspect.isawaitable(closing):
            await closing

    async def _shut(self) -> None:
        """Let the host wind the pool up, and wait for it; on the event loop."""
        if not self._started:
            return
        self._open_done(PoolClosed(self.name))
        self._announce_end()
        self._desk.stop_kept(self.options.shutdown_timeout)
        self._port.post({"what": "close"})
        await self._closed.wait()
        self._changes.give_up()
        await self._adaptive.idle()
        self._desk.close()
        scheduler = self._scheduler
        if isinstance(scheduler, Scheduler):
            # It may be somebody else's, and go on.
            await internals.uninstall_local(scheduler, self._host, self._runner)
        elif self._comes_bare and self._is_given and self.client.status == "running":
            await internals.uninstall_remote(self.client, self._host, self._runner)
        internals.forget_adaptive(self.cluster, self._adaptive)

    def _reconfigured(self, options: PoolOptions) -> None:
        """Tell the parts in this process of other options; on the event loop."""
        self._adaptive.bound(options.min, options.max)
        getattr(self._backend, "configured", lambda options: None)(options)

    def _over(self) -> None:
        self._state = "closed"
        if self._code is not None:
            self._code.close()
        registry.unregister(self)

    def _announce_end(self) -> None:
        """Say that nothing more is tried for long; to the backend, too, if it wants to know."""
        self._adaptive.hurry()
        getattr(self._backend, "closing", lambda: None)()

    def _lost(self) -> None:
        """Take note that the way to the host is cut: its scheduler is gone, say (F3)."""
        if not self._closed.is_set():
            self._open_done(BootError("cluster", "the connection to the scheduler is lost"))
            self._desk.lose()
            self._announce_end()
            # Nobody is left who could order it.
            self._adaptive.halt_all()
            self._closed.set()
            self._changes.give_up()
            if self._state == "open":  # not if it is closing anyway
                self._died = True
                self._on_death()

    def _watch(self, died: Callable[[], None]) -> None:
        """Have a function called when the pool dies by itself (K1): on any thread, maybe twice."""
        self._on_death = died
        if self._died:
            died()

    def close_at_exit(self) -> None:
        """Close the pool because the interpreter exits."""
        if not self._asynchronous:
            self.close()
        elif isinstance(self._backend, SpecBackend):
            # The event loop of an asynchronous pool is gone by now, but processes may go on.
            self._backend.kill()

    def __enter__(self) -> Self:
        if self._asynchronous:
            raise TypeError("this pool is asynchronous: use `async with`")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __await__(self) -> Generator[Any, Any, Self]:
        return self._open_async().__await__()

    async def __aenter__(self) -> Self:
        opened: Self = await self
        return opened

    async def __aexit__(self, *exc_info: object) -> None:
        await self._close_async()


class _Settings:
    """What Dask's configuration has under ``flame:`` that is no option of a pool."""

    def __init__(self, inline_limit: int, backoff: Backoff, grace: float) -> None:
        self.inline_limit = inline_limit
        self.backoff = backoff
        self.grace = grace

    @classmethod
    def read(cls) -> _Settings:
        get = dask.config.get
        backoff = Backoff(
            base=parse_timedelta(get("flame.boot-backoff.base")),
            factor=float(get("flame.boot-backoff.factor")),
            cap=parse_timedelta(get("flame.boot-backoff.cap")),
            open_retries=int(get("flame.boot-retries")),
        )
        inline_limit = int(parse_bytes(get("flame.inline-limit")))
        return cls(inline_limit, backoff, parse_timedelta(get("flame.terminate-grace")))

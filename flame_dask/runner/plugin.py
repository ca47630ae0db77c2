"""The runner's own part of a pool: a Dask worker plugin.

It runs calls and ends them, asks the idle check, and sees to the runner's own end: when it is told
to go by a signal (E5), and when its parent is gone (G3). For that it needs neither the parent nor
the scheduler.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from distributed.diagnostics.plugin import WorkerPlugin

from flame_dask import dask_internals as internals
from flame_dask.code_sync.receiver import Places
from flame_dask.constants import GRACE_MARGIN, LAST_RESORT, LEAVES
from flame_dask.payload import Payload, pack_value
from flame_dask.runner import here, lifeline, offspring, output, signals
from flame_dask.runner.code import NotReady, RunnerCode
from flame_dask.runner.guard import Guard
from flame_dask.runner.isolated import CallProcesses
from flame_dask.runner.memory import MemoryWatch
from flame_dask.runner.terminator import QUIET_PAUSE, Terminator

if TYPE_CHECKING:
    from distributed import Worker

logger = logging.getLogger("flame_dask.runner")

#: Seconds that an idle check may take.
IDLE_LIMIT: Final = 30.0

Message = dict[str, Any]


class FlameRunner(WorkerPlugin):
    """Worker plugin that makes a Dask worker a runner of a pool.

    Parameters
    ----------
    pool
        The pool's name.
    isolation
        What calls run in: ``thread`` or ``process``.
    grace
        Seconds between SIGTERM and SIGKILL, when processes are ended.
    shutdown_timeout
        Seconds that calls may go on when the runner is told to go, and unlinked ones when the
        parent is gone; ``None`` is no limit.
    idle_check
        Asked before an idle runner stops (D2).
    idle_limit
        Seconds that it may take.
    parent
        What the runner is to know of its parent.
    log
        Whether what calls print and log goes to the parent (B8).
    places
        Where the parent's code is put, if it gets that (J2).

    Attributes
    ----------
    terminator
        Ends calls.
    processes
        What calls run in, if they have processes of their own.
    code
        The parent's code, if it gets that.
    id
        The runner's id; ``None`` if that is the worker's name.
    threads
        How many calls it is to take at the same time; ``None`` if the worker is made for that.
    """

    name = "flame"

    def __init__(
        self,
        pool: str,
        *,
        isolation: str = "thread",
        grace: float = 1.0,
        shutdown_timeout: float | None = 30.0,
        idle_check: Callable[[], object] | None = None,
        idle_limit: float = IDLE_LIMIT,
        parent: here.ParentInfo | None = None,
        log: bool = False,
        places: Places | None = None,
    ) -> None:
        self.pool = pool
        self.isolation = isolation
        self.grace = grace
        self.shutdown_timeout = shutdown_timeout
        # Pickled as a call is, since Dask sends a function of a module as a name (B6).
        self.idle_check: Payload | None = None if idle_check is None else pack_value(idle_check)
        self.idle_limit = idle_limit
        self.parent = parent
        self.log = log
        self.places = places
        self.code: RunnerCode | None = None
        self.id: str | None = None
        self.threads: int | None = None

    def setup(self, worker: Worker) -> None:
        """Take up work. The worker's status change has gone out before this."""
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._leaving = False
        self._had_their_time = False  # the calls that run
        self._goes: set[asyncio.Task[None]] = set()
        # Whether the process is there for this runner alone. A cluster may have its workers in the
        # parent, or in a thread of something else.
        self._own_process = (
            not here.is_parent(self.parent)
            and threading.current_thread() is threading.main_thread()
        )
        watch = lifeline.watch if self._own_process else None
        self._own_guard: Guard | None = None
        self.terminator = Terminator(
            self._loop,
            grace=self.grace,
            report=self._send,
            known=worker.state.tasks,
            count_unlinked=None if watch is None else watch.guard.count_unlinked,
        )
        self.processes: CallProcesses | None = None
        name = self.id or str(worker.name)
        if self.threads is not None:
            internals.set_threads(worker, self.threads)
        here.arrive(self.parent, name)
        internals.hasten(worker.batched_stream)
        internals.listen_to_scheduler(worker, self.receive)
        if self.isolation == "process":
            if watch is None:
                guard = self._own_guard = Guard()
            else:
                guard = watch.guard
            self.processes = CallProcesses(self.parent, name, guard, self.grace, self.log)
        elif self._own_process:
            offspring.install()
        self._memory: MemoryWatch | None = None
        self._undo: list[Callable[[], object]] = []
        if self._own_process and self.log and self.processes is None:
            self._undo.append(output.install())
        if self._own_process:
            limit, give_back = internals.take_over_memory(worker)
            self._undo.append(give_back)
            if limit is not None:
                self._memory = MemoryWatch(limit, self.processes, self._is_busy)
            self._undo.append(signals.take_sigterm(self._loop, self._on_sigterm))
        lifeline.arrived()
        if watch is not None:
            watch.ready(self)
        # In the parent's own process there is all of its code.
        if self.places is not None and not here.is_parent(self.parent):
            self.code = RunnerCode(worker, self.places, self._code_changed)
        if self.processes is None and self.code is None:
            self._send({"what": "ready"})
        else:
            threading.Thread(
                target=self._warm_up, args=(name,), name="flame-warm-up", daemon=True
            ).start()

    def _warm_up(self, name: str) -> None:
        """Get the parent's code, and have a first process for calls.

        To start Python must not take part of a call's time.
        """
        try:
            if self.code is not None:
                self.code.boot(self.parent, name)
            if self.processes is not None:
                self.processes.warm()
        except NotReady as error:
            news = {"phase": error.phase, "cause": error.cause, "log_tail": error.log_tail}
            self._on_loop(self._send, {"what": "boot-refused", **news})
        except Exception:
            # Without the word that it is ready the boot fails, at last by its timeout.
            logger.exception("this runner can't get ready")
            if self._own_process:
                offspring.end_process(1)
        else:
            self._on_loop(self._send, {"what": "ready"})

    def _code_changed(self, files: Path) -> None:
        if self.processes is not None:
            self.processes.renew(files)

    def _is_busy(self) -> bool:
        return bool(self.terminator.runs)

    # -- messages ------------------------------------------------------------------------------

    def receive(self, what: str, **message: Any) -> None:
        """Take one message of the host. Never raises: that would cut the stream."""
        try:
            match what:
                case "terminate":
                    self.terminator.terminate(message["task"], "order")
                case "order":
                    task = message.pop("task")
                    self.terminator.order(task, message)
                case "ask-idle":
                    self._ask_idle(message["number"])
                case "go":
                    self._on_go(message["force"])
                case _:
                    logger.warning("pool %s: unknown message %r", self.pool, what)
        except Exception:
            logger.exception("pool %s: message %r of the host", self.pool, what)

    def note(self, task: str, message: Message) -> None:
        """Have a note of a call sent to its parent; in any thread."""
        if message["kind"] == "kept":
            self.terminator.keep(task)
        self._on_loop(self._send, {"what": "note", "task": task, **message})

    def _send(self, message: Message) -> None:
        internals.send_to_scheduler(self._worker, message)

    def _on_loop(self, function: Callable[..., Any], *args: Any) -> None:
        """Have a function called on the event loop; in any thread."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # it is closed, and the runner with it
            logger.debug("pool %s: too late for %s", self.pool, function)

    # -- the idle check ------------------------------------------------------------------------

    def _ask_idle(self, number: int) -> None:
        """Have the idle check asked, in a thread: it may take its time (D2)."""
        answered = False

        def answer(go: bool) -> None:
            nonlocal answered
            if not answered:
                answered = True
                timer.cancel()
                self._send({"what": "idle-answer", "number": number, "go": go})

        def give_up() -> None:
            logger.warning("pool %s: no idle check after %g s", self.pool, self.idle_limit)
            answer(False)

        def check() -> None:
            go = False
            try:
                assert self.idle_check is not None, "only a pool with an idle check asks it"
                go = bool(self.idle_check.load()())
            except Exception:
                logger.warning("pool %s: the idle check failed", self.pool, exc_info=True)
            self._on_loop(answer, go)

        timer = self._loop.call_later(self.idle_limit, give_up)
        threading.Thread(target=check, name="flame-idle-check", daemon=True).start()

    # -- the runner's end ----------------------------------------------------------------------

    def _on_sigterm(self) -> None:
        """Go, since somebody else says so: an operator, or a cloud that wants its machine back."""
        if not self._leaving:
            self._leaving = True
            self._send({"what": "leaving", "reason": "SIGTERM"})
            self._start(self._go("SIGTERM"))

    def _on_go(self, force: bool) -> None:
        """Go, since the parent is gone (G3), or can't see to it from where it is."""
        if not self._own_process:
            self._start(self._worker.close(reason="the pool has ended it"))
        elif force:
            self._start(self._end_at_once())
        else:
            self._start(self._go("the pool has ended it"))

    async def _end_at_once(self) -> None:
        try:
            # Or else it would start another one.
            await asyncio.wait_for(internals.dismiss_nanny(self._worker), GRACE_MARGIN)
        except (OSError, TimeoutError):
            logger.warning("pool %s: this runner's nanny does not answer", self.pool)
        await self._remove_code()
        offspring.end_process()

    def parent_is_gone(self) -> None:
        """End what is linked, let the rest go on in its time, and go (G1, G2); in any thread."""
        # By the worker's close: `teardown` does all this, since that is also what a worker does
        # whose scheduler was in its parent and has died with it.
        self._on_loop(lambda: self._start(self._worker.close(reason="its parent is gone")))

    def _start(self, work: Coroutine[Any, Any, Any]) -> None:
        task = self._loop.create_task(work)
        self._goes.add(task)  # the loop itself would forget it
        task.add_done_callback(self._goes.discard)

    async def _go(self, reason: str) -> None:
        """Close the worker when its calls are over, or their time is."""
        limit, moment = self.shutdown_timeout, self.grace + GRACE_MARGIN
        await self._finished(None if limit is None else max(0.0, limit - moment))
        # What lives on is asked to end while there is time for that: when it is over, the host has
        # this process killed.
        self.terminator.end_kept(LEAVES)
        await self._finished(None if limit is None else min(limit, moment))
        self._had_their_time = True
        await self._worker.close(reason=reason)

    async def _finished(self, seconds: float | None) -> None:
        """Wait until no call runs and none has a result here that is to be fetched yet.

        Those that are being ended don't count: they need not be waited for.
        """
        end = float("inf") if seconds is None else self._loop.time() + seconds
        runs = self.terminator.runs
        while self.terminator.going_on() or internals.has_work(self._worker, Payload, runs):
            if self._loop.time() >= end:
                return
            await asyncio.sleep(QUIET_PAUSE)

    async def teardown(self, worker: Worker) -> None:
        """Wind up; awaited by the worker's close, whatever the reason for that.

        Dask has cancelled what it knew of by then. So it is not asked what still runs. It also
        happens to a worker that goes on without the pool, as one of a cluster that is older.
        """
        terminator, moment = self.terminator, self.grace + GRACE_MARGIN
        if not self._had_their_time:
            terminator.terminate_all("parent gone", linked_only=True)
            await terminator.quiet(self.shutdown_timeout, unlinked_only=True)
        terminator.terminate_all("parent gone")
        quiet = await terminator.quiet(moment)
        if self._memory is not None:
            await self._in_thread(self._memory.close)
        if self.processes is not None:
            await self._in_thread(self.processes.close)
            quiet = await terminator.quiet(GRACE_MARGIN)
        terminator.close()
        await self._remove_code()
        for undo in self._undo:
            undo()
        if self._own_process and internals.is_closing(worker):
            if not quiet:
                # A thread that can't be ended: the worker would wait for it.
                logger.warning("pool %s: a call can't be ended: the runner is killed", self.pool)
                offspring.end_process()
            offspring.end_process_after(LAST_RESORT)
        elif self._own_guard:
            self._own_guard.close()
        if not here.is_parent(self.parent):
            here.depart()

    async def _remove_code(self) -> None:
        """Remove what has been copied, also if that goes on (J5)."""
        if self.code is not None:
            self.code.stop()
            await self._in_thread(self.code.close)

    async def _in_thread(self, function: Callable[[], None]) -> None:
        thread = threading.Thread(target=function, name="flame-close", daemon=True)
        thread.start()
        while thread.is_alive():
            await asyncio.sleep(QUIET_PAUSE)

"""The host of the pool core, a Dask scheduler plugin.

It holds no policy. What happens on the scheduler becomes an event for the core, and what the core
instructs becomes an effect: on runners here, on calls in
:class:`~flame_dask.scheduler.tasks.CallTasks`. :class:`~flame_dask.scheduler.driver.CoreDriver` is
in between, with the clock.

Everything runs on the scheduler's event loop. Scheduler hooks run in the middle of the scheduler's
own transitions, which must not be re-entered, so they only take note and deliver.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import SchedulerPlugin

from flame_dask import dask_internals as internals
from flame_dask import package
from flame_dask.constants import LAST_RESORT, LEAVES
from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.backoff import Backoff
from flame_dask.core.events import BootProblem, Limits, PoolOptionsView
from flame_dask.core.instructions import Instruction
from flame_dask.core.pool import PoolState
from flame_dask.errors import CallTimeout, PoolClosed
from flame_dask.payload import Payload
from flame_dask.scheduler import gateway
from flame_dask.scheduler.adoption import Adoption
from flame_dask.scheduler.arrivals import Arrivals
from flame_dask.scheduler.calls import (
    HostCall,
    boot_error,
    lost_error,
    scaled_message,
    timeout_error,
)
from flame_dask.scheduler.code import CodeRelay
from flame_dask.scheduler.driver import CoreDriver
from flame_dask.scheduler.inquest import PATIENCE, Verdict
from flame_dask.scheduler.notes import Notes
from flame_dask.scheduler.tasks import UNKNOWN, CallTasks

if TYPE_CHECKING:
    from distributed import Scheduler

logger = logging.getLogger("flame_dask.scheduler")

Message = dict[str, Any]


class FlameScheduler(SchedulerPlugin):
    """Scheduler plugin that runs one pool.

    Parameters
    ----------
    pool
        The pool's name.
    options
        What the core decides by.
    backoff
        When failed boots are tried again.
    inline_limit
        Results of at most so many bytes travel with the completion of their task.
    own_thread
        Whether ``async def`` functions run like any other, not on the runner's event loop: they
        can't if each call has a process of its own.
    owns_scheduler
        Whether the scheduler is there for this pool alone, in a process of its own, and has to end
        when the parent is gone (G3).
    adopts
        Whether the cluster starts workers by their number alone, and chooses their names.
    patience
        Seconds for the backend to say what a runner died of.
    keep_awake
        Whether the scheduler counts as busy as long as the pool is open, with work or without.
    versions
        What the parent has; runners have to fit.
    sends_code
        Whether runners get code of the parent.
    """

    name = "flame"
    idempotent = False

    def __init__(
        self,
        pool: str,
        options: PoolOptionsView,
        backoff: Backoff,
        inline_limit: int,
        own_thread: bool = False,
        owns_scheduler: bool = False,
        adopts: bool = False,
        patience: float = PATIENCE,
        keep_awake: bool = False,
        versions: Mapping[str, str] | None = None,
        sends_code: bool = False,
    ) -> None:
        self.sends_code = sends_code
        self.adopts = adopts
        self.patience = patience
        self.keep_awake = keep_awake
        self.versions = package.versions() if versions is None else versions
        self.pool = pool
        self.options = options
        self.backoff = backoff
        self.inline_limit = inline_limit
        self.own_thread = own_thread
        self.owns_scheduler = owns_scheduler

    async def start(self, scheduler: Scheduler) -> None:
        """Take up work on a scheduler; called by it, or by a parent in the same process."""
        self.scheduler = scheduler
        self._told = str(scheduler.contact_address or scheduler.address)
        self.core = PoolState(self.options, name=self.pool, backoff=self.backoff)
        # Clients in this process hear of their calls by a plain function call.
        self.sinks: dict[str, Callable[[Message], None]] = {}
        self.parent: str | None = None
        self.address_of: dict[str, str] = {}
        self.runner_at: dict[str, str] = {}
        self._loop = scheduler.loop.asyncio_loop  # type: ignore[attr-defined]
        self._driver = CoreDriver(self.core, self._loop, self._carry_out)
        self._tell = self._driver.tell
        self._tasks = CallTasks(
            scheduler,
            self._loop,
            self.pool,
            inline_limit=self.inline_limit,
            own_thread=self.own_thread,
            send=self._send,
            tell=self._tell,
            patience=self.patience,
        )
        self.calls = self._tasks.calls
        # The parent is gone: nobody starts and stops runners any more (G3).
        self._orphaned = False
        self._closed = False
        if self.keep_awake:
            internals.keep_awake(scheduler, lambda: self.parent is not None and not self._closed)
        self._handlers: dict[str, Callable[..., None]] = {
            "call": self._on_call,
            "release": self._on_release,
            "delivered": self._on_delivered,
            "open": self._on_open,
            "close": lambda **_: self._tell(ev.Close()),
            "configure": self._on_configure,
            "ended": self._on_ended,
            "stopped": self._on_stopped,
            "ready": self._on_ready,
            "leaving": self._on_leaving,
            "idle-answer": self._on_idle_answer,
            "terminated": self._on_terminated,
            "call-lost": self._on_call_lost,
            "boot-refused": self._on_boot_refused,
        }
        told = self.calls, self._tasks.running, self.runner_at, self._send, self._driver.tell
        self._notes = notes = Notes(scheduler, *told)
        self._handlers["note"] = notes.on_note
        self._handlers["order"] = notes.on_order
        self._code = CodeRelay(self.runner_at, self._send_parent) if self.sends_code else None
        if self._code is not None:
            self._handlers["code"] = self._code.answered
            scheduler.handlers[internals.CODE] = self._code.ask
        internals.listen_to_streams(scheduler, self.receive)
        scheduler.handlers["flame"] = self.answer
        parts = scheduler, self._loop, self.core, self.address_of, self._send_parent
        self._adoption = Adoption(*parts) if self.adopts else None
        self._arrivals = Arrivals(self.versions, self.options.max_concurrency, self.runner_at.get)
        scheduler.handlers[internals.ARRIVE] = self._arrivals.answer

    async def before_close(self) -> None:
        """Stop the clock: the scheduler closes."""
        self._driver.stop()
        self._tasks.inquest.close()
        if self._code is not None:
            self._code.give_up()

    # -- messages ------------------------------------------------------------------------------

    def receive(self, what: str, **message: Any) -> None:
        """Take one message of a parent or a runner. Never raises: that would cut its stream."""
        try:
            self._handlers[what](**message)
        except Exception:
            logger.exception("pool %s: message %r of %s", self.pool, what, message.get("client"))

    async def answer(self, comm: object, what: str) -> Message:
        """Answer a question of a parent in another process."""
        return {"status": "OK", "answer": internals.ToPickle(self.tell(what))}

    def tell(self, what: str) -> Any:
        """Answer a question of a parent: ``status`` or ``events``."""
        if what == "status":
            now = time.monotonic()
            return self.core.snapshot(now), dict(self.address_of)
        offset = time.time() - time.monotonic()
        return [line._replace(at=line.at + offset) for line in self.core.decisions()]

    def _send(self, client: str, message: Message) -> None:
        sink = self.sinks.get(client)
        if sink is not None:
            sink(message)
            return
        error = message.get("error")
        if error is not None:
            message["error"] = internals.ToPickle(error)
        if not internals.send_to_client(self.scheduler, client, message):
            logger.info("pool %s: %s is gone, %r undelivered", self.pool, client, message["what"])

    def _send_parent(self, message: Message) -> bool:
        if self.parent is not None:
            self._send(self.parent, message)
        return self.parent is not None

    # -- from the parent -----------------------------------------------------------------------

    def _on_open(self, client: str) -> None:
        self.parent = client
        internals.hasten_client(self.scheduler, client)
        self._tell(ev.Open())

    def _on_configure(self, client: str, options: tuple[Any, ...], no: int) -> None:
        self.options = PoolOptionsView(*options)
        self._tell(ev.Configure(self.options))
        self._send(client, {"what": "configured", "no": no})

    def _on_call(
        self,
        client: str,
        key: str,
        payload: Payload,
        limits: tuple[float | None, ...],
        priority: int,
        keep: bool,
        asynchronous: bool,
        link: bool,
        retries: int,
        inputs: dict[str, Payload] | None = None,
        mode: str = "",
        affinity: str | None = None,
        code: int = 0,
    ) -> None:
        call = HostCall(key, client, payload, inputs, keep, asynchronous, link, retries, mode, code)
        _, run, total = limits
        call.limit = run if total is None else total
        self.calls[key] = call
        self._tell(ev.CallSubmitted(key, Limits(*limits), priority, retries, affinity))

    def _on_release(self, client: str, keys: list[str]) -> None:
        for key in keys:
            call = self.calls.get(key)
            if call is not None:
                self._release(call)
            else:
                self._notes.drop(client, key)

    def _release(self, call: HostCall) -> None:
        """Let a call go whose caller is gone, or has its answer."""
        call.answered = True
        if call.delivering:
            self._tasks.end(call)
        else:
            self._tell(ev.CallReleased(call.key))
            if call.key not in self.core.calls:
                self.calls.pop(call.key, None)

    def _on_delivered(self, client: str, key: str, task: str, lost: bool = False) -> None:
        """Take note that a large result has been fetched, or can't be."""
        call = self.calls.get(key)
        if call is None:
            return
        delivering = call.delivering and call.task == task
        if delivering and lost:
            call.delivering = False
            self._tasks.drop(call)
            self._tell(ev.CallLost(key, "unreachable"))
        elif delivering:
            self._tasks.end(call)
        elif not lost:
            # Its runner was lost while the result was on its way, and the call waits or runs anew.
            self._release(call)

    def _on_ended(
        self,
        client: str,
        runner: str,
        phase: str,
        cause: str,
        loss: str | None,
        exit_code: int | None,
        log_tail: list[str],
    ) -> None:
        """Take note: a runner ended by itself, or never started, and nothing of it is left."""
        self._tasks.inquest.found(runner, Verdict.of(loss, exit_code))
        known = self.core.runners.get(runner)
        if known is not None and known.state in ("ready", "draining"):
            self._tell(ev.RunnerLost(runner, UNKNOWN))  # remove_worker follows
        refused = self._arrivals.refused.pop(runner, None)
        problem = BootProblem(phase, refused or cause, tuple(log_tail))
        self._tell(ev.BootFailed(runner, problem))

    def _on_stopped(
        self,
        client: str,
        runner: str,
        cause: str,
        loss: str | None,
        exit_code: int | None,
        log_tail: list[str],
    ) -> None:
        self._tasks.inquest.found(runner, Verdict.of(loss, exit_code))
        said = cause if loss is not None else ""
        self._tell(ev.RunnerStopped(runner, tuple(log_tail), said))

    # -- from the runners ----------------------------------------------------------------------

    def _on_ready(self, worker: str) -> None:
        runner = self.runner_at.get(worker)
        if runner is not None:
            self._tell(ev.RunnerReady(runner))

    def _on_boot_refused(self, worker: str, phase: str, cause: str, log_tail: list[str]) -> None:
        runner = self.runner_at.get(worker)
        if runner is not None:
            self._tell(ev.BootRefused(runner, BootProblem(phase, cause, tuple(log_tail))))

    def _on_leaving(self, worker: str, reason: str) -> None:
        runner = self.runner_at.get(worker)
        if runner is not None:
            self._tell(ev.RunnerLeaving(runner, reason))

    def _on_idle_answer(self, worker: str, number: int, go: bool) -> None:
        runner = self.runner_at.get(worker)
        if runner is not None:
            self._tell(ev.IdleAnswer(runner, number, go))

    def _on_terminated(self, worker: str, task: str, how: str, reason: str) -> None:
        """Take note that the work of a call has been ended; its task is over in a moment (E3)."""
        call = self._tasks.running.get(task)
        if call is None:
            return
        call.how = how
        if reason == "order" or call.answered:
            return
        if reason == "deadline":  # the runner's own clock was the faster one
            limit = call.limit or 0.0
            late = CallTimeout("running", running=limit, limit=limit, call=call.key)
            self._tasks.fail(call, late)
        else:
            runner = self.runner_at.get(worker)
            verdict = Verdict("preempted") if reason == LEAVES else Verdict()
            self._tasks.fail(call, lost_error(call, runner, verdict))

    def _on_call_lost(
        self, worker: str, task: str, cause: str, exit_code: int | None, signal: int | None
    ) -> None:
        """Take note that a call's own process died; its runner lives on."""
        call = self._tasks.running.get(task)
        if call is not None:
            self._tasks.drop(call)
            self._tell(ev.CallLost(call.key, cause, exit_code, signal))

    # -- scheduler hooks -----------------------------------------------------------------------

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Remember the address of a runner of ours. It is ready when its plugin says so."""
        adoption = self._adoption
        name = adoption.awaited() if adoption else str(scheduler.workers[worker].name)
        known = self.core.runners.get(name)
        if known is None or known.state != "booting":
            return  # not ours, or given up while it was on its way: its end is under way
        self.address_of[name] = worker
        self.runner_at[worker] = name
        if adoption:
            internals.count_threads(scheduler, worker, self.options.max_concurrency)
        internals.hasten_worker(scheduler, worker)

    def valid_workers_downscaling(self, scheduler: Scheduler, workers: list[Any]) -> list[Any]:
        """Let whoever wants fewer workers take none that is a runner: that is the core's to say."""
        return [worker for worker in workers if worker.address not in self.runner_at]

    def remove_worker(
        self, scheduler: Scheduler, worker: str, *, stimulus_id: str, **kwargs: Any
    ) -> None:
        """Tell the core of a runner's end, in the turn of the loop in which Dask learns of it."""
        runner = self.runner_at.pop(worker, None)
        if runner is None:
            return
        del self.address_of[runner]
        if self._code is not None:
            self._code.gone(runner)
        self._tasks.strand(worker, stimulus_id)
        # The core answers for those whose callers still wait, or starts them anew (retries).
        refused = self._arrivals.refused.pop(runner, None)
        self._tell(ev.RunnerLost(runner, refused or UNKNOWN))
        for key in [key for key in self.calls if key not in self.core.calls]:
            del self.calls[key]
        if self._adoption:
            self._adoption.gone(runner)
        if self._orphaned:
            self._tell(ev.RunnerStopped(runner))

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Let the calls of a client that is gone go too, if they are linked (G1)."""
        self.sinks.pop(client, None)
        for call in [call for call in self.calls.values() if call.client == client]:
            if call.link:
                self._release(call)
            call.answered = True
        if client == self.parent and not self._closed:
            self._be_orphaned()
        elif client == self.parent and self.owns_scheduler and self.adopts:
            # The gateway may not have heard that its cluster is to end.
            gateway.close_scheduler(self.scheduler)

    def parent_is_gone(self) -> None:
        """Take note of it though no client may have left: one that had not opened the pool yet."""
        if self._closed:
            gateway.close_scheduler(self.scheduler)
        elif not self._orphaned:
            self._be_orphaned()

    def _be_orphaned(self) -> None:
        """Wind the pool up without its parent: nobody else will (G3)."""
        logger.info("pool %s: its parent is gone", self.pool)
        self.parent = None
        self._orphaned = True
        if self._code is not None:
            self._code.give_up()
        gateway.want_no_workers(self.scheduler)
        self._tell(ev.Close())
        for runner in [r.id for r in self.core.runners.values() if r.state == "stopping"]:
            self._send_away(runner, force=True)
        limit = self.options.shutdown_timeout
        if self.owns_scheduler and limit is not None:
            # Whatever becomes of the runners: they see to their own end, too.
            self._loop.call_later(limit + LAST_RESORT, gateway.close_scheduler, self.scheduler)

    def _send_away(self, runner: str, force: bool) -> None:
        """Have a runner end itself. One that has no address yet does so when its parent goes."""
        address = self.address_of.get(runner)
        message = {"what": "go", "force": force}
        if address is None or not internals.send_to_worker(self.scheduler, address, message):
            self._tell(ev.RunnerStopped(runner))

    def transition(
        self, key: Any, start: str, finish: str, *args: Any, stimulus_id: str, **kwargs: Any
    ) -> None:
        """Deliver what a task of ours has come to."""
        if start == "processing":
            self._tasks.processed(key, finish, kwargs)

    # -- instructions of the core --------------------------------------------------------------

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case do.Start(call, runner):
                self._tasks.start(self.calls[call], self.address_of[runner])
            case do.Boot(runner, attempt, reason):
                message = {"what": "boot", "runner": runner, "attempt": attempt, "reason": reason}
                self._send_parent(message)
            case do.Drain(runner, reason):
                if runner in self.address_of:
                    address = self.address_of[runner]
                    internals.cordon_worker(self.scheduler, address, f"flame-drain-{runner}")
            case do.Stop(runner, reason, force):
                if self._orphaned:
                    self._send_away(runner, force)
                else:
                    message = {"what": "stop", "runner": runner, "reason": reason, "force": force}
                    limit, adoption = self.options.shutdown_timeout, self._adoption
                    if not (adoption and adoption.part_with(runner, force, limit, message)):
                        self._send_parent(message)
            case do.Expired():
                self._expired(instruction)
            case do.Refused(call):
                self._tasks.refuse(call, PoolClosed(self.pool))
            case do.Lost(call, runner, cause, exit_code, signal):
                self._tasks.lost(call, runner, Verdict(cause, exit_code, signal))
            case do.Requeued(call):
                # It has another task when it has a slot again.
                self._tasks.drop(self.calls[call])
            case do.AskIdle(runner, number):
                message = {"what": "ask-idle", "number": number}
                internals.send_to_worker(self.scheduler, self.address_of[runner], message)
            case do.Scaled():
                self._send_parent(scaled_message(instruction, self._told))
            case do.OpenDone():
                self._send_parent({"what": "opened"})
            case do.OpenFailed(problem):
                self._send_parent({"what": "open-failed", "error": boot_error(problem, self._told)})
            case do.CloseDone():
                self._closed = True
                self._send_parent({"what": "closed"})
                if self._orphaned and self.owns_scheduler:
                    gateway.close_scheduler(self.scheduler)
            case do.Terminate(call, runner, reason):
                self._tasks.terminate(self.calls[call], reason)

    def _expired(self, news: do.Expired) -> None:
        self._tasks.fail(self.calls[news.call], timeout_error(news, self._told))
        if news.phase != "running":
            del self.calls[news.call]

"""The host of the pool core, a Dask scheduler plugin.

It holds no policy. What happens on the scheduler becomes an event for the core, what the core
instructs becomes an effect, and one timer wakes the core at its next deadline.

A call is an ordinary Dask task, pinned to the runner that the core chose and created when its slot
is free. It is wanted by a client that exists in name only (``owner``), so Dask tells no client
about it and never frees it on its own: what a parent hears of its calls, it hears from here.

Everything runs on the scheduler's event loop. Scheduler hooks run in the middle of the scheduler's
own transitions, which must not be re-entered, so they only take note and deliver; what changes
tasks follows in :meth:`FlameScheduler._flush`, in the same turn of the loop.
"""

from __future__ import annotations

import logging
import time
from asyncio import TimerHandle
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import SchedulerPlugin

from flame_dask import dask_internals as internals
from flame_dask import package
from flame_dask.constants import LAST_RESORT
from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.backoff import Backoff
from flame_dask.core.events import BootProblem, Event, Limits, PoolOptionsView
from flame_dask.core.instructions import Instruction
from flame_dask.core.pool import PoolState
from flame_dask.errors import CallTimeout, FlameError, PoolClosed
from flame_dask.payload import Payload
from flame_dask.runner.execution import Terms, run_call, run_call_async
from flame_dask.scheduler import gateway
from flame_dask.scheduler.adoption import Adoption, Message
from flame_dask.scheduler.arrivals import Arrivals
from flame_dask.scheduler.calls import (
    NOWHERE,
    UNKNOWN,
    HostCall,
    boot_error,
    lost_error,
    scaled_message,
    timeout_error,
)
from flame_dask.scheduler.inquest import PATIENCE, Inquest, Verdict

if TYPE_CHECKING:
    from distributed import Scheduler

logger = logging.getLogger("flame_dask.scheduler")


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
    ) -> None:
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
        self.owner = f"flame-{self.pool}"
        self._told = str(scheduler.contact_address or scheduler.address)
        self.core = PoolState(self.options, name=self.pool, backoff=self.backoff)
        # Clients in this process hear of their calls by a plain function call.
        self.sinks: dict[str, Callable[[Message], None]] = {}
        self.parent: str | None = None
        self.calls: dict[str, HostCall] = {}
        # By the keys of their tasks: calls that are on a runner.
        self.tasks: dict[str, HostCall] = {}
        self.address_of: dict[str, str] = {}
        self.runner_at: dict[str, str] = {}
        self._events: deque[Event] = deque()
        self._busy = False
        self._over: list[tuple[HostCall, str]] = []
        self._flushing = False
        self._timer: TimerHandle | None = None
        self._timer_due = float("inf")
        self._loop = scheduler.loop.asyncio_loop  # type: ignore[attr-defined]
        self._inquest: Inquest[HostCall] = Inquest(self._loop, self._lose, self.patience)
        # The parent is gone: nobody starts and stops runners any more (G3).
        self._orphaned = self._closed = False
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
        }
        internals.listen_to_streams(scheduler, self.receive)
        scheduler.handlers["flame"] = self.answer
        parts = scheduler, self._loop, self.core, self.address_of, self._send_parent
        self._adoption = Adoption(*parts) if self.adopts else None
        self._arrivals = Arrivals(self.versions, self.options.max_concurrency, self.runner_at.get)
        scheduler.handlers[internals.ARRIVE] = self._arrivals.answer

    async def before_close(self) -> None:
        """Stop the clock: the scheduler closes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._inquest.close()

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

    def _send_parent(self, message: Message) -> None:
        if self.parent is not None:
            self._send(self.parent, message)

    # -- from the parent -----------------------------------------------------------------------

    def _on_open(self, client: str) -> None:
        self.parent = client
        internals.hasten_client(self.scheduler, client)
        self._tell(ev.Open())

    def _on_configure(self, client: str, options: tuple[Any, ...]) -> None:
        self._tell(ev.Configure(PoolOptionsView(*options)))

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
    ) -> None:
        call = HostCall(key, client, payload, inputs, keep, asynchronous, link, retries)
        _, run, total = limits
        call.limit = run if total is None else total
        self.calls[key] = call
        self._tell(ev.CallSubmitted(key, Limits(*limits), priority, retries))

    def _on_release(self, client: str, keys: list[str]) -> None:
        for key in keys:
            call = self.calls.get(key)
            if call is not None:
                self._release(call)

    def _release(self, call: HostCall) -> None:
        """Let a call go whose caller is gone, or has its answer."""
        call.answered = True
        if call.delivering:
            self._end(call)
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
            self._drop_task(call)
            self._tell(ev.CallLost(key, "unreachable"))
        elif delivering:
            self._end(call)
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
        self._inquest.found(runner, Verdict.of(loss, exit_code))
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
        self._inquest.found(runner, Verdict.of(loss, exit_code))
        said = cause if loss is not None else ""
        self._tell(ev.RunnerStopped(runner, tuple(log_tail), said))

    # -- from the runners ----------------------------------------------------------------------

    def _on_ready(self, worker: str) -> None:
        runner = self.runner_at.get(worker)
        if runner is not None:
            self._tell(ev.RunnerReady(runner))

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
        call = self.tasks.get(task)
        if call is None:
            return
        call.how = how
        if reason == "order" or call.answered:
            return
        if reason == "deadline":  # the runner's own clock was the faster one
            limit = call.limit or 0.0
            self._fail(call, CallTimeout("running", running=limit, limit=limit, call=call.key))
        else:
            runner = self.runner_at.get(worker)
            self._fail(call, lost_error(call, runner, Verdict()))

    def _on_call_lost(
        self, worker: str, task: str, cause: str, exit_code: int | None, signal: int | None
    ) -> None:
        """Take note that a call's own process died; its runner lives on."""
        call = self.tasks.get(task)
        if call is not None:
            self._drop_task(call)
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
        """Tell the core of a runner's end, in the same turn of the loop in which Dask learns of it.

        Its tasks stand in ``no-worker`` now: they are pinned to an address that will not come
        back, so Dask starts none of them anew (F1).
        """
        runner = self.runner_at.pop(worker, None)
        if runner is None:
            return
        del self.address_of[runner]
        for call, _ in self._over:
            if call.address == worker:
                # It has its answer, and must not be started anew with those that are lost.
                self._tell(ev.CallReleased(call.key))
        left = [task for task, call in self.tasks.items() if call.address == worker]
        for task in left:
            call = self.tasks.pop(task)
            call.task, call.delivering = None, False
        internals.forget_tasks(scheduler, left, self.owner, stimulus_id)
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
        if start != "processing":
            return
        call = self.tasks.get(key)
        if call is None:
            return
        if finish == "memory":
            self._deliver(call, kwargs)
        elif call.address not in self.scheduler.workers:
            return  # remove_worker follows in this turn, and answers for the runner's calls
        elif finish == "erred":
            if not call.answered:
                exception, trace = kwargs.get("exception"), kwargs.get("traceback")
                message = {
                    "what": "failed",
                    "key": call.key,
                    "exception": exception,
                    "traceback": trace,
                }
                self._send(call.client, message)
                call.answered = True
            self._end(call)
        elif (call, key) not in self._over:
            # Rescheduled: by the task itself, or because its worker is closing. It has started
            # once, so it must not start again, here or elsewhere (F1).
            self.scheduler.tasks[key].worker_restrictions = {NOWHERE}
            self._loop.call_soon(self._rescheduled, call, key)

    def _rescheduled(self, call: HostCall, task: str) -> None:
        if self.tasks.get(task) is call:
            self._terminate(call, "rescheduled")  # its runner may live on, and the work with it
            self._drop_task(call)
            self._tell(ev.CallLost(call.key, "preempted"))

    def _deliver(self, call: HostCall, kwargs: dict[str, Any]) -> None:
        metadata = kwargs.get("metadata") or {}
        result = metadata.get(internals.RESULT)
        if call.answered:
            self._end(call)
        elif result is not None or not call.keep:
            self._send(call.client, {"what": "result", "key": call.key, "result": result})
            call.answered = True
            self._end(call)
        else:
            # Too large to pass through here: the caller fetches it, the slot is taken until then.
            call.delivering = True
            message = {"what": "fetch", "key": call.key, "task": call.task}
            self._send(call.client, {**message, "address": call.address})

    def _end(self, call: HostCall) -> None:
        """Note that the present run of a call is over."""
        assert call.task is not None, "only a call with a task has anything to end"
        self._over.append((call, call.task))
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Forget the tasks that are over, and give their slots back."""
        over, self._over = self._over, []
        self._flushing = False
        # What a runner's loss has overtaken in between is no longer among the tasks.
        over = [(call, task) for call, task in over if self.tasks.pop(task, None) is not None]
        tasks = [task for _, task in over]
        internals.forget_tasks(self.scheduler, tasks, self.owner, f"flame-over-{time.time()}")
        for call, _ in over:
            self.calls.pop(call.key, None)
            self._tell(ev.CallEnded(call.key, call.how))

    def _drop_task(self, call: HostCall) -> None:
        """Let go of the task of a call that has lost its work, not its runner."""
        if call.task is not None and self.tasks.pop(call.task, None) is not None:
            stimulus = f"flame-drop-{time.time()}"
            internals.forget_tasks(self.scheduler, [call.task], self.owner, stimulus)
        call.task = None

    # -- the core ------------------------------------------------------------------------------

    def _tell(self, event: Event) -> None:
        self._events.append(event)
        if self._busy:  # the effect of an instruction: its turn comes after the present event
            return
        self._busy = True
        try:
            while self._events:
                event = self._events.popleft()
                for instruction in self.core.handle(time.monotonic(), event):
                    self._carry_out(instruction)
        finally:
            self._busy = False
        self._arm()

    def _arm(self) -> None:
        due = self.core.next_deadline()
        if due is None or due >= self._timer_due:
            return  # a timer that rings too early does no harm
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._timer_due = float("inf")
        self._tell(ev.Tick())

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case do.Start(call, runner):
                self._start(self.calls[call], runner)
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
                self._refuse(call, PoolClosed(self.pool))
            case do.Lost(call, runner, cause, exit_code, signal):
                self._lost(call, runner, Verdict(cause, exit_code, signal))
            case do.Requeued(call):
                # It has another task when it has a slot again.
                self._drop_task(self.calls[call])
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
                self._terminate(self.calls[call], reason)

    def _start(self, call: HostCall, runner: str) -> None:
        address = self.address_of[runner]
        task = call.begin(address)
        self.tasks[task] = call
        on_loop = call.asynchronous and not self.own_thread
        terms = Terms(
            call.key,
            task,
            self.inline_limit if call.keep else -1,
            call.limit,
            call.link,
            call.asynchronous,
        )
        run = run_call_async if on_loop else run_call
        spec = internals.make_task(task, run, call.payload, call.inputs, terms)
        if call.runs > call.retries:
            call.payload = call.inputs = None
        internals.place_task(
            self.scheduler,
            key=task,
            spec=spec,
            address=address,
            owner=self.owner,
            priority=0,
            stimulus_id=f"flame-start-{time.time()}",
        )

    def _terminate(self, call: HostCall, reason: str) -> None:
        """Have the work of a call ended (E3)."""
        if call.delivering:
            self._end(call)  # it has run: only its result is still there
        elif call.task is not None and call.address is not None:
            message = {"what": "terminate", "task": call.task, "reason": reason}
            internals.send_to_worker(self.scheduler, call.address, message)

    def _expired(self, news: do.Expired) -> None:
        self._fail(self.calls[news.call], timeout_error(news, self._told))
        if news.phase != "running":
            del self.calls[news.call]

    def _refuse(self, key: str, error: FlameError) -> None:
        """Answer for a call that the core has struck off."""
        call = self.calls.pop(key, None)
        if call is not None:
            self._fail(call, error)
            self._drop_task(call)

    def _lost(self, key: str, runner: str, verdict: Verdict) -> None:
        """Answer for a call that was lost, as soon as it is known how."""
        call = self.calls.pop(key, None)
        if call is None:
            return
        self._drop_task(call)
        if verdict.cause == UNKNOWN:
            self._inquest.lost(runner, call)
        else:
            self._lose(call, runner, verdict)

    def _lose(self, call: HostCall, runner: str, verdict: Verdict) -> None:
        self._fail(call, lost_error(call, runner, verdict))

    def _fail(self, call: HostCall, error: FlameError) -> None:
        if call.answered:
            return
        call.answered = True
        self._send(call.client, {"what": "error", "key": call.key, "error": error})

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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from distributed.diagnostics.plugin import SchedulerPlugin

from flame_dask import dask_internals as internals
from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.backoff import Backoff
from flame_dask.core.events import BootProblem, Event, Limits, PoolOptionsView
from flame_dask.core.instructions import Instruction
from flame_dask.core.pool import PoolState
from flame_dask.errors import BootError, CallTimeout, FlameError, PoolClosed, RunnerLost
from flame_dask.payload import Payload
from flame_dask.runner.execution import run_call, run_call_async

if TYPE_CHECKING:
    from distributed import Scheduler

logger = logging.getLogger("flame_dask.scheduler")

#: A scheduler that has no running worker of this address: a task pinned to it can't start.
NOWHERE = "flame://nowhere"

Message = dict[str, Any]


class HostCall:
    """What the host knows of a call, beyond what the core does."""

    __slots__ = (
        "address",
        "answered",
        "asynchronous",
        "client",
        "delivering",
        "inputs",
        "keep",
        "key",
        "payload",
    )

    def __init__(
        self,
        key: str,
        client: str,
        payload: Payload,
        inputs: dict[str, Payload] | None,
        keep: bool,
        asynchronous: bool,
    ) -> None:
        self.key = key
        self.client = client
        self.payload: Payload | None = payload
        # The values of futures among the arguments.
        self.inputs = inputs
        self.keep = keep
        self.asynchronous = asynchronous
        self.address: str | None = None
        self.delivering = False
        # Its caller has been told of an end, or is gone: nothing more is sent to it.
        self.answered = False


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
    """

    name = "flame"
    idempotent = False

    def __init__(
        self, pool: str, options: PoolOptionsView, backoff: Backoff, inline_limit: int
    ) -> None:
        self.pool = pool
        self.options = options
        self.backoff = backoff
        self.inline_limit = inline_limit

    async def start(self, scheduler: Scheduler) -> None:
        """Take up work on a scheduler; called by it, or by a parent in the same process."""
        self.scheduler = scheduler
        self.owner = f"flame-{self.pool}"
        self.core = PoolState(self.options, name=self.pool, backoff=self.backoff)
        # Clients in this process hear of their calls by a plain function call.
        self.sinks: dict[str, Callable[[Message], None]] = {}
        self.parent: str | None = None
        self.calls: dict[str, HostCall] = {}
        self.address_of: dict[str, str] = {}
        self.runner_at: dict[str, str] = {}
        self._events: deque[Event] = deque()
        self._busy = False
        self._over: list[HostCall] = []
        self._flushing = False
        self._timer: TimerHandle | None = None
        self._timer_due = float("inf")
        self._loop = scheduler.loop.asyncio_loop  # type: ignore[attr-defined]
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
        }
        internals.listen_to_streams(scheduler, self.receive)
        scheduler.handlers["flame"] = self.answer

    async def before_close(self) -> None:
        """Stop the clock: the scheduler closes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

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
        inputs: dict[str, Payload] | None = None,
    ) -> None:
        self.calls[key] = HostCall(key, client, payload, inputs, keep, asynchronous)
        self._tell(ev.CallSubmitted(key, Limits(*limits), priority))

    def _on_release(self, client: str, keys: list[str]) -> None:
        for key in keys:
            call = self.calls.get(key)
            if call is None:
                continue
            call.answered = True
            if call.delivering:
                self._end(call)
            else:
                self._tell(ev.CallReleased(key))
                if key not in self.core.calls:
                    del self.calls[key]

    def _on_delivered(self, client: str, key: str) -> None:
        call = self.calls.get(key)
        if call is not None:
            self._end(call)

    def _on_ended(
        self,
        client: str,
        runner: str,
        phase: str,
        cause: str,
        exit_code: int | None,
        log_tail: list[str],
    ) -> None:
        """Take note: a runner ended by itself, or never started, and nothing of it is left."""
        problem = BootProblem(phase, cause, tuple(log_tail))
        self._tell(ev.BootFailed(runner, problem))

    def _on_stopped(self, client: str, runner: str, log_tail: list[str]) -> None:
        self._tell(ev.RunnerStopped(runner, tuple(log_tail)))

    # -- from the runners ----------------------------------------------------------------------

    def _on_ready(self, worker: str) -> None:
        runner = self.runner_at.get(worker)
        if runner is not None:
            self._tell(ev.RunnerReady(runner))

    # -- scheduler hooks -----------------------------------------------------------------------

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Remember the address of a runner of ours. It is ready when its plugin says so."""
        name = str(scheduler.workers[worker].name)
        known = self.core.runners.get(name)
        if known is None or known.state != "booting":
            return  # not ours, or given up while it was on its way: its end is under way
        self.address_of[name] = worker
        self.runner_at[worker] = name
        internals.hasten_worker(scheduler, worker)

    def remove_worker(
        self, scheduler: Scheduler, worker: str, *, stimulus_id: str, **kwargs: Any
    ) -> None:
        """Tell the core of a runner's end, in the same turn of the loop in which Dask learns of it.

        Its tasks stand in ``no-worker`` now: they are pinned to an address that will not come
        back, so Dask starts none of them anew (F1).
        """
        runner = self.runner_at.pop(worker, None)
        if runner is not None:
            del self.address_of[runner]
            self._tell(ev.RunnerLost(runner, "exited"))
            # The core has answered for those whose callers still waited.
            left = [key for key, call in self.calls.items() if call.address == worker]
            for key in left:
                del self.calls[key]
            internals.forget_tasks(scheduler, left, self.owner, stimulus_id)

    def remove_client(self, scheduler: Scheduler, client: str) -> None:
        """Let the calls of a client that is gone go too (G1)."""
        self.sinks.pop(client, None)
        mine = [call.key for call in self.calls.values() if call.client == client]
        self._on_release(client, mine)

    def transition(
        self, key: Any, start: str, finish: str, *args: Any, stimulus_id: str, **kwargs: Any
    ) -> None:
        """Deliver what a task of ours has come to."""
        if start != "processing":
            return
        call = self.calls.get(key)
        if call is None:
            return
        if finish == "memory":
            self._deliver(call, kwargs)
        elif call.address not in self.scheduler.workers:
            return  # remove_worker follows in this turn, and answers for the runner's calls
        elif finish == "erred":
            if not call.answered:
                exception, trace = kwargs.get("exception"), kwargs.get("traceback")
                message = {"what": "failed", "key": key, "exception": exception, "traceback": trace}
                self._send(call.client, message)
            self._end(call)
        elif call not in self._over:
            # Rescheduled: by the task itself, or because its worker is closing. It has started
            # once, so it must not start again, here or elsewhere (F1).
            self.scheduler.tasks[key].worker_restrictions = {NOWHERE}
            runner = self.runner_at.get(str(call.address))
            self._fail(call, RunnerLost("exited", runner=runner, call=key))
            self._end(call)

    def _deliver(self, call: HostCall, kwargs: dict[str, Any]) -> None:
        metadata = kwargs.get("metadata") or {}
        result = metadata.get(internals.RESULT)
        if call.answered:
            self._end(call)
        elif result is not None or not call.keep:
            self._send(call.client, {"what": "result", "key": call.key, "result": result})
            self._end(call)
        else:
            # Too large to pass through here: the caller fetches it, the slot is taken until then.
            call.delivering = True
            message = {"what": "fetch", "key": call.key, "address": call.address}
            self._send(call.client, message)

    def _end(self, call: HostCall) -> None:
        self._over.append(call)
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        """Forget the tasks that are over, and give their slots back."""
        over, self._over = self._over, []
        self._flushing = False
        keys = [call.key for call in over if self.calls.pop(call.key, None) is not None]
        internals.forget_tasks(self.scheduler, keys, self.owner, f"flame-over-{time.time()}")
        for key in keys:
            self._tell(ev.CallEnded(key))

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
            case do.Stop(runner, reason):
                self._send_parent({"what": "stop", "runner": runner, "reason": reason})
            case do.Expired():
                self._expired(instruction)
            case do.Refused(call):
                self._refuse(call, PoolClosed(self.pool))
            case do.Lost(call, runner, cause, exit_code, signal):
                error = RunnerLost(
                    cause,  # type: ignore[arg-type]  # the core's word is one of the causes
                    exit_code=exit_code,
                    signal=signal,
                    runner=runner,
                    call=call,
                )
                self._refuse(call, error)
            case do.Scaled(kind, runner, count, reason, problem):
                self._send_parent(
                    {
                        "what": "scaled",
                        "kind": kind,
                        "runner": runner,
                        "count": count,
                        "reason": reason,
                        "error": None if problem is None else boot_error(problem),
                    }
                )
            case do.OpenDone():
                self._send_parent({"what": "opened"})
            case do.OpenFailed(problem):
                self._send_parent({"what": "open-failed", "error": boot_error(problem)})
            case do.CloseDone():
                self._send_parent({"what": "closed"})
            case do.Terminate():
                pass  # a thread can't be ended yet: the lease lasts until it ends by itself

    def _start(self, call: HostCall, runner: str) -> None:
        call.address = address = self.address_of[runner]
        run = run_call_async if call.asynchronous else run_call
        limit = self.inline_limit if call.keep else -1
        spec = internals.make_task(call.key, run, call.payload, call.inputs, call.key, limit)
        call.payload = call.inputs = None
        internals.place_task(
            self.scheduler,
            key=call.key,
            spec=spec,
            address=address,
            owner=self.owner,
            priority=0,
            stimulus_id=f"flame-start-{time.time()}",
        )

    def _expired(self, news: do.Expired) -> None:
        problem = news.boot_problem
        error = CallTimeout(
            news.phase,  # type: ignore[arg-type]  # the core's word is one of the phases
            queued=news.queued,
            booting=news.booting,
            running=news.running,
            limit=news.limit,
            call=news.call,
            boot_error=None if problem is None else boot_error(problem),
        )
        call = self.calls[news.call]
        self._fail(call, error)
        if news.phase != "running":
            del self.calls[news.call]

    def _refuse(self, key: str, error: FlameError) -> None:
        """Answer for a call that the core has struck off."""
        call = self.calls.pop(key, None)
        if call is not None:
            self._fail(call, error)
            if call.address is not None:
                stimulus = f"flame-refuse-{time.time()}"
                internals.forget_tasks(self.scheduler, [key], self.owner, stimulus)

    def _fail(self, call: HostCall, error: FlameError) -> None:
        if call.answered:
            return
        call.answered = True
        self._send(call.client, {"what": "error", "key": call.key, "error": error})


def boot_error(problem: BootProblem) -> BootError:
    """Return the exception that tells of a failed boot."""
    return BootError(
        problem.phase,
        cause=str(problem.cause),
        log_tail=problem.log_tail,
        attempts=problem.attempts,
    )

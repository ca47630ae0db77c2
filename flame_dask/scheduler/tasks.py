"""Calls on the scheduler: their Dask tasks, and the answers that callers get.

A call is an ordinary Dask task, pinned to the runner that the core chose and created when its slot
is free. It is wanted by a client that exists in name only, so Dask tells no client about it and
never frees it on its own: what a parent hears of its calls, it hears from here.

The scheduler's own transitions must not be re-entered. So what is heard in the middle of one is
only taken note of and delivered; what changes tasks follows in :meth:`CallTasks._flush`, in the
same turn of the loop.
"""

from __future__ import annotations

import time
from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flame_dask import dask_internals as internals
from flame_dask.core import events as ev
from flame_dask.core.events import Event
from flame_dask.errors import FlameError
from flame_dask.runner.execution import Terms, run_call, run_call_async
from flame_dask.scheduler.calls import HostCall, lost_error
from flame_dask.scheduler.inquest import PATIENCE, Inquest, Verdict

if TYPE_CHECKING:
    from distributed import Scheduler

Message = dict[str, Any]

#: A scheduler that has no running worker of this address: a task pinned to it can't start.
NOWHERE = "flame://nowhere"

#: What the core is told a runner died of, as long as the backend has not said (F2).
UNKNOWN = "lost"


class CallTasks:
    """The calls of a pool, as its host knows them, and their tasks.

    Parameters
    ----------
    scheduler, loop
        The scheduler, and its event loop.
    pool
        The pool's name.
    inline_limit, own_thread, patience
        As for :class:`~flame_dask.scheduler.plugin.FlameScheduler`.
    send
        Takes the id of a client, and a message for it.
    tell
        Takes an event for the core.

    Attributes
    ----------
    calls
        By their keys: all that have no answer yet, or whose work goes on.
    running
        By the keys of their tasks: those that are on a runner.
    inquest
        Where calls wait whose runner was lost, until it is known how.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        loop: AbstractEventLoop,
        pool: str,
        *,
        inline_limit: int,
        own_thread: bool,
        send: Callable[[str, Message], None],
        tell: Callable[[Event], None],
        patience: float = PATIENCE,
    ) -> None:
        self.calls: dict[str, HostCall] = {}
        self.running: dict[str, HostCall] = {}
        self.inquest: Inquest[HostCall] = Inquest(loop, self._lose, patience)
        self._scheduler = scheduler
        self._pool = pool
        self._loop = loop
        self._owner = f"flame-{pool}"
        self._inline_limit = inline_limit
        self._own_thread = own_thread
        self._send = send
        self._tell = tell
        self._over: list[tuple[HostCall, str]] = []
        self._flushing = False

    # -- starting and ending -------------------------------------------------------------------

    def start(self, call: HostCall, address: str) -> None:
        """Run a call on the runner at this address."""
        task = call.begin(address)
        self.running[task] = call
        on_loop = call.asynchronous and not self._own_thread
        terms = Terms(
            call.key,
            task,
            self._inline_limit if call.keep else -1,
            call.limit,
            call.link,
            call.asynchronous,
            call.mode,
            self._pool if call.mode else "",
            call.code,
        )
        run = run_call_async if on_loop else run_call
        spec = internals.make_task(task, run, call.payload, call.inputs, terms)
        if call.runs > call.retries:
            call.payload = call.inputs = None
        internals.place_task(
            self._scheduler,
            key=task,
            spec=spec,
            address=address,
            owner=self._owner,
            priority=0,
            stimulus_id=f"flame-start-{time.time()}",
        )

    def terminate(self, call: HostCall, reason: str) -> None:
        """Have the work of a call ended (E3)."""
        if call.delivering:
            self.end(call)  # it has run: only its result is still there
        elif call.task is not None and call.address is not None:
            message = {"what": "terminate", "task": call.task, "reason": reason}
            internals.send_to_worker(self._scheduler, call.address, message)

    def end(self, call: HostCall) -> None:
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
        over = [(call, task) for call, task in over if self.running.pop(task, None) is not None]
        tasks = [task for _, task in over]
        internals.forget_tasks(self._scheduler, tasks, self._owner, f"flame-over-{time.time()}")
        for call, _ in over:
            self.calls.pop(call.key, None)
            self._tell(ev.CallEnded(call.key, call.how))

    def drop(self, call: HostCall) -> None:
        """Let go of the task of a call that has lost its work, not its runner."""
        if call.task is not None and self.running.pop(call.task, None) is not None:
            stimulus = f"flame-drop-{time.time()}"
            internals.forget_tasks(self._scheduler, [call.task], self._owner, stimulus)
        call.task = None

    # -- what Dask says ------------------------------------------------------------------------

    def processed(self, key: Any, finish: str, news: dict[str, Any]) -> None:
        """Deliver what a task has come to, if it is one of these.

        Parameters
        ----------
        key
            The task's key.
        finish
            The state that it has gone to from ``processing``.
        news
            What the scheduler knows of that.
        """
        call = self.running.get(key)
        if call is None:
            return
        if finish == "memory":
            self._deliver(call, news)
        elif call.address not in self._scheduler.workers:
            return  # remove_worker follows in this turn, and answers for the runner's calls
        elif finish == "erred":
            if not call.answered:
                exception, trace = news.get("exception"), news.get("traceback")
                message = {
                    "what": "failed",
                    "key": call.key,
                    "exception": exception,
                    "traceback": trace,
                }
                self._send(call.client, message)
                call.answered = True
            self.end(call)
        elif (call, key) not in self._over:
            # Rescheduled: by the task itself, or because its worker is closing. It has started
            # once, so it must not start again, here or elsewhere (F1).
            self._scheduler.tasks[key].worker_restrictions = {NOWHERE}
            self._loop.call_soon(self._rescheduled, call, key)

    def _rescheduled(self, call: HostCall, task: str) -> None:
        if self.running.get(task) is call:
            self.terminate(call, "rescheduled")  # its runner may live on, and the work with it
            self.drop(call)
            self._tell(ev.CallLost(call.key, "preempted"))

    def _deliver(self, call: HostCall, news: dict[str, Any]) -> None:
        metadata = news.get("metadata") or {}
        result = metadata.get(internals.RESULT)
        if call.answered:
            self.end(call)
        elif result is not None or not call.keep:
            self._send(call.client, {"what": "result", "key": call.key, "result": result})
            call.answered = True
            self.end(call)
        else:
            # Too large to pass through here: the caller fetches it, the slot is taken until then.
            call.delivering = True
            message = {"what": "fetch", "key": call.key, "task": call.task}
            self._send(call.client, {**message, "address": call.address})

    def strand(self, address: str, stimulus_id: str) -> None:
        """Forget the tasks at an address that is gone. The core says what becomes of their calls.

        They stand in ``no-worker`` now: they are pinned to an address that will not come back, so
        Dask starts none of them anew (F1).
        """
        for call, _ in self._over:
            if call.address == address:
                # It has its answer, and must not be started anew with those that are lost.
                self._tell(ev.CallReleased(call.key))
        left = [task for task, call in self.running.items() if call.address == address]
        for task in left:
            call = self.running.pop(task)
            call.task, call.delivering = None, False
        internals.forget_tasks(self._scheduler, left, self._owner, stimulus_id)

    # -- answering for calls that have no result -----------------------------------------------

    def fail(self, call: HostCall, error: FlameError) -> None:
        """Answer a caller with an error, unless it has its answer."""
        if call.answered:
            return
        call.answered = True
        self._send(call.client, {"what": "error", "key": call.key, "error": error})

    def refuse(self, key: str, error: FlameError) -> None:
        """Answer for a call that the core has struck off."""
        call = self.calls.pop(key, None)
        if call is not None:
            self.fail(call, error)
            self.drop(call)

    def lost(self, key: str, runner: str, verdict: Verdict) -> None:
        """Answer for a call that was lost, as soon as it is known how."""
        call = self.calls.pop(key, None)
        if call is None:
            return
        self.drop(call)
        if verdict.cause == UNKNOWN:
            self.inquest.lost(runner, call)
        else:
            self._lose(call, runner, verdict)

    def _lose(self, call: HostCall, runner: str, verdict: Verdict) -> None:
        self.fail(call, lost_error(call, runner, verdict))

"""The pool as a pure state machine: events in, instructions out.

A pool is level-triggered (C3): every event is followed by :meth:`PoolState._settle`, which compares
what is there with what is wanted, whatever the event was. Handlers only record the fact.

Who counts for what:

* A runner counts towards ``max`` from its boot until the backend has confirmed its end (C1).
* Demand is the leases on runners that stay, plus the waiters (C2). Leases on a draining runner are
  carried by that runner to its end, and ask for no other.
* A boot that failed is *owed* until its back-off is over: it is part of what is planned, so that
  nothing is booted in its place, but not of what is there, since no machine exists (C6).

Who does what: :class:`~flame_dask.core.fleet.Fleet` knows the ready runners and the idle ones among
them, :class:`~flame_dask.core.boots.BootLedger` the boots,
:class:`~flame_dask.core.calls.CallBook` the calls, :class:`~flame_dask.core.leaving.Evictions`
until when a runner may drain, and the pool what each means for the others.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.backoff import Backoff
from flame_dask.core.boots import BootLedger
from flame_dask.core.calls import CallBook
from flame_dask.core.events import BootProblem, Event, PoolOptionsView
from flame_dask.core.fleet import Fleet
from flame_dask.core.instructions import Instruction
from flame_dask.core.leaving import Evictions
from flame_dask.core.records import COUNTERS, Call, Decision, Runner, RunnerInfo, Snapshot
from flame_dask.core.transitions import Story
from flame_dask.core.waiting import NEVER, Alarm


class PoolState:
    """What one pool is and owes. Not thread-safe, and it never waits.

    Parameters
    ----------
    options
        The options that decisions depend on.
    name
        Prefix of the boot ids.
    backoff
        When failed boots are tried again.
    seed
        For the jitter of the back-off; equal seeds and events give equal instructions.

    Examples
    --------
    >>> pool = PoolState(PoolOptionsView(min=0, max=1), name="p")
    >>> pool.handle(0.0, ev.Open())
    [OpenDone()]
    >>> boot, news = pool.handle(0.0, ev.CallSubmitted("c1"))
    >>> boot.runner
    'p-1'
    >>> pool.handle(0.5, ev.RunnerReady("p-1"))[-1]
    Start(call='c1', runner='p-1')
    """

    def __init__(
        self,
        options: PoolOptionsView,
        *,
        name: str = "pool",
        backoff: Backoff = Backoff(),  # noqa: B008  # immutable
        seed: int | None = None,
    ) -> None:
        self.options = options
        self.name = name
        self.counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self.story = Story()
        self.runners: dict[str, Runner] = {}
        # What ``max`` has been, for as long as more runners than the present one are left (C8).
        self.ceiling = options.max
        # The same for ``max_concurrency`` and the leases of one runner.
        self.most_leases = options.max_concurrency
        self.opening = False
        self.closing = False

        self._alarm = Alarm()
        self._fleet = Fleet(self._alarm, options)
        self._boots = BootLedger(self._alarm, backoff, random.Random(seed))
        self._book = CallBook(self._alarm, self.story, self._boots)
        self.calls = self._book.calls
        self.queue = self._book.queue
        self._evictions = Evictions(self._alarm)
        self._close_at = NEVER
        self._decisions: deque[Decision] = deque(maxlen=1000)
        self._out: list[Instruction] = []
        self._no = 0
        self._now = 0.0
        self._closed = False
        self._holding = False

    # -- the whole interface -------------------------------------------------------------------

    def handle(self, now: float, event: Event) -> list[Instruction]:
        """Take in one event and return what is to be done, in order.

        Parameters
        ----------
        now
            Seconds on any clock. One that goes back is taken to stand still.
        event
            What happened.

        Returns
        -------
        list of Instruction
            To be carried out in this order.

        Raises
        ------
        IllegalTransition
            If the event contradicts what is known. Nothing has changed then.
        """
        now = max(now, self._now)
        _HANDLERS[type(event)](self, now, event)
        self._now = now
        self._settle(now)
        out, self._out = self._out, []
        return out

    def next_deadline(self) -> float | None:
        """Return when to call ``handle(now, Tick())`` at the latest; ``None`` is never."""
        self._alarm.at = due = self._earliest()
        return None if due == NEVER else due

    def decisions(self) -> list[Decision]:
        """Return the last decisions, oldest first (C10)."""
        return list(self._decisions)

    def snapshot(self, now: float) -> Snapshot:
        """Return the pool at this instant, in seconds of the events' clock (C10)."""
        needed = self._needed()
        return Snapshot(
            runners=tuple(RunnerInfo.of(runner, now) for runner in self.runners.values()),
            leases=sum(len(r.leases) for r in self.runners.values()),
            waiters=len(self.queue),
            booting=self._boots.under_way,
            wanted=0 if self.closing else max(needed, min(self._fleet.floor, self.options.max)),
            counters=dict(self.counters),
        )

    @property
    def last_problem(self) -> BootProblem | None:
        """Why the last boot that failed did (C6)."""
        return self._boots.problem

    # -- opening, changing, closing ------------------------------------------------------------

    def _on_open(self, now: float, event: ev.Open) -> None:
        if not self.closing:
            self.opening = True
            self._fleet.wake_min()

    def _on_configure(self, now: float, event: ev.Configure) -> None:
        old, new = self.options, event.options
        self.options = new
        self._fleet.configure(old, new)
        self.ceiling = max(len(self.runners), new.max)
        leases = max((len(runner.leases) for runner in self.runners.values()), default=0)
        self.most_leases = max(leases, new.max_concurrency)
        for runner in [r for r in self._fleet.ready.values() if new.single_use and r.used]:
            self._drain(now, runner, "single use")
        # Runners that are leaving already are no surplus.
        surplus = len(self._fleet.ready) + self._boots.under_way - new.max
        if surplus <= 0 or self.closing:
            return
        reason = f"max is {new.max} now"
        # Boots go first, the latest before the others, then the runners with the least to finish.
        boots = [runner for runner in self.runners.values() if runner.state == "booting"]
        for runner in boots[-surplus:]:
            self._stop(now, runner, "not needed", reason)
        surplus -= len(boots)
        by_leases = sorted(self._fleet.ready.values(), key=lambda r: (len(r.leases), -r.no))
        for runner in by_leases[: max(0, surplus)]:
            self._drain(now, runner, reason)

    def _on_close(self, now: float, event: ev.Close) -> None:
        if self.closing:
            return
        self.closing = True
        self.opening = False
        for call_id in list(self.queue):
            self._refuse(now, self.calls[call_id])
        self._boots.forgive()
        for runner in list(self.runners.values()):
            if runner.state == "booting":
                self._stop(now, runner, "not needed", "the pool closes")
            elif runner.state == "ready":
                self._drain(now, runner, "the pool closes")
        if self.options.shutdown_timeout is not None:
            self._close_at = now + self.options.shutdown_timeout
            self._alarm.at = min(self._alarm.at, self._close_at)

    def _shut_down(self, now: float) -> None:
        """End what has not ended within ``shutdown_timeout`` (A6)."""
        for runner in list(self.runners.values()):
            if runner.state == "draining":
                for call_id in list(runner.leases):
                    call = self.calls[call_id]
                    if call.state == "running":
                        self._refuse(now, call)
                    else:  # its caller has been answered
                        self._end(now, call, "pool closes")
                self._stop(now, runner, "pool closes", "shutdown_timeout is over", force=True)

    def _refuse(self, now: float, call: Call) -> None:
        self._end(now, call, "pool closes")
        self.counters["refused"] += 1
        self._out.append(do.Refused(call.id))

    # -- calls ---------------------------------------------------------------------------------

    def _on_submitted(self, now: float, event: ev.CallSubmitted) -> None:
        if self.closing:
            self.counters["submitted"] += 1
            self.counters["refused"] += 1
            self._decide(now, "refuse", "the pool closes")
            self._out.append(do.Refused(event.call))
            return
        call = self._book.add(now, event)
        self.counters["submitted"] += 1
        self._admit(now, call)

    def _admit(self, now: float, call: Call) -> None:
        """Give a call a slot, or let it wait for one."""
        if not self.queue:
            # The short way: a free slot and nobody before it.
            self._fleet.aim(now, self._needed(1))
            runner = self._fleet.pick()
            if runner is not None:
                self._start(now, call, runner)
                return
        self._fleet.wake_min()
        self._book.wait(call)

    def _start(self, now: float, call: Call, runner: Runner) -> None:
        self._book.start(now, call, runner)
        self._fleet.lease(runner, call.id)
        self.counters["started"] += 1
        self._out.append(do.Start(call.id, runner.id))

    def _on_ended(self, now: float, event: ev.CallEnded) -> None:
        call = self.calls.get(event.call)
        if call is not None:
            answered = call.state != "running"
            self._end(now, call, "done")
            self.counters["ended"] += not answered  # each call is counted once
            if event.how:
                self._decide(now, "retire", f"call {call.id} ended by {event.how}")
            runner = call.runner
            if self.options.single_use or (runner and runner.state == "draining"):
                self._work_over(now, runner)

    def _on_call_lost(self, now: float, event: ev.CallLost) -> None:
        call = self.calls.get(event.call)
        if call is not None:
            runner = call.runner
            again = self._lose(now, call, "work lost", event)
            self._work_over(now, runner)
            self._readmit(now, again)

    def _work_over(self, now: float, runner: Runner | None) -> None:
        """See what it means for a runner that the work of one of its calls is over."""
        assert runner is not None, "a call that has work has a runner"
        if runner.state == "draining":
            self._go_if_done(now, runner)
        elif self.options.single_use:
            self._drain(now, runner, "single use")

    def _lose(
        self, now: float, call: Call, step: str, loss: ev.CallLost | ev.RunnerLost
    ) -> list[Call]:
        """Take note that the work of a call is gone; return the call if it is to run again (F1)."""
        runner = call.runner
        if runner is None or call.answered:
            self._end(now, call, step)
        elif call.retries and not self.closing:
            self._free(now, call)
            self._book.requeue(now, call)
            self.counters["retried"] += 1
            self._out.append(do.Requeued(call.id))
            return [call]
        else:
            self._end(now, call, step)
            self.counters["lost"] += 1
            cause = "preempted" if runner.leaving else loss.cause
            self._out.append(do.Lost(call.id, runner.id, cause, loss.exit_code, loss.signal))
        return []

    def _lose_all(self, now: float, runner: Runner, step: str, loss: ev.RunnerLost) -> list[Call]:
        calls = [self.calls[call_id] for call_id in runner.leases]
        return [again for call in calls for again in self._lose(now, call, step, loss)]

    def _readmit(self, now: float, calls: list[Call]) -> None:
        # Not before their runner has been struck off: it could be picked.
        for call in sorted(calls, key=lambda call: -call.priority):
            if self._book.overdue(now, call):
                self._book.wait(call)  # settling tells its caller
            else:
                self._admit(now, call)

    def _on_released(self, now: float, event: ev.CallReleased) -> None:
        call = self.calls.get(event.call)
        if call is None or call.answered:
            return
        self.counters["released"] += 1
        if call.state == "waiting":
            self._end(now, call, "released")
        else:
            self._terminate(now, call, "released", "its caller is gone")

    def _expire(self, now: float, call: Call) -> None:
        news = self._book.expired(now, call)
        self.counters["expired"] += 1
        self._out.append(news)
        if news.phase == "running":
            self._terminate(now, call, "expired", "its time is up")
        else:
            self._end(now, call, "expired")
            self._decide(now, "refuse", f"no slot within {news.limit:g} s ({news.phase})")

    def _terminate(self, now: float, call: Call, event: str, reason: str) -> None:
        self._book.answer(now, call, event, self.options.grace)
        assert call.runner is not None, "a running call has a runner"
        self._out.append(do.Terminate(call.id, call.runner.id, reason))

    def _stick(self, now: float, call: Call) -> None:
        """Give up on a runner with work that has not gone within the grace (E3)."""
        self._book.stick(now, call)
        runner = call.runner
        assert runner is not None, "a call that has work has a runner"
        reason = f"call {call.id} can't be ended"
        if runner.state == "ready":
            self._drain(now, runner, reason)
        else:
            self._decide(now, "retire", f"{runner.id}: {reason}")
        self._evictions.stick(now, runner, call.id, self.options.shutdown_timeout)
        self._go_if_done(now, runner)

    def _end(self, now: float, call: Call, event: str) -> None:
        self._book.end(now, call, event)
        self._free(now, call)

    def _free(self, now: float, call: Call) -> None:
        runner = call.runner
        if runner is None:
            return
        if runner.state == "ready":
            self._fleet.give_back(now, runner, call.id)
        else:
            del runner.leases[call.id]
            self._evictions.free(runner, call.id)

    # -- runners -------------------------------------------------------------------------------

    def _boot(self, now: float, reason: str) -> None:
        self._no += 1
        planned = len(self._fleet.ready) + self._boots.under_way + 1
        extra = planned > self.options.min
        ident = f"{self.name}-{self._no}"
        limit = self.options.boot_timeout
        runner = Runner(self._no, ident, self._boots.next_attempt(), extra, limit)
        self.runners[ident] = runner
        self.story.begin(now, ident, "boot", runner.state)
        self._boots.begin(now, runner)
        self.counters["boots"] += 1
        self._out.append(do.Boot(ident, runner.attempt, reason))
        if extra:
            self._out.append(do.Scaled("grow_start", ident, planned, reason))

    def _on_ready(self, now: float, event: ev.RunnerReady) -> None:
        runner = self.runners.get(event.runner)
        if runner is None or runner.state in ("draining", "stopping"):
            return  # an earlier life, or it has just been given up
        runner.state = self.story.runner(now, runner.id, runner.state, "ready")
        self._boots.over(runner)
        self._fleet.join(now, runner)
        if runner.extra:
            self._out.append(do.Scaled("grow_end", runner.id, len(self._fleet.ready), "ready"))

    def _on_boot_failed(self, now: float, event: ev.BootFailed) -> None:
        runner = self.runners.get(event.runner)
        if runner is None:
            return
        if runner.state in ("ready", "draining"):
            # The backend's word and the worker's own crossed: the machine is gone all the same.
            self._on_lost(now, ev.RunnerLost(runner.id, "exited"))
        if runner.state == "stopping":  # given up already; now nothing of it is left
            self._gone(now, runner, "stopped", event.problem.log_tail)
            return
        self._boots.over(runner)
        self._gone(now, runner, "failed", ())
        self._boot_problem(now, runner, event.problem)

    def _boot_timed_out(self, now: float, runner: Runner) -> None:
        cause = f"not ready within boot_timeout={runner.boot_timeout:g} s"
        self._stop(now, runner, "timed out", f"boot: {cause}")
        self._boot_problem(now, runner, BootProblem("connect", cause))

    def _boot_problem(self, now: float, runner: Runner, problem: BootProblem) -> None:
        problem = problem._replace(attempts=runner.attempt)
        self._boots.note(now, runner, problem)
        self.counters["boot_failures"] += 1
        self._decide(now, "retire", f"boot {runner.id} failed ({problem.phase}): {problem.cause}")
        self._boot_abandoned(runner, "failed", problem)
        if self.opening and self._boots.gave_up(runner.attempt):
            self._out.append(do.OpenFailed(problem))
            self._on_close(now, ev.Close())
        elif not self.closing:
            self._boots.owe(now, runner)

    def _boot_abandoned(self, runner: Runner, reason: str, problem: BootProblem) -> None:
        """Say that a boot has come to nothing: who heard of its start hears of its end (C9)."""
        if runner.extra:
            news = do.Scaled("grow_end", runner.id, len(self._fleet.ready), reason, problem)
            self._out.append(news)

    def _on_lost(self, now: float, event: ev.RunnerLost) -> None:
        runner = self.runners.get(event.runner)
        if runner is None or runner.state == "stopping":
            return
        booting = runner.state == "booting"
        runner.lost = True
        again = self._lose_all(now, runner, "runner lost", event)
        cause = "preempted" if runner.leaving else event.cause
        self._stop(now, runner, "lost", f"lost: {cause}")
        self.counters["runners_lost"] += 1
        self._readmit(now, again)
        if booting:
            cause = f"the worker went away while booting ({cause})"
            self._boot_problem(now, runner, BootProblem("setup", cause))

    def _on_leaving(self, now: float, event: ev.RunnerLeaving) -> None:
        runner = self.runners.get(event.runner)
        if runner is None or runner.state == "stopping" or runner.leaving:
            return
        if runner.state == "booting":  # it will not get ready
            self._on_lost(now, ev.RunnerLost(runner.id, event.reason))
            return
        runner.leaving = True
        self._evictions.limit(now, runner, self.options.shutdown_timeout)
        if runner.state == "ready":
            self._drain(now, runner, event.reason)

    def _on_idle_answer(self, now: float, event: ev.IdleAnswer) -> None:
        runner = self.runners.get(event.runner)
        if runner is None or not self._fleet.answered(now, runner, event.number, event.go):
            return
        needed = self._needed()
        self._fleet.aim(now, needed)
        # It may be needed by now. Then it is asked again as soon as it is not.
        if not self.opening and self._fleet.spares(runner.kind, needed, self.options.buffer):
            self._dismiss(now, runner)

    def _dismiss(self, now: float, runner: Runner) -> None:
        assert runner.idle_since is not None, "only an idle runner is dismissed"
        self._fleet.dismiss(runner)
        self._drain(now, runner, f"idle for {round(now - runner.idle_since, 1):g} s")

    def _drain(self, now: float, runner: Runner, reason: str) -> None:
        self._out.append(do.Drain(runner.id, reason))
        runner.state = self.story.runner(now, runner.id, runner.state, "drain")
        self._fleet.leave(runner)
        self._decide(now, "shrink", f"{runner.id}: {reason}")
        self._out.append(do.Scaled("shrink", runner.id, len(self._fleet.ready), reason))
        if not runner.leases:
            self._stop(now, runner, "drained", reason)

    def _go_if_done(self, now: float, runner: Runner) -> None:
        """Stop a draining runner that has nothing to wait for."""
        if not runner.leases:
            self._stop(now, runner, "drained", "drained")
        elif self._evictions.hopeless(runner):
            self._evict(now, runner, "only calls that can't be ended are left")

    def _evict(self, now: float, runner: Runner, reason: str) -> None:
        """Stop a draining runner, whatever is left on it (E3, E5)."""
        again = self._lose_all(now, runner, "runner evicted", ev.RunnerLost("", "preempted"))
        self._stop(now, runner, "evicted", reason, force=True)
        self._readmit(now, again)

    def _stop(
        self, now: float, runner: Runner, event: str, reason: str, *, force: bool = False
    ) -> None:
        before = runner.state
        runner.state = self.story.runner(now, runner.id, before, event)
        if before == "ready":
            self._fleet.leave(runner)
        elif before == "booting":
            self._boots.over(runner)
        else:
            self._evictions.discard(runner)
        if event == "not needed":
            self._boot_abandoned(runner, reason, BootProblem("cancelled", reason))
        elif event != "drained":
            self._decide(now, "retire", f"{runner.id}: {reason}")
        self._out.append(do.Stop(runner.id, reason, force))

    def _on_stopped(self, now: float, event: ev.RunnerStopped) -> None:
        runner = self.runners.get(event.runner)
        if runner is not None:
            self._gone(now, runner, "stopped", event.log_tail)
            if event.cause and runner.lost:
                self._decide(now, "retire", f"{runner.id}: {event.cause}")

    def _gone(self, now: float, runner: Runner, event: str, log_tail: tuple[str, ...]) -> None:
        runner.state = self.story.runner(now, runner.id, runner.state, event)
        del self.runners[runner.id]
        self.counters["runners_stopped"] += 1
        self._boots.add_log(runner.id, log_tail)
        if len(self.runners) < self.ceiling:
            self.ceiling = max(len(self.runners), self.options.max)

    # -- settling: compare what is with what is wanted (C3) ------------------------------------

    def _settle(self, now: float) -> None:
        if now >= self._alarm.at:
            self._run_deadlines(now)
        if self.closing:
            if not self.runners and not self._closed:
                self._closed = True
                self._close_at = NEVER
                self._out.append(do.CloseDone())
            return
        fleet, options = self._fleet, self.options
        needed = self._needed()
        fleet.aim(now, needed)
        while self.queue:
            runner = fleet.pick()
            if runner is None:
                break
            self._start(now, self.calls[self.queue.pop()], runner)
        wanted = max(needed, min(fleet.floor, options.max))
        self._grow(now, wanted - len(fleet.ready) - self._boots.under_way)
        if self.opening:
            # Whoever is idle stays until all are ready: else opening might never end (A5).
            if len(fleet.ready) < min(options.min, options.max):
                return
            self.opening = False
            self._out.append(do.OpenDone())
        while (idle := fleet.overdue(needed, options.buffer)) is not None:
            if options.idle_check:
                self._out.append(do.AskIdle(idle.id, fleet.ask(idle)))
            else:
                self._dismiss(now, idle)

    def _grow(self, now: float, short: int) -> None:
        boots = self._boots
        if short > 0:
            count = boots.startable(short, self.options.max - len(self.runners))
            if count > 0:
                demand = self._fleet.leases + len(self.queue)
                reason = f"{demand} calls, min {self.options.min}, buffer {self.options.buffer}"
                self._decide(now, "grow", f"{count} more: {reason}")
                for _ in range(count):
                    self._boot(now, reason)
                short -= count
        boots.settle(now, short)
        if self.queue:
            self._hold(now)
        else:
            self._holding = False

    def _hold(self, now: float) -> None:
        """Note that calls wait and no runner more may be booted; once, not for each call."""
        planned = len(self._fleet.ready) + self._boots.under_way + self._boots.cooling
        holding = self._demanded() > planned
        said = bool(self._decisions) and self._decisions[-1].action == "hold"
        if holding and not self._holding and not said:
            leaving = len(self.runners) - len(self._fleet.ready) - self._boots.under_way
            still = f", {leaving} of them leaving" if leaving else ""
            self._decide(now, "hold", f"max={self.options.max} reached{still}, calls wait")
        self._holding = holding

    def _run_deadlines(self, now: float) -> None:
        while (call := self._book.pop_due(now)) is not None:
            over = self._stick if call.state == "ending" else self._expire
            over(now, call)
        while (runner_id := self._boots.pop_timed_out(now)) is not None:
            self._boot_timed_out(now, self.runners[runner_id])
        self._boots.cool(now)
        self._fleet.ring(now)
        while (runner := self._evictions.pop_due(now)) is not None:
            self._evict(now, runner, "shutdown_timeout is over")
        if now >= self._close_at:
            self._close_at = NEVER
            self._shut_down(now)
        self._alarm.at = self._earliest()

    # -- small things --------------------------------------------------------------------------

    def _demanded(self, more: int = 0) -> int:
        """How many runners the demand would have, if there were no ``max``."""
        demand = self._fleet.leases + len(self.queue) + more
        return -(-demand // self.options.max_concurrency) + self.options.buffer

    def _needed(self, more: int = 0) -> int:
        """How many runners the demand needs, whatever ``min`` is."""
        return min(self.options.max, self._demanded(more))

    def _earliest(self) -> float:
        return min(
            self._book.next(),
            self._boots.next(),
            self._fleet.next(),
            self._evictions.next(),
            self._close_at,
        )

    def _decide(self, now: float, action: str, reason: str) -> None:
        figures: dict[str, int | float] = {
            "ready": len(self._fleet.ready),
            "booting": self._boots.under_way,
            "total": len(self.runners),
            "leases": self._fleet.leases,
            "waiters": len(self.queue),
        }
        self._decisions.append(Decision(now, action, reason, figures))

    def _on_tick(self, now: float, event: ev.Tick) -> None:
        """Time passes; settling does the rest."""


_HANDLERS: Final[dict[type, Callable[[PoolState, float, Any], None]]] = {
    ev.Open: PoolState._on_open,
    ev.Configure: PoolState._on_configure,
    ev.Close: PoolState._on_close,
    ev.CallSubmitted: PoolState._on_submitted,
    ev.CallEnded: PoolState._on_ended,
    ev.CallLost: PoolState._on_call_lost,
    ev.CallReleased: PoolState._on_released,
    ev.RunnerReady: PoolState._on_ready,
    ev.BootFailed: PoolState._on_boot_failed,
    ev.RunnerLost: PoolState._on_lost,
    ev.RunnerLeaving: PoolState._on_leaving,
    ev.IdleAnswer: PoolState._on_idle_answer,
    ev.RunnerStopped: PoolState._on_stopped,
    ev.Tick: PoolState._on_tick,
}

"""A model of a pool that is too simple to be wrong: what a host of the core can know.

It tells the core what happens, and holds each instruction against what it knows: which runners were
booted and not stopped, who waits, who runs where, and who has been answered.
"""

from __future__ import annotations

import pickle
from collections.abc import Hashable

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.events import Event, Limits
from flame_dask.core.instructions import Instruction
from flame_dask.core.invariants import check
from flame_dask.core.pool import PoolState
from flame_dask.core.transitions import IllegalTransition


class RunnerModel:
    """What a host knows of a runner."""

    def __init__(self) -> None:
        self.state = "booting"
        self.leases: list[str] = []
        self.used = False
        self.lost = False
        self.leaving = False
        self.evict_at: float | None = None
        self.idle_from = 0.0
        self.asked: int | None = None
        self.heard: list[str] = []


class CallModel:
    """What a host knows of a call."""

    def __init__(
        self,
        at: float,
        limits: Limits,
        priority: int,
        retries: int,
        affinity: Hashable | None = None,
    ) -> None:
        self.no = 0
        self.at = at
        self.limits = limits
        self.priority = priority
        self.retries = retries
        self.affinity = affinity
        self.waits_since = at
        self.starts_left = 1
        self.started_at: float | None = None
        self.gone_by = 0.0
        self.terminated = False
        self.runner: str | None = None
        self.answers: list[str] = []
        self.state = "waiting"

    def due(self) -> float | None:
        """Return when its time is up (E1)."""
        if self.limits.total is not None:
            return self.at + self.limits.total
        waits = self.started_at is None
        limit = self.limits.queue if waits else self.limits.run
        since = self.waits_since if self.started_at is None else self.started_at
        return None if limit is None else since + limit


class PoolModel:
    """A pool's core, and all that can be known of it from outside.

    From each instruction it is checked that

    * no more runners exist than ``max`` (C1), no runner has more leases than slots, and none gets a
      call that is not ready for it (D3);
    * each call is started at most once, and once more for each time that its work was lost and it
      had a retry left (F1), and answered exactly once (F3);
    * a runner that single use, a stuck call or somebody else has struck off gets no call, and goes
      when it has to and not earlier (D5, E3, E5);
    * no runner goes for idleness unless it was asked and has agreed, where there is a check (D2);
    * a call with a key gets the runner of the last one, if that has room and is no surplus (C7);
    * it is first come, first served within a priority (C4);
    * a call that is kept is never out of time, and not started anew (H1, I1);
    * seconds queued, booting and running add up, and nobody is told before the time is up (E2);
    * whoever hears of a boot's start hears of its end, once (C9).

    Parameters
    ----------
    core
        A new pool.

    Attributes
    ----------
    now : float
        The clock, in seconds. Set it to let time pass.
    log : list of str
        What was told and instructed.
    sound : bool
        False after :meth:`tell` has found something wrong.
    """

    def __init__(self, core: PoolState) -> None:
        self.core = core
        self.now = 0.0
        self.sound = True
        self.log: list[str] = []
        self.runners: dict[str, RunnerModel] = {}
        self.calls: dict[str, CallModel] = {}
        self.most = core.options.max
        self.opening = False
        self.opened = 0
        self.closed = 0
        self.old_asks: list[tuple[str, int]] = []
        self._asks = 0
        self._arrivals = 0
        # The runner that got the last call of each key.
        self._last: dict[Hashable, str] = {}
        self._steady = False
        # What the present event has made happen.
        self._dying = self._agreed = self._lost_call = self._cause = ""
        self._struck: set[str] = set()

    # -- telling the core ----------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Tell the core what happens now, and check what it makes of it.

        Raises
        ------
        AssertionError
            If something is wrong.
        """
        self.sound = False
        self._note(event)
        self._take(event, self.core.handle(self.now, event))
        check(self.core)
        self.sound = True

    def refuses(self, event: Event) -> None:
        """Tell the core something impossible: it has to raise and to stay as it is.

        Raises
        ------
        AssertionError
            If it does not.
        """
        before = pickle.dumps(self.core)
        story = None
        try:
            self.core.handle(self.now, event)
        except IllegalTransition as error:
            story = error.story
        assert story, f"{event} is not refused, or without a story: {story}"
        assert pickle.dumps(self.core) == before, f"{event} was refused and changed something"

    def ignores(self, event: Event) -> None:
        """Tell the core stale news: it has to do what it would have done without.

        Raises
        ------
        AssertionError
            If it does anything else.
        """
        twin: PoolState = pickle.loads(pickle.dumps(self.core))
        expected = twin.handle(self.now, ev.Tick())
        got = self.core.handle(self.now, event)
        assert got == expected, f"{event} is stale and led to {got}"
        self._take(event, got)
        assert twin.snapshot(self.now) == self.core.snapshot(self.now), f"{event} changed something"

    # -- what is known -------------------------------------------------------------------------

    def runners_in(self, *states: str) -> list[str]:
        """Return the runners in some states, by age."""
        return [ident for ident, runner in self.runners.items() if runner.state in states]

    def calls_in(self, *states: str) -> list[str]:
        """Return the calls in some states.

        They are ``waiting``, ``running``, ``kept``, ``ending``, ``stuck`` and ``over``.
        """
        return [ident for ident, call in self.calls.items() if call.state in states]

    def asks(self) -> dict[str, int]:
        """Return the runners that are asked whether they may go, and the numbers of the asks."""
        asks = {ident: runner.asked for ident, runner in self.runners.items()}
        return {ident: number for ident, number in asks.items() if number is not None}

    # -- events --------------------------------------------------------------------------------

    def _note(self, event: Event) -> None:
        """Change what is known by what happens."""
        match event:
            case ev.Open():
                self.opening = not self.core.closing
            case ev.Close():
                self.opening = False
            case ev.CallSubmitted(call, limits, priority, retries, affinity):
                self.calls[call] = CallModel(self.now, limits, priority, retries, affinity)
                self._waits(call)
            case ev.CallKept(call):
                self.calls[call].state = "kept"
                self.calls[call].limits = Limits()
                self.calls[call].retries = 0
            case ev.CallEnded(call):
                self._work_over(call)
                self._over(call, "ended")
            case ev.CallLost(call, cause):
                self._work_over(call)
                if self.calls[call].state not in ("running", "kept"):
                    self._over(call, None)
                else:  # it is answered, or runs again
                    self._lost_call, self._cause = call, cause
            case ev.CallReleased(call):
                if self.calls[call].state == "waiting":
                    self._over(call, "released")
                else:
                    self._terminated(call, "released")
            case ev.RunnerReady(runner):
                self.runners[runner].state = "ready"
                self.runners[runner].idle_from = self.now
            case ev.RunnerLost(runner, cause):
                self._cause = cause
                self._lost(runner)
            case ev.RunnerLeaving(runner):
                if self.runners[runner].state == "booting":
                    self._lost(runner)
                else:
                    self.runners[runner].leaving = True
                    self._limit(runner)
            case ev.IdleAnswer(runner, number, go):
                assert self.runners[runner].asked == number
                self._ask_over(runner)
                if go:
                    self._agreed = runner
                else:
                    self.runners[runner].idle_from = self.now
            case ev.RunnerStopped(runner):
                self.runners[runner].state = "gone"
            case ev.BootFailed(runner):
                if self.runners[runner].state in ("ready", "draining"):
                    self._cause = "exited"
                    self._lost(runner)
                    self._dying = runner  # it is gone as soon as it is stopped
                else:
                    self.runners[runner].state = "gone"
            case ev.Configure(options):
                self.most = max(options.max, len(self._alive()))
                for runner in [] if options.idle_check else self.asks():
                    self._ask_over(runner)

    def _waits(self, ident: str) -> None:
        call = self.calls[ident]
        self._arrivals += 1
        call.no = self._arrivals
        call.waits_since = self.now
        call.started_at = call.runner = None
        call.state = "waiting"

    def _work_over(self, ident: str) -> None:
        on = self.calls[ident].runner
        assert on is not None
        self.runners[on].used = True

    def _terminated(self, ident: str, answer: str) -> None:
        self._answer(ident, answer)
        self.calls[ident].state = "ending"
        self.calls[ident].gone_by = self.now + self.core.options.grace

    def _limit(self, ident: str) -> None:
        """Give a runner that has to go its time, from now on."""
        runner, seconds = self.runners[ident], self.core.options.shutdown_timeout
        if seconds is not None and runner.evict_at is None:
            runner.evict_at = self.now + seconds

    def _ask_over(self, ident: str) -> None:
        runner = self.runners[ident]
        if runner.asked is not None:
            self.old_asks.append((ident, runner.asked))
            runner.asked = None

    def _lost(self, ident: str) -> None:
        runner = self.runners[ident]
        runner.lost = True
        for call in list(runner.leases):
            if self.calls[call].state not in ("running", "kept"):  # nobody is told twice
                self._over(call, None)

    def _over(self, ident: str, answer: str | None) -> None:
        call = self.calls[ident]
        if answer is not None and call.state not in ("ending", "stuck"):
            self._answer(ident, answer)
        was_stuck = call.state == "stuck"
        call.state = "over"
        if call.runner is not None:
            self._free(call.runner, ident)
            runner = self.runners[call.runner]
            if was_stuck and not runner.leaving and not self._stuck_on(runner):
                runner.evict_at = None

    def _free(self, on: str, ident: str) -> None:
        runner = self.runners[on]
        runner.leases.remove(ident)
        if not runner.leases:
            runner.idle_from = self.now

    def _stuck_on(self, runner: RunnerModel) -> list[str]:
        return [call for call in runner.leases if self._is_stuck(call)]

    def _is_stuck(self, ident: str) -> bool:
        call = self.calls[ident]
        return call.state == "stuck" or (call.state == "ending" and call.gone_by <= self.now)

    def _is_due(self, runner: RunnerModel) -> bool:
        """Say whether a runner has to go now, whatever is left on it (E3, E5)."""
        stuck = self._stuck_on(runner)
        if runner.leases and len(stuck) == len(runner.leases):
            return True
        if runner.evict_at is None:  # a call has got stuck just now, and no time is given
            just_now = any(self.calls[call].state == "ending" for call in stuck)
            return just_now and self.core.options.shutdown_timeout == 0
        return runner.evict_at <= self.now

    def _answer(self, ident: str, answer: str) -> None:
        answers = self.calls[ident].answers
        answers.append(answer)
        assert len(answers) == 1, f"F3: {ident} was answered {answers}"

    def _alive(self) -> list[str]:
        return self.runners_in("booting", "ready", "draining", "stopping")

    # -- instructions --------------------------------------------------------------------------

    def _take(self, event: Event, instructions: list[Instruction]) -> None:
        self.log.append(f"{self.now:g} {event}")
        # Groups can be told by what they are afterwards only if nothing else has changed them.
        kinds = [type(instruction) for instruction in instructions]
        self._steady = kinds.count(do.Start) == 1 and do.Drain not in kinds and do.Stop not in kinds
        for instruction in instructions:
            self.log.append(f"    {instruction}")
            self._carry_out(instruction)
        self._get_stuck()
        self._dying = self._agreed = self._lost_call = self._cause = ""
        self._struck.clear()
        self._compare()

    def _get_stuck(self) -> None:
        for ident, call in self.calls.items():
            if call.state == "ending" and self._is_stuck(ident):
                call.state = "stuck"
                assert call.runner is not None
                self._limit(call.runner)

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case do.Boot(runner, attempt):
                assert runner not in self.runners, "a boot id is never used twice"
                assert attempt >= 1
                self.runners[runner] = RunnerModel()
                assert len(self._alive()) <= self.most, "C1"
            case do.Start(call, runner):
                self._start(call, runner)
            case do.Drain(runner, reason):
                assert self.runners[runner].state == "ready"
                self.runners[runner].state = "draining"
                self._ask_over(runner)
                if reason.startswith("idle"):
                    self._dismissed(runner)
            case do.Stop(runner, _, force):
                self._stop(runner, force)
            case do.AskIdle(runner, number):
                self._ask(runner, number)
            case do.Terminate(call, runner):
                assert self.calls[call].runner == runner
                assert self.calls[call].state == "ending"
                assert not self.calls[call].terminated, "E3"
                self.calls[call].terminated = True
            case do.Expired():
                self._expired(instruction)
            case do.Refused(call):
                assert self.core.closing, "A6"
                self._struck.add(self.calls[call].runner or "")
                self._over(call, "refused")
            case do.Lost(call, runner, cause):
                assert self.calls[call].runner == runner, "F2"
                assert cause == self._why_lost(call), "F2, E5"
                assert not self.calls[call].retries or self.core.closing, "F1"
                self._over(call, "lost")
            case do.Requeued(call):
                self._requeue(call)
            case do.OpenDone():
                self.opened += 1
                self.opening = False
                options = self.core.options
                assert len(self.runners_in("ready")) >= min(options.min, options.max), "A5"
            case do.OpenFailed(problem):
                self.opened += 1
                self.opening = False
                assert problem.attempts > 1, "A5"
            case do.CloseDone():
                self.closed += 1
                assert not self._alive(), "A6"
                assert len(self.calls_in("over")) == len(self.calls), "A6"
            case do.Scaled("shrink"):
                pass
            case do.Scaled(kind, runner):
                heard = self.runners[runner].heard
                heard.append(kind)
                assert heard in (["grow_start"], ["grow_start", "grow_end"]), "C9"

    def _start(self, ident: str, on: str) -> None:
        call, runner = self.calls[ident], self.runners[on]
        assert runner.state == "ready", "D3"
        assert len(runner.leases) < self.core.options.max_concurrency
        assert not (self.core.options.single_use and runner.used), "D5"
        assert call.starts_left == 1, "F1"
        assert not call.answers, "F1"
        waiting = [self.calls[other] for other in self.calls_in("waiting")]
        assert call is min(waiting, key=lambda c: (-c.priority, c.no)), "C4"
        # A call that meets a free slot at once is served, however little time it has.
        due, total = call.due(), call.limits.total
        at_once = self.now == (call.waits_since if total is None else call.at)
        assert due is None or self.now < due or at_once, "C4"
        if call.affinity is not None:
            self._check_affinity(call.affinity, on)
            self._last[call.affinity] = on
        call.starts_left -= 1
        call.started_at = self.now
        call.runner = on
        call.state = "running"
        runner.leases.append(ident)
        self._ask_over(on)

    def _check_affinity(self, key: Hashable, on: str) -> None:
        last = self._last.get(key)
        if last in (None, on) or not self._steady:
            return
        runner = self.runners[str(last)]
        if runner.state == "ready" and len(runner.leases) < self.core.options.max_concurrency:
            surplus = self.core.runners[str(last)].group == "surplus"
            assert surplus, f"C7: a call with {key} is on {on}, the last one was on {last}"

    def _requeue(self, ident: str) -> None:
        call = self.calls[ident]
        assert call.state == "running", "F1"
        assert call.retries > 0, "F1"
        assert not self.core.closing, "A6"
        self._why_lost(ident)
        call.retries -= 1
        call.starts_left += 1
        self._free(str(call.runner), ident)
        self._waits(ident)

    def _why_lost(self, ident: str) -> str:
        """Return why the work of a call is gone, as far as the host can know."""
        runner = self.runners[str(self.calls[ident].runner)]
        lost = runner.lost or ident == self._lost_call
        if not lost:
            self._struck.add(str(self.calls[ident].runner))
        assert lost or (runner.state == "draining" and self._is_due(runner)), "F2"
        return self._cause if lost and not runner.leaving else "preempted"

    def _dismissed(self, ident: str) -> None:
        """Check that a runner may go because of its idle time."""
        options = self.core.options
        assert not options.idle_check or ident == self._agreed, "D2"
        assert not self.opening, "A5"
        ready = self.runners_in("ready")
        demand = sum(len(self.runners[runner].leases) for runner in ready)
        demand += len(self.calls_in("waiting"))
        needed = -(-demand // options.max_concurrency) + options.buffer
        assert len(ready) >= min(options.max, needed), "D1"

    def _ask(self, ident: str, number: int) -> None:
        runner, options = self.runners[ident], self.core.options
        assert options.idle_check, "D2"
        assert runner.state == "ready", "D2"
        assert not runner.leases, "D2"
        assert runner.asked is None, "D2"
        assert number > self._asks, "D2"
        spans = [options.idle_shutdown_after, options.min_idle_shutdown_after]
        assert any(s is not None and self.now >= runner.idle_from + s for s in spans), "D2"
        runner.asked = self._asks = number

    def _stop(self, ident: str, force: bool) -> None:
        runner = self.runners[ident]
        assert runner.state in ("booting", "draining") or runner.lost, "D3"
        assert runner.state not in ("stopping", "gone")
        self._ask_over(ident)
        assert not force or self.core.closing or self._is_due(runner), "E3"
        assert force or ident not in self._struck, "E3, A6"
        for call in list(runner.leases):
            assert force, "D3"
            assert self.calls[call].state in ("ending", "stuck"), "A6"
            self._over(call, None)
        heard_of = runner.heard == ["grow_start"] and runner.state == "booting"
        assert not heard_of or runner.lost or self.core.last_problem or self.core.closing, "C9"
        runner.state = "gone" if ident == self._dying else "stopping"

    def _expired(self, news: do.Expired) -> None:
        call = self.calls[news.call]
        running = call.state == "running"
        due = call.due()
        assert due is not None
        assert self.now >= due, "E1"
        assert (news.phase == "running") == running, "E2"
        assert min(news.queued, news.booting, news.running) >= 0, "E2"
        spent = news.queued + news.booting + news.running
        assert abs(spent - (self.now - call.at)) < 1e-6, "E2"
        if running:
            self._terminated(news.call, "expired")
        else:
            self._over(news.call, "expired")

    def _compare(self) -> None:
        """Hold the core's books against what is known."""
        snapshot = self.core.snapshot(self.now)
        assert {info.id: (info.state, info.leases) for info in snapshot.runners} == {
            ident: (runner.state, len(runner.leases))
            for ident, runner in self.runners.items()
            if runner.state != "gone"
        }
        assert {ident: call.state for ident, call in self.core.calls.items()} == {
            ident: call.state for ident, call in self.calls.items() if call.state != "over"
        }
        by_books = self.core._fleet._idle.asked
        assert {runner.id: number for runner, number in by_books.items()} == self.asks(), "D2"
        evictions = self.core._evictions.entries()
        assert {runner.id: due for runner, due in evictions.items()} == {
            ident: self.runners[ident].evict_at
            for ident in self.runners_in("draining")
            if self.runners[ident].evict_at is not None
        }, "E3, E5"
        for ident, call in self.calls.items():
            assert call.terminated or call.state not in ("ending", "stuck"), f"E3: {ident}"
            answered = call.state in ("ending", "stuck", "over")
            assert len(call.answers) == int(answered), f"F3: {ident} was answered {call.answers}"
        for ident, runner in self.runners.items():
            if runner.state != "booting":
                assert runner.heard in ([], ["grow_start", "grow_end"]), f"C9: {ident}"
            assert not runner.lost or runner.state in ("stopping", "gone"), f"{ident} is lost"
            if runner.state == "ready":
                used = runner.used and self.core.options.single_use
                assert not used, f"D5: {ident} is ready for another call"
                assert not runner.leaving, f"E5: {ident} is leaving and ready"
                assert not self._stuck_on(runner), f"E3: {ident} has stuck calls and is ready"
            elif runner.state == "draining":
                assert not self._is_due(runner), f"E3, E5: {ident} has to be gone"

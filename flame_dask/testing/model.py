"""A model of a pool that is too simple to be wrong: what a host of the core can know.

It tells the core what happens, and holds each instruction against what it knows: which runners were
booted and not stopped, who waits, who runs where, and who has been answered.
"""

from __future__ import annotations

import pickle

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
        self.lost = False
        self.heard: list[str] = []


class CallModel:
    """What a host knows of a call."""

    def __init__(self, no: int, at: float, limits: Limits, priority: int) -> None:
        self.no = no
        self.at = at
        self.limits = limits
        self.priority = priority
        self.started_at: float | None = None
        self.runner: str | None = None
        self.answers: list[str] = []
        self.state = "waiting"

    def due(self) -> float | None:
        """Return when its time is up (E1)."""
        if self.limits.total is not None:
            return self.at + self.limits.total
        waits = self.started_at is None
        limit = self.limits.queue if waits else self.limits.run
        since = self.at if self.started_at is None else self.started_at
        return None if limit is None else since + limit


class PoolModel:
    """A pool's core, and all that can be known of it from outside.

    From each instruction it is checked that

    * no more runners exist than ``max`` (C1), no runner has more leases than slots, and none gets a
      call that is not ready for it (D3);
    * each call is started at most once (F1) and answered exactly once (F3);
    * it is first come, first served within a priority (C4);
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
        self.opened = 0
        self.closed = 0
        self._dying = ""

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
        """Return the calls in some states (``waiting``, ``running``, ``ending``, ``over``)."""
        return [ident for ident, call in self.calls.items() if call.state in states]

    # -- events --------------------------------------------------------------------------------

    def _note(self, event: Event) -> None:
        """Change what is known by what happens."""
        match event:
            case ev.CallSubmitted(call, limits, priority):
                self.calls[call] = CallModel(len(self.calls), self.now, limits, priority)
            case ev.CallEnded(call):
                self._over(call, "ended")
            case ev.CallReleased(call):
                if self.calls[call].state == "waiting":
                    self._over(call, "released")
                else:
                    self._answer(call, "released")
                    self.calls[call].state = "ending"
            case ev.RunnerReady(runner):
                self.runners[runner].state = "ready"
            case ev.RunnerLost(runner):
                self._lost(runner)
            case ev.RunnerStopped(runner):
                self.runners[runner].state = "gone"
            case ev.BootFailed(runner):
                if self.runners[runner].state in ("ready", "draining"):
                    self._lost(runner)
                    self._dying = runner  # it is gone as soon as it is stopped
                else:
                    self.runners[runner].state = "gone"
            case ev.Configure(options):
                self.most = max(options.max, len(self._alive()))

    def _lost(self, ident: str) -> None:
        runner = self.runners[ident]
        runner.lost = True
        for call in list(runner.leases):
            if self.calls[call].state == "ending":  # nobody is told twice
                self._over(call, None)

    def _over(self, ident: str, answer: str | None) -> None:
        call = self.calls[ident]
        if answer is not None and call.state != "ending":
            self._answer(ident, answer)
        call.state = "over"
        if call.runner is not None:
            self.runners[call.runner].leases.remove(ident)

    def _answer(self, ident: str, answer: str) -> None:
        answers = self.calls[ident].answers
        answers.append(answer)
        assert len(answers) == 1, f"F3: {ident} was answered {answers}"

    def _alive(self) -> list[str]:
        return self.runners_in("booting", "ready", "draining", "stopping")

    # -- instructions --------------------------------------------------------------------------

    def _take(self, event: Event, instructions: list[Instruction]) -> None:
        self.log.append(f"{self.now:g} {event}")
        for instruction in instructions:
            self.log.append(f"    {instruction}")
            self._carry_out(instruction)
        self._dying = ""
        self._compare()

    def _carry_out(self, instruction: Instruction) -> None:
        match instruction:
            case do.Boot(runner, attempt):
                assert runner not in self.runners, "a boot id is never used twice"
                assert attempt >= 1
                self.runners[runner] = RunnerModel()
                assert len(self._alive()) <= self.most, "C1"
            case do.Start(call, runner):
                self._start(call, runner)
            case do.Drain(runner):
                assert self.runners[runner].state == "ready"
                self.runners[runner].state = "draining"
            case do.Stop(runner):
                self._stop(runner)
            case do.Terminate(call, runner):
                assert self.calls[call].runner == runner
                assert self.calls[call].state == "ending"
            case do.Expired():
                self._expired(instruction)
            case do.Refused(call):
                assert self.core.closing, "A6"
                self._over(call, "refused")
            case do.Lost(call, runner):
                assert self.calls[call].runner == runner, "F2"
                assert self.runners[runner].lost, "F2"
                self._over(call, "lost")
            case do.OpenDone():
                self.opened += 1
                options = self.core.options
                assert len(self.runners_in("ready")) >= min(options.min, options.max), "A5"
            case do.OpenFailed(problem):
                self.opened += 1
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
        assert call.started_at is None, "F1"
        assert not call.answers, "F1"
        waiting = [self.calls[other] for other in self.calls_in("waiting")]
        assert call is min(waiting, key=lambda c: (-c.priority, c.no)), "C4"
        # A call that meets a free slot at once is served, however little time it has.
        due = call.due()
        assert due is None or self.now < due or self.now == call.at, "C4"
        call.started_at = self.now
        call.runner = on
        call.state = "running"
        runner.leases.append(ident)

    def _stop(self, ident: str) -> None:
        runner = self.runners[ident]
        assert runner.state in ("booting", "draining") or runner.lost, "D3"
        assert runner.state not in ("stopping", "gone")
        for call in list(runner.leases):
            assert self.core.closing, "D3"
            assert self.calls[call].state == "ending", "A6"
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
            self._answer(news.call, "expired")
            call.state = "ending"
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
        for ident, call in self.calls.items():
            answered = call.state in ("ending", "over")
            assert len(call.answers) == int(answered), f"F3: {ident} was answered {call.answers}"
        for ident, runner in self.runners.items():
            if runner.state != "booting":
                assert runner.heard in ([], ["grow_start", "grow_end"]), f"C9: {ident}"

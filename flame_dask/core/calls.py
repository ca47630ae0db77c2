"""The calls of a pool: where each is in its life, and until when it may take (E1, E2, E3)."""

from __future__ import annotations

from flame_dask.core import instructions as do
from flame_dask.core.boots import BootLedger
from flame_dask.core.events import CallSubmitted, Limits
from flame_dask.core.records import Call, Runner
from flame_dask.core.transitions import IllegalTransition, Story
from flame_dask.core.waiting import Alarm, Deadlines, WaitQueue


class CallBook:
    """The calls that wait, run, or end.

    Parameters
    ----------
    alarm
        Is told of each deadline.
    story
        Knows which steps are legal, and remembers them.
    boots
        Knows how long boots have taken, and why they failed.
    """

    __slots__ = ("_boots", "_due", "_story", "calls", "queue")

    def __init__(self, alarm: Alarm, story: Story, boots: BootLedger) -> None:
        self._story = story
        self._boots = boots
        self.calls: dict[str, Call] = {}
        self.queue = WaitQueue()
        self._due: Deadlines[str] = Deadlines(alarm)

    def add(self, now: float, event: CallSubmitted) -> Call:
        """Take in a call that nobody knows yet.

        Raises
        ------
        IllegalTransition
            If it is known.
        """
        known = self.calls.get(event.call)
        if known is not None:
            story = self._story.of(event.call)
            raise IllegalTransition(event.call, known.state, "submitted", story)
        ident, limits, priority, retries, affinity = event
        boots = self._boots.seconds(now)
        call = Call(ident, limits, priority, retries, affinity, now, boots)
        self.calls[call.id] = call
        self._story.begin(now, call.id, "submitted", call.state)
        return call

    def wait(self, call: Call) -> None:
        """Put a call into the queue, for as long as it may be there."""
        self.queue.push(call.id, call.priority)
        limits = call.limits
        if limits.total is not None:
            self._due.set(call.id, call.submitted + limits.total)
        elif limits.queue is not None:
            self._due.set(call.id, call.since + limits.queue)

    def start(self, now: float, call: Call, runner: Runner) -> None:
        """Note that a call has a slot, and how it came to it."""
        call.state = self._story.call(now, call.id, call.state, "slot")
        call.runner = runner
        call.started = now
        call.queued += now - call.since
        call.booted += self._boots.seconds(now) - call.clock
        call.problem = self._boots.problem_since(call.submitted)
        limits = call.limits
        if limits.total is not None:
            self._due.set(call.id, call.submitted + limits.total)
        elif limits.run is not None:
            self._due.set(call.id, now + limits.run)
        else:
            self._due.discard(call.id)

    def requeue(self, now: float, call: Call) -> None:
        """Note that the work of a running call was lost, and that it is to be started anew (F1).

        It comes after those that wait already. The limits of the queue and of the run count from
        their beginning again, a total limit goes on.
        """
        call.state = self._story.call(now, call.id, call.state, "requeued")
        call.retries -= 1
        call.runner = None
        call.ran += now - call.started
        call.since = now
        call.clock = self._boots.seconds(now)
        self._due.discard(call.id)

    def keep(self, now: float, call: Call) -> None:
        """Note that a running call has begun something that lives on (H1, I1)."""
        call.state = self._story.call(now, call.id, call.state, "kept")
        call.limits = Limits()
        call.retries = 0
        self._due.discard(call.id)

    def overdue(self, now: float, call: Call) -> bool:
        """Say whether a call's time is up, whatever it does."""
        total = call.limits.total
        return total is not None and now >= call.submitted + total

    def answer(self, now: float, call: Call, event: str, grace: float) -> None:
        """Note that the caller of a call with work has been answered; the work goes on (E3).

        Unless that is gone within the grace, the call comes up in :meth:`pop_due` once more.
        """
        call.state = self._story.call(now, call.id, call.state, event)
        self._due.set(call.id, now + grace)

    def stick(self, now: float, call: Call) -> None:
        """Note that the work of an answered call can't be ended."""
        call.state = self._story.call(now, call.id, call.state, "stuck")

    def end(self, now: float, call: Call, event: str) -> None:
        """Note the end of a call, and forget it."""
        call.state = self._story.call(now, call.id, call.state, event)
        self._due.discard(call.id)
        self.queue.discard(call.id)
        del self.calls[call.id]

    def pop_due(self, now: float) -> Call | None:
        """Return one call whose time is up, or whose grace is; ``None`` if there is no more."""
        call_id = self._due.pop_due(now)
        return None if call_id is None else self.calls[call_id]

    def expired(self, now: float, call: Call) -> do.Expired:
        """Say where the time of a call went whose time is up (E2)."""
        limits = call.limits
        if call.state == "running":
            phase, limit = "running", limits.run
            waited, boots = call.queued, call.booted
            running = call.ran + now - call.started
            problem = call.problem
        else:
            phase, limit = "booting" if self._boots.busy else "queued", limits.queue
            waited = call.queued + now - call.since
            boots = call.booted + self._boots.seconds(now) - call.clock
            running = call.ran
            problem = self._boots.problem_since(call.submitted)
        if limits.total is not None:
            limit = limits.total
        assert limit is not None, "a call without a limit has no deadline"
        # Each is a difference of larger times, so it may be off by a rounding error.
        boots = min(waited, max(0.0, boots))
        return do.Expired(call.id, phase, waited - boots, boots, running, limit, problem)

    def next(self) -> float:
        """Return the earliest deadline, ``NEVER`` if there is none."""
        return self._due.next()

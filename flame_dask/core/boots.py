"""The boots of a pool: which are under way, which are owed, and since when (C6)."""

from __future__ import annotations

import random

from flame_dask.core.backoff import Backoff
from flame_dask.core.events import BootProblem
from flame_dask.core.records import Runner
from flame_dask.core.waiting import Alarm, Deadlines


class BootLedger:
    """What is known of boots.

    A boot that failed is *owed*. It cools until its back-off is over, whether it is wanted or not:
    so callers that come and go do not make a pool hammer on a cloud that refuses. Then it is *due*,
    and booted as soon as a runner is wanted and there is room for it.

    Parameters
    ----------
    alarm
        Is told of each deadline.
    backoff
        When a failed boot is tried again.
    rng
        For its jitter.
    """

    __slots__ = (
        "_alarm",
        "_backoff",
        "_cooling",
        "_due",
        "_limits",
        "_problem_at",
        "_problem_of",
        "_rng",
        "_seconds",
        "_since",
        "problem",
        "under_way",
    )

    def __init__(self, alarm: Alarm, backoff: Backoff, rng: random.Random) -> None:
        self._alarm = alarm
        self._backoff = backoff
        self._rng = rng
        self.under_way = 0
        self.problem: BootProblem | None = None
        self._problem_at = 0.0
        self._problem_of = ""
        self._limits: Deadlines[str] = Deadlines(alarm)
        # (number of the failed runner, attempt to come) of each boot whose back-off is not over.
        self._cooling: Deadlines[tuple[int, int]] = Deadlines(alarm)
        self._due: list[int] = []  # the attempts to come of those whose back-off is over
        self._seconds = 0.0
        self._since: float | None = None

    def begin(self, now: float, runner: Runner) -> None:
        """Note a boot that starts now."""
        self.under_way += 1
        if runner.boot_timeout is not None:
            self._limits.set(runner.id, now + runner.boot_timeout)

    def over(self, runner: Runner) -> None:
        """Note that a boot is no longer under way, however it ended."""
        self.under_way -= 1
        self._limits.discard(runner.id)

    def pop_timed_out(self, now: float) -> str | None:
        """Return the id of one runner whose boot takes too long; ``None`` if there is no more."""
        return self._limits.pop_due(now)

    def note(self, now: float, runner: Runner, problem: BootProblem) -> None:
        """Remember why a boot failed."""
        self.problem = problem
        self._problem_at = now
        self._problem_of = runner.id

    def gave_up(self, attempt: int) -> bool:
        """Say whether opening fails, now that this attempt has (A5)."""
        return attempt > self._backoff.open_retries

    def owe(self, now: float, runner: Runner) -> None:
        """Note that a failed boot is to be tried again."""
        delay = self._backoff.delay(runner.attempt, self._rng)
        self._cooling.set((runner.no, runner.attempt + 1), now + delay)

    def forgive(self) -> None:
        """Forget all that is owed: the pool closes."""
        self._cooling = Deadlines(self._alarm)
        self._due.clear()

    def cool(self, now: float) -> None:
        """Make due whatever has cooled."""
        while (owed := self._cooling.pop_due(now)) is not None:
            self._due.append(owed[1])

    def startable(self, short: int, room: int) -> int:
        """Return how many boots are to start now.

        Parameters
        ----------
        short
            How many runners are wanted beyond those that are there or under way.
        room
            How many more may exist.
        """
        # What still cools is part of the plan, so nothing is booted in its place. But what is due
        # does not wait until the rest has cooled as well.
        return max(0, min(room, max(short - len(self._cooling), min(short, len(self._due)))))

    def next_attempt(self) -> int:
        """Take what is due, or a fresh boot, and return which attempt it is."""
        return self._due.pop() if self._due else 1

    def settle(self, now: float, short: int) -> None:
        """Compare what is owed with what is wanted once more; start or stop the boot clock.

        Parameters
        ----------
        now
            Seconds.
        short
            How many runners are wanted beyond those that are there or under way.
        """
        if self._due:
            del self._due[max(0, short) :]  # nobody wants them any more
        busy = self.under_way > 0 or (short > 0 and self.owed > 0)
        if busy != (self._since is not None):
            self._seconds = self.seconds(now)
            self._since = now if busy else None

    @property
    def owed(self) -> int:
        """How many failed boots are still to be tried again."""
        return len(self._cooling) + len(self._due)

    @property
    def cooling(self) -> int:
        """How many of these have to wait for the end of their back-off."""
        return len(self._cooling)

    @property
    def busy(self) -> bool:
        """Whether the boot clock runs: whoever waits for a slot, waits for a boot."""
        return self._since is not None

    def seconds(self, now: float) -> float:
        """Return the seconds, so far, during which a boot was under way, or wanted and owed."""
        return self._seconds if self._since is None else self._seconds + now - self._since

    def problem_since(self, since: float) -> BootProblem | None:
        """Return why the last boot failed, if it did since then or holds up the next one (C6)."""
        if self.problem is None or not (self._problem_at >= since or self.owed):
            return None
        return self.problem

    def add_log(self, runner: str, log_tail: tuple[str, ...]) -> None:
        """Add the last words of a runner to its boot's problem, if these are missing there."""
        problem = self.problem
        if log_tail and runner == self._problem_of and problem and not problem.log_tail:
            self.problem = problem._replace(log_tail=log_tail)

    def next(self) -> float:
        """Return the earliest deadline, ``NEVER`` if there is none."""
        return min(self._limits.next(), self._cooling.next())

"""The ready runners of a pool: their leases, their kinds, and who has been idle for too long."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from flame_dask.core.affinity import Affinities
from flame_dask.core.events import PoolOptionsView
from flame_dask.core.policy import DemandWindow, Placement
from flame_dask.core.records import Kind, Runner
from flame_dask.core.waiting import NEVER, Alarm, Deadlines, Ranked


class MinGroup:
    """The oldest ready runners, as many as ``min`` asks for; the others are elastic.

    With ``min_idle_shutdown_after`` a member may go although it belongs to ``min`` (D1). Then it
    *rests*: the group is smaller until a call finds no free slot. If any call brought it back, then
    a trickle that one runner carries would boot the others again and again.
    """

    __slots__ = ("_elastic", "_members", "rested", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.rested = 0
        self._members: Ranked[Runner] = Ranked()  # the youngest first
        self._elastic: Ranked[Runner] = Ranked()  # the oldest first

    def __len__(self) -> int:
        return len(self._members)

    @property
    def floor(self) -> int:
        """How many runners there have to be, whatever the demand (C3)."""
        return max(0, self.size - self.rested)

    def join(self, runner: Runner) -> None:
        """Take in a ready runner, as an elastic one."""
        runner.kind = "elastic"
        self._elastic.set(runner, runner.no)

    def leave(self, runner: Runner) -> None:
        """Let a runner go."""
        self._members.discard(runner)
        self._elastic.discard(runner)

    def fit(self) -> Iterable[Runner]:
        """Make the group as large as it should be; yield each runner that changes its kind."""
        while len(self._members) > self.floor:
            runner = self._members.pop()
            self.join(runner)
            yield runner
        while self._elastic and len(self._members) < self.floor:
            runner = self._elastic.pop()
            runner.kind = "min"
            self._members.set(runner, -runner.no)
            yield runner


class IdleClocks:
    """Since when runners have had no lease, whose time is over (D1), and who is asked (D2).

    Parameters
    ----------
    alarm
        Is told of each deadline.

    Attributes
    ----------
    over
        The runners of each kind whose time is over and who are not asked, the youngest first.
    asked
        The runners that have been asked whether they may go, and the numbers of the questions.
    """

    __slots__ = ("_due", "_span", "asked", "over")

    def __init__(self, alarm: Alarm) -> None:
        self._span: dict[Kind, float | None] = {"min": None, "elastic": None}
        self._due: Deadlines[Runner] = Deadlines(alarm)
        self.over: dict[Kind, Ranked[Runner]] = {"elastic": Ranked(), "min": Ranked()}
        self.asked: dict[Runner, int] = {}

    def spans(self, elastic: float | None, of_min: float | None) -> None:
        """Set for how long runners of each kind may be idle, in seconds; ``None`` is for ever."""
        self._span["elastic"] = elastic
        self._span["min"] = of_min

    def start(self, now: float, runner: Runner) -> None:
        """Note that a runner has no lease from now on."""
        runner.idle_since = runner.idle_clock = now
        span = self._span[runner.kind]
        if span is not None:
            self._due.set(runner, now + span)

    def stop(self, runner: Runner) -> None:
        """Note that a runner has a lease, or is no longer ready."""
        if runner.idle_since is not None:
            runner.idle_since = None
            self._due.discard(runner)
            self.over[runner.kind].discard(runner)
            if self.asked:
                self.asked.pop(runner, None)

    def reset(self, runner: Runner) -> None:
        """Set the clock of a runner anew: its kind has changed, or the options."""
        if runner.idle_since is not None:
            self._wind(runner.idle_clock, runner)

    def _wind(self, at: float, runner: Runner) -> None:
        """Let the clock of an idle runner count from ``at`` on; it has been idle for longer."""
        self._due.discard(runner)
        for over in self.over.values():
            over.discard(runner)
        since = runner.idle_since
        self.start(at, runner)
        runner.idle_since = since

    def ask(self, runner: Runner, number: int) -> None:
        """Note that a runner whose time is over is asked whether it may go."""
        self.over[runner.kind].discard(runner)
        self.asked[runner] = number

    def answered(self, now: float, runner: Runner, number: int, go: bool) -> bool:
        """Take in an answer, and say whether the runner may go.

        An answer is too late if there has been a lease since the question. And the time of a runner
        that was asked may no longer be over: its kind has changed, or the options.
        """
        if self.asked.get(runner) != number:
            return False
        del self.asked[runner]
        span = self._span[runner.kind]
        if not go:
            self._wind(now, runner)
        elif span is not None and now >= runner.idle_clock + span:
            self._due.discard(runner)
            self.over[runner.kind].set(runner, -runner.no)
            return True
        return False

    def ring(self, now: float) -> None:
        """Take note of those whose time is over."""
        while (runner := self._due.pop_due(now)) is not None:
            if runner not in self.asked:  # nobody is asked twice at the same time
                self.over[runner.kind].set(runner, -runner.no)

    def next(self) -> float:
        """Return when the next clock rings, ``NEVER`` if none does."""
        return self._due.next()


class Fleet:
    """The ready runners.

    Parameters
    ----------
    alarm
        Is told of each deadline.
    options
        The options of the pool.
    """

    __slots__ = (
        "_affinities",
        "_alarm",
        "_asks",
        "_fall",
        "_group",
        "_idle",
        "_keep_min",
        "_peak",
        "_placement",
        "_window",
        "floor",
        "leases",
        "ready",
    )

    def __init__(self, alarm: Alarm, options: PoolOptionsView) -> None:
        self._alarm = alarm
        self.ready: dict[str, Runner] = {}
        self.leases = 0
        # How many runners there have to be, whatever the demand (C3).
        self.floor = options.min
        self._placement = Placement(options.placement, options.max_concurrency)
        self._affinities = Affinities()
        self._group = MinGroup(options.min)
        self._idle = IdleClocks(alarm)
        self._window = DemandWindow(None)
        self._peak = 0
        self._fall = NEVER
        self._asks = 0
        self._set_spans(options)

    def configure(self, old: PoolOptionsView, new: PoolOptionsView) -> None:
        """Go by other options from now on (C8)."""
        self._set_spans(new)
        if (old.placement, old.max_concurrency) != (new.placement, new.max_concurrency):
            self._placement = Placement(new.placement, new.max_concurrency)
            for runner in self.ready.values():
                self._placement.add(runner)
        if (old.min, old.min_idle_shutdown_after) != (new.min, new.min_idle_shutdown_after):
            self._group.size = new.min
            self._group.rested = 0
            self._fit()
        if not new.idle_check:
            self._idle.asked.clear()
        for runner in self.ready.values():
            self._idle.reset(runner)

    def _set_spans(self, options: PoolOptionsView) -> None:
        elastic, of_min = options.idle_shutdown_after, options.min_idle_shutdown_after
        self._idle.spans(elastic, of_min)
        self._window.span = of_min if elastic is None else elastic
        self._keep_min = of_min is None

    # -- who is there --------------------------------------------------------------------------

    def join(self, now: float, runner: Runner) -> None:
        """Take in a runner that has just become ready."""
        self.ready[runner.id] = runner
        self._group.join(runner)
        self._placement.add(runner)
        self._idle.start(now, runner)
        self._fit()

    def leave(self, runner: Runner) -> None:
        """Let a runner go, whatever it holds."""
        del self.ready[runner.id]
        self.leases -= len(runner.leases)
        self._fall = NEVER
        self._placement.remove(runner)
        self._affinities.leave(runner)
        self._idle.stop(runner)
        self._group.leave(runner)
        self._fit()

    def wake_min(self) -> None:
        """Bring the min group back, if members of it rest: a call has found no free slot."""
        if self._group.rested:
            self._group.rested = 0
            self._fit()

    def _fit(self) -> None:
        self.floor = self._group.floor
        for runner in self._group.fit():
            self._placement.rank(runner)
            self._idle.reset(runner)

    # -- leases --------------------------------------------------------------------------------

    def aim(self, now: float, needed: int) -> None:
        """Note how many runners demand needs from now on, and favour as many (C5)."""
        self._peak = peak = self._window.note(now, needed)
        self._fall = NEVER  # whether anybody waits for it is for `dismiss` to say
        # A min group that never goes gains nothing from being idle: work may be spread over it.
        self._placement.favour(max(peak, self.floor) if self._keep_min else peak)

    def pick(self) -> Runner | None:
        """Return the runner that should get the next call, ``None`` when all are full."""
        return self._placement.pick()

    def prefer(self, key: Hashable, runner: Runner) -> Runner:
        """Return the runner that a call with this key gets in the place of another (C7).

        It is the one that got the last call with the key, if that one has room and is no surplus.
        So a key does not keep a runner that the pool can do without (C5, D1): it moves on to one
        that stays.

        Parameters
        ----------
        key
            The key.
        runner
            The one that a call without a key would get.
        """
        last = self._affinities.last(key)
        if last is not None and self._placement.favours(last):
            runner = last
        self._affinities.note(key, runner)
        return runner

    def lease(self, runner: Runner, call: str) -> None:
        """Give a slot of a runner to a call."""
        self.leases += 1
        runner.leases[call] = None
        self._idle.stop(runner)
        self._placement.touch(runner)

    def give_back(self, now: float, runner: Runner, call: str) -> None:
        """Free the slot of a call."""
        self.leases -= 1
        del runner.leases[call]
        runner.used = True
        self._placement.touch(runner)
        if not runner.leases:
            self._idle.start(now, runner)

    # -- who has been idle for too long ----------------------------------------------------------

    def ring(self, now: float) -> None:
        """Take note of the idle clocks that have run down."""
        self._fall = NEVER
        self._idle.ring(now)

    def overdue(self, needed: int, buffer: int) -> Runner | None:
        """Choose one runner whose idle time is over and who is not needed, ``None`` if none is.

        Whoever is chosen is to be dismissed or asked at once.

        Parameters
        ----------
        needed
            How many runners demand needs, with the buffer.
        buffer
            How many of these nobody uses yet.
        """
        over = self._idle.over
        if not over["elastic"] and not over["min"]:
            return None
        for kind, runners in over.items():
            runner = runners.first()
            if runner is None:
                continue
            if self.spares(kind, needed, buffer):
                return runner
            if len(self.ready) > max(needed, self._floor_for(kind)):
                self._fall = self._window.next_fall()
                self._alarm.at = min(self._alarm.at, self._fall)
        return None

    def spares(self, kind: Kind, needed: int, buffer: int) -> bool:
        """Say whether there is one runner of a kind more than has been needed of late."""
        # A buffer is idle although it is needed. It stays as long as it has been needed of late, or
        # else each dip of the demand would stop a runner that the next call boots again. Without a
        # buffer, a runner that nobody used was not needed either.
        recent = max(needed, self._peak if buffer else 0)
        return len(self.ready) > max(recent, self._floor_for(kind))

    def _floor_for(self, kind: Kind) -> int:
        # The min group is no reason to keep a member of it whose own time is over (D1).
        return self.floor if kind == "elastic" else 0

    def dismiss(self, runner: Runner) -> None:
        """Note that a runner is to leave at once because of its idle time.

        If it is a member of the min group, it counts as resting.
        """
        self._group.rested += runner.kind == "min"

    def ask(self, runner: Runner) -> int:
        """Note that a runner is asked whether it may go; return the number of the question."""
        self._asks += 1
        self._idle.ask(runner, self._asks)
        return self._asks

    def answered(self, now: float, runner: Runner, number: int, go: bool) -> bool:
        """Take in the answer of a runner, and say whether it may go."""
        return self._idle.answered(now, runner, number, go)

    def next(self) -> float:
        """Return when somebody may have been idle for too long, ``NEVER`` if nobody may."""
        return min(self._idle.next(), self._fall)

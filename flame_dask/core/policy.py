"""Which runner gets a call, and what the pool has needed of late (C5)."""

from __future__ import annotations

from collections import deque
from typing import Final

from flame_dask.core.records import Group, Runner
from flame_dask.core.waiting import NEVER, Ranked

# A rank is one number, which compares faster than a tuple: so many runners never exist.
_STEP: Final = 1 << 40


class DemandWindow:
    """The most runners that demand has needed during the last ``span`` seconds.

    Parameters
    ----------
    span
        Seconds; ``None`` is since the beginning.

    Notes
    -----
    Past needs are kept as (end, need) with rising ends and falling needs: a need that ended before
    a larger one did can never again be the maximum. O(1) amortised.
    """

    __slots__ = ("_current", "_past", "span")

    def __init__(self, span: float | None) -> None:
        self.span = span
        self._current = 0
        self._past: deque[tuple[float, int]] = deque()

    def note(self, now: float, needed: int) -> int:
        """Note what is needed from now on; return the maximum over the window."""
        past, current = self._past, self._current
        if needed != current:
            while past and past[-1][1] <= current:
                past.pop()
            past.append((now, current))
            self._current = needed
        if self.span is not None:
            while past and past[0][0] + self.span <= now:
                past.popleft()
        return max(past[0][1], needed) if past else needed

    def next_fall(self) -> float:
        """Return when the maximum falls if nothing else happens; ``NEVER`` if it does not."""
        if self.span is None or not self._past or self._past[0][1] <= self._current:
            return NEVER
        return self._past[0][0] + self.span


class Placement:
    """The ready runners, in two groups, each ordered by how much it should get the next call.

    The ``favoured`` group has as many runners as demand has needed of late, the oldest first
    (runners of the ``min`` group before all others). The rest is ``surplus``: it gets new work
    only while no favoured runner has room, and so falls idle although work goes on (C5).

    Parameters
    ----------
    placement
        ``"pack"`` (the fullest runner with room gets the next call) or ``"spread"`` (the one with
        the fewest leases). Equally full ones are taken by age.
    slots
        The most leases of one runner.
    """

    __slots__ = ("_age", "_load", "_pack", "_slots", "_target")

    def __init__(self, placement: str, slots: int) -> None:
        self._pack = placement == "pack"
        self._slots = slots
        # Those of a group that have room, the next to get a call first.
        self._load: dict[Group, Ranked[Runner]] = {"favoured": Ranked(), "surplus": Ranked()}
        # All of a group: who leaves it next comes first, the youngest favoured, the oldest surplus.
        self._age: dict[Group, Ranked[Runner]] = {"favoured": Ranked(), "surplus": Ranked()}
        self._target = 0

    def __len__(self) -> int:
        return len(self._age["favoured"]) + len(self._age["surplus"])

    def add(self, runner: Runner) -> None:
        """Take in a runner that has just become ready."""
        self._join(runner, "surplus")
        self._balance()

    def remove(self, runner: Runner) -> None:
        """Let a runner go, whatever it holds."""
        self._leave(runner)
        self._balance()

    def touch(self, runner: Runner) -> None:
        """Note that the leases of a runner have changed."""
        load = self._load[runner.group]
        leases = len(runner.leases)
        if leases < self._slots:
            load.set(runner, (-leases if self._pack else leases) * _STEP + runner.no)
        else:
            load.discard(runner)

    def rank(self, runner: Runner) -> None:
        """Note that a runner has changed between the ``min`` and the elastic kind."""
        self._leave(runner)
        self.add(runner)

    def favour(self, count: int) -> None:
        """Set how many runners get work as long as they have room."""
        if count != self._target:
            self._target = count
            self._balance()

    def pick(self) -> Runner | None:
        """Return the runner that should get the next call, ``None`` when all are full."""
        runner = self._load["favoured"].first()
        return self._load["surplus"].first() if runner is None else runner

    def favours(self, runner: Runner) -> bool:
        """Say whether a runner is favoured and has room: it can get the next call, too."""
        return runner in self._load["favoured"]

    def _join(self, runner: Runner, group: Group) -> None:
        runner.group = group
        age = _age(runner)
        self._age[group].set(runner, -age if group == "favoured" else age)
        self.touch(runner)

    def _leave(self, runner: Runner) -> None:
        self._age[runner.group].discard(runner)
        self._load[runner.group].discard(runner)

    def _move(self, runner: Runner, group: Group) -> None:
        self._leave(runner)
        self._join(runner, group)

    def _balance(self) -> None:
        favoured, surplus = self._age["favoured"], self._age["surplus"]
        while len(favoured) > self._target:
            self._move(_some(favoured), "surplus")
        while surplus and len(favoured) < self._target:
            self._move(_some(surplus), "favoured")
        # An older surplus runner takes the place of a younger favoured one.
        while surplus and favoured:
            old, young = _some(surplus), _some(favoured)
            if _age(old) > _age(young):
                break
            self._move(young, "surplus")
            self._move(old, "favoured")


def _age(runner: Runner) -> int:
    return runner.no if runner.kind == "min" else runner.no + _STEP


def _some(group: Ranked[Runner]) -> Runner:
    runner = group.first()
    assert runner is not None, "only asked of a group with a runner in it"
    return runner

"""What a pool is made of, and what it tells about itself."""

from __future__ import annotations

import random
from collections import deque

from flame_dask.core.backoff import Backoff
from flame_dask.core.boots import BootLedger
from flame_dask.core.calls import CallBook
from flame_dask.core.events import BootProblem, PoolOptionsView
from flame_dask.core.fleet import Fleet
from flame_dask.core.instructions import Instruction
from flame_dask.core.leaving import Evictions
from flame_dask.core.records import COUNTERS, Decision, Runner, RunnerInfo, Snapshot
from flame_dask.core.transitions import Story
from flame_dask.core.waiting import NEVER, Alarm


class PoolBooks:
    """The books of a pool: runners, calls, counters, decisions, and the instructions to be given.

    Parameters
    ----------
    options, name, backoff, seed
        As for :class:`~flame_dask.core.pool.PoolState`.
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

    # -- what it tells about itself --------------------------------------------------------------

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

    # -- what is noted, and what is needed -------------------------------------------------------

    def _decide(self, now: float, action: str, reason: str) -> None:
        figures: dict[str, int | float] = {
            "ready": len(self._fleet.ready),
            "booting": self._boots.under_way,
            "total": len(self.runners),
            "leases": self._fleet.leases,
            "waiters": len(self.queue),
        }
        self._decisions.append(Decision(now, action, reason, figures))

    def _demanded(self, more: int = 0) -> int:
        """How many runners the demand would have, if there were no ``max``."""
        demand = self._fleet.leases + len(self.queue) + more
        return -(-demand // self.options.max_concurrency) + self.options.buffer

    def _needed(self, more: int = 0) -> int:
        """How many runners the demand needs, whatever ``min`` is."""
        return min(self.options.max, self._demanded(more))

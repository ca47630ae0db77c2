"""What the core remembers of a runner and of a call, and what it tells about itself."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from flame_dask.core.events import BootProblem, Limits
from flame_dask.core.transitions import CallState, RunnerState

Kind = Literal["min", "elastic"]
Group = Literal["favoured", "surplus"]

#: What a pool counts (C10). Each call that is submitted is ``ended``, ``expired``, ``released``,
#: ``refused`` or ``lost`` once; each start beyond the first of a call is ``retried``.
COUNTERS: Final = (
    "submitted",
    "started",
    "ended",
    "expired",
    "released",
    "refused",
    "lost",
    "retried",
    "boots",
    "boot_failures",
    "runners_lost",
    "runners_stopped",
)


class Runner:
    """One boot and what became of it."""

    __slots__ = (
        "attempt",
        "boot_timeout",
        "extra",
        "group",
        "id",
        "idle_clock",
        "idle_since",
        "kind",
        "leases",
        "leaving",
        "lost",
        "no",
        "state",
        "stuck",
        "used",
    )

    def __init__(
        self, no: int, ident: str, attempt: int, extra: bool, boot_timeout: float | None
    ) -> None:
        self.no = no
        self.id = ident
        self.state: RunnerState = "booting"
        self.attempt = attempt
        # The option may change while it boots.
        self.boot_timeout = boot_timeout
        # Booted beyond ``min``: only these make news for the hooks (C9).
        self.extra = extra
        self.kind: Kind = "elastic"
        # Insertion-ordered, so that what happens to several calls happens in a known order.
        self.leases: dict[str, None] = {}
        self.idle_since: float | None = None
        # When its idle clock was set: later than ``idle_since`` if an idle check kept it (D2).
        self.idle_clock = 0.0
        self.group: Group = "surplus"
        # The work of a call has ended on it (D5).
        self.used = False
        # Somebody else has told it to go (E5).
        self.leaving = False
        self.lost = False
        # Those of its leases whose work can't be ended (E3).
        self.stuck: set[str] = set()


class Call:
    """One call, from the moment somebody wants it to the end of its work."""

    __slots__ = (
        "affinity",
        "booted",
        "clock",
        "id",
        "limits",
        "priority",
        "problem",
        "queued",
        "ran",
        "retries",
        "runner",
        "since",
        "started",
        "state",
        "submitted",
    )

    def __init__(
        self,
        ident: str,
        limits: Limits,
        priority: int,
        retries: int,
        affinity: Hashable | None,
        now: float,
        clock: float,
    ) -> None:
        self.id = ident
        self.limits = limits
        self.priority = priority
        self.retries = retries
        self.affinity = affinity
        self.state: CallState = "waiting"
        self.submitted = now
        # Since when it waits, or waited before its latest start, and the pool's boot clock then.
        self.since = now
        self.clock = clock
        # Seconds of all its waits that are over, how many of them were a boot's, and seconds of its
        # runs that were lost.
        self.queued = 0.0
        self.booted = 0.0
        self.ran = 0.0
        self.started = 0.0
        self.runner: Runner | None = None
        # The boot that failed while it waited, once it has a slot (C6).
        self.problem: BootProblem | None = None

    @property
    def answered(self) -> bool:
        """Whether its caller has been answered, and only its work is left."""
        return self.state in ("ending", "stuck")


class Decision(NamedTuple):
    """One line of :meth:`PoolState.decisions` (C10)."""

    at: float
    """Seconds on the clock that the events carry."""
    action: str
    """``grow``, ``hold``, ``shrink``, ``retire`` or ``refuse``."""
    reason: str
    figures: dict[str, int | float]


class RunnerInfo(NamedTuple):
    """One runner in a :class:`Snapshot`."""

    id: str
    state: RunnerState
    leases: int
    kind: Kind
    idle: float
    """Seconds without a lease, 0 while it has one."""

    @classmethod
    def of(cls, runner: Runner, now: float) -> RunnerInfo:
        """Describe a runner at this instant."""
        since = runner.idle_since
        idle = 0.0 if since is None else max(0.0, now - since)
        return cls(runner.id, runner.state, len(runner.leases), runner.kind, idle)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The pool at one instant (C10)."""

    runners: tuple[RunnerInfo, ...]
    leases: int
    waiters: int
    booting: int
    wanted: int
    counters: dict[str, int] = field(default_factory=dict)

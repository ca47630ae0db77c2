"""What the core remembers of a runner and of a call, and what it tells about itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from flame_dask.core.events import BootProblem, Limits
from flame_dask.core.transitions import CallState, RunnerState

Kind = Literal["min", "elastic"]
Group = Literal["favoured", "surplus"]


class Runner:
    """One boot and what became of it."""

    __slots__ = (
        "attempt",
        "boot_timeout",
        "extra",
        "group",
        "id",
        "idle_since",
        "kind",
        "leases",
        "no",
        "state",
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
        self.group: Group = "surplus"


class Call:
    """One call, from the moment somebody wants it to the end of its work."""

    __slots__ = (
        "booted",
        "id",
        "limits",
        "priority",
        "problem",
        "queued",
        "runner",
        "started",
        "state",
        "submitted",
    )

    def __init__(
        self, ident: str, limits: Limits, priority: int, now: float, booted: float
    ) -> None:
        self.id = ident
        self.limits = limits
        self.priority = priority
        self.state: CallState = "waiting"
        self.submitted = now
        # The pool's boot clock when the call came, later the seconds of its wait spent on boots.
        self.booted = booted
        self.queued = 0.0
        self.started = 0.0
        self.runner: Runner | None = None
        # The boot that failed while it waited, once it has a slot (C6).
        self.problem: BootProblem | None = None


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


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The pool at one instant (C10)."""

    runners: tuple[RunnerInfo, ...]
    leases: int
    waiters: int
    booting: int
    wanted: int
    counters: dict[str, int] = field(default_factory=dict)

"""What a pool tells about itself (C10)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flame_dask.core.records import Decision, Snapshot


@dataclass(frozen=True, slots=True)
class RunnerStatus:
    """One runner of a pool.

    Parameters
    ----------
    id
        Its boot id, which is also the name of its Dask worker.
    address
        Its Dask address, ``None`` until it has one.
    state
        ``booting``, ``ready``, ``draining`` or ``stopping``.
    leases
        How many of its slots are taken.
    kind
        ``min`` if it is kept, ``elastic`` if it goes when it is idle.
    idle
        Seconds without a lease; 0 while it has one.
    """

    id: str
    address: str | None
    state: str
    leases: int
    kind: str
    idle: float


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A pool at one instant.

    Parameters
    ----------
    name
        The pool's name.
    runners
        All runners that exist or are being started or stopped.
    leases, waiters, booting
        Slots taken, calls that wait for one, and runners that are starting.
    wanted
        How many runners the pool wants now (C2).
    counters
        Totals since the pool opened: calls ``submitted``, ``started``, ``ended``, ``expired``,
        ``released``, ``refused``, ``lost``, ``retried`` (starts anew after a loss); ``boots``,
        ``boot_failures``, ``runners_lost``, ``runners_stopped``.
    """

    name: str
    runners: tuple[RunnerStatus, ...]
    leases: int
    waiters: int
    booting: int
    wanted: int
    counters: Mapping[str, int]

    @classmethod
    def of(cls, name: str, snapshot: Snapshot, addresses: Mapping[str, str]) -> PoolStatus:
        """Put a snapshot of the core and the addresses of its runners together."""
        runners = tuple(
            RunnerStatus(r.id, addresses.get(r.id), r.state, r.leases, r.kind, r.idle)
            for r in snapshot.runners
        )
        return cls(
            name,
            runners,
            snapshot.leases,
            snapshot.waiters,
            snapshot.booting,
            snapshot.wanted,
            snapshot.counters,
        )


@dataclass(frozen=True, slots=True)
class PoolEvent:
    """One decision of a pool.

    Parameters
    ----------
    time
        When, in seconds since the epoch.
    action
        ``grow``, ``hold``, ``shrink``, ``retire`` or ``refuse``.
    reason
        Why, in words.
    figures
        What the pool was like then: ``ready``, ``booting``, ``total``, ``leases``, ``waiters``.
    """

    time: float
    action: str
    reason: str
    figures: Mapping[str, float]

    @classmethod
    def of(cls, line: Decision) -> PoolEvent:
        """Make one from a decision of the core whose time is wall-clock time."""
        return cls(line.at, line.action, line.reason, line.figures)

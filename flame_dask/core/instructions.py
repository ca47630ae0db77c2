"""What the core wants done. The host carries each out, in order, without a decision of its own."""

from __future__ import annotations

from typing import NamedTuple

from flame_dask.core.events import BootProblem


class Boot(NamedTuple):
    """Start one runner; its name is its boot id, never used twice."""

    runner: str
    attempt: int
    reason: str


class Drain(NamedTuple):
    """Close a runner to new work on Dask's side as well (D3)."""

    runner: str
    reason: str


class Stop(NamedTuple):
    """Take a runner down, and tell the core when nothing of it is left."""

    runner: str
    reason: str
    force: bool = False
    """Do not wait for it: there may be work on it that can't be ended."""


class AskIdle(NamedTuple):
    """Ask a runner whose idle time is over whether it may go (D2); it may get calls meanwhile."""

    runner: str
    number: int
    """Unique; the answer carries it."""


class Start(NamedTuple):
    """Run a call on a runner: it holds a lease from now on."""

    call: str
    runner: str


class Terminate(NamedTuple):
    """End the work of a call on its runner; the lease lasts until the work is gone (E3)."""

    call: str
    runner: str
    reason: str


class Expired(NamedTuple):
    """A call's time is up (E2)."""

    call: str
    phase: str
    queued: float
    booting: float
    running: float
    limit: float
    boot_problem: BootProblem | None


class Refused(NamedTuple):
    """A call fails because the pool is closing (A6)."""

    call: str


class Requeued(NamedTuple):
    """A call whose work was lost waits for a slot again; its caller hears nothing (F1)."""

    call: str


class Lost(NamedTuple):
    """A call fails because its runner is gone, or its own process (F2).

    ``cause`` is ``preempted`` if the runner was leaving (E5), or was taken from the call.
    """

    call: str
    runner: str
    cause: str
    exit_code: int | None
    signal: int | None


class OpenDone(NamedTuple):
    """The runners of the ``min`` group are ready (A5)."""


class OpenFailed(NamedTuple):
    """A boot failed past its retries while the pool was opening (A5)."""

    problem: BootProblem


class CloseDone(NamedTuple):
    """Nothing of the pool is left."""


class Scaled(NamedTuple):
    """News for the hooks of C9: ``kind`` is ``grow_start``, ``grow_end`` or ``shrink``."""

    kind: str
    runner: str
    runners: int
    reason: str
    problem: BootProblem | None = None


Instruction = (
    Boot
    | Drain
    | Stop
    | AskIdle
    | Start
    | Terminate
    | Expired
    | Refused
    | Requeued
    | Lost
    | OpenDone
    | OpenFailed
    | CloseDone
    | Scaled
)

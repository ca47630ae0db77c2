"""What can happen to a pool. Each event is a fact, told to the core with the time it became known.

An event about something the core does not know (a runner of an earlier life, a call that has
ended) is stale news and changes nothing; an event that contradicts what the core knows raises
:class:`~flame_dask.core.transitions.IllegalTransition`.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple


class Limits(NamedTuple):
    """How long a call may take, in seconds; ``None`` is no limit (rule E1)."""

    queue: float | None = None
    """For a slot, when there is no ``total``."""
    run: float | None = None
    """Running, when there is no ``total``."""
    total: float | None = None
    """For both together: the call's own ``timeout``."""


class BootProblem(NamedTuple):
    """Why a boot failed, as far as is known."""

    phase: str
    cause: object
    log_tail: tuple[str, ...] = ()
    attempts: int = 1


class PoolOptionsView(NamedTuple):
    """The options that the core decides by. Durations are seconds, ``None`` is never."""

    min: int = 0
    max: int = 1
    max_concurrency: int = 1
    buffer: int = 0
    placement: str = "spread"
    boot_timeout: float | None = 30.0
    shutdown_timeout: float | None = 30.0
    idle_shutdown_after: float | None = 30.0
    min_idle_shutdown_after: float | None = None
    single_use: bool = False
    """A runner takes no further call once the work of one has ended on it (D5)."""
    idle_check: bool = False
    """A runner whose idle time is over is asked first whether it may go (D2)."""
    grace: float = 1.5
    """Within this time after a ``Terminate`` the work has to be gone (E3)."""


class Open(NamedTuple):
    """The pool opens: boot ``min`` runners, and say when they are ready (A5)."""


class Configure(NamedTuple):
    """The options of a running pool change (C8)."""

    options: PoolOptionsView


class Close(NamedTuple):
    """The pool closes: queued calls fail at once, leases get ``shutdown_timeout`` (A6)."""


class CallSubmitted(NamedTuple):
    """A caller wants a slot."""

    call: str
    limits: Limits = Limits()
    priority: int = 0
    retries: int = 0
    """How often it may be started anew after its work was lost (F1)."""
    affinity: Hashable | None = None
    """It prefers the runner that got the last call with this key (C7)."""


class CallKept(NamedTuple):
    """The work of a call has begun something that lives on: a child, a resource (H1, I1).

    From now on the call has no limits and no retries. It keeps its lease until it ends, is
    released or lost.
    """

    call: str


class CallEnded(NamedTuple):
    """The work of a call is over on its runner, and its slot is free."""

    call: str
    how: str = ""
    """By which rung of the ladder, if it was terminated (E3): words such as "SIGKILL to its
    processes"."""


class CallLost(NamedTuple):
    """The work of a call is gone though its runner lives, and its slot is free.

    Its own process has died, or its result can no longer be fetched.
    """

    call: str
    cause: str
    exit_code: int | None = None
    signal: int | None = None


class CallReleased(NamedTuple):
    """Nobody waits for the call any more: cancelled, dropped, or its caller is gone."""

    call: str


class RunnerReady(NamedTuple):
    """A boot is through: the runner can take calls."""

    runner: str


class BootFailed(NamedTuple):
    """A boot failed, and nothing of it is left that could cost money."""

    runner: str
    problem: BootProblem


class BootRefused(NamedTuple):
    """A runner is up, and says itself that it can't get ready. Its machine is still there."""

    runner: str
    problem: BootProblem


class RunnerLost(NamedTuple):
    """A runner is gone without having been told to. Its machine may still be there."""

    runner: str
    cause: str
    exit_code: int | None = None
    signal: int | None = None


class RunnerLeaving(NamedTuple):
    """Somebody else has told a runner to go: SIGTERM, a spot notice (E5)."""

    runner: str
    reason: str


class IdleAnswer(NamedTuple):
    """What an idle check has said (D2)."""

    runner: str
    number: int
    """That of the ``AskIdle`` which this answers."""
    go: bool


class RunnerStopped(NamedTuple):
    """The backend confirms: nothing of this runner is left."""

    runner: str
    log_tail: tuple[str, ...] = ()
    cause: str = ""
    """How its process ended, in words, where that is known."""


class Tick(NamedTuple):
    """Nothing happened, but time passed."""


Event = (
    Open
    | Configure
    | Close
    | CallSubmitted
    | CallKept
    | CallEnded
    | CallLost
    | CallReleased
    | RunnerReady
    | BootFailed
    | BootRefused
    | RunnerLost
    | RunnerLeaving
    | IdleAnswer
    | RunnerStopped
    | Tick
)

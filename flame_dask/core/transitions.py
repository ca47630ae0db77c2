"""The lives of a runner and of a call, as tables.

The tables are the specification: the documentation's state diagrams are drawn from them, and
:class:`Story` refuses whatever is not in them.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Literal

RunnerState = Literal["booting", "ready", "draining", "stopping", "gone"]
CallState = Literal["waiting", "running", "kept", "ending", "stuck", "ended"]

#: A runner counts towards ``max`` in every state but ``gone`` (C1).
RUNNER: Final[dict[tuple[RunnerState, str], RunnerState]] = {
    ("booting", "ready"): "ready",
    ("booting", "failed"): "gone",
    ("booting", "timed out"): "stopping",
    ("booting", "refused"): "stopping",
    ("booting", "lost"): "stopping",
    ("booting", "not needed"): "stopping",
    ("ready", "drain"): "draining",
    ("ready", "lost"): "stopping",
    ("draining", "drained"): "stopping",
    ("draining", "lost"): "stopping",
    ("draining", "evicted"): "stopping",
    ("draining", "pool closes"): "stopping",
    ("stopping", "stopped"): "gone",
}

#: A call holds a lease from its slot to its end. It is ``kept`` when its work has begun something
#: that lives on, and so has no deadline and is never started anew (H1, I1). It is ``ending`` when
#: its caller has been answered (deadline, cancelled) while the work on the runner is still there,
#: and ``stuck`` when that work has not gone within the grace (E3).
CALL: Final[dict[tuple[CallState, str], CallState]] = {
    ("waiting", "slot"): "running",
    ("waiting", "expired"): "ended",
    ("waiting", "released"): "ended",
    ("waiting", "pool closes"): "ended",
    ("running", "kept"): "kept",
    ("running", "done"): "ended",
    ("running", "expired"): "ending",
    ("running", "released"): "ending",
    ("running", "pool closes"): "ended",
    ("running", "runner lost"): "ended",
    ("running", "runner evicted"): "ended",
    ("running", "work lost"): "ended",
    ("running", "requeued"): "waiting",
    ("kept", "done"): "ended",
    ("kept", "released"): "ending",
    ("kept", "pool closes"): "ended",
    ("kept", "runner lost"): "ended",
    ("kept", "runner evicted"): "ended",
    ("kept", "work lost"): "ended",
    ("ending", "stuck"): "stuck",
    ("ending", "done"): "ended",
    ("ending", "runner lost"): "ended",
    ("ending", "runner evicted"): "ended",
    ("ending", "work lost"): "ended",
    ("ending", "pool closes"): "ended",
    ("stuck", "done"): "ended",
    ("stuck", "runner lost"): "ended",
    ("stuck", "runner evicted"): "ended",
    ("stuck", "work lost"): "ended",
    ("stuck", "pool closes"): "ended",
}


class IllegalTransition(RuntimeError):
    """Two facts that cannot both be true. Carries what is known of the subject's past.

    Parameters
    ----------
    subject, state, event
        What was asked to change, where it was, and what was said to have happened.
    story
        The latest transitions of the subject, oldest first: (seconds, event, new state).
    """

    def __init__(
        self, subject: str, state: str, event: str, story: list[tuple[float, str, str]]
    ) -> None:
        super().__init__(subject, state, event, story)
        self.subject = subject
        self.state = state
        self.event = event
        self.story = story

    def __str__(self) -> str:
        past = "; ".join(f"{at:.3f} {event} -> {state}" for at, event, state in self.story)
        return f"{self.subject} is {self.state}, {self.event!r} is impossible. Story: {past or '-'}"


class Story:
    """Remembers the latest transitions, and refuses those that no table has."""

    __slots__ = ("_log",)

    def __init__(self, length: int = 2000) -> None:
        self._log: deque[tuple[float, str, str, str]] = deque(maxlen=length)

    def begin(self, now: float, subject: str, event: str, state: str) -> None:
        """Remember where a life begins."""
        self._log.append((now, subject, event, state))

    def runner(self, now: float, subject: str, state: RunnerState, event: str) -> RunnerState:
        """Return the state a runner goes to.

        Raises
        ------
        IllegalTransition
            If the table has no such step.
        """
        after = RUNNER.get((state, event))
        if after is None:
            raise IllegalTransition(subject, state, event, self.of(subject))
        self._log.append((now, subject, event, after))
        return after

    def call(self, now: float, subject: str, state: CallState, event: str) -> CallState:
        """Return the state a call goes to.

        Raises
        ------
        IllegalTransition
            If the table has no such step.
        """
        after = CALL.get((state, event))
        if after is None:
            raise IllegalTransition(subject, state, event, self.of(subject))
        self._log.append((now, subject, event, after))
        return after

    def of(self, subject: str) -> list[tuple[float, str, str]]:
        """Return the remembered transitions of one subject, oldest first."""
        return [(at, event, state) for at, who, event, state in self._log if who == subject]

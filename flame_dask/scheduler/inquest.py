"""What a runner died of (F2).

The scheduler sees at once that a runner is gone, but not why: its exit code is known to the
backend, a moment earlier or later. So the news to its callers is held back until then, for a
limited time.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, TimerHandle
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, Generic, NamedTuple, TypeVar

#: Seconds to wait for the backend's word, if it has not said how long it takes itself.
PATIENCE: Final = 1.0

#: Verdicts that are kept for runners whose loss has not been heard of yet.
_KEPT: Final = 100

T = TypeVar("T")


class Verdict(NamedTuple):
    """What a runner died of."""

    cause: str = "unreachable"
    exit_code: int | None = None
    signal: int | None = None

    @classmethod
    def of(cls, loss: str | None, exit_code: int | None) -> Verdict:
        """Make one of what a backend says."""
        if loss is None:
            return cls()
        if exit_code is not None and exit_code < 0:
            return cls(loss, None, -exit_code)
        return cls(loss, exit_code)


class Inquest(Generic[T]):
    """Brings losses and their causes together, whichever comes first.

    Parameters
    ----------
    loop
        The event loop, for its clock.
    tell
        Takes each thing that was lost with a runner, the runner, and the verdict.
    patience
        Seconds to wait for a cause.
    """

    def __init__(
        self,
        loop: AbstractEventLoop,
        tell: Callable[[T, str, Verdict], None],
        patience: float = PATIENCE,
    ) -> None:
        self._loop = loop
        self._tell = tell
        self._patience = patience
        self._verdicts: OrderedDict[str, Verdict] = OrderedDict()
        self._waiting: dict[str, tuple[TimerHandle, list[T]]] = {}

    def lost(self, runner: str, thing: T) -> None:
        """Tell of a thing that was lost with its runner, as soon as the cause is known."""
        verdict = self._verdicts.get(runner)
        if verdict is not None:
            self._tell(thing, runner, verdict)
            return
        if runner not in self._waiting:
            timer = self._loop.call_later(self._patience, self.found, runner, Verdict())
            self._waiting[runner] = timer, []
        self._waiting[runner][1].append(thing)

    def found(self, runner: str, verdict: Verdict) -> None:
        """Take the cause of a runner's end; only the first one counts."""
        if runner in self._verdicts:
            return
        self._verdicts[runner] = verdict
        while len(self._verdicts) > _KEPT:
            self._verdicts.popitem(last=False)
        timer, things = self._waiting.pop(runner, (None, []))
        if timer is not None:
            timer.cancel()
        for thing in things:
            self._tell(thing, runner, verdict)

    def close(self) -> None:
        """Tell of what is left: nobody will say anything any more."""
        for runner in list(self._waiting):
            self.found(runner, Verdict())

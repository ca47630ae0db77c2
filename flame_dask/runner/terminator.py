"""The terminator: it knows what runs on this runner, and ends what must end (E2, E3, G1)."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Container
from contextlib import suppress
from typing import Any, Final

from flame_dask.runner.threads import Run

logger = logging.getLogger("flame_dask.runner")

#: Seconds between two attempts to end the same work.
PRESS_EVERY: Final = 0.1

#: Seconds between two looks whether all work has ended, when the runner goes.
QUIET_PAUSE: Final = 0.02


class Terminator:
    """Ends the work of calls.

    ``enter`` and ``leave`` are called in the threads of the calls, and on each one's way: they
    take no lock and no timer of their own. All else is for the event loop.

    Parameters
    ----------
    loop
        The runner's event loop.
    grace
        Seconds between SIGTERM and SIGKILL.
    report
        Takes a message to the host, on the event loop.
    known
        Holds the keys of the tasks that this runner has.
    count_unlinked
        Takes +1 and -1 when a call that is not linked begins and ends.

    Attributes
    ----------
    runs
        What runs, by the keys of the tasks.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        grace: float,
        report: Callable[[dict[str, Any]], None],
        known: Container[Any] = (),
        count_unlinked: Callable[[int], None] | None = None,
    ) -> None:
        self.runs: dict[str, Run] = {}
        self.grace = grace
        self._loop = loop
        self._report = report
        self._known = known
        self._count_unlinked = count_unlinked or (lambda by: None)
        # Tasks that have to end and have not begun yet, with the reason.
        self._doomed: dict[str, str] = {}
        self._ending: set[Run] = set()
        self._presser: asyncio.TimerHandle | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._clock_due = float("inf")

    # -- for the calls -------------------------------------------------------------------------

    def enter(self, run: Run) -> bool:
        """Take note that a call begins; say whether it may."""
        task = run.terms.task
        if not run.terms.link:
            self._count_unlinked(+1)
        self.runs[task] = run  # from here on its work may be ended at any moment
        # After it stands among the runs: `terminate` looks the other way round, so one of the two
        # sees the other whatever the order in which they happen.
        if task in self._doomed:
            run.reason = self._doomed.pop(task, "") or run.reason or "order"
            run.never_began = True
            return False
        if run.due < self._clock_due:
            with suppress(RuntimeError):  # the loop is closed: so is the runner, in a moment
                self._loop.call_soon_threadsafe(self._set_clock)
        return True

    def leave(self, run: Run) -> bool:
        """Take note that a call is over; say whether its work was ended.

        The message about it is on its way before the task can complete.
        """
        self._strike_off(run)
        if not run.reason:
            return False
        self._tell({"what": "terminated", "how": run.how(), "reason": run.reason}, run)
        return True

    def leave_lost(self, run: Run, cause: str, exit_code: int | None, number: int | None) -> None:
        """Take note that a call's own process died, though nobody had ended it.

        Parameters
        ----------
        run
            The call.
        cause
            ``exited``, ``signal`` or ``oom``.
        exit_code, number
            Its exit code, or the number of the signal.
        """
        self._strike_off(run)
        news = {"what": "call-lost", "cause": cause, "exit_code": exit_code, "signal": number}
        self._tell(news, run)

    def forget(self, task: str) -> None:
        """Strike off what has run in a call that is over, and may have been cut short in there."""
        for inner in self._inner(task):
            self._strike_off(inner)

    def order(self, task: str, order: dict[str, Any]) -> None:
        """Hand an order to a call; nothing happens if it is over. On the event loop only.

        Parameters
        ----------
        task
            The key of its Dask task.
        order
            What the parent wants. To ``drop`` a call to what it keeps is done from here.
        """
        run = self.runs.get(task)
        if run is not None:
            run.order(order)
        # After it has been told: whoever begins looks the other way round, as in `enter`.
        inner = self.runs.get(f"{task}/{order['no']}") if order["kind"] == "drop" else None
        if inner is not None:
            self._end(inner, "order")

    def keep(self, task: str) -> None:
        """Take note that a call has begun something that lives on: it has no deadline any more."""
        run = self.runs.get(task)
        if run is not None:
            run.due = float("inf")
            run.kept = True

    def _strike_off(self, run: Run) -> None:
        if self.runs.pop(run.terms.task, None) is not None and not run.terms.link:
            self._count_unlinked(-1)

    def _tell(self, news: dict[str, Any], run: Run) -> None:
        news["task"] = run.terms.task
        with suppress(RuntimeError):  # the loop is closed: nobody is told anything any more
            # Also from the loop's own thread: what is sent comes before the completion anyway,
            # which takes the same way.
            self._loop.call_soon_threadsafe(self._report, news)

    # -- for the event loop --------------------------------------------------------------------

    def terminate(self, task: str, reason: str) -> None:
        """End the work of a task, also if it has not begun yet.

        Parameters
        ----------
        task
            The key of the Dask task.
        reason
            ``order``, ``deadline``, ``parent gone`` or ``runner leaves``.
        """
        self._doomed[task] = reason
        run = self.runs.get(task)
        if run is not None:
            self._doomed.pop(task, None)
            self._end(run, reason)
        elif task not in self._known:
            del self._doomed[task]  # it is over, and its completion has crossed the order
        else:
            for other in [other for other in self._doomed if other not in self._known]:
                del self._doomed[other]

    def terminate_all(self, reason: str, *, linked_only: bool = False) -> None:
        """End what runs.

        Parameters
        ----------
        reason
            As in ``terminate``.
        linked_only
            Whether calls that are not linked may go on.
        """
        for run in list(self.runs.values()):
            if run.terms.link or not linked_only:
                self._end(run, reason)

    def end_kept(self, reason: str) -> None:
        """End what lives on, and has no end of its own."""
        for run in list(self.runs.values()):
            if run.kept:
                self._end(run, reason)

    def going_on(self) -> bool:
        """Tell whether a call runs whose work need not end."""
        return any(not run.reason for run in list(self.runs.values()))

    def has_unlinked(self) -> bool:
        """Tell whether a call runs that is not linked; in any thread."""
        return any(not run.terms.link for run in list(self.runs.values()))

    async def quiet(self, seconds: float | None, *, unlinked_only: bool = False) -> bool:
        """Wait until nothing runs.

        Parameters
        ----------
        seconds
            How long at most; ``None`` is no limit.
        unlinked_only
            Whether linked calls don't count: they are being ended.

        Returns
        -------
        bool
            Whether nothing runs.
        """
        end = float("inf") if seconds is None else time.monotonic() + seconds
        # Not by Dask's own count: that never empties while a worker closes.
        while self.has_unlinked() if unlinked_only else self.runs:
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(QUIET_PAUSE)
        return True

    def close(self) -> None:
        """Stop the clocks."""
        for timer in (self._clock, self._presser):
            if timer is not None:
                timer.cancel()
        self._clock_due = float("-inf")  # nobody starts it again

    def _inner(self, task: str) -> list[Run]:
        """Return what runs in a call that keeps things."""
        return [run for key, run in list(self.runs.items()) if key.startswith(f"{task}/")]

    def _end(self, run: Run, reason: str) -> None:
        if not run.reason:
            run.end(reason)
            self._ending.add(run)
            run.press(self.grace)
            # With all that runs in it: a call to what it keeps may have a thread of its own.
            for inner in self._inner(run.terms.task) if run.terms.mode else ():
                self._end(inner, reason)
            if self._presser is None:
                self._presser = self._loop.call_later(PRESS_EVERY, self._press)

    def _press(self) -> None:
        self._presser = None
        self._ending = {run for run in self._ending if self.runs.get(run.terms.task) is run}
        for run in self._ending:
            run.press(self.grace)
        if self._ending:
            self._presser = self._loop.call_later(PRESS_EVERY, self._press)

    def _set_clock(self) -> None:
        """Have the clock ring at the earliest deadline, unless it is set to an earlier time.

        That of a call which has ended is left in place: it rings for nothing, once, and most calls
        need no clock of their own for that. There are no more calls than slots, so a look at all
        of them is cheaper than keeping them in order.
        """
        due = min([run.due for run in list(self.runs.values())], default=float("inf"))
        if due >= self._clock_due:
            return
        if self._clock is not None:
            self._clock.cancel()
        self._clock_due = due
        self._clock = self._loop.call_later(max(due - time.monotonic(), 0.0), self._ring)

    def _ring(self) -> None:
        self._clock = None
        self._clock_due = float("inf")
        now = time.monotonic()
        for run in list(self.runs.values()):
            if run.due <= now:
                run.due = float("inf")
                self._end(run, "deadline")
        self._set_clock()

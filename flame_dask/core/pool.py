"""The pool as a pure state machine: events in, instructions out.

A pool is level-triggered (C3): every event is followed by :meth:`PoolState._settle`, which compares
what is there with what is wanted, whatever the event was. Handlers only record the fact.

Who counts for what:

* A runner counts towards ``max`` from its boot until the backend has confirmed its end (C1).
* Demand is the leases on runners that stay, plus the waiters (C2). Leases on a draining runner are
  carried by that runner to its end, and ask for no other.
* A boot that failed is *owed* until its back-off is over: it is part of what is planned, so that
  nothing is booted in its place, but not of what is there, since no machine exists (C6).

Who does what: :class:`~flame_dask.core.fleet.Fleet` knows the ready runners and the idle ones among
them, :class:`~flame_dask.core.boots.BootLedger` the boots,
:class:`~flame_dask.core.calls.CallBook` the calls, :class:`~flame_dask.core.leaving.Evictions`
until when a runner may drain. What each means for the others is in three layers, of which each
knows those under it:

* :class:`~flame_dask.core.books.PoolBooks`, all of these together;
* :class:`~flame_dask.core.call_lives.CallLives`, what happens to calls;
* :class:`~flame_dask.core.runner_lives.RunnerLives`, what happens to runners, and with them;

and :class:`PoolState`, at the top, opens, compares and watches the clock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.events import Event
from flame_dask.core.instructions import Instruction
from flame_dask.core.runner_lives import RunnerLives
from flame_dask.core.waiting import NEVER


class PoolState(RunnerLives):
    """What one pool is and owes. Not thread-safe, and it never waits.

    Parameters
    ----------
    options
        The options that decisions depend on.
    name
        Prefix of the boot ids.
    backoff
        When failed boots are tried again.
    seed
        For the jitter of the back-off; equal seeds and events give equal instructions.

    Examples
    --------
    >>> pool = PoolState(ev.PoolOptionsView(min=0, max=1), name="p")
    >>> pool.handle(0.0, ev.Open())
    [OpenDone()]
    >>> boot, news = pool.handle(0.0, ev.CallSubmitted("c1"))
    >>> boot.runner
    'p-1'
    >>> pool.handle(0.5, ev.RunnerReady("p-1"))[-1]
    Start(call='c1', runner='p-1')
    """

    # -- the whole interface, with what the books tell -------------------------------------------

    def handle(self, now: float, event: Event) -> list[Instruction]:
        """Take in one event and return what is to be done, in order.

        Parameters
        ----------
        now
            Seconds on any clock. One that goes back is taken to stand still.
        event
            What happened.

        Returns
        -------
        list of Instruction
            To be carried out in this order.

        Raises
        ------
        IllegalTransition
            If the event contradicts what is known. Nothing has changed then.
        """
        now = max(now, self._now)
        _HANDLERS[type(event)](self, now, event)
        self._now = now
        self._settle(now)
        out, self._out = self._out, []
        return out

    def next_deadline(self) -> float | None:
        """Return when to call ``handle(now, Tick())`` at the latest; ``None`` is never."""
        self._alarm.at = due = self._earliest()
        return None if due == NEVER else due

    # -- opening, changing ---------------------------------------------------------------------

    def _on_open(self, now: float, event: ev.Open) -> None:
        if not self.closing:
            self.opening = True
            self._fleet.wake_min()

    def _on_configure(self, now: float, event: ev.Configure) -> None:
        old, new = self.options, event.options
        self.options = new
        self._fleet.configure(old, new)
        self.ceiling = max(len(self.runners), new.max)
        leases = max((len(runner.leases) for runner in self.runners.values()), default=0)
        self.most_leases = max(leases, new.max_concurrency)
        for runner in [r for r in self._fleet.ready.values() if new.single_use and r.used]:
            self._drain(now, runner, "single use")
        # Runners that are leaving already are no surplus.
        surplus = len(self._fleet.ready) + self._boots.under_way - new.max
        if surplus <= 0 or self.closing:
            return
        reason = f"max is {new.max} now"
        # Boots go first, the latest before the others, then the runners with the least to finish.
        boots = [runner for runner in self.runners.values() if runner.state == "booting"]
        for runner in boots[-surplus:]:
            self._stop(now, runner, "not needed", reason)
        surplus -= len(boots)
        by_leases = sorted(self._fleet.ready.values(), key=lambda r: (len(r.leases), -r.no))
        for runner in by_leases[: max(0, surplus)]:
            self._drain(now, runner, reason)

    def _on_tick(self, now: float, event: ev.Tick) -> None:
        """Time passes; settling does the rest."""

    # -- settling: compare what is with what is wanted (C3) ------------------------------------

    def _settle(self, now: float) -> None:
        if now >= self._alarm.at:
            self._run_deadlines(now)
        if self.closing:
            if not self.runners and not self._closed:
                self._closed = True
                self._close_at = NEVER
                self._out.append(do.CloseDone())
            return
        fleet, options = self._fleet, self.options
        needed = self._needed()
        fleet.aim(now, needed)
        while self.queue:
            runner = fleet.pick()
            if runner is None:
                break
            self._start(now, self.calls[self.queue.pop()], runner)
        wanted = max(needed, min(fleet.floor, options.max))
        self._grow(now, wanted - len(fleet.ready) - self._boots.under_way)
        if self.opening:
            # Whoever is idle stays until all are ready: else opening might never end (A5).
            if len(fleet.ready) < min(options.min, options.max):
                return
            self.opening = False
            self._out.append(do.OpenDone())
        while (idle := fleet.overdue(needed, options.buffer)) is not None:
            if options.idle_check:
                self._out.append(do.AskIdle(idle.id, fleet.ask(idle)))
            else:
                self._dismiss(now, idle)

    def _grow(self, now: float, short: int) -> None:
        boots = self._boots
        if short > 0:
            count = boots.startable(short, self.options.max - len(self.runners))
            if count > 0:
                demand = self._fleet.leases + len(self.queue)
                reason = f"{demand} calls, min {self.options.min}, buffer {self.options.buffer}"
                self._decide(now, "grow", f"{count} more: {reason}")
                for _ in range(count):
                    self._boot(now, reason)
                short -= count
        boots.settle(now, short)
        if self.queue:
            self._hold(now)
        else:
            self._holding = False

    def _hold(self, now: float) -> None:
        """Note that calls wait and no runner more may be booted; once, not for each call."""
        planned = len(self._fleet.ready) + self._boots.under_way + self._boots.cooling
        holding = self._demanded() > planned
        said = bool(self._decisions) and self._decisions[-1].action == "hold"
        if holding and not self._holding and not said:
            leaving = len(self.runners) - len(self._fleet.ready) - self._boots.under_way
            still = f", {leaving} of them leaving" if leaving else ""
            self._decide(now, "hold", f"max={self.options.max} reached{still}, calls wait")
        self._holding = holding

    # -- the clock -----------------------------------------------------------------------------

    def _run_deadlines(self, now: float) -> None:
        while (call := self._book.pop_due(now)) is not None:
            over = self._stick if call.state == "ending" else self._expire
            over(now, call)
        while (runner_id := self._boots.pop_timed_out(now)) is not None:
            self._boot_timed_out(now, self.runners[runner_id])
        self._boots.cool(now)
        self._fleet.ring(now)
        while (runner := self._evictions.pop_due(now)) is not None:
            self._evict(now, runner, "shutdown_timeout is over")
        if now >= self._close_at:
            self._close_at = NEVER
            self._shut_down(now)
        self._alarm.at = self._earliest()

    def _earliest(self) -> float:
        return min(
            self._book.next(),
            self._boots.next(),
            self._fleet.next(),
            self._evictions.next(),
            self._close_at,
        )


_HANDLERS: Final[dict[type, Callable[[PoolState, float, Any], None]]] = {
    ev.Open: PoolState._on_open,
    ev.Configure: PoolState._on_configure,
    ev.Close: PoolState._on_close,
    ev.CallSubmitted: PoolState._on_submitted,
    ev.CallKept: PoolState._on_kept,
    ev.CallEnded: PoolState._on_ended,
    ev.CallLost: PoolState._on_call_lost,
    ev.CallReleased: PoolState._on_released,
    ev.RunnerReady: PoolState._on_ready,
    ev.BootFailed: PoolState._on_boot_failed,
    ev.BootRefused: PoolState._on_boot_refused,
    ev.RunnerLost: PoolState._on_lost,
    ev.RunnerLeaving: PoolState._on_leaving,
    ev.IdleAnswer: PoolState._on_idle_answer,
    ev.RunnerStopped: PoolState._on_stopped,
    ev.Tick: PoolState._on_tick,
}

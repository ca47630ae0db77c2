"""A pool's core on an event loop: events go in, instructions are carried out, time passes."""

from __future__ import annotations

import time
from asyncio import AbstractEventLoop, TimerHandle
from collections import deque
from collections.abc import Callable

from flame_dask.core import events as ev
from flame_dask.core.events import Event
from flame_dask.core.instructions import Instruction
from flame_dask.core.pool import PoolState


class CoreDriver:
    """Tells a core what happens, and wakes it at its next deadline with one timer.

    Parameters
    ----------
    core
        The pool.
    loop
        The event loop. Everything runs on it.
    carry_out
        Takes each instruction of the core, in order.
    """

    def __init__(
        self,
        core: PoolState,
        loop: AbstractEventLoop,
        carry_out: Callable[[Instruction], None],
    ) -> None:
        self._core = core
        self._loop = loop
        self._carry_out = carry_out
        self._events: deque[Event] = deque()
        self._busy = False
        self._timer: TimerHandle | None = None
        self._timer_due = float("inf")

    def tell(self, event: Event) -> None:
        """Tell the core what happens now, and carry out what it instructs."""
        self._events.append(event)
        if self._busy:  # the effect of an instruction: its turn comes after the present event
            return
        self._busy = True
        try:
            while self._events:
                event = self._events.popleft()
                for instruction in self._core.handle(time.monotonic(), event):
                    self._carry_out(instruction)
        finally:
            self._busy = False
        self._arm()

    def stop(self) -> None:
        """Stop the clock."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        due = self._core.next_deadline()
        if due is None or due >= self._timer_due:
            return  # a timer that rings too early does no harm
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._timer_due = float("inf")
        self.tell(ev.Tick())

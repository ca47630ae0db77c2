"""Runners of a cluster that starts workers by their number alone, and chooses their names.

Each that comes is the runner that has been awaited longest. One that is to stop is told so from
here, since nobody else can end that one and no other.
"""

from __future__ import annotations

from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flame_dask import dask_internals as internals
from flame_dask.constants import LAST_RESORT
from flame_dask.core.pool import PoolState
from flame_dask.scheduler import gateway

if TYPE_CHECKING:
    from distributed import Scheduler

Message = dict[str, Any]


class Adoption:
    """Takes in runners, and parts with them.

    Parameters
    ----------
    scheduler, loop
        The scheduler, and its event loop.
    core
        The pool.
    addresses
        Where the runners are that have come.
    send_parent
        Takes a message for the parent.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        loop: AbstractEventLoop,
        core: PoolState,
        addresses: Mapping[str, str],
        send_parent: Callable[[Message], object],
    ) -> None:
        self._scheduler = scheduler
        self._loop = loop
        self._core = core
        self._addresses = addresses
        self._send_parent = send_parent
        # Runners that end themselves because the core said so: what the parent is to hear when they
        # have, and when they are struck off if they don't.
        self._parting: dict[str, tuple[Message, TimerHandle | None]] = {}
        gateway.heed_every_order(scheduler)

    def awaited(self) -> str:
        """Return the runner that has been awaited longest; nothing if none is."""
        runners = self._core.runners.values()
        booting = (r.id for r in runners if r.state == "booting" and r.id not in self._addresses)
        return next(booting, "")

    def part_with(self, runner: str, force: bool, limit: float | None, message: Message) -> bool:
        """Have a runner end itself; the parent hears of it when it is gone.

        Parameters
        ----------
        runner
            Its id.
        force
            Whether there is work on it that can't be ended otherwise.
        limit
            Seconds that its calls may go on; ``None`` is no limit.
        message
            What the parent is to hear.

        Returns
        -------
        bool
            Whether the runner was there.
        """
        address = self._addresses.get(runner)
        if address is None:
            return False
        timer = None
        limit = 0.0 if force else limit
        if limit is not None:
            # It sees to its own end within this time. If not, the cluster is to take its machine:
            # it does so when the worker is no longer known here.
            limit += 2 * LAST_RESORT
            timer = self._loop.call_later(
                limit, internals.strike_off_worker, self._scheduler, address, f"flame-end-{runner}"
            )
        self._parting[runner] = message, timer
        internals.send_to_worker(self._scheduler, address, {"what": "go", "force": force})
        return True

    def gone(self, runner: str) -> None:
        """Take note that a runner has left the scheduler."""
        message, timer = self._parting.pop(runner, (None, None))
        if timer is not None:
            timer.cancel()
        if message is not None:
            self._send_parent(message)

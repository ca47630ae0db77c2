"""Growth and shrinking of the cluster object, on the core's orders.

Dask's own ``Adaptive`` asks every second how many workers there should be. This one is told at the
moment of need, and boots and stops each runner on its own, so that no boot waits for another.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import traceback
from collections.abc import Callable
from typing import Any

from distributed import Adaptive

from flame_dask.backends.base import Backend, Ending
from flame_dask.parent.port import Message

logger = logging.getLogger("flame_dask")

STOP_RETRY = (1.0, 2.0, 4.0, 8.0, 15.0)

#: Seconds for which a pool that is closing tries to stop a runner. An open one goes on: the runner
#: counts until it is gone (C1). But a service that does not come back must not hold up the parent's
#: end for ever (A6), and the runner ends by itself when that is there (G3).
LAST_TRIES: float = 60.0


class PoolAdaptive(Adaptive):
    """Carries out what the core wants on a Dask cluster.

    It belongs to the cluster like any other (``cluster.adapt(Adaptive=PoolAdaptive)``), but never
    polls: ``target`` is the number of runners that the core has ordered, ``workers_to_close`` are
    those that it has drained, and both have been acted upon by the time that anybody could ask.

    Parameters
    ----------
    cluster
        The Dask cluster.
    backend
        Starts and stops its workers.
    report
        Takes the news for the pool's host.
    """

    def __init__(
        self,
        cluster: Any,
        *,
        backend: Backend,
        report: Callable[[Message], None],
        minimum: int,
        maximum: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(cluster, interval=0, minimum=minimum, maximum=maximum, **kwargs)
        self.backend = backend
        self.report = report
        self.booted = 0
        self._boots: dict[str, asyncio.Task[None]] = {}
        self._stops: dict[str, asyncio.Task[None]] = {}
        # How runners have ended by themselves that are being taken down now.
        self._endings: dict[str, Ending] = {}
        self._closing = False

    async def target(self) -> int:
        """Return how many runners the core has ordered."""
        return len(self._boots)

    async def workers_to_close(self, target: int) -> list[str]:
        """Return the runners that the core has ordered to stop."""
        return list(self._stops)

    def bound(self, minimum: int, maximum: int) -> None:
        """Take other bounds from now on (C8). The core keeps to them; here they are only shown."""
        self.minimum = minimum
        self.maximum = maximum

    def boot(self, runner: str) -> None:
        """Start a runner, and report if it fails or ends by itself."""
        self.booted += 1
        self._boots[runner] = asyncio.ensure_future(self._live(runner))

    def halt(self, runner: str, force: bool = False) -> None:
        """Stop a runner, and report when nothing of it is left."""
        if runner not in self._stops:
            self._stops[runner] = asyncio.ensure_future(self._stop(runner, force))

    def halt_all(self) -> None:
        """Stop all runners."""
        for runner in list(self._boots):
            self.halt(runner)

    def hurry(self) -> None:
        """Take note that the pool is closing."""
        self._closing = True

    async def idle(self) -> None:
        """Wait until all orders have been carried out."""
        while self._stops or self._boots:
            await asyncio.wait([*self._stops.values(), *self._boots.values()])

    async def _live(self, runner: str) -> None:
        """Go with a runner from its boot to its end."""
        try:
            await self.backend.boot(runner)
            ending = await self.backend.watch(runner)
        except Exception as error:
            ending = Ending(phase="start", cause=error, log_tail=log_tail(error))
        if runner in self._stops:
            return  # it ends because it was told to
        self._endings[runner] = ending  # what takes it down must not be cut off half-way
        ending = await self._remove(runner, ending)
        if runner in self._stops:
            return  # it was told to end meanwhile, and that is what is reported
        self._boots.pop(runner, None)
        self.report({"what": "ended", "phase": ending.phase, **_told(runner, ending)})
        del self._endings[runner]

    async def _stop(self, runner: str, force: bool) -> None:
        boot = self._boots.get(runner)
        if boot is not None:
            if runner not in self._endings:
                boot.cancel()
            await asyncio.wait([boot])
        ending = await self._remove(runner, self._endings.pop(runner, None), force)
        self._boots.pop(runner, None)
        del self._stops[runner]
        self.report({"what": "stopped", **_told(runner, ending)})

    async def _remove(self, runner: str, ending: Ending | None, force: bool = False) -> Ending:
        """Take down what is left of a runner. It costs money until this works, so it goes on."""
        clock = asyncio.get_running_loop().time
        end = None
        for attempt in itertools.count():
            try:
                last = await self.backend.stop(runner, force=force)
            except Exception as error:
                if self._closing:
                    end = clock() + LAST_TRIES if end is None else end
                    if clock() >= end:
                        logger.error(
                            "could not stop runner %s, and the pool is closed: it may go on until "
                            "it notices that its parent is gone (%r)", runner, error)  # fmt: skip
                        return ending or Ending(cause=error)
                logger.exception("could not stop runner %s, trying again", runner)
                await asyncio.sleep(STOP_RETRY[min(attempt, len(STOP_RETRY) - 1)])
            else:
                ending = ending or last
                return ending._replace(log_tail=ending.log_tail or last.log_tail)
        raise AssertionError("unreachable")


def _told(runner: str, ending: Ending) -> Message:
    return {
        "runner": runner,
        "cause": str(ending.cause),
        "loss": ending.loss,
        "exit_code": ending.exit_code,
        "log_tail": list(ending.log_tail),
    }


def log_tail(error: BaseException, lines: int = 20) -> tuple[str, ...]:
    """Return the last lines of an exception's traceback: what a worker said when it failed."""
    text = "".join(traceback.format_exception(error))
    return tuple(text.splitlines()[-lines:])

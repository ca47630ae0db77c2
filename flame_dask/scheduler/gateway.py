"""A scheduler that Dask Gateway has started: what its host can do without the parent (G3).

The gateway starts a new worker for each one that goes, until it is told otherwise, and keeps the
cluster until somebody ends it. The parent does both; when it is gone, the host has to. The gateway
has put an object of its own on the scheduler, by which it hears from there.

Only ``count``, ``heartbeat``, ``scale`` and ``gateway.shutdown`` of that object are used.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final

from flame_dask import dask_internals as internals

if TYPE_CHECKING:
    from distributed import Scheduler

logger = logging.getLogger("flame_dask.scheduler")

#: Seconds for the gateway to end the cluster before the scheduler ends by itself.
PATIENCE: Final = 10.0

_under_way: set[asyncio.Task[None]] = set()


def service_of(scheduler: Scheduler) -> Any:
    """Return the gateway's object on a scheduler; ``None`` if the scheduler is somebody else's."""
    return scheduler.services.get("gateway")


def heed_every_order(scheduler: Scheduler) -> None:
    """Have the gateway told of each number of workers that is ordered (C2).

    Its object on the scheduler tells it in a loop, and is woken by an order. But one that comes
    while it is just telling of another does not wake it: it would tell of that with its next
    heartbeat, 15 seconds later, or an hour later on Kubernetes.
    """
    service = service_of(scheduler)
    if service is None or not hasattr(service, "heartbeat") or "heartbeat" in vars(service):
        return  # another version, or an earlier pool has done it
    heartbeat = service.heartbeat

    async def until_all_is_told() -> None:
        told = None
        while told != service.count:
            told = service.count
            await heartbeat()

    service.heartbeat = until_all_is_told


def want_no_workers(scheduler: Scheduler) -> None:
    """Have no worker replaced that goes. Those that work are left alone."""
    service = service_of(scheduler)
    if service is not None:
        _start(service.scale(0))


def close_scheduler(scheduler: Scheduler) -> None:
    """Close a scheduler, and have the gateway end its cluster if it is one of a gateway's."""
    service = service_of(scheduler)
    if service is None:
        internals.close_scheduler(scheduler)
    else:
        _start(_end_cluster(scheduler, service))


async def _end_cluster(scheduler: Scheduler, service: Any) -> None:
    try:
        async with asyncio.timeout(PATIENCE):
            await service.gateway.shutdown()
    except Exception:
        # The gateway misses the scheduler, then, if it is still there itself.
        logger.warning("Dask Gateway does not end this cluster", exc_info=True)
    else:
        await asyncio.sleep(PATIENCE)
    internals.close_scheduler(scheduler)


def _start(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.ensure_future(work)
    _under_way.add(task)  # the loop itself would forget it
    task.add_done_callback(_under_way.discard)

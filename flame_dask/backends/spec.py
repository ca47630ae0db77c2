"""Clusters whose workers are objects in the parent: distributed's ``SpecCluster`` family."""

from __future__ import annotations

from typing import Any

from distributed import SpecCluster

from flame_dask import dask_internals as internals
from flame_dask.backends.base import Ending


class SpecBackend:
    """Starts and stops single workers of a running ``SpecCluster``.

    Its workers are of classes of the pool's own. Beyond what ``SpecCluster`` wants of a worker they
    have ``end(force)``, and ``ending()`` says how it ended.

    Parameters
    ----------
    cluster
        The cluster, if it is there already; it is left open then.
    """

    def __init__(self, cluster: SpecCluster | None = None) -> None:
        self.cluster = cluster
        self.given = cluster is not None

    def open(self, *, asynchronous: bool) -> Any:
        """Return the cluster."""
        assert self.cluster is not None
        return self.cluster

    def worker(self) -> tuple[type, dict[str, Any]]:
        """Return the class of a worker and its options."""
        assert self.cluster is not None
        spec = self.cluster.new_spec
        return spec["cls"], spec.get("options", {})

    async def boot(self, runner: str) -> None:
        """Start one worker."""
        assert self.cluster is not None
        cls, options = self.worker()
        await internals.start_member(self.cluster, runner, cls, options)

    async def watch(self, runner: str) -> Ending:
        """Wait until the worker ends by itself."""
        assert self.cluster is not None
        member = self.cluster.workers[runner]
        await member.finished()
        return await self.ending(member)

    async def ending(self, member: Any) -> Ending:
        """Say how a worker ended."""
        ending: Ending = member.ending()
        return ending

    async def stop(self, runner: str, *, force: bool = False) -> Ending:
        """Take a worker down."""
        assert self.cluster is not None
        member: Any = self.cluster.workers.get(runner)
        if member is not None:
            await member.end(force)
        await internals.stop_member(self.cluster, runner)
        return Ending() if member is None else await self.ending(member)

    def kill(self) -> None:
        """End what can be ended without an event loop, because the interpreter exits."""

    def close(self, cluster: Any) -> Any:
        """Close the cluster, unless it was there before the pool."""
        return None if self.given else cluster.close()

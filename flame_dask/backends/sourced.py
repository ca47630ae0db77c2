"""A cluster with its scheduler in the parent, and a vendor's cluster object beside it.

The vendor's object is not used as a cluster of Dask: it knows how a machine is started, and may
make at the cloud what machines need around them.
"""

from __future__ import annotations

from typing import Any, Protocol

from distributed import SpecCluster
from distributed.core import Status


class Sourced(Protocol):
    """What has such an object; both are called on the event loop."""

    async def set_up(self, cluster: SpecCluster) -> None:
        """Make it, and what machines need around them."""

    async def tidy(self) -> None:
        """Delete at the cloud what was made there."""


class SourcedCluster(SpecCluster):
    """A cluster with its scheduler in the parent that opens and closes the vendor's with it.

    Parameters
    ----------
    backend
        Has the vendor's.
    options
        As for ``SpecCluster``.
    """

    def __init__(self, backend: Sourced, **options: Any) -> None:
        self._backend = backend
        super().__init__(**options)

    async def _start(self) -> None:
        fresh = self.status == Status.created
        await super()._start()
        if fresh:
            try:
                await self._backend.set_up(self)
            except BaseException:  # whoever opens the pool may give up, too
                await self._close()
                raise

    async def _close(self) -> None:
        await super()._close()
        await self._backend.tidy()

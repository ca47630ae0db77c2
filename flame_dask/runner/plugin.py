"""The runner's own part of a pool: a Dask worker plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distributed.diagnostics.plugin import WorkerPlugin

from flame_dask import dask_internals as internals

if TYPE_CHECKING:
    from distributed import Worker


class FlameRunner(WorkerPlugin):
    """Worker plugin that makes a Dask worker a runner of a pool.

    Parameters
    ----------
    pool
        The pool's name.
    """

    name = "flame"

    def __init__(self, pool: str) -> None:
        self.pool = pool

    def setup(self, worker: Worker) -> None:
        """Say that the runner is ready. The worker's status change has gone out before this."""
        internals.hasten(worker.batched_stream)
        internals.send_to_scheduler(worker, {"what": "ready"})

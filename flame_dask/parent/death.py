"""What a pool has died of (K1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame_dask.parent.pool import FlamePool


def status_of(cluster: Any) -> str:
    """Return a cluster's status: in Dask an enumeration, with some clusters a text."""
    status = getattr(cluster, "status", "")
    return str(getattr(status, "name", status))


def cause_of(pool: FlamePool, status: str) -> str:
    """Say what a pool has died of. ``status`` is what its cluster was at that moment."""
    if status in ("closing", "closed", "failed"):
        return f"its cluster was {'closed' if status == 'closing' else status}"
    # Known where the scheduler is a process of ours. With exit code 0 it has ended because it lost
    # the connection, too.
    ending = getattr(getattr(pool.cluster, "scheduler", None), "ending", None)
    if ending is not None and (end := ending()).loss is not None and end.exit_code != 0:
        return f"its scheduler is gone: {end.cause}"
    return "the connection to its scheduler was lost"

"""Elixir's FLAME idea on Dask: run any function on a short-lived machine.

>>> from flame_dask import FlamePool
>>> with FlamePool("crunch", max=4) as pool:  # doctest: +SKIP
...     pool.call(pow, 2, 10)
1024
"""

from typing import TYPE_CHECKING

from flame_dask.child_spec import ChildSpec
from flame_dask.code_options import CodeSync
from flame_dask.errors import (
    BootError,
    CallCancelled,
    CallTimeout,
    Crash,
    FlameError,
    PoolClosed,
    PoolNotFound,
    PoolOptionsError,
    RunnerLost,
    SerializationError,
    SupervisorFailed,
)
from flame_dask.parent.child import Child
from flame_dask.parent.futures import PoolFuture
from flame_dask.parent.hooks import ScaleEvent
from flame_dask.parent.pool import FlamePool
from flame_dask.parent.registry import call, cast, get_pool, place_child
from flame_dask.parent.remote_object import RemoteObject
from flame_dask.parent.spec import PoolSpec
from flame_dask.parent.status import PoolEvent, PoolStatus, RunnerStatus
from flame_dask.parent.stream import AsyncStream, Stream
from flame_dask.parent.supervisor import Supervisor
from flame_dask.runner.here import Parent
from flame_dask.tracking import Trackable, Tracker, keep, track_resources

if TYPE_CHECKING:
    # The package of this name can be called; type checkers can't know of it.
    from flame_dask.runner.here import parent
else:
    from flame_dask import parent

__version__ = "0.1.0"

__all__ = [
    "AsyncStream",
    "BootError",
    "CallCancelled",
    "CallTimeout",
    "Child",
    "ChildSpec",
    "CodeSync",
    "Crash",
    "FlameError",
    "FlamePool",
    "Parent",
    "PoolClosed",
    "PoolEvent",
    "PoolFuture",
    "PoolNotFound",
    "PoolOptionsError",
    "PoolSpec",
    "PoolStatus",
    "RemoteObject",
    "RunnerLost",
    "RunnerStatus",
    "ScaleEvent",
    "SerializationError",
    "Stream",
    "Supervisor",
    "SupervisorFailed",
    "Trackable",
    "Tracker",
    "call",
    "cast",
    "get_pool",
    "keep",
    "parent",
    "place_child",
    "track_resources",
]

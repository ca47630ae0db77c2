"""From what ``backend=`` was given to what starts the runners (A3)."""

from __future__ import annotations

import importlib
from typing import Any

from distributed import LocalCluster, SpecCluster
from distributed.deploy.subprocess import SubprocessCluster

from flame_dask.backends.base import Backend
from flame_dask.backends.processes import ProcessBackend
from flame_dask.backends.spec import SpecBackend
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

_REMEDY = (
    "give LocalCluster, SubprocessCluster, one of them with options as (class, {...}), its dotted "
    "path, a running LocalCluster, or an object with the methods of flame_dask.backends.base."
    "Backend"
)


def resolve(options: PoolOptions) -> Backend:
    """Return the backend of a pool. Nothing is started.

    Parameters
    ----------
    options
        The pool's options.

    Raises
    ------
    PoolOptionsError
        If the backend can't be found, or is not supported.
    """
    given = options.backend
    more: dict[str, Any] = {}
    if isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[1], dict):
        given, more = given[0], dict(given[1])
    if isinstance(given, str):
        given = _imported(given)
    if given is None:
        given = LocalCluster
    if given is SubprocessCluster or (isinstance(given, type) and issubclass(given, LocalCluster)):
        return ProcessBackend(options, given, more)
    if isinstance(given, SpecCluster):
        return _running(options, given)
    if not isinstance(given, type) and isinstance(given, Backend):
        return given
    raise PoolOptionsError("backend", options.backend, _REMEDY)


def _imported(path: str) -> Any:
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PoolOptionsError(
            "backend", path, f"give the dotted path of a cluster class ({error})"
        ) from error


def _running(options: PoolOptions, cluster: SpecCluster) -> Backend:
    worker = cluster.new_spec or {}
    if "nthreads" not in worker.get("options", {}):
        raise PoolOptionsError("backend", cluster, _REMEDY, problem="is not supported")
    if cluster.worker_spec:
        raise PoolOptionsError(
            "backend",
            cluster,
            "make it with n_workers=0: a pool starts all its workers itself",
            problem="has workers already",
        )
    if cluster.asynchronous != options.asynchronous:
        raise PoolOptionsError(
            "backend",
            cluster,
            "make both asynchronous, or none of them",
            problem=f"is {'' if cluster.asynchronous else 'not '}asynchronous, unlike the pool",
        )
    changes: dict[str, Any] = {"nthreads": options.max_concurrency}
    if options.env:
        changes["env"] = dict(options.env)
    return SpecBackend(cluster, changes)

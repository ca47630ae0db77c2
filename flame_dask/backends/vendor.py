"""Cluster classes of vendors, told by their names: their packages need not be there."""

from __future__ import annotations

from typing import Any


def split(backend: Any) -> tuple[Any, dict[str, Any]]:
    """Return the class and the options of ``backend=``.

    Examples
    --------
    >>> split(("distributed.LocalCluster", {"host": "127.0.0.1"}))
    ('distributed.LocalCluster', {'host': '127.0.0.1'})
    """
    if isinstance(backend, tuple | list) and len(backend) == 2 and isinstance(backend[1], dict):
        return backend[0], dict(backend[1])
    return backend, {}


def is_job_queue(given: Any) -> bool:
    """Tell whether this is a cluster class of dask-jobqueue, or alike."""
    return _descends(given, "dask_jobqueue.core", "JobQueueCluster")


def is_ecs(given: Any) -> bool:
    """Tell whether this is dask-cloudprovider's ``ECSCluster``, ``FargateCluster``, or alike."""
    return _descends(given, "dask_cloudprovider.aws.ecs", "ECSCluster")


def is_fargate(given: Any) -> bool:
    """Tell whether this is dask-cloudprovider's ``FargateCluster``, or alike."""
    return _descends(given, "dask_cloudprovider.aws.ecs", "FargateCluster")


def _descends(given: Any, module: str, name: str) -> bool:
    mro = given.__mro__ if isinstance(given, type) else ()
    return any((cls.__module__, cls.__name__) == (module, name) for cls in mro)

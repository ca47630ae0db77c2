"""Cluster classes of vendors, told by their names, since their packages need not be there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flame_dask.errors import PoolOptionsError


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


def where(kind: str, option: str) -> str:
    """Return where an option of a cluster class stands, for an error that names it.

    Examples
    --------
    >>> where("LocalCluster", "host")
    "backend=(LocalCluster, {'host': ...})"
    """
    return f"backend=({kind}, {{{option!r}: ...}})"


def check(
    kind: str,
    given: Mapping[str, Any],
    of_the_pool: Mapping[str, str],
    taken: Collection[str] | None = None,
) -> None:
    """Refuse options of a cluster class that are the pool's to set, and those that there are not.

    Parameters
    ----------
    kind
        The class's name.
    given
        The options.
    of_the_pool
        Those that the pool sets, with what to do instead.
    taken
        All others that there are; ``None`` leaves that to the class.

    Raises
    ------
    PoolOptionsError
        It names the option, its value and the remedy.
    """
    for option, value in given.items():
        if option in of_the_pool:
            problem = "is the pool's to set"
            raise PoolOptionsError(where(kind, option), value, of_the_pool[option], problem=problem)
        if taken is not None and option not in taken:
            remedy = f"give some of {', '.join(sorted(taken))}"
            problem = f"is no option of {kind} that a pool takes"
            raise PoolOptionsError(where(kind, option), value, remedy, problem=problem)


def is_job_queue(given: Any) -> bool:
    """Tell whether this is a cluster class of dask-jobqueue, or alike."""
    return _descends(given, "dask_jobqueue.core", "JobQueueCluster")


def is_ecs(given: Any) -> bool:
    """Tell whether this is dask-cloudprovider's ``ECSCluster``, ``FargateCluster``, or alike."""
    return _descends(given, "dask_cloudprovider.aws.ecs", "ECSCluster")


def is_fargate(given: Any) -> bool:
    """Tell whether this is dask-cloudprovider's ``FargateCluster``, or alike."""
    return _descends(given, "dask_cloudprovider.aws.ecs", "FargateCluster")


def is_gateway(given: Any) -> bool:
    """Tell whether this is Dask Gateway's class, or alike, or such a cluster that runs."""
    kind = given if isinstance(given, type) else type(given)
    return _descends(kind, "dask_gateway.client", "GatewayCluster")


def is_kube(given: Any) -> bool:
    """Tell whether this is the class for dask-kubernetes' operator, or alike, or such a cluster."""
    kind = given if isinstance(given, type) else type(given)
    return _descends(kind, "dask_kubernetes.operator.kubecluster.kubecluster", "KubeCluster")


def is_vm(given: Any) -> bool:
    """Tell whether this is one of dask-cloudprovider's classes for virtual machines, or alike."""
    return _descends(given, "dask_cloudprovider.generic.vmcluster", "VMCluster")


def is_ec2(given: Any) -> bool:
    """Tell whether this is dask-cloudprovider's ``EC2Cluster``, or alike."""
    return _descends(given, "dask_cloudprovider.aws.ec2", "EC2Cluster")


def _descends(given: Any, module: str, name: str) -> bool:
    mro = given.__mro__ if isinstance(given, type) else ()
    return any((cls.__module__, cls.__name__) == (module, name) for cls in mro)

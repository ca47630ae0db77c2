"""From what ``backend=`` was given to what starts the runners (A3)."""

from __future__ import annotations

import importlib
from typing import Any

from distributed import LocalCluster, Nanny, SpecCluster, SSHCluster
from distributed.deploy.subprocess import SubprocessCluster

from flame_dask.backends.base import Backend
from flame_dask.backends.generic import GenericBackend
from flame_dask.backends.processes import ProcessBackend
from flame_dask.backends.ssh import SSHBackend
from flame_dask.backends.vendor import is_ecs, is_gateway, is_job_queue, is_kube, is_vm, split
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

_REMEDY = (
    "give LocalCluster, SubprocessCluster, SSHCluster, a class of dask-jobqueue or "
    "dask-cloudprovider, GatewayCluster, dask_kubernetes.operator.KubeCluster, or another class "
    "that inherits from SpecCluster; one of them with options as (class, {...}), its dotted path, "
    "a running cluster without workers, or an object with the methods of "
    "flame_dask.backends.base.Backend"
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
    given, more = split(options.backend)
    if isinstance(given, str):
        given = _imported(given)
    if given is None:
        given = LocalCluster
    if given is SubprocessCluster or (isinstance(given, type) and issubclass(given, LocalCluster)):
        return ProcessBackend(options, given, more)
    if given is SSHCluster:
        return SSHBackend(options, more)
    if is_job_queue(given):
        from flame_dask.backends.jobqueue import JobQueueBackend

        return JobQueueBackend(options, given, more)
    if is_gateway(given):
        from flame_dask.backends.gateway import GatewayBackend

        return GatewayBackend(options, given, more)
    if is_kube(given):
        from flame_dask.backends.kube import KubeBackend

        return KubeBackend(options, given, more)
    if is_ecs(given):
        from flame_dask.backends.ecs import ECSBackend

        return ECSBackend(options, given, more)
    if is_vm(given):
        from flame_dask.backends.vm import VMBackend

        return VMBackend(options, given, more)
    if isinstance(given, LocalCluster) and (given.new_spec or {}).get("cls") is Nanny:
        return _running(options, given)
    if isinstance(given, SpecCluster) or _is_spec_class(given):
        _refuse_vendors(given)
        return GenericBackend(options, given, more)
    if not isinstance(given, type) and isinstance(given, Backend):
        return given
    _refuse_unsupported(given)
    raise PoolOptionsError("backend", options.backend, _REMEDY)


def _is_spec_class(given: Any) -> bool:
    # The base class itself has no workers of any kind.
    return isinstance(given, type) and issubclass(given, SpecCluster) and given is not SpecCluster


def _refuse_vendors(given: Any) -> None:
    kind = type(given)
    if is_job_queue(kind) or is_ecs(kind) or is_vm(kind):
        remedy = "give the class with options: its pool has the scheduler in the parent"
        raise PoolOptionsError("backend", given, remedy, problem="runs already")


#: Clusters whose single workers can't be started and ended soundly, and what to give instead.
_UNSUPPORTED = {
    # That of the operator is another class of this name.
    ("dask_kubernetes", "KubeCluster"): "use dask_kubernetes.operator.KubeCluster",
    ("coiled", "Cluster"): "use a class of dask-cloudprovider for the same cloud, such as "
    "FargateCluster or EC2Cluster",
}


def _refuse_unsupported(given: Any) -> None:
    kind = given if isinstance(given, type) else type(given)
    for base in kind.__mro__:
        remedy = _UNSUPPORTED.get((base.__module__.partition(".")[0], base.__name__))
        if remedy is not None:
            name = f"{base.__module__.partition('.')[0]}.{base.__name__}"
            problem = f"is a {name}, which is not supported: it does not start single workers"
            raise PoolOptionsError("backend", given, remedy, problem=problem)


def _imported(path: str) -> Any:
    module, _, name = path.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise PoolOptionsError(
            "backend", path, f"give the dotted path of a cluster class ({error})"
        ) from error


def _running(options: PoolOptions, cluster: LocalCluster) -> Backend:
    worker = cluster.new_spec
    if cluster.security.require_encryption:
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
    # Its own workers would have a nanny, which starts a dead one anew; a runner lives once.
    more = {name: v for name, v in worker["options"].items() if name not in _OF_THE_CLASS}
    return ProcessBackend(options, LocalCluster, more, cluster)


#: What LocalCluster itself puts among the options of its workers, and the pool does not need.
_OF_THE_CLASS = {
    "dashboard",
    "dashboard_address",
    "interface",
    "nthreads",
    "protocol",
    "security",
    "services",
}

"""Clusters and faults for tests on an imitation of Kubernetes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Resource = dict[str, Any]

SPACE = "/apis/kubernetes.dask.org/v1/namespaces/pools"
GROUPS = f"{SPACE}/daskworkergroups"


def refusing(status: int, message: str, *methods: str, path: str = GROUPS) -> Callable[..., None]:
    """Have the API server refuse some requests."""
    from kube_api import Fault

    def fault(method: str, asked: str, body: object) -> None:
        if method in methods and asked.startswith(path):
            raise Fault(status, message)

    return fault


def own_cluster(image: str = "", *, workers: int = 0) -> Resource:
    """Return somebody's own specification of a cluster; the image is that of its workers."""
    from dask_kubernetes.operator import make_cluster_spec

    kind = "LoadBalancer"
    spec: Resource = make_cluster_spec("mine", n_workers=workers, scheduler_service_type=kind)
    if image:
        spec["spec"]["worker"]["spec"]["containers"][0]["image"] = image
    return {"custom_cluster_spec": spec}


@contextlib.contextmanager
def open_cluster() -> Iterator[Any]:
    """Open a cluster that a pool can be given."""
    import kr8s.asyncio
    from dask_kubernetes.operator import KubeCluster

    kind = "LoadBalancer"
    cluster = KubeCluster(scheduler_service_type=kind, n_workers=0, quiet=True)

    async def cut() -> None:
        api = await kr8s.asyncio.api()
        assert api._session is not None
        await api._session.aclose()

    try:
        yield cluster
    finally:
        cluster.close()
        cluster.sync(cut)
        cluster._loop_runner.stop()

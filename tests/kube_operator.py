"""The Dask operator on an imitation of Kubernetes.

What it makes, and what it asks of a scheduler, is dask-kubernetes' own code. When it does so is
written down here as that has it. Deployments are here, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Final

from dask_kubernetes.operator.controller import controller

from kube_api import API, FINALIZER, Resource
from kube_pods import Pod
from support import make_site

#: Seconds between two looks whether a scheduler is idle; the operator's own value is 5.
IDLE_PAUSE: Final = 1.0

#: Seconds for a scheduler to say so: there is one timer for all clusters, and some are just going.
IDLE_LIMIT: Final = 2.0

logger = logging.getLogger("kube-operator")


class Kube(API):
    """The API server, the operator, and the machines.

    Attributes
    ----------
    most
        The largest number of pods of workers that there were at the same time.
    quota
        How many of these there may be; ``None`` is no limit.
    idle
        Since when schedulers have been idle, each time that the operator asked; 0 is not idle, and
        ``None`` that they did not say.
    operator
        Whether the operator is there.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.most = 0
        self.quota: int | None = None
        self.idle: list[float | None] = []
        self.operator = threading.Event()
        self._site = make_site(folder / "site")
        self._over = threading.Event()
        self._worker = threading.Thread(target=self._reconcile, name="kube-operator")
        self._timer = threading.Thread(target=self._look_after_idle, name="kube-timer")
        self.reset()
        self._worker.start()
        self._timer.start()

    def reset(self) -> None:
        """Have it work as it should, and forget what was."""
        self.fault = lambda *_: None
        self.most, self.quota = 0, None
        self.answered.clear()
        self.idle.clear()
        self.operator.set()

    def close(self) -> None:
        """End it, and all that runs."""
        self._over.set()
        self.changed.set()
        self._worker.join()
        self._timer.join()
        super().close()

    # -- for tests -----------------------------------------------------------------------------

    def names(self, kind: str) -> list[str]:
        """Return what there is of a kind; groups only those that are not a cluster's first."""
        with self.lock:
            return sorted(name for name in self.all[kind] if not name.endswith("-default"))

    def pods(self, component: str = "worker") -> list[Pod]:
        """Return the pods of workers, or the ``scheduler``'s."""
        with self.lock:
            return [
                pod
                for pod in self.running.values()
                if pod.resource["metadata"]["labels"]["dask.org/component"] == component
            ]

    def everything(self) -> list[tuple[str, str]]:
        """Return all that there is."""
        with self.lock:
            return [(kind, name) for kind, there in self.all.items() for name in there]

    def clear(self) -> None:
        """Delete all that there is."""
        for name in self.names("daskclusters"):
            self.delete("daskclusters", name)
        self.settle()

    # -- the operator --------------------------------------------------------------------------

    def _reconcile(self) -> None:
        while not self._over.is_set():
            self.changed.wait(0.1)
            self.changed.clear()
            with self.lock:
                if self.operator.is_set():
                    for cluster in list(self.all["daskclusters"].values()):
                        self._on_cluster(cluster)
                    for group in list(self.all["daskworkergroups"].values()):
                        self._on_group(group)
                for deployment in list(self.all["deployments"].values()):
                    self._on_deployment(deployment)
            self.delete_orphans()

    def _on_cluster(self, cluster: Resource) -> None:
        metadata, spec = cluster["metadata"], cluster["spec"]
        if "deletionTimestamp" in metadata:
            metadata["finalizers"].clear()
        if "deletionTimestamp" in metadata or "status" in cluster:
            return
        metadata["finalizers"].append(FINALIZER)
        name, scheduler = metadata["name"], spec["scheduler"]
        told = metadata.get("annotations", {}), metadata["labels"]
        data = controller.build_scheduler_deployment_spec(name, scheduler["spec"], *told)
        self._create("deployments", data, cluster)
        data = controller.build_scheduler_service_spec(name, scheduler["service"], *told)
        for port in data["spec"]["ports"]:
            port["port"] = _free_port()
        data["status"] = {"loadBalancer": {"ingress": [{"ip": "127.0.0.1"}]}}
        self._create("services", data, cluster)
        data = controller.build_default_worker_group_spec(name, spec["worker"], *told)
        self._create("daskworkergroups", data)
        cluster["status"] = {"phase": "Running"}

    def _on_group(self, group: Resource) -> None:
        metadata, spec = group["metadata"], group["spec"]
        name, cluster = metadata["name"], self.all["daskclusters"].get(spec["cluster"])
        if cluster is None or "deletionTimestamp" in metadata:
            return
        metadata["ownerReferences"] = _owners(cluster)
        mine = [
            each
            for each in self.all["deployments"].values()
            if each["metadata"]["labels"].get("dask.org/workergroup-name") == name
        ]
        for _ in range(spec["worker"]["replicas"] - len(mine)):
            data = controller.build_worker_deployment_spec(
                worker_group_name=name,
                namespace=metadata["namespace"],
                cluster_name=spec["cluster"],
                uuid=uuid.uuid4().hex[:10],
                pod_spec=spec["worker"]["spec"],
                annotations=metadata.get("annotations", {}),
                labels=metadata["labels"],
            )
            self._create("deployments", data, group)

    def _create(self, kind: str, data: Resource, owner: Resource | None = None) -> None:
        data = json.loads(json.dumps(data))
        if owner is not None:
            data["metadata"]["ownerReferences"] = _owners(owner)
        self.create(kind, "pools", data)

    def _look_after_idle(self) -> None:
        while not self._over.wait(IDLE_PAUSE):
            for name in self.names("daskclusters"):
                with self.lock:
                    cluster = self.all["daskclusters"].get(name, {})
                if self.operator.is_set() and "status" in cluster:
                    self._end_if_idle(name, cluster["spec"].get("idleTimeout") or 0)

    def _end_if_idle(self, name: str, limit: int) -> None:
        if not limit:
            return
        try:
            since = asyncio.run(self._idle_since(name))
        except Exception:  # as the operator has it
            self.idle.append(None)
            return
        self.idle.append(since)
        if since and time.time() > since + limit:
            self.delete("daskclusters", name)

    async def _idle_since(self, cluster: str) -> float:
        async def address(*args: Any, port_name: str = "tcp-comm", **more: Any) -> str:
            return f"tcp://127.0.0.1:{self._port(cluster, port_name)}"

        real = controller.get_scheduler_address  # it would look for it by its name
        controller.get_scheduler_address = address
        try:
            told = f"{cluster}-scheduler", "pools", logger
            async with asyncio.timeout(IDLE_LIMIT):
                return await controller.check_scheduler_idle(*told)
        finally:
            controller.get_scheduler_address = real

    # -- Deployments ---------------------------------------------------------------------------

    def _on_deployment(self, deployment: Resource) -> None:
        metadata = deployment["metadata"]
        if "deletionTimestamp" in metadata:
            return
        uid = metadata["uid"]
        owners = [each["metadata"]["ownerReferences"][0] for each in self.all["pods"].values()]
        if uid in [owner["uid"] for owner in owners]:
            return
        worker = metadata["labels"]["dask.org/component"] == "worker"
        if worker and self.quota is not None and len(self.pods()) >= self.quota:
            message = f'pods "{metadata["name"]}" is forbidden: exceeded quota: compute-resources'
            failure = {"reason": "FailedCreate", "message": message, "status": "True"}
            deployment["status"] = {"conditions": [{"type": "ReplicaFailure", **failure}]}
            return
        template = json.loads(json.dumps(deployment["spec"]["template"]))
        cluster = metadata["labels"]["dask.org/cluster-name"]
        if not worker:  # in a network of its own it would have the usual ports
            ports = str(self._port(cluster)), f":{self._port(cluster, 'http-dashboard')}"
            args = template["spec"]["containers"][0]["args"]
            args += ["--no-dashboard", "--port", ports[0], "--dashboard-address", ports[1]]
        name = f"{metadata['name']}-{uuid.uuid4().hex[:5]}"
        owned = {**template["metadata"], "name": name, "ownerReferences": _owners(deployment)}
        pod = self.create("pods", "pools", {"metadata": owned, "spec": template["spec"]})
        self.running[name] = Pod(
            self.folder, pod, lambda word: self._resolve(cluster, word), self._site
        )
        self.most = max(self.most, len(self.pods()))

    def _resolve(self, cluster: str, word: str) -> str:
        """Do what in a pod a network of its own and a name service would."""
        service = f"{cluster}-scheduler.pools.svc.cluster.local:8786"
        word = word.replace(service, f"127.0.0.1:{self._port(cluster)}")
        # Without a dashboard, which takes as long to start as the rest.
        changed = {"0.0.0.0": "127.0.0.1", "8788": "0", "--dashboard": "--no-dashboard"}
        return changed.get(word, word)

    def _port(self, cluster: str, name: str = "tcp-comm") -> int:
        with contextlib.suppress(KeyError):
            ports = self.all["services"][f"{cluster}-scheduler"]["spec"]["ports"]
            return next(int(port["port"]) for port in ports if port["name"] == name)
        raise ConnectionError(f"there is no scheduler of {cluster}")


def _owners(owner: Resource) -> list[Resource]:
    metadata = owner["metadata"]
    mark = {"controller": True, "blockOwnerDeletion": True}
    return [{"name": metadata["name"], "uid": metadata["uid"], **mark}]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port

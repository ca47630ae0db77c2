"""Kubernetes with the Dask operator on this machine: its API is an imitation.

What dask-kubernetes and the pool ask is there, and what that rests on: the garbage collector, which
deletes what belongs to something that is deleted, in the foreground or not, and finalizers. A
Deployment makes its pods without a ReplicaSet between them. The operator is in kube_operator.py.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kube_pods import Pod

Resource = dict[str, Any]

#: Where the plural of each kind is: version of the API, and kind.
KINDS = {
    "daskclusters": ("kubernetes.dask.org/v1", "DaskCluster"),
    "daskworkergroups": ("kubernetes.dask.org/v1", "DaskWorkerGroup"),
    "deployments": ("apps/v1", "Deployment"),
    "pods": ("v1", "Pod"),
    "services": ("v1", "Service"),
}

#: What the operator writes on a cluster, because it has a timer for it; without the operator
#: nothing takes it off again.
FINALIZER = "kopf.zalando.org/KopfFinalizerMarker"

PATH = re.compile(
    r"/apis?/(?P<version>.+?)/namespaces/(?P<space>[^/]+)/(?P<kind>[^/]+)"
    r"(?:/(?P<name>[^/]+))?(?P<log>/log)?"
)
NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
LABEL = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")


class Fault(Exception):
    """An answer of the API server that is none of the usual ones."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class API:
    """The API server and the garbage collector.

    Attributes
    ----------
    fault
        Is called with method, path and body before each answer. It may raise; if it returns
        something true, what was asked is done, but the answer does not arrive.
    answered
        Methods and paths of what was asked and done.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fault: Callable[[str, str, Resource], object] = lambda *_: None
        self.answered: list[tuple[str, str]] = []
        self.all: dict[str, dict[str, Resource]] = {kind: {} for kind in KINDS}
        self.running: dict[str, Pod] = {}
        self.lock = threading.RLock()
        self.changed = threading.Event()
        self._ends: list[threading.Thread] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.config = folder / "config"
        cluster = {"server": f"http://127.0.0.1:{self._server.server_port}"}
        context = {"cluster": "here", "user": "me", "namespace": "pools"}
        self.config.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "here", "cluster": cluster}],
                    "contexts": [{"name": "here", "context": context}],
                    "users": [{"name": "me", "user": {"token": "its-secret-token"}}],
                    "current-context": "here",
                }
            )
        )

    def close(self) -> None:
        """End it, and all that runs."""
        for pod in list(self.running.values()):
            pod.end(0.0)
        self.settle()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def settle(self) -> None:
        """Wait for deletions that are under way."""
        while self._ends:
            self._ends.pop().join()

    # -- the API server ------------------------------------------------------------------------

    def answer(
        self, method: str, path: str, query: dict[str, str], body: Resource
    ) -> Resource | str:
        """Answer a request."""
        lost = self.fault(method, path, body)
        said = self._answer(method, path, query, body)
        self.answered.append((method, path))
        if lost:
            raise ConnectionError
        return said

    def _answer(
        self, method: str, path: str, query: dict[str, str], body: Resource
    ) -> Resource | str:
        if path == "/version":
            return {"gitVersion": "v1.34.0", "major": "1", "minor": "34"}
        if path == "/api":
            return {"versions": ["v1"]}
        if path == "/apis":
            groups = ("kubernetes.dask.org/v1", "apps/v1")
            versions = [{"groupVersion": group, "version": "v1"} for group in groups]
            return {"groups": [{"name": v["groupVersion"], "versions": [v]} for v in versions]}
        if re.fullmatch(r"/api/v1|/apis/[^/]+/v1", path):
            return {"resources": [_described(k) for k in KINDS if path.endswith(f"/{KINDS[k][0]}")]}
        found = PATH.fullmatch(path)
        if (
            found is None
            or found["kind"] not in KINDS
            or found["version"] != KINDS[found["kind"]][0]
        ):
            raise Fault(404, f"the server could not find the requested resource {path}")
        kind, name = found["kind"], found["name"]
        with self.lock:
            there = self.all[kind]
            for pod in self.running.values():
                pod.update()
            if method == "POST":
                return self.create(kind, found["space"], body)
            if name is None:
                return {"items": [each for each in there.values() if _fits(each, query)]}
            if name not in there:
                raise Fault(404, f'{kind} "{name}" not found')
            if found["log"]:
                return self.running[name].log(query.get("previous") == "true")
            if method == "GET":
                return there[name]
            if method == "DELETE":
                resource = there[name]
                foreground = body.get("propagationPolicy") == "Foreground"
                self.delete(kind, name, foreground, body.get("gracePeriodSeconds"))
                return resource
        raise Fault(405, f"{method} {path}")

    def create(self, kind: str, space: str, resource: Resource) -> Resource:
        """Make a resource, if it is one."""
        resource = json.loads(json.dumps(resource))
        metadata = resource["metadata"]
        name = metadata["name"]
        labels = metadata.setdefault("labels", {})
        if not NAME.fullmatch(name) or len(name) > 253:
            raise Fault(422, f"metadata.name: Invalid value: {name!r}")
        for label in labels.values():
            if not LABEL.fullmatch(label) or len(label) > 63:
                raise Fault(422, f"metadata.labels: Invalid value: {label!r}")
        owners = metadata.get("ownerReferences", [])
        if len([owner for owner in owners if owner.get("controller")]) > 1:
            raise Fault(422, "Only one reference can have Controller set to true")
        if not isinstance(resource["spec"].get("idleTimeout") or 0, int):
            raise Fault(422, "spec.idleTimeout: Invalid value")
        with self.lock:
            if name in self.all[kind]:
                raise Fault(409, f'{kind} "{name}" already exists')
            metadata |= {"uid": str(uuid.uuid4()), "namespace": space}
            metadata.setdefault("finalizers", [])
            self.all[kind][name] = resource
        self.changed.set()
        return resource

    # -- the garbage collector -----------------------------------------------------------------

    def delete(
        self, kind: str, name: str, foreground: bool = False, grace: float | None = None
    ) -> None:
        """Delete something, and all that belongs to it; in the foreground it goes last."""
        with self.lock:
            resource = self.all[kind].get(name)
            if resource is None:
                return
            metadata = resource["metadata"]
            again = "deletionTimestamp" in metadata
            if again and (kind != "pods" or grace is None):
                return
            metadata["deletionTimestamp"] = "now"
            if kind == "pods":
                usual = resource["spec"].get("terminationGracePeriodSeconds", 30)
                metadata["deletionGracePeriodSeconds"] = usual if grace is None else grace
        work = (
            (self.running[name].end, (grace,)) if again else (self._end, (kind, name, foreground))
        )
        thread = threading.Thread(target=work[0], args=work[1], name="kube-end")
        self._ends.append(thread)
        thread.start()

    def _end(self, kind: str, name: str, foreground: bool) -> None:
        resource = self.all[kind][name]
        metadata = resource["metadata"]
        if foreground:
            self._end_dependents(metadata["uid"])
        if kind == "pods":
            self.running[name].end(metadata["deletionGracePeriodSeconds"])
        gone = threading.Event()
        while metadata["finalizers"]:
            self.changed.set()
            gone.wait(0.02)
        with self.lock:
            self.running.pop(name, None)
            self.all[kind].pop(name, None)
        self.changed.set()
        if not foreground:
            self._end_dependents(metadata["uid"])

    def _end_dependents(self, uid: str) -> None:
        with self.lock:
            mine = [
                (kind, name)
                for kind, there in self.all.items()
                for name, each in there.items()
                if uid in [owner["uid"] for owner in each["metadata"].get("ownerReferences", ())]
            ]
        for kind, name in mine:
            self.delete(kind, name, foreground=True)
        gone = threading.Event()
        while any(name in self.all[kind] for kind, name in mine):
            gone.wait(0.02)

    def delete_orphans(self) -> None:
        """Delete what belongs to something that is not there (any more)."""
        with self.lock:
            there = {
                each["metadata"]["uid"] for kind in self.all.values() for each in kind.values()
            }
            orphans = [
                (kind, name)
                for kind, all_of_it in self.all.items()
                for name, each in all_of_it.items()
                if (owners := each["metadata"].get("ownerReferences"))
                and not any(owner["uid"] in there for owner in owners)
            ]
        for kind, name in orphans:
            self.delete(kind, name)


def _described(plural: str) -> Resource:
    kind = KINDS[plural][1]
    described = {"name": plural, "singularName": kind.lower(), "kind": kind, "namespaced": True}
    return {**described, "shortNames": [], "verbs": ["create", "delete", "get", "list"]}


def _fits(resource: Resource, query: dict[str, str]) -> bool:
    labels = resource["metadata"]["labels"]
    fields = {
        "metadata.name": resource["metadata"]["name"],
        "status.phase": resource.get("status", {}).get("phase"),
    }
    for selector, values in (("labelSelector", labels), ("fieldSelector", fields)):
        for term in filter(None, query.get(selector, "").split(",")):
            key, _, value = term.partition("=")
            if values.get(key) != value:
                return False
    return True


def _handler(api: API) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            path = re.sub("/+", "/", parts.path).rstrip("/")
            status, kind = 200, "application/json"
            try:
                said = api.answer(self.command, path, query, body)
                if isinstance(said, str):
                    kind = "text/plain"
                else:
                    with api.lock:
                        said = json.dumps(said)
            except Fault as fault:
                status = fault.status
                said = json.dumps({"kind": "Status", "message": str(fault), "code": status})
            except ConnectionError:
                self.close_connection = True
                return
            data = said.encode()
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _answer

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@contextlib.contextmanager
def start_kube(folder: Path) -> Iterator[Any]:
    """Have a Kubernetes with the Dask operator for a while."""
    from kube_operator import Kube

    kube = Kube(folder)
    try:
        yield kube
    finally:
        kube.close()

"""What the backend for Kubernetes asks of the API server, and what a runner is there."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

from flame_dask.backends import kube_pods
from flame_dask.backends.base import Ending
from flame_dask.constants import LAST_RESORT

#: The operator's part of the API.
OPERATOR: Final = "kubernetes.dask.org/v1"

#: Seconds for the API server to answer.
ANSWER_LIMIT: Final = 10.0

#: Seconds after an order without an answer in which it may still be carried out.
UNCLEAR: Final = 10.0

#: Seconds between two looks whether something is gone: at first, and at most.
_PAUSES: Final = (0.1, 1.0)

#: Lines of a container's log that go into an error.
_LINES: Final = 20

#: Seconds that a runner with a call that can't be ended gets at its end.
_FORCED: Final = 1

#: Seconds for the calls of a runner that Kubernetes wants to end, if the pool sets no limit.
_NO_LIMIT: Final = 3600

#: Commands of Dask's worker that are known to take its options.
_WORKERS: Final = (["dask-worker"], ["dask", "worker"])


class NoAnswerError(RuntimeError):
    """The API server has not answered in time."""


@dataclass
class Group:
    """A worker group, which is one runner.

    Attributes
    ----------
    name, cluster, runner
        Its name, that of the cluster it belongs to, and the runner's id.
    container
        The name of the worker's container in its pod.
    unclear_until
        On the event loop's clock: until when it may come to be though nothing is there yet.
    waits_for
        What its pod was waiting for when it was last looked at; empty if it runs.
    """

    name: str
    cluster: str
    runner: str
    container: str = "worker"
    unclear_until: float = 0.0
    waits_for: str = ""

    @classmethod
    def of(cls, cluster: str, runner: str) -> Group:
        """Return the group of a runner, with a name that nothing else has ever had.

        The name is a label's value as well: it may have 63 characters.
        """
        start = cluster[:40].rstrip("-.")
        return cls(f"{start}-flame-{uuid.uuid4().hex[:12]}", cluster, runner)

    def resource(
        self, cluster: dict[str, Any], pool: str, threads: int, shutdown_timeout: float | None
    ) -> dict[str, Any]:
        """Return what the API server is to be given: a worker of the cluster, and the runner's id.

        Parameters
        ----------
        cluster
            The ``DaskCluster``.
        pool
            The pool's name.
        threads
            How many calls the runner takes at the same time.
        shutdown_timeout
            Seconds that its calls get when it is to end.
        """
        worker = copy.deepcopy(cluster["spec"]["worker"])
        worker["replicas"] = 1
        container = _container(worker["spec"])
        self.container = container["name"]
        # The operator would choose a name; it leaves one alone that is there.
        kept = [each for each in container.get("env") or [] if each["name"] != "DASK_WORKER_NAME"]
        container["env"] = [*kept, {"name": "DASK_WORKER_NAME", "value": self.runner}]
        _complete(container, threads)
        # Kubernetes' own 30 seconds would cut calls off (E5).
        seconds = _NO_LIMIT if shutdown_timeout is None else shutdown_timeout + LAST_RESORT
        worker["spec"].setdefault("terminationGracePeriodSeconds", math.ceil(seconds))
        owner = {
            "apiVersion": OPERATOR,
            "kind": "DaskCluster",
            "name": self.cluster,
            "uid": cluster["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        metadata = {
            "name": self.name,
            "labels": {
                "dask.org/cluster-name": self.cluster,
                "dask.org/component": "workergroup",
            },
            "annotations": {"flame-dask/pool": pool, "flame-dask/runner": self.runner},
            # The operator does this, too, a moment later. With it a group goes with its cluster,
            # even one that comes to be when the cluster is gone.
            "ownerReferences": [owner],
        }
        return {
            "apiVersion": OPERATOR,
            "kind": "DaskWorkerGroup",
            "metadata": metadata,
            "spec": {"cluster": self.cluster, "worker": worker},
        }


def _container(pod: dict[str, Any]) -> dict[str, Any]:
    containers: list[dict[str, Any]] = pod["containers"]
    return next((each for each in containers if each.get("name") == "worker"), containers[0])


def _complete(container: dict[str, Any], threads: int) -> None:
    """Give a worker's command the options that a runner needs, if it is one of Dask's own."""
    args = list(container.get("args") or [])
    words = [*(container.get("command") or []), *args]
    if not any("DASK_WORKER_NAME" in word for word in words):
        raise RuntimeError(
            "the worker of this DaskCluster does not take its name from the operator: its command "
            "needs the words --name $(DASK_WORKER_NAME)"
        )
    if any(words[: len(known)] == known for known in _WORKERS):
        if not {"--nanny", "--no-nanny"} & set(words):
            # A nanny would take SIGTERM for the worker (E5), and start a dead one anew.
            args.append("--no-nanny")
        if "--nthreads" not in words:
            args += ["--nthreads", str(threads)]
        container["args"] = args


class KubeAPI:
    """The API server, in one namespace.

    Parameters
    ----------
    borrowed
        Whether the connections to it are somebody else's, who goes on to use them.
    """

    #: All on one event loop have the same connections: how many pools do.
    _users: ClassVar[WeakKeyDictionary[Any, int]] = WeakKeyDictionary()

    def __init__(self, *, borrowed: bool = False) -> None:
        self._borrowed = borrowed
        self._api: Any = None
        self._namespace = ""

    async def connect(self, namespace: str | None) -> None:
        """Find the server, by the configuration that all tools for Kubernetes use."""
        if self._api is None:
            import kr8s.asyncio

            api = await kr8s.asyncio.api()
            if self._api is None:  # several runners may boot at this moment
                self._users[api] = self._users.get(api, 0) + (not self._borrowed)
                self._api, self._namespace = api, namespace or api.namespace

    async def close(self) -> None:
        """Close the connections to it, unless another pool has them, too."""
        api, self._api = self._api, None
        if api is None or self._borrowed:
            return
        self._users[api] -= 1
        session = api._session  # there is no other way
        if session is not None and not self._users[api]:
            await session.aclose()  # whoever else wants one gets another

    async def _ask(self, method: str, url: str, version: str = OPERATOR, **more: Any) -> Any:
        """Return the answer; ``None`` if there is no such thing."""
        try:
            async with (
                asyncio.timeout(ANSWER_LIMIT),
                self._api.call_api(
                    method, version=version, namespace=self._namespace, url=url, **more
                ) as response,
            ):
                return response.text if url.endswith("/log") else response.json()
        except TimeoutError:
            raise NoAnswerError(
                f"the API server of Kubernetes does not answer within {ANSWER_LIMIT:g} s"
            ) from None
        except Exception as error:
            if self.status_of(error) == 404:
                return None
            raise

    @staticmethod
    def status_of(error: BaseException) -> int | None:
        """Return the HTTP status by which the server has refused something."""
        status: int | None = getattr(getattr(error, "response", None), "status_code", None)
        return status

    async def get(self, kind: str, name: str) -> dict[str, Any] | None:
        """Return a resource; ``None`` if there is none of that name."""
        found: dict[str, Any] | None = await self._ask("GET", f"{kind}/{name}")
        return found

    async def create(self, group: Group, resource: dict[str, Any]) -> None:
        """Have a group made."""
        clock = asyncio.get_running_loop().time
        # Until there is an answer: whoever gives up waiting does not take the order back.
        group.unclear_until = math.inf
        try:
            made = await self._ask("POST", "daskworkergroups", content=json.dumps(resource))
        except BaseException as error:
            refused = self.status_of(error) or 0
            group.unclear_until = 0.0 if 400 <= refused < 500 else clock() + UNCLEAR
            raise
        group.unclear_until = 0.0
        if made is None:
            raise RuntimeError(
                "the API server knows no DaskWorkerGroup: is the Dask operator installed there?"
            )

    async def look(self, group: Group) -> Ending | None:
        """Return why a group does not become a runner; ``None`` if it still may."""
        pods = await self._of(group, "pods", "v1")
        for pod in pods:
            trouble = kube_pods.trouble(pod, group.container)
            if trouble:
                return trouble._replace(log_tail=await self._log(group, pod))
        if pods:
            running = any(kube_pods.runs(pod, group.container) for pod in pods)
            waiting = (kube_pods.waits_for(pod, group.container) for pod in pods)
            group.waits_for = "" if running else next(filter(None, waiting), "")
            return None
        made = await self._of(group, "deployments", "apps/v1")
        refused = next(filter(None, map(kube_pods.refusal, made)), "")
        if refused:
            return Ending("start", refused)
        group.waits_for = "its pod" if made else "the Dask operator: does it run?"
        return None

    async def _of(self, group: Group, kind: str, version: str) -> list[dict[str, Any]]:
        """Return the pods or Deployments of a group."""
        return await self._list(kind, version, f"dask.org/workergroup-name={group.name}")

    async def _list(self, kind: str, version: str, labels: str) -> list[dict[str, Any]]:
        found = await self._ask("GET", kind, version, params={"labelSelector": labels})
        items: list[dict[str, Any]] = (found or {}).get("items", [])
        return items

    async def scheduler_trouble(self, cluster: str) -> str:
        """Return why the scheduler of a cluster does not start; empty if that is not known."""
        labels = f"dask.org/cluster-name={cluster},dask.org/component=scheduler"
        with suppress(Exception):
            for pod in await self._list("pods", "v1", labels):
                trouble = kube_pods.trouble(pod, "scheduler")
                said = str(trouble.cause) if trouble else kube_pods.waits_for(pod, "scheduler")
                if said:
                    return said
        return ""

    async def _log(self, group: Group, pod: dict[str, Any]) -> tuple[str, ...]:
        """Return what a container said last; nothing if that may not be read, or is not there."""
        name = pod["metadata"]["name"]
        for previous in ("true", "false"):  # before it was started anew, if it has been
            what = {"container": group.container, "tailLines": str(_LINES), "previous": previous}
            with suppress(Exception):
                said = await self._ask("GET", f"pods/{name}/log", "v1", params=what)
                if said:
                    return tuple(said.splitlines()[-_LINES:])
        return ()

    async def end_group(self, group: Group, limit: float, *, wait: bool, force: bool) -> Ending:
        """Have a group deleted; with ``wait``, return when its pod is gone, and how it ended.

        With ``force`` its pod gets no time for what it does.

        Raises
        ------
        TimeoutError
            If it is not gone within so many seconds.
        """
        if not wait and not force:
            await self._delete("daskworkergroups", group.name)
            return Ending()
        clock = asyncio.get_running_loop().time
        end, pause = clock() + limit, _PAUSES[0]
        ending = Ending()
        if group.waits_for:
            ending = Ending(log_tail=(f"it was waiting for: {group.waits_for}",))
        while True:
            # Time and again: it may come to be only now.
            await self._delete("daskworkergroups", group.name)
            pods = await self._of(group, "pods", "v1")
            for pod in pods:
                if ending.loss is None:
                    seen = kube_pods.how_it_ended(pod, group.container)
                    ending = seen._replace(log_tail=ending.log_tail)
                if force:
                    await self._hurry(pod)
            gone = not pods and await self.get("daskworkergroups", group.name) is None
            if gone and clock() >= group.unclear_until:
                return ending
            if clock() >= end:
                raise TimeoutError(f"worker group {group.name} or its pod is still there")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSES[1])

    async def _hurry(self, pod: dict[str, Any]) -> None:
        """Have a pod that is about to end killed; not one that would be replaced."""
        metadata = pod["metadata"]
        if metadata.get("deletionGracePeriodSeconds", 0) > _FORCED:
            body = json.dumps({"gracePeriodSeconds": _FORCED})
            with suppress(Exception):  # if that is not allowed, it takes its time
                await self._ask("DELETE", f"pods/{metadata['name']}", "v1", content=body)

    async def end(self, kind: str, name: str, limit: float) -> None:
        """Have a resource deleted, and wait until it is gone, with all that belongs to it.

        Raises
        ------
        TimeoutError
            If it is not within so many seconds.
        """
        clock = asyncio.get_running_loop().time
        end, pause = clock() + limit, _PAUSES[0]
        told, problem = False, ""
        while True:
            try:
                if not told:
                    await self._delete(kind, name)
                    told = True
                if await self.get(kind, name) is None:
                    return
                problem = "it is about to"
            except Exception as error:  # a server that is just starting anew may be back in time
                problem = str(error) or type(error).__name__
            if clock() >= end:
                raise TimeoutError(problem)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _PAUSES[1])

    async def _delete(self, kind: str, name: str) -> None:
        # In the foreground: it is there until all that belongs to it is gone, its pods above all.
        body = json.dumps({"propagationPolicy": "Foreground"})
        await self._ask("DELETE", f"{kind}/{name}", content=body)

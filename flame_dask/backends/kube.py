"""Runners on Kubernetes, for ``KubeCluster`` of dask-kubernetes and its operator.

The scheduler is the cluster's. Each runner is a worker group of its own (``DaskWorkerGroup``) with
one replica, so that runners start and stop one by one. Its worker has the runner's id as its name,
by which the pool's host knows it. What ends in a pod is started anew by Kubernetes: such a worker
is nobody's, and is sent away until its group is gone.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import dask.config
from distributed.utils import sync
from tornado.ioloop import IOLoop

from flame_dask import dask_internals as internals
from flame_dask.backends.base import Ending
from flame_dask.backends.kube_api import Group, KubeAPI
from flame_dask.backends.vendor import check, where
from flame_dask.constants import LAST_RESORT
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

logger = logging.getLogger("flame_dask")

#: Rules that are kept in part only; docs/backends/kubernetes.md says of each what differs.
IN_PART: Final = ("A6", "C1", "E5", "F2", "G3")

#: Seconds for Kubernetes to end a runner, and a cluster, before that is tried anew or given up;
#: beyond those that calls have for their end.
END_LIMIT: Final = 60.0

#: Seconds without a parent after which the operator deletes a cluster (G3), unless it is told.
IDLE_TIMEOUT: Final = 60

#: Seconds between two looks at a pod that starts: at first, and at most.
LOOK_PAUSES: Final = (1.0, 5.0)

#: Options of ``KubeCluster`` that the pool decides about, and what to give instead.
_OURS: Final = {
    "asynchronous": "give it to the pool",
    "loop": "leave it out: the pool has one",
    "n_workers": "use the pool's own options `min` and `max`",
    "create_mode": "leave it out, or give a running cluster: KubeCluster.from_name(...)",
    "shutdown_on_close": "leave it out, or give a running cluster, which is left open",
}

#: Options of a pool that an operator leaves no room for, and why.
_NOT_HERE: Final = {
    "security": "leave it out: the operator starts the scheduler, without certificates",
    "host": "leave it out: the scheduler is in the Kubernetes cluster",
    "contact_address": "leave it out: workers are told by the operator where the scheduler is",
}


class KubeBackend:
    """Runners on a cluster of dask-kubernetes' operator.

    Parameters
    ----------
    options
        The pool's options.
    cluster
        ``dask_kubernetes.operator.KubeCluster``, or one that runs and has no workers; it is left
        open then.
    given
        Options for the class: ``name``, ``namespace``, ``image``, ``resources`` and so on.
    """

    #: Its workers come as they are, and are made runners of when they have connected.
    bare = True

    #: Kubernetes takes a moment to see how a container has ended, and is asked when it is gone.
    patience = 5.0

    def __init__(self, options: PoolOptions, cluster: Any, given: Mapping[str, Any]) -> None:
        self.given = not isinstance(cluster, type)
        self.cluster: Any = cluster if self.given else None
        self._factory = None if self.given else cluster
        self._more = dict(given)
        self._pool = options.name
        self._asynchronous = options.asynchronous
        self._threads = options.max_concurrency
        self._boot_timeout = options.boot_timeout
        self._shutdown_timeout = options.shutdown_timeout
        self._api = KubeAPI(borrowed=self.given)
        self._groups: dict[str, Group] = {}
        self._closing = False
        for option, remedy in _NOT_HERE.items():
            value = getattr(options, option)
            if value is not None:
                raise PoolOptionsError(option, value, remedy, problem="is the operator's to set")
        if options.scheduler == "parent":
            remedy = "give 'remote', or leave it out: pods connect to the cluster's scheduler"
            raise PoolOptionsError("scheduler", "parent", remedy, problem="can't be had")
        if self.given:
            self._check_running(options)
        else:
            self._check_options(cluster)

    @property
    def keep_awake(self) -> bool:
        """Whether the scheduler must not count as idle while the pool is open.

        The operator would delete the cluster. That is what it is to do when the parent is gone; of
        a cluster that somebody else has made it is theirs to say.
        """
        return not self.given

    def _check_options(self, kind: type) -> None:
        check(kind.__name__, self._more, _OURS, _parameters(kind) - set(_OURS))
        idle = self._more.get("idle_timeout")
        if idle is not None and not (isinstance(idle, int) and idle > 0):
            place = where(kind.__name__, "idle_timeout")
            remedy = (
                "give a whole number of seconds, at least 1, or leave it out: it is what ends the "
                "cluster of a parent that was killed"
            )
            raise PoolOptionsError(place, idle, remedy)

    def _check_running(self, options: PoolOptions) -> None:
        cluster = self.cluster
        problem = remedy = ""
        if self._more:
            problem = "runs already and takes no options"
            remedy = "give the class with options, or the running cluster alone"
        elif cluster.asynchronous != options.asynchronous:
            problem = f"is {'' if cluster.asynchronous else 'not '}asynchronous, unlike the pool"
            remedy = "make both asynchronous, or none of them"
        elif cluster.status != internals.Status.running:
            problem, remedy = f"is {cluster.status.name}", "give one that runs, or the class"
        elif cluster.scheduler_info.get("workers"):
            problem = "has workers already"
            remedy = "scale its groups to 0: a pool starts all its workers itself"
        if problem:
            raise PoolOptionsError("backend", cluster, remedy, problem=problem)

    # -- the cluster ---------------------------------------------------------------------------

    def open(self, *, asynchronous: bool) -> Any:
        """Return the cluster, or what has to be awaited for it."""
        logger.warning(
            "pool %s: on Kubernetes rules %s hold in part only, and connections are not encrypted: "
            "whoever reaches the scheduler can run code there (see docs/backends/kubernetes.md)",
            self._pool,
            ", ".join(IN_PART),
        )
        factory = self._factory
        if factory is None:
            return self.cluster
        options = self._cluster_options()
        # On the loop that it is told it does not start by itself: that would have no limit of time.
        if asynchronous:
            loop = IOLoop.current()
            return self._start(factory(asynchronous=True, loop=loop, **options))

        def make(loop: Any) -> Any:
            async def start() -> Any:
                return await self._start(factory(loop=loop, **options))

            return sync(loop, start)

        self.cluster = internals.start_cluster(make)
        return self.cluster

    def _cluster_options(self) -> dict[str, Any]:
        from dask_kubernetes.operator.kubecluster.kubecluster import CreateMode

        options = {"quiet": True, **self._more}
        # It would connect to another's cluster of this name, and delete it in the end.
        options |= {"create_mode": CreateMode.CREATE_ONLY, "shutdown_on_close": False}
        options["n_workers"] = 0
        custom = options.get("custom_cluster_spec")
        if custom is None:
            custom = dask.config.get("kubernetes.custom-cluster-spec", None)
        idle = options.get("idle_timeout") or dask.config.get("kubernetes.idle-timeout", None)
        options["idle_timeout"] = idle or IDLE_TIMEOUT
        if custom is not None:
            options["custom_cluster_spec"] = _without_workers(custom, options["idle_timeout"])
        return options

    async def _start(self, cluster: Any) -> Any:
        self.cluster = cluster
        # It would be closed before the pool at the interpreter's exit.
        type(cluster)._instances.discard(cluster)
        internals.use_loop(cluster)
        # The scheduler's pod comes as a runner's does, and the operator has its time, too.
        limit = self._boot_timeout
        if limit is not None:
            limit += cluster._resource_timeout or 0
        mine = False
        try:
            async with asyncio.timeout(limit):
                await self._api.connect(cluster.namespace)
                if await self._api.get("daskclusters", cluster.name) is not None:
                    raise RuntimeError(f"there is a DaskCluster {cluster.name} already")
                mine = True
                await cluster
        except BaseException as error:
            why = str(error)
            if isinstance(error, TimeoutError):
                why = await self._api.scheduler_trouble(cluster.name) or why
            # One that somebody else has made at this moment is not this pool's to delete.
            taken = isinstance(error, ValueError) or self._api.status_of(error) == 409
            await self._end(cluster, mine and not taken)
            internals.leave_loop(cluster)
            self.cluster = None
            if isinstance(error, TimeoutError):
                text = f"the scheduler of {cluster.name} is not there within {limit} s ({why})"
                raise TimeoutError(text) from error
            raise
        return cluster

    def closing(self) -> None:
        """Take note that the pool ends: all that is still to be done can be done by `close`."""
        self._closing = True

    def close(self, cluster: Any) -> Any:
        """Delete the cluster, unless it was there before the pool; awaitable if asynchronous."""
        cluster = self.cluster
        if self.given or cluster is None:
            return None
        if self._asynchronous:
            return self._end(cluster, True)
        # Also if somebody has closed the object: that leaves the cluster as it is.
        cluster.sync(self._end, cluster, True)
        internals.leave_loop(cluster)
        self.cluster = None
        return None

    async def _end(self, cluster: Any, delete: bool) -> None:
        """Have a cluster deleted, and wait until nothing of it is left (A6)."""
        limit = self._end_limit
        try:
            # It leaves the deletion to us: it would not wait for the pods.
            await cluster._close()
            if delete:
                await self._api.end("daskclusters", cluster.name, limit)
        except Exception as error:
            logger.error(
                "pool %s: DaskCluster %s may go on: Kubernetes has not ended it within %g s (%s). "
                "Have it deleted there",
                self._pool,
                cluster.name,
                limit,
                error,
            )
        finally:
            await self._api.close()

    @property
    def _end_limit(self) -> float:
        """Seconds to wait for Kubernetes, which waits for calls itself (E5)."""
        grace = self._shutdown_timeout
        return END_LIMIT if grace is None else max(END_LIMIT, grace + 2 * LAST_RESORT)

    # -- runners -------------------------------------------------------------------------------

    async def boot(self, runner: str) -> None:
        """Have one worker group made, with one worker."""
        resource = await self._cluster_resource()
        group = self._groups[runner] = Group.of(self.cluster.name, runner)
        order = group.resource(resource, self._pool, self._threads, self._shutdown_timeout)
        await self._api.create(group, order)

    async def _cluster_resource(self) -> dict[str, Any]:
        """Return what is known of the cluster: of that its workers are made."""
        await self._api.connect(self.cluster.namespace)
        found = await self._api.get("daskclusters", self.cluster.name)
        if found is None:
            raise RuntimeError(f"there is no DaskCluster {self.cluster.name} any more")
        return found

    async def watch(self, runner: str) -> Ending:
        """Look at the pod while it starts; how a runner ends is asked when it is stopped."""
        group = self._groups[runner]
        clock = asyncio.get_running_loop().time
        end = clock() + (math.inf if self._boot_timeout is None else self._boot_timeout)
        pause, most = LOOK_PAUSES
        while clock() < end:
            try:
                trouble = await self._api.look(group)
            except Exception as error:
                logger.info("pool %s: no word of the pod of %s: %s", self._pool, runner, error)
            else:
                if trouble is not None:
                    return trouble
            await asyncio.sleep(pause)
            pause = min(1.2 * pause, most)
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def stop(self, runner: str, *, force: bool = False) -> Ending:
        """Have the group deleted, and wait until its pod is gone."""
        group = self._groups.get(runner)
        if group is None:
            return Ending()
        # When the pool is closing it goes with the cluster, which is about to be deleted.
        last = self._closing and not self.given
        ending = Ending()
        try:
            ending = await self._api.end_group(group, self._end_limit, wait=not last, force=force)
        except Exception:
            if not last:
                raise
        self._groups.pop(runner, None)
        return ending


def _parameters(kind: type) -> set[str]:
    """Return the options of a class, and of those that it inherits them from."""
    found: set[str] = set()
    for cls in kind.__mro__:
        if "__init__" in vars(cls):
            parameters = inspect.signature(vars(cls)["__init__"]).parameters
            found |= {name for name, each in parameters.items() if "VAR_" not in each.kind.name}
        if cls.__name__ == "KubeCluster":
            break  # what all clusters have is the pool's to set
    return found - {"self"}


def _without_workers(custom: Any, idle: int) -> dict[str, Any]:
    """Return somebody's own specification of a cluster, with no workers, and with an end."""
    if isinstance(custom, str):
        import yaml

        custom = yaml.safe_load(Path(custom).read_text())
    spec = custom["spec"]
    worker = {**spec["worker"], "replicas": 0}
    spec = {**spec, "worker": worker, "idleTimeout": spec.get("idleTimeout") or idle}
    return {**custom, "spec": spec}

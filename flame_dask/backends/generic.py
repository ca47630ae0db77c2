"""Runners on any other cluster that is a ``SpecCluster``.

What starts a worker is the cluster's own class for that, with the runner's id as its name. The pool
has no part in how it is started, and no way to prepare it: the worker becomes a runner when it has
connected, by a plugin that brings the package along (``flame_dask.runner.newcomer``).
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from distributed import SpecCluster, Worker
from distributed.utils import import_term

from flame_dask import dask_internals as internals
from flame_dask.backends import process as processes
from flame_dask.backends.base import Ending
from flame_dask.backends.secure import is_loopback
from flame_dask.backends.spec import SpecBackend
from flame_dask.backends.vendor import check
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

logger = logging.getLogger("flame_dask")

#: Options of a class that the pool decides about, and what to give instead.
_OF_THE_POOL: Final = {
    "asynchronous": "give it to the pool",
    "loop": "leave it out: the pool has one",
    "n_workers": "use the pool's own options `min` and `max`",
    "workers": "use the pool's own options `min` and `max`",
}

#: Options of a pool that are the class's here.
_NOT_HERE: Final = ("security", "host", "contact_address", "scheduler")


class GenericBackend(SpecBackend):
    """Runners started by the cluster's own class of workers.

    Parameters
    ----------
    options
        The pool's options.
    given
        A class that inherits from ``SpecCluster``, or a running one without workers.
    more
        Options for the class.
    """

    #: Its workers come as they are, and are made runners of when they have connected.
    bare = True

    def __init__(self, options: PoolOptions, given: Any, more: Mapping[str, Any]) -> None:
        running = not isinstance(given, type)
        super().__init__(given if running else None)
        self._factory: Any = None if running else given
        self._kind = type(given).__name__ if running else given.__name__
        self._more = dict(more)
        self._threads = options.max_concurrency
        self._pool = options.name
        self._mine: set[str] = set()
        self._warned = False
        for option in _NOT_HERE:
            value = getattr(options, option)
            if value is not None:
                remedy = f"give it among the options of {self._kind}, as that class has it"
                problem = "is the cluster's to say"
                raise PoolOptionsError(option, value, remedy, problem=problem)
        if running:
            self._check_running(options, given)
            return
        check(self._kind, self._more, _OF_THE_POOL)
        taken = inspect.signature(given.__init__).parameters
        # Left to itself a class may start some.
        if "n_workers" in taken:
            self._more["n_workers"] = 0
        kinds = {parameter.kind for parameter in taken.values()}
        self._takes_loop = "loop" in taken or inspect.Parameter.VAR_KEYWORD in kinds

    def _check_running(self, options: PoolOptions, cluster: SpecCluster) -> None:
        problem = remedy = ""
        if self._more:
            problem = "runs already and takes no options"
            remedy = "give the class with options, or the running cluster alone"
        elif cluster.asynchronous != options.asynchronous:
            problem = f"is {'' if cluster.asynchronous else 'not '}asynchronous, unlike the pool"
            remedy = "make both asynchronous, or none of them"
        elif cluster.status != internals.Status.running:
            problem = f"is {cluster.status.name}"
            remedy = "give one that runs, or the class"
        elif cluster.worker_spec:
            problem = "has workers already"
            remedy = "make it without workers: a pool starts all its workers itself"
        elif problem := _problem_of(cluster):
            remedy = "give another cluster"
        if problem:
            raise PoolOptionsError("backend", cluster, remedy, problem=problem)

    # -- the cluster ---------------------------------------------------------------------------

    def open(self, *, asynchronous: bool) -> Any:
        """Return the cluster; it is started if it is not asynchronous."""
        logger.warning(
            "pool %s: on %s rules F2 and G3 hold in part only: how its workers end is for that "
            "class to say (see docs/backends/other.md)",
            self._pool,
            self._kind,
        )
        if self._factory is None:
            return self.cluster
        if asynchronous:
            self.cluster = self._factory(asynchronous=True, **self._more)
            return self.cluster
        if self._takes_loop:
            self.cluster = internals.start_cluster(self._factory, **self._more)
        else:
            self.cluster = self._factory(**self._more)
        try:
            self._require_fit()
        except BaseException:
            self.cluster.close()
            raise
        return self.cluster

    def _require_fit(self) -> None:
        """Raise if this cluster can't be used; that is seen only when it has started."""
        assert self.cluster is not None
        if problem := _problem_of(self.cluster):
            raise RuntimeError(f"{self._kind} {problem}")
        if not self.given and set(self.cluster.worker_spec) - self._mine:
            raise RuntimeError(
                f"{self._kind} starts workers of its own: give it options by which it starts none"
            )
        address = self.cluster.scheduler_address.partition("://")[2].rpartition(":")[0].strip("[]")
        # What is inproc:// is within this process.
        local = is_loopback(address) or self.cluster.scheduler_address.startswith("inproc")
        if not self._warned and not local and not self.cluster.security.require_encryption:
            self._warned = True
            logger.warning(
                "pool %s: the connections of this %s are not encrypted, and whoever reaches %s can "
                "run code there",
                self._pool,
                self._kind,
                self.cluster.scheduler_address,
            )

    # -- runners -------------------------------------------------------------------------------

    def worker(self) -> tuple[type, dict[str, Any]]:
        """Return what starts a worker: what the cluster would take for its next one."""
        assert self.cluster is not None
        [spec] = self.cluster.new_worker_spec().values()
        options = {name: value for name, value in spec.get("options", {}).items() if name != "name"}
        if "nthreads" in options:
            options["nthreads"] = self._threads
        cls = spec["cls"]
        return import_term(cls) if isinstance(cls, str) else cls, options

    async def boot(self, runner: str) -> None:
        """Start one worker."""
        self._require_fit()
        self._mine.add(runner)
        await super().boot(runner)

    async def ending(self, member: Any) -> Ending:
        """Say how a worker ended: its class does not tell."""
        return Ending(cause="its worker has ended")

    async def stop(self, runner: str, *, force: bool = False) -> Ending:
        """Close a worker: as Dask closes any at first, so that it can end what it has started."""
        assert self.cluster is not None
        member: Any = self.cluster.workers.get(runner)
        if member is not None:
            address = self._address_of(runner)
            if address is not None and not force:
                await internals.unregister_worker(self.cluster, address, f"flame-end-{runner}")
                with suppress(TimeoutError):
                    await asyncio.wait_for(member.finished(), processes.TERMINATE_WAIT)
            await internals.stop_member(self.cluster, runner)
        self._mine.discard(runner)
        return Ending() if member is None else await self.ending(member)

    def _address_of(self, runner: str) -> str | None:
        assert self.cluster is not None
        workers: dict[str, Any] = self.cluster.scheduler_info["workers"]
        found = (address for address, each in workers.items() if each["name"] == runner)
        return next(found, None)


def _problem_of(cluster: SpecCluster) -> str:
    """Say why the workers of a cluster can't be runners; nothing if they can."""
    spec = cluster.new_spec
    if not spec or "cls" not in spec:
        return "has no specification of a new worker (new_spec)"
    if "group" in spec:
        return "starts several workers at a time"
    cls = spec["cls"]
    cls = import_term(cls) if isinstance(cls, str) else cls
    if isinstance(cls, type) and issubclass(cls, Worker):
        return "has its workers in the parent's own process"
    return ""

"""Runners as processes of this machine, for ``LocalCluster`` and ``SubprocessCluster`` alike."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import logging
from collections.abc import Mapping
from typing import Any, Final

from distributed import SpecCluster, Worker
from distributed.deploy.subprocess import SubprocessCluster

from flame_dask import dask_internals as internals
from flame_dask.backends import secure
from flame_dask.backends.process import OwnProcess, RunnerProcess, subprocess_cluster
from flame_dask.backends.spec import SpecBackend
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

#: Options of the cluster classes that the pool decides about, and what to give instead.
TAKEN: Final = {
    "n_workers": "give the pool min and max",
    "threads_per_worker": "give the pool max_concurrency",
    "asynchronous": "give it to the pool",
    "worker_class": "leave it out: the pool needs its own, which does not restart a dead worker",
    "processes": "leave it out: a runner that is a thread of the parent can't be ended",
    "security": "give it to the pool",
}


def check_place(options: PoolOptions, factory: Any) -> None:
    """Refuse what can't be had where all parts of a pool are on this machine."""
    elsewhere = factory is SubprocessCluster
    if options.scheduler == ("parent" if elsewhere else "remote"):
        other = "LocalCluster" if elsewhere else "SubprocessCluster"
        remedy = f"leave it out, or give backend={other}"
        problem = f"can't be had with {factory.__name__}"
        raise PoolOptionsError("scheduler", options.scheduler, remedy, problem=problem)
    if options.contact_address is not None:
        remedy = "leave it out: the runners are on this machine"
        raise PoolOptionsError("contact_address", options.contact_address, remedy)


def for_workers(factory: Any, given: Mapping[str, Any]) -> list[str]:
    """Return which of the options are not for the cluster, but for its workers.

    Raises
    ------
    PoolOptionsError
        If one is for neither: ``LocalCluster`` would swallow it.
    """
    of_cluster = {"worker_kwargs", *names_of(factory), *names_of(SpecCluster)}
    of_worker = names_of(Worker)
    for option, value in given.items():
        if option not in of_cluster | of_worker:
            near = difflib.get_close_matches(option, of_cluster | of_worker, n=1)
            remedy = f"did you mean {near[0]}?" if near else "leave it out"
            problem = "is no option of the cluster or its workers"
            where = f"backend=(..., {{{option!r}: ...}})"
            raise PoolOptionsError(where, value, remedy, problem=problem)
    return [option for option in given if option not in of_cluster]


def names_of(factory: Any) -> set[str]:
    """Return the names of the parameters of a function, or of a class and its bases."""
    makers = (
        [vars(c).get("__init__") for c in factory.__mro__]
        if isinstance(factory, type)
        else [factory]
    )
    parameters = [p for m in makers if m for p in inspect.signature(m).parameters.values()]
    names = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    return names - {"self"}


class ProcessBackend(SpecBackend):
    """Runners on this machine, each a process of its own.

    Parameters
    ----------
    options
        The pool's options.
    factory
        Makes the cluster: ``LocalCluster``, a subclass of it, or ``SubprocessCluster``.
    given
        More options for it. ``env``, ``worker_kwargs`` and, as with ``LocalCluster``, any option of
        :class:`distributed.Worker` go to the workers.
    cluster
        The cluster, if it is there already; it is left open then.
    """

    def __init__(
        self,
        options: PoolOptions,
        factory: Any,
        given: Mapping[str, Any],
        cluster: SpecCluster | None = None,
    ) -> None:
        super().__init__(cluster)
        for option, remedy in TAKEN.items():
            if option in given:
                raise PoolOptionsError(
                    f"backend=(..., {{{option!r}: ...}})",
                    given[option],
                    remedy,
                    problem="is the pool's to set",
                )
        check_place(options, factory)
        self.kind: str = factory.__name__
        rest = dict(given)
        if options.host is not None:
            rest["host"] = options.host
        self._factory = subprocess_cluster if factory is SubprocessCluster else factory
        self._boot_timeout = options.boot_timeout
        self._isolation = options.isolation
        self._security = secure.security_of(options, rest.get("host"))
        self._env = {
            **rest.pop("env", {}),
            **secure.environment(self._security, "worker"),
            **options.env,
        }
        workers = {name: rest.pop(name) for name in for_workers(factory, rest)}
        host = rest.get("host") or "127.0.0.1"
        self._worker_kwargs: dict[str, Any] = {
            "host": host,
            # Beyond a limit a worker would pause: calls would wait on it though they have a slot.
            "memory_limit": None,
            "dashboard": False,
            # As LocalCluster does: what is of interest in a log of a worker are its complaints.
            "silence_logs": rest.get("silence_logs", logging.WARNING),
            **workers,
            **rest.pop("worker_kwargs", {}),
            "nthreads": options.max_concurrency,
        }
        # A port of its own for each pool, and never open to the network by default.
        self._options = {"dashboard_address": "127.0.0.1:0", **rest}
        if self._security is not None:
            self._options["security"] = self._security

    def open(self, *, asynchronous: bool) -> Any:
        """Return the cluster, without workers."""
        if self.cluster is not None:
            return self.cluster
        options = dict(self._options)
        if self._factory is not subprocess_cluster:  # that one has no workers anyway
            options |= {"n_workers": 0, "threads_per_worker": 1}
        if asynchronous:
            self.cluster = self._factory(asynchronous=True, **options)
        else:
            self.cluster = internals.start_cluster(self._factory, **options)
        return self.cluster

    def configured(self, options: PoolOptions) -> None:
        """Tell runners to come of other options."""
        self._boot_timeout = options.boot_timeout

    def worker(self) -> tuple[type, dict[str, Any]]:
        """Return the class of a worker and its options."""
        return RunnerProcess, {
            "worker_kwargs": self._worker_kwargs,
            "env": self._env,
            "boot_timeout": self._boot_timeout,
            "isolation": self._isolation,
        }

    def close(self, cluster: Any) -> Any:
        """Close the cluster; awaitable if it is."""
        if cluster.asynchronous:
            return self._close(cluster)
        if cluster.status != internals.Status.closed:  # its loop has ended then
            cluster.sync(self._prepare_end, cluster)
        super().close(cluster)
        return None

    async def _close(self, cluster: Any) -> None:
        await self._prepare_end(cluster)
        if not self.given:
            await super().close(cluster)

    async def _prepare_end(self, cluster: Any) -> None:
        # None is left, unless the pool's own closing was cut off. Dask would ask the scheduler to
        # see to them, which may be on its way out already.
        left = [n for n, member in cluster.workers.items() if isinstance(member, OwnProcess)]
        await asyncio.gather(*(self.stop(name) for name in left))
        if isinstance(cluster.scheduler, OwnProcess):
            # Not through its own door: if it is gone, or about to go since it has lost its client,
            # Dask would try to reach it for half a minute.
            cluster.shutdown_scheduler = False
            await cluster.scheduler.close()

    def kill(self) -> None:
        """End all processes at once, without an event loop, because the interpreter exits."""
        if self.cluster is None:
            return
        for member in [*self.cluster.workers.values(), self.cluster.scheduler]:
            if isinstance(member, OwnProcess):
                member.clean_up()

"""Runners as virtual machines of a cloud, for dask-cloudprovider's ``VMCluster`` classes.

``EC2Cluster``, ``HetznerCluster``, ``GCPCluster``, ``AzureVMCluster``, ``DropletCluster`` and
others have one way to start a worker: a machine whose cloud-init runs a container. A pool has the
vendor's class start and end each machine, and says what the container does. The scheduler is in the
parent, so that a pool without runners has no machine at all (D4).

What a runner needs, certificates among it, is in the machine's user data, and gets into the
container through its standard input. It is in no argument of a process, and in no environment that
a container could be asked for.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from distributed import SpecCluster
from distributed.core import Status

from flame_dask import dask_internals as internals
from flame_dask.backends import lease
from flame_dask.backends.base import Ending
from flame_dask.backends.remote import RemoteBackend
from flame_dask.backends.sourced import SourcedCluster
from flame_dask.backends.vendor import check, where
from flame_dask.backends.vm_clouds import EC2, cloud_of
from flame_dask.backends.vm_machine import machine_class, program
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

logger = logging.getLogger("flame_dask")

#: Seconds between two tries to renew leases.
RENEWAL_PAUSE: float = 300.0

#: Seconds between two looks at a machine whose runner is not there, or not yet.
LOOK: float = 10.0

#: Options of the vendors' classes that are the pool's to set, and what says it instead.
_OF_THE_POOL: Final = {
    "asynchronous": "use the pool's own option `asynchronous`",
    "auto_shutdown": "leave it out: a machine always ends with its runner",
    "debug": "leave it out: it would show the certificates",
    "loop": "leave it out: the pool has one",
    "n_workers": "use the pool's own options `min` and `max`",
    "name": "leave it out: machines are called after the pool",
    "protocol": "use the pool's own option `security`",
    "scheduler": "leave it out: the scheduler is in the parent",
    "security": "use the pool's own option `security`",
    "silence_logs": "set the level of the logger 'distributed'",
    "worker": "leave it out: runners are Dask's own workers",
    "worker_class": "leave it out: runners are Dask's own workers",
    "worker_command": "leave it out: runners are Dask's own workers",
    "worker_module": "leave it out: runners are Dask's own workers",
    "workers": "use the pool's own options `min` and `max`",
}

#: Options of a worker that are the pool's to set.
_OF_A_RUNNER: Final = frozenset(
    {"name", "nthreads", "preload", "preload_argv", "protocol", "security"}
)


class VMBackend(RemoteBackend):
    """Runners as virtual machines.

    Parameters
    ----------
    options
        The pool's options.
    given
        The vendor's class.
    more
        Options of it.
    """

    def __init__(self, options: PoolOptions, given: type, more: Mapping[str, Any]) -> None:
        self._given = given
        self._more = dict(more)
        self._cloud = cloud_of(given)
        self._check(options)
        scheduler = dict(self._more.pop("scheduler_options", None) or {})
        super().__init__(options, given.__name__, scheduler, local=False)
        self._worker_options = {
            "dashboard": False,
            **(self._more.pop("worker_options", None) or {}),
            "nthreads": options.max_concurrency,
        }
        given_env = self._more.pop("env_vars", None) or {}
        self._variables = {name: str(text) for name, text in given_env.items()}
        self._source: Any = None
        self._class: type = SpecCluster
        self._renewal: asyncio.Task[None] | None = None
        told = len(self._told("tls://" + "x" * 60, options.name))
        if self._cloud.limit is not None and told > self._cloud.limit:
            problem = (
                f"takes {told} bytes with certificates, and the cloud allows {self._cloud.limit}"
            )
            remedy = "give less of it, or certificates with shorter keys"
            raise PoolOptionsError("env", options.env, remedy, problem=problem)

    def _check(self, options: PoolOptions) -> None:
        kind = self._given.__name__
        there = _options_of(self._given)
        of_a_scheduler = {each for each in there if each.startswith("scheduler_")}
        of_the_pool = {
            **dict.fromkeys(of_a_scheduler - {"scheduler_options"}, _OF_THE_POOL["scheduler"]),
            **_OF_THE_POOL,
        }
        check(kind, self._more, of_the_pool, there - set(of_the_pool))
        own = sorted(_OF_A_RUNNER.intersection(self._more.get("worker_options") or ()))
        if own:
            place, remedy = where(kind, "worker_options"), f"leave out {', '.join(own)}"
            raise PoolOptionsError(place, own, remedy, problem="has what is the pool's to set")
        if options.scheduler == "remote":
            remedy = _OF_THE_POOL["scheduler"]
            raise PoolOptionsError("scheduler", options.scheduler, remedy)
        self._check_groups()
        if "IBMCodeEngineCluster" in {base.__name__ for base in self._given.__mro__}:
            remedy = "use the class of another cloud: its jobs take neither user data nor secrets"
            raise PoolOptionsError("backend", self._given, remedy, problem="is not supported")

    def _check_groups(self) -> None:
        import dask.config

        if not isinstance(self._cloud, EC2) or self._more.get("security_groups"):
            return
        if not dask.config.get("cloudprovider.ec2.security_groups", None):
            place = where(self._given.__name__, "security_groups")
            remedy = "give the ids of some: the vendor's own is open to the world"
            raise PoolOptionsError(place, None, remedy, missing=True, problem="is missing")

    # -- the cluster ---------------------------------------------------------------------------

    def open(self, *, asynchronous: bool) -> Any:
        """Return a cluster without workers, whose scheduler is in this process."""
        rules = "rule F2 holds" if self._cloud.frees else "rules F2 and G3 hold"
        rest = "" if self._cloud.frees else ", and one whose parent is gone may go on costing money"
        logger.warning(
            "pool %s: on %s %s in part only: the cloud does not say what a machine died of%s (see "
            "docs/backends/vm.md)",
            self._pool_options.name,
            self.kind,
            rules,
            rest,
        )
        return super().open(asynchronous=asynchronous)

    def factory(self, **options: Any) -> SpecCluster:
        """Make the cluster: one that takes the vendor's along."""
        return SourcedCluster(self, **options)

    async def set_up(self, cluster: SpecCluster) -> None:
        """Make the vendor's object; on the event loop. It starts nothing."""
        self._source = _make_source(
            self._given, self._more, lease.tags(self._pool_options.name), cluster.loop
        )
        self._class = machine_class(self._source.worker_class)
        if self._cloud.keeps_lease:
            self._renewal = asyncio.ensure_future(self._renew_leases())

    async def tidy(self) -> None:
        """Let go of the vendor's object; on the event loop."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.wait([self._renewal])
            self._renewal = None
        if self._source is not None:
            self._source.status = Status.closed
            self._source = None

    async def _renew_leases(self) -> None:
        """Say of all machines, every now and then, that they have a parent."""
        while True:
            await asyncio.sleep(min(RENEWAL_PAUSE, lease.LEASE / 4))
            machines = [] if self.cluster is None else list(self.cluster.workers.values())
            try:
                await self._cloud.renew(machines)
            except Exception as error:
                # Only `reap` on another machine would be misled by that.
                logger.warning("the leases of machines could not be renewed: %s", error)

    # -- runners -------------------------------------------------------------------------------

    def worker(self) -> tuple[type, dict[str, Any]]:
        """Return what starts a runner."""
        if self._source is None:  # the cluster is being made
            return self._class, {}
        # They are what `new_spec` of the vendor's class would have.
        given = {
            key: value
            for key, value in self._source.worker_options.items()
            if key not in ("worker_class", "worker_module", "worker_options", "protocol")
        }
        return self._class, {"cloud": self._cloud, "options": {**given, "env_vars": {}}}

    async def boot(self, runner: str) -> None:
        """Start one machine."""
        assert self.cluster is not None
        cls, options = self.worker()
        scheduler: Any = self.cluster.scheduler
        address = getattr(scheduler, "contact_address", None) or scheduler.address
        name = _machine_name(runner)
        tags = lease.tags(self._pool_options.name)
        options["options"] = self._cloud.tagged(options["options"], tags, name)
        options |= {"machine_name": name, "told": self._told(str(address), runner)}
        await internals.start_member(self.cluster, runner, cls, options)

    def _told(self, scheduler: str, runner: str) -> str:
        spec = {"cls": "distributed.Worker", "opts": {**self._worker_options, "name": runner}}
        environment = {**self._variables, **self.environment()}
        return program(environment, [scheduler, "--spec", json.dumps(spec)])

    async def watch(self, runner: str) -> Ending:
        """Wait until a machine whose runner is not connected has switched itself off."""
        assert self.cluster is not None
        member: Any = self.cluster.workers[runner]
        scheduler: Any = self.cluster.scheduler
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(member.finished(), LOOK)
                return await self.ending(member)
            if runner not in scheduler.aliases:
                try:
                    if await self._cloud.is_off(member):
                        return Ending(cause="its machine has switched itself off")
                except Exception as error:  # the cloud is asked again; the boot's time passes
                    logger.info("the state of machine %s is not known: %s", member.name, error)

    async def stop(self, runner: str, *, force: bool = False) -> Ending:
        """End a runner and its machine."""
        assert self.cluster is not None
        member: Any = self.cluster.workers.get(runner)
        scheduler: Any = self.cluster.scheduler
        address = scheduler.aliases.get(runner)
        if address is not None:
            # A machine may go without a word, and would be waited for on this side.
            internals.strike_off_worker(scheduler, address, f"flame-end-{runner}")
        await internals.stop_member(self.cluster, runner)
        return Ending() if member is None else await self.ending(member)


class _Source:
    """Comes before the vendor's class: what a pool does in another way."""

    flame_tags: dict[str, str]

    def _log(self, message: Any) -> None:
        # It would be printed.
        logger.debug("%s", message)
        text = str(message)
        failed = text.startswith(("Failed to terminate", "Failed to clean up"))
        if failed and "NotFound" not in text and "No Server found" not in text:
            # OpenStack's class says no more than this of a machine that it could not end.
            raise RuntimeError(text)

    def get_tags(self) -> dict[str, str]:
        """Return the tags of everything, where there are such; Azure's class asks for it."""
        return {**super().get_tags(), **self.flame_tags}  # type: ignore[misc]


def _make_source(
    given: type, options: Mapping[str, Any], flame_tags: dict[str, str], loop: Any
) -> Any:
    """Return the vendor's object, without having it start anything; to be used on ``loop``."""
    cls = type(given.__name__, (_Source, given), {"flame_tags": flame_tags})
    source: Any = cls(
        **options,
        asynchronous=True,
        loop=loop,
        n_workers=0,
        # With certificates of its own it would change the configuration of the whole program.
        security=False,
        shutdown_on_close=False,
    )
    # Google's class has it from its scheduler.
    source.scheduler_internal_ip = source.scheduler_port = "in the parent"
    source.debug = False  # it may be configured, and would show the certificates
    return source


def _options_of(given: type) -> set[str]:
    """Return the options that a class and those that it inherits from take."""
    found: set[str] = set()
    for base in given.__mro__:
        if base is SpecCluster:
            break
        made = base.__dict__.get("__init__")
        if made is not None:
            for name, parameter in inspect.signature(made).parameters.items():
                if parameter.kind in (
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    inspect.Parameter.KEYWORD_ONLY,
                ):
                    found.add(name)
    return found - {"self"}


def _machine_name(runner: str) -> str:
    """Name a machine: unique, and as narrow as the clouds are."""
    pool, _, number = runner.rpartition("-")
    short = re.sub(r"[^a-z0-9]+", "-", pool.lower()).strip("-")[:30].strip("-") or "pool"
    return f"flame-{short}-{number}-{uuid.uuid4().hex[:8]}"

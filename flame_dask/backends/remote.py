"""Runners on other machines, with the scheduler in the parent.

An empty pool so costs nothing: what runs elsewhere are runners alone (D4). They connect to the
parent, which therefore needs an address that they can reach.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from distributed import Scheduler, SchedulerPlugin, SpecCluster

from flame_dask import dask_internals as internals
from flame_dask import package
from flame_dask.backends import secure
from flame_dask.backends.spec import SpecBackend
from flame_dask.constants import BOOT_TIMEOUT
from flame_dask.options import PoolOptions


class RemoteBackend(SpecBackend):
    """What backends have in common whose runners connect to a scheduler in the parent.

    A subclass says with ``worker`` how one runner is started.

    Parameters
    ----------
    options
        The pool's options. ``host`` is where the scheduler listens: all interfaces by default, or
        loopback if the runners are there too. ``contact_address`` is what runners are told instead
        of that, if there is a router or a tunnel in between.
    kind
        The name of the cluster class.
    scheduler
        Options of :class:`distributed.Scheduler`.
    local
        Whether all runners are on this machine.

    Attributes
    ----------
    kind
        The name of the cluster class.
    security
        Of all connections; ``None`` on loopback.
    """

    def __init__(
        self, options: PoolOptions, kind: str, scheduler: Mapping[str, Any], *, local: bool
    ) -> None:
        super().__init__()
        self._pool_options = options
        self.kind = kind
        host = options.host or scheduler.get("host") or ("127.0.0.1" if local else None)
        self.security = secure.security_of(options, host if host or local else "")
        self._scheduler = {
            "port": 0,
            "dashboard_address": "127.0.0.1:0",
            "protocol": "tcp://" if self.security is None else "tls://",
            **scheduler,
            "host": host,
            "security": self.security,
            "contact": options.contact_address,
            "plugins": [Attendance(self), *scheduler.get("plugins", ())],
        }

    def open(self, *, asynchronous: bool) -> Any:
        """Return a cluster without workers, whose scheduler is in this process."""
        options: dict[str, Any] = {
            "workers": {},
            "scheduler": {"cls": ParentScheduler, "options": self._scheduler},
            "worker": {"cls": self.worker()[0], "options": {}},
            "security": self.security,
            "name": self.kind,
            "silence_logs": logging.WARNING,
        }
        if asynchronous:
            self.cluster = self.factory(asynchronous=True, **options)
        else:
            self.cluster = internals.start_cluster(self.factory, **options)
        return self.cluster

    def factory(self, **options: Any) -> SpecCluster:
        """Make the cluster, with these options of ``SpecCluster``."""
        return SpecCluster(**options)

    def configured(self, options: PoolOptions) -> None:
        """Tell runners to come of other options."""
        self._pool_options = options

    def environment(self) -> dict[str, str]:
        """Return the environment variables that make a worker of Dask one of this pool's runners.

        They hold the certificates, so they must not be shown to anybody.
        """
        variables = {
            **secure.environment(self.security, "worker"),
            "DASK_DISTRIBUTED__WORKER__PRELOAD": repr([package.preload()]),
            # As LocalCluster does: what is of interest in a log of a worker are its complaints.
            "DASK_LOGGING__DISTRIBUTED": "warning",
        }
        if self._pool_options.boot_timeout is not None:
            variables[BOOT_TIMEOUT] = str(self._pool_options.boot_timeout)
        return {**variables, **self._pool_options.env}


class Attendance(SchedulerPlugin):
    """Marks each runner that comes to the scheduler as ``connected``, whatever becomes of it.

    Parameters
    ----------
    backend
        Has the cluster that has the runners.
    """

    name = "flame-attendance"

    def __init__(self, backend: SpecBackend) -> None:
        self._backend = backend

    def add_worker(self, scheduler: Scheduler, worker: str) -> None:
        """Mark one."""
        cluster = self._backend.cluster
        members: Mapping[str, Any] = {} if cluster is None else cluster.workers
        member = members.get(str(scheduler.workers[worker].name))
        if member is not None:
            member.connected = True


class ParentScheduler(Scheduler):
    """A scheduler in the parent, for workers elsewhere.

    Parameters
    ----------
    contact
        What workers are to connect to, with or without protocol and port.
    """

    def __init__(self, contact: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._contact = contact

    async def start_unsafe(self) -> Any:
        """Start it, and find out what to tell the workers."""
        started = await super().start_unsafe()
        if self._contact:
            protocol, _, port = self.address.partition("://")
            given, _, rest = self._contact.rpartition("://")
            port = port.rpartition(":")[2]
            named = rest.rpartition("]")[2].count(":") == 1  # not one of those in an IPv6 address
            self.contact_address = f"{given or protocol}://{rest if named else f'{rest}:{port}'}"
        return started

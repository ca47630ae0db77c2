"""How a pool moves in on a scheduler that is not in this process (A8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from distributed.protocol.pickle import dumps

from flame_dask import dask_internals as internals
from flame_dask import package
from flame_dask.dask_internals import PoolClient
from flame_dask.errors import BootError
from flame_dask.options import PoolOptions
from flame_dask.package import AsText
from flame_dask.runner.plugin import FlameRunner
from flame_dask.scheduler.plugin import FlameScheduler

_WELCOME: Final = "flame_dask.scheduler.welcome"


def newcomer(runner: FlameRunner, options: PoolOptions) -> AsText:
    """Return the plugin that makes a runner of a worker that comes as it is."""
    return AsText(
        "flame_dask.runner.newcomer",
        "Newcomer(runner, env)",
        runner=dumps(runner),
        env=dict(options.env),
    )


async def install_remote(
    client: PoolClient, host: FlameScheduler, plugin: object, name: str
) -> None:
    """Put the pool's plugins on a scheduler elsewhere, and the package before them.

    Parameters
    ----------
    client
        The way to it.
    host, plugin
        The plugins, for it and for its workers.
    name
        The name of the second.

    Raises
    ------
    BootError
        If the scheduler's versions of Python or Dask don't fit the parent's.
    """
    found: Mapping[str, str | None] = await internals.run_on_scheduler(
        client, AsText(_WELCOME, "found")
    )
    problem = package.misfit(found, host.versions, "scheduler")
    if problem:
        raise BootError("cluster", problem)
    if found["flame_dask"] != host.versions["flame_dask"]:
        await internals.run_on_scheduler(client, AsText(_WELCOME, "unpack"), package.archive())
    await internals.install_remote(client, host, plugin, name)

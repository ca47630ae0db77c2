"""Worker plugin that makes a runner of a worker that nobody has prepared. It is sent as text.

Some clusters start their workers themselves, with names, threads and an environment of their own
choice: all that a pool can do is to wait for them on the scheduler. Such a worker need not have
flame_dask (A8), so only Dask and the standard library are used here. It asks the pool's scheduler
which runner it is to be, and gets the package if that is missing.
"""

import asyncio
import importlib
import io
import logging
import os
import sys
import zipfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import dask
from distributed import WorkerPlugin
from distributed.protocol.pickle import loads

logger = logging.getLogger("flame_dask.runner")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _here() -> str | None:
    try:
        found: str = importlib.import_module("flame_dask").__version__
    except Exception:  # whatever is wrong with that one, it is not what is wanted
        return None
    return found


class Newcomer(WorkerPlugin):
    """Gives its place to the pool's own plugin.

    Parameters
    ----------
    runner
        That plugin, pickled.
    env
        Environment variables of the pool.
    """

    name = "flame"

    def __init__(self, runner: bytes, env: Mapping[str, str]) -> None:
        self.runner = runner
        self.env = env

    async def setup(self, worker: Any) -> None:
        """Become a runner, or go if there is none to become."""
        try:
            reason = await self._become_runner(worker)
        except Exception:
            self._leave(worker, "it could not become a runner")
            raise
        if reason:
            self._leave(worker, reason)

    async def _become_runner(self, worker: Any) -> str:
        versions = {"python": sys.version.split()[0], "flame_dask": _here()}
        versions |= {package: _version(package) for package in ("dask", "distributed")}
        reply = await worker.scheduler.flame_arrive(
            runner=str(worker.name), versions=versions, address=worker.address
        )
        if reply["refused"]:
            return str(reply["refused"])
        os.environ.update(self.env)
        dask.config.refresh()
        if reply["package"] is not None:
            folder = f"{worker.local_directory}/flame_dask-package"
            zipfile.ZipFile(io.BytesIO(reply["package"])).extractall(folder)
            sys.path.insert(0, folder)
            importlib.invalidate_caches()
            for name in list(sys.modules):
                if name.partition(".")[0] == "flame_dask":
                    del sys.modules[name]
        runner = loads(self.runner)
        runner.id, runner.threads = reply["runner"], reply["threads"]
        worker.plugins[self.name] = runner
        runner.setup(worker)
        return ""

    def _leave(self, worker: Any, reason: str) -> None:
        # Not within its own start, which would wait for it. With its nanny, if it has one: that
        # would start it anew.
        logger.warning("this worker is no runner: %s", reason)
        worker._flame_leaves = asyncio.ensure_future(worker.close(reason=reason))

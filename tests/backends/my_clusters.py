"""Cluster classes as somebody may have at home: each worker is a process of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from distributed import Scheduler, SpecCluster
from distributed.deploy.spec import ProcessInterface
from distributed.deploy.subprocess import SubprocessScheduler

from support import make_site


class MyWorker(ProcessInterface):
    """A worker of Dask's command line, in an interpreter that has no flame_dask."""

    def __init__(
        self, scheduler: str, name: str, folder: str, arguments: tuple[str, ...] = ()
    ) -> None:
        super().__init__(scheduler, name)
        self.process: subprocess.Popen[bytes] | None = None
        self._folder = folder
        command = [sys.executable, "-m", "distributed.cli.dask_worker"]
        self._command = [*command, scheduler, "--name", name]
        self._command += ["--no-dashboard", "--local-directory", folder, *arguments]

    async def start(self) -> None:
        site = make_site(Path(self._folder) / "site")
        with open(Path(self._folder) / "log", "ab") as log:
            self.process = subprocess.Popen(
                self._command,
                env={**os.environ, "PYTHONPATH": site},
                cwd=self._folder,  # not where flame_dask lies
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        await super().start()

    async def close(self) -> None:
        if self.process is not None:
            self.process.terminate()
            await asyncio.to_thread(self.process.wait)
        await super().close()


class MyCluster(SpecCluster):
    """With the scheduler in the parent."""

    def __init__(
        self, folder: str, arguments: tuple[str, ...] = (), first: int = 0, **options: Any
    ):
        worker = {"cls": MyWorker, "options": {"folder": folder, "arguments": arguments}}
        super().__init__(
            scheduler=self.my_scheduler(folder),
            worker=worker,
            workers={f"first-{number}": worker for number in range(first)},
            **options,
        )

    def my_scheduler(self, folder: str) -> dict[str, Any]:
        local = {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}
        return {"cls": Scheduler, "options": local}

    def _new_worker_name(self, worker_number: int) -> str:
        return f"worker-{worker_number}"


class MyDistantCluster(MyCluster):
    """With the scheduler in a process of its own."""

    def my_scheduler(self, folder: str) -> dict[str, Any]:
        options = {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}
        # Left to itself it may leave the file behind.
        options["scheduler_file"] = f"{folder}/scheduler"
        return {"cls": SubprocessScheduler, "options": {"scheduler_kwargs": options}}

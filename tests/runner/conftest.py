"""A scheduler with a host that only writes down what it hears, and runners of all kinds."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Scheduler, Worker
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.protocol.pickle import dumps

from flame_dask import dask_internals as internals
from flame_dask.constants import BOOT_TIMEOUT, RUNNER_FOLDER
from flame_dask.payload import Payload, pack_call
from flame_dask.runner import here
from flame_dask.runner.execution import CallRaised, Terms, run_call, run_call_async
from flame_dask.runner.plugin import FlameRunner


class Host(SchedulerPlugin):
    """Stands in for the pool's host: it takes note of messages and of what tasks come to."""

    name = "flame"

    def __init__(self) -> None:
        self.news: list[dict[str, Any]] = []
        self.ends: dict[str, tuple[str, dict[str, Any]]] = {}
        self.order: list[tuple[str, str]] = []

    async def start(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        internals.listen_to_streams(scheduler, self.receive)

    def receive(self, **message: Any) -> None:
        self.order.append((message["what"], message.get("task", "")))
        self.news.append(message)

    def transition(self, key: Any, start: str, finish: str, *args: Any, **kwargs: Any) -> None:
        if start == "processing" and finish in ("memory", "erred"):
            self.order.append((finish, key))
            self.ends[key] = finish, kwargs


class Process:
    """A runner process, started as a backend does it."""

    def __init__(self, address: str, name: str, boot_timeout: float | None, **options: Any) -> None:
        self.name = name
        self.address = ""
        self.folder = tempfile.mkdtemp(prefix="flame-")
        options = {
            "name": name,
            "nthreads": 4,
            "dashboard": False,
            "memory_limit": None,
            "host": "127.0.0.1",
            "local_directory": self.folder,
            "preload": ["flame_dask.runner.boot"],
            **options,
        }
        spec = json.dumps({"cls": "distributed.Worker", "opts": options})
        env = {**os.environ, RUNNER_FOLDER: self.folder}
        if boot_timeout is not None:
            env[BOOT_TIMEOUT] = str(boot_timeout)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_spec", address, "--spec", spec],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
        self.pid = self.process.pid

    def relatives(self) -> list[psutil.Process]:
        """All processes of the runner's session, the guard's too."""
        guard = [p for p in psutil.process_iter(["cmdline"]) if self._is_guard(p)]
        return [*self.members(), *guard]

    def members(self) -> list[psutil.Process]:
        """All processes of the runner's session."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and os.getsid(process.pid) == self.pid:
                    found.append(process)
        return found

    def _is_guard(self, process: psutil.Process) -> bool:
        line = process.info["cmdline"] or []
        return "flame-guard" in line and self.folder in line

    def parent_dies(self) -> None:
        """Do what the parent's death does."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(OSError):
            self.parent_dies()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Bench:
    """A scheduler on an event loop of its own, in a thread."""

    def __init__(self, until: Callable[..., Any]) -> None:
        self.until = until
        self.host = Host()
        self.loop = asyncio.new_event_loop()
        self._numbers = itertools.count(1)
        self._stack = contextlib.ExitStack()
        self._thread = threading.Thread(target=self.loop.run_forever, name="bench")
        self._thread.start()
        self._workers: list[Worker] = []
        self.scheduler: Scheduler = self.do(self._open())

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)

    async def _open(self) -> Scheduler:
        scheduler = Scheduler(
            host="127.0.0.1", port=0, dashboard=False, dashboard_address=":0", plugins=[]
        )
        await scheduler
        scheduler.add_plugin(self.host)
        await self.host.start(scheduler)
        return scheduler

    def plugin(self, **options: Any) -> None:
        """Have runners get this plugin."""
        info = here.describe("pool", "Bench")
        runner = FlameRunner("pool", **{"grace": 0.5, "parent": info, **options})
        self.do(
            self.scheduler.register_worker_plugin(
                comm=None, plugin=dumps(runner), name="flame", idempotent=False
            )
        )

    def worker(self, **options: Any) -> Worker:
        """Start a runner in this process."""
        self.plugin(**options)

        async def start() -> Worker:
            return await Worker(
                self.scheduler.address, nthreads=4, memory_limit=None, dashboard=False, name="here"
            )

        worker: Worker = self.do(start())
        self._workers.append(worker)
        self.ready(worker.address)
        return worker

    def process(
        self,
        boot_timeout: float | None = 30,
        worker_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> Process:
        """Start a runner in a process of its own."""
        self.plugin(**options)
        process = self.start(self.scheduler.address, boot_timeout, **(worker_options or {}))
        name = process.name
        process.address = self.until(lambda: self.address(name), 20)
        self.ready(process.address)
        return process

    def start(self, address: str, boot_timeout: float | None = 30, **options: Any) -> Process:
        """Start a worker process, whatever is at that address."""
        process = Process(address, f"runner-{next(self._numbers)}", boot_timeout, **options)
        self._stack.callback(process.close)
        return process

    def address(self, name: str) -> str | None:
        for worker in list(self.scheduler.workers.values()):
            if worker.name == name:
                return str(worker.address)
        return None

    def ready(self, address: str) -> None:
        self.until(lambda: self.heard("ready", worker=address), 20)

    def heard(self, what: str, **parts: Any) -> list[dict[str, Any]]:
        """Return the messages of this kind."""
        return [
            news
            for news in list(self.host.news)
            if news["what"] == what and all(news.get(k) == v for k, v in parts.items())
        ]

    def submit(
        self,
        address: str,
        fn: Callable[..., Any],
        *args: Any,
        limit: float | None = None,
        link: bool = True,
        inline: int = 65536,
        asynchronous: bool = False,
        on_loop: bool | None = None,
    ) -> str:
        """Place a call on a runner; return the key of its task."""
        key = f"task-{next(self._numbers)}"
        terms = Terms(f"call-{key}", key, inline, limit, link, asynchronous)
        run = run_call_async if (asynchronous if on_loop is None else on_loop) else run_call
        spec = internals.make_task(key, run, pack_call(fn, args, {}), None, terms)

        async def place() -> None:
            internals.place_task(
                self.scheduler,
                key=key,
                spec=spec,
                address=address,
                owner="bench",
                priority=0,
                stimulus_id="test",
            )

        self.do(place())
        return key

    def tell(self, address: str, **message: Any) -> None:
        """Send a message to a runner."""

        async def send() -> None:
            assert internals.send_to_worker(self.scheduler, address, message)

        self.do(send())

    def cut(self, address: str) -> None:
        """Do what the death of the scheduler does to a runner."""

        async def abort() -> None:
            self.scheduler.stream_comms[address].abort()

        self.do(abort())

    def terminate(self, address: str, key: str) -> None:
        self.tell(address, what="terminate", task=key, reason="order")

    def end(self, key: str, deadline: float = 10) -> str:
        """Wait until a task is over; return how."""
        self.until(lambda: key in self.host.ends, deadline, about=f"{key} is over")
        return self.host.ends[key][0]

    def value(self, key: str, deadline: float = 10) -> Any:
        """Return the value of a call, or raise what it raised."""
        kind, details = self.until(lambda: self.host.ends.get(key), deadline, about=f"{key} over")
        if kind == "memory":
            parts = (details.get("metadata") or {}).get(internals.RESULT)
            return None if parts is None else Payload.from_parts(parts).load()
        error, _ = internals.open_error(details["exception"], details["traceback"])
        if isinstance(error, CallRaised):
            raise error.payload.load()
        raise error

    def close(self) -> None:
        async def close() -> None:
            for worker in self._workers:
                await worker.close()
            await self.scheduler.close()

        self._stack.close()
        try:
            self.do(close())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join()
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()


@pytest.fixture(scope="module")
def make_bench(until: Callable[..., Any], temporary_folder: Path) -> Iterator[Callable[[], Bench]]:
    """Make a bench that ends with the module."""
    with contextlib.ExitStack() as stack:

        def make() -> Bench:
            bench = Bench(until)
            stack.callback(bench.close)
            return bench

        yield make


@pytest.fixture
def bench(until: Callable[..., Any], temporary_folder: Path) -> Iterator[Bench]:
    """A scheduler and what runs under it; all of it ends with the test."""
    bench = Bench(until)
    yield bench
    bench.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a call tells that it has begun."""
    return tmp_path / "begun"

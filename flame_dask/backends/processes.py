"""Runners as processes of this machine, for ``LocalCluster`` and ``SubprocessCluster`` alike."""

from __future__ import annotations

import asyncio
import difflib
import inspect
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from distributed import SpecCluster, Worker
from distributed.deploy.subprocess import SubprocessWorker

from flame_dask import dask_internals as internals
from flame_dask.backends.base import Ending
from flame_dask.backends.spec import SpecBackend, describe_exit
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

#: Seconds for a worker to take its leave of the scheduler before it is killed.
TERMINATE_WAIT: Final = 5.0

#: Seconds to wait for the last words of a process. Its pipe may stay open much longer: whatever it
#: has started, and was out of reach, holds the pipe too.
LAST_WORDS_WAIT: Final = 1.0

#: Options of the cluster classes that the pool decides about, and what to give instead.
TAKEN: Final = {
    "n_workers": "give the pool min and max",
    "threads_per_worker": "give the pool max_concurrency",
    "asynchronous": "give it to the pool",
    "worker_class": "leave it out: the pool needs its own, which does not restart a dead worker",
    "processes": "leave it out: a runner that is a thread of the parent can't be ended",
    "security": "leave it out: such a cluster is reached from this machine only",
}


class RunnerProcess(SubprocessWorker):
    """A worker process without a nanny: it lives once, and its last words are kept.

    It leads a session of its own, so that Ctrl-C reaches the parent alone, and what calls have
    started can be ended with it.

    Parameters
    ----------
    scheduler
        The scheduler's address.
    name
        The runner's id.
    worker_kwargs
        Options of :class:`distributed.Worker`.
    env
        Environment variables in addition to the parent's.

    Attributes
    ----------
    exit_code
        Negative for a signal; ``None`` until the process has ended.
    log
        The last lines of its stderr.
    """

    def __init__(
        self,
        scheduler: str,
        name: str,
        worker_kwargs: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            scheduler,
            worker_class="distributed.Worker",
            name=name,
            worker_kwargs={**worker_kwargs, "name": name},
        )
        self.env = dict(env or {})
        self.exit_code: int | None = None
        self.log: deque[str] = deque(maxlen=50)
        self._attendant: asyncio.Task[None] | None = None
        self._folder: str | None = None

    async def _start(self) -> None:
        if "local_directory" not in self.worker_kwargs:
            # Its own, so that it can be removed when the worker had no time to do so.
            self._folder = tempfile.mkdtemp(prefix="flame-")
            self.worker_kwargs["local_directory"] = self._folder
        spec = json.dumps({"cls": self.worker_class, "opts": self.worker_kwargs})
        # A pipe of our own: with one of asyncio's, a process has not ended, for Python 3.11, before
        # all that it has started has closed the pipe too.
        ours, its = os.pipe()
        try:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dask", "spec", self.scheduler, "--spec", spec,
                stdin=asyncio.subprocess.DEVNULL,
                stderr=its,
                env={**os.environ, **self.env},
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(its)
        self._attendant = asyncio.ensure_future(self._attend(self.process, ours))

    async def _attend(self, process: asyncio.subprocess.Process, pipe: int) -> None:
        """Go with the process to its end, and keep its last words."""
        stream = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stream),
            open(pipe, "rb", buffering=0),  # noqa: SIM115  # the transport closes it
        )
        reader = asyncio.ensure_future(self._read(stream))
        try:
            self.exit_code = await process.wait()
            await asyncio.wait([reader], timeout=LAST_WORDS_WAIT)
        finally:
            reader.cancel()
            transport.close()
        self._event_finished.set()

    async def _read(self, stream: asyncio.StreamReader) -> None:
        """Keep the last lines of the log, and pass them on to where they would have gone."""
        async for line in read_lines(stream):
            self.log.append(line.rstrip("\n"))
            pass_on(line)

    async def close(self) -> None:
        """End the process: gracefully at first, since its worker tells the scheduler then."""
        async with self.lock:  # not while it is being started
            await self._end()
        await super().close()

    async def _end(self) -> None:
        process = self.process
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.terminate()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(process.wait(), TERMINATE_WAIT)
        self.clean_up()
        if self._attendant is not None:
            await asyncio.wait([self._attendant])
        self.process = None

    def clean_up(self) -> None:
        """Kill what is left of the process and all that it has started, and remove its folder."""
        if self.process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        if self._folder is not None:
            # Not in another thread: a pool is closed at the end of the interpreter too, when no
            # executor takes work any more. There is little in it, its worker has cleaned up.
            shutil.rmtree(self._folder, ignore_errors=True)


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


async def read_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield the lines of a stream, but for overlong ones, which the stream drops."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:  # longer than the stream's limit
            continue
        if not line:
            return
        yield line.decode(errors="replace")


def pass_on(line: str) -> None:
    """Write a line of another process's log where that process would have written it."""
    # Our own stderr may be closed, broken, or not there at all: the reader must not end over it.
    with suppress(ValueError, OSError, AttributeError):
        sys.stderr.write(line)


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
        rest = dict(given)
        self._factory = factory
        self._env = {**rest.pop("env", {}), **options.env}
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
        self._drain: asyncio.Task[None] | None = None
        self.scheduler_log: deque[str] = deque(maxlen=50)

    def open(self, *, asynchronous: bool) -> Any:
        """Return the cluster, without workers."""
        if self.cluster is not None:
            return self.cluster
        options = {**self._options, "n_workers": 0, "threads_per_worker": 1}
        if asynchronous:
            self.cluster = self._factory(asynchronous=True, **options)
        else:
            self.cluster = internals.start_cluster(self._factory, **options)
        return self.cluster

    def worker(self) -> tuple[type, dict[str, Any]]:
        """Return the class of a worker and its options."""
        return RunnerProcess, {"worker_kwargs": self._worker_kwargs, "env": self._env}

    async def boot(self, runner: str) -> None:
        """Start one worker process."""
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._drain_scheduler())
        await super().boot(runner)

    def ending(self, member: Any) -> Ending:
        """Say how a worker process ended."""
        code = member.exit_code
        return Ending(cause=describe_exit(code), exit_code=code, log_tail=tuple(member.log))

    async def stop(self, runner: str) -> Sequence[str]:
        """End a worker process; return its last log lines."""
        assert self.cluster is not None
        member: Any = self.cluster.workers.get(runner)
        await super().stop(runner)
        return () if member is None else tuple(member.log)

    def close(self, cluster: Any) -> Any:
        """Close the cluster; awaitable if it is."""
        if cluster.asynchronous:
            return self._close(cluster)
        if cluster.status != internals.Status.closed:  # its loop has ended then
            cluster.sync(self._prepare_end, cluster)
        super().close(cluster)
        self._tidy(cluster)
        return None

    async def _close(self, cluster: Any) -> None:
        await self._prepare_end(cluster)
        if not self._given:
            await super().close(cluster)
            self._tidy(cluster)

    def _tidy(self, cluster: Any) -> None:
        """Remove the file in which a scheduler process told its address, as it is killed."""
        options: dict[str, Any] = getattr(cluster.scheduler, "scheduler_kwargs", {})
        if "scheduler_file" in options:
            Path(options["scheduler_file"]).unlink(missing_ok=True)

    async def _prepare_end(self, cluster: Any) -> None:
        if self._drain is not None:
            self._drain.cancel()
            await asyncio.wait([self._drain])
        process = getattr(cluster.scheduler, "process", None)
        if process is not None and process.returncode is not None:
            # The scheduler is gone: Dask would try to reach it for half a minute.
            cluster.shutdown_scheduler = False
            await cluster.scheduler.close()

    def kill(self) -> None:
        """End all processes at once, without an event loop, because the interpreter exits."""
        if self.cluster is None:
            return
        for member in [*self.cluster.workers.values(), self.cluster.scheduler]:
            process = getattr(member, "process", None)
            if process is not None and process.returncode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            if isinstance(member, RunnerProcess):
                member.clean_up()
        self._tidy(self.cluster)

    async def _drain_scheduler(self) -> None:
        """Read the stderr of a scheduler process: a full pipe would bring it to a stop."""
        assert self.cluster is not None
        process: Any = getattr(self.cluster.scheduler, "process", None)
        if process is not None and process.stderr is not None:
            # Dask reads it as it ends the process: a second reader would be one too many.
            stream, process.stderr = process.stderr, None
            async for line in read_lines(stream):
                if " - INFO - " not in line:  # as for the workers, only its complaints
                    self.scheduler_log.append(line.rstrip("\n"))
                    pass_on(line)

"""A runner, and a scheduler, as a process of its own on this machine.

Both end with their parent, however it dies (G3): their standard input is a pipe whose other end
only the parent holds. :mod:`flame_dask.runner.boot` and :mod:`flame_dask.scheduler.boot` watch it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil
from distributed import SpecCluster
from distributed.deploy.subprocess import Subprocess, SubprocessScheduler, SubprocessWorker
from distributed.security import Security

from flame_dask.backends import secure
from flame_dask.backends.base import Ending
from flame_dask.constants import BOOT_TIMEOUT, OOM_EXIT, RUNNER_FOLDER
from flame_dask.system import is_running, kernel_kills

#: Seconds for a process to take its leave of the others before it is killed.
TERMINATE_WAIT: float = 5.0

#: Seconds to wait for the last words of a process. Its pipe may stay open much longer: whatever it
#: has started, and was out of reach, holds the pipe too.
LAST_WORDS_WAIT: Final = 1.0

#: Seconds between two looks for the file in which a scheduler tells its address.
ADDRESS_PAUSE: Final = 0.02

#: What starts a part of Dask. "dask spec" imports the commands of all packages first, which takes
#: half as long again.
DASK_SPEC: Final = "distributed.cli.dask_spec"

#: The ends of pipes by which processes know that this one lives.
_lifelines: set[int] = set()


def _cut_lifelines() -> None:
    """Let go of them in a forked child, which may live longer than its parent."""
    while _lifelines:
        os.close(_lifelines.pop())


os.register_at_fork(after_in_child=_cut_lifelines)


class OwnProcess(Subprocess):
    """A process that lives once, ends with this one, and whose last words are kept.

    It leads a session of its own, so that Ctrl-C reaches the parent alone, and all that it starts
    can be ended with it.

    Attributes
    ----------
    exit_code
        Negative for a signal; ``None`` until the process has ended.
    log
        The last lines of its stderr.
    """

    #: Whether a line of its log is worth keeping.
    _worth: Any = staticmethod(lambda line: True)

    def _prepare(self) -> None:
        """Make what an instance needs; the classes of Dask have constructors of their own."""
        self.exit_code: int | None = None
        self.log: deque[str] = deque(maxlen=50)
        self._attendant: asyncio.Task[None] | None = None
        self._lifeline: int | None = None
        # The signals that this side has sent it.
        self._sent: set[int] = set()
        self._kills_before = 0

    async def _launch(
        self, arguments: Sequence[str], env: Mapping[str, str], *, program: str = DASK_SPEC
    ) -> None:
        # Pipes of our own: with one of asyncio's, a process has not ended, for Python 3.11, before
        # all that it has started has closed the pipe too.
        ours, its = os.pipe()
        end, lifeline = os.pipe()
        self._kills_before = kernel_kills()
        try:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", program, *arguments,
                stdin=end,
                stderr=its,
                env={**os.environ, **env},
                start_new_session=True,
            )  # fmt: skip
        except BaseException:
            os.close(ours)
            os.close(lifeline)
            raise
        finally:
            os.close(its)
            os.close(end)
        self._lifeline = lifeline
        _lifelines.add(lifeline)
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
            if self._worth(line):
                self.log.append(line.rstrip("\n"))
                pass_on(line)

    async def end(self, force: bool = False) -> None:
        """End the process: gracefully at first, unless ``force``, and with all it has started."""
        async with self.lock:  # not while it is being started
            process = self.process
            if process is not None and process.returncode is None and not force:
                self._sent.add(signal.SIGTERM)
                # Not by process.terminate(): that polls the process first, and can so take the
                # exit code from whoever waits for it.
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(process.wait(), TERMINATE_WAIT)
            self.clean_up()
            if self._attendant is not None:
                await asyncio.wait([self._attendant])
            self.process = None

    async def close(self) -> None:
        """End the process."""
        await self.end()
        await super().close()

    def clean_up(self) -> None:
        """Kill what is left of the process and of all that it has started."""
        if self.process is not None:
            if self.process.returncode is None:
                self._sent.add(signal.SIGKILL)
            kill_session(self.process.pid)
        if self._lifeline in _lifelines:  # not if this is a forked child
            _lifelines.discard(self._lifeline)
            os.close(self._lifeline)
            self._lifeline = None

    def ending(self) -> Ending:
        """Say how the process ended."""
        code = self.exit_code
        out_of_memory = code == OOM_EXIT or (
            code == -signal.SIGKILL and kernel_kills() > self._kills_before
        )
        # A process that had been told to end may have died of something else in that moment.
        ours = -code in self._sent if code else signal.SIGTERM in self._sent
        loss: Any = None
        if code is not None and not ours:
            loss = "oom" if out_of_memory else "signal" if code < 0 else "exited"
        cause = describe_exit(code)
        if out_of_memory and loss is not None:
            cause += ", out of memory"
        return Ending(cause=cause, exit_code=code, log_tail=tuple(self.log), loss=loss)


class RunnerProcess(OwnProcess, SubprocessWorker):
    """A worker process without a nanny.

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
    boot_timeout
        Seconds after which the process ends by itself if it isn't ready; ``None`` is never.
    isolation
        What its calls run in.
    """

    def __init__(
        self,
        scheduler: str,
        name: str,
        worker_kwargs: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        boot_timeout: float | None = None,
        isolation: str = "thread",
    ) -> None:
        SubprocessWorker.__init__(
            self,
            scheduler,
            worker_class="distributed.Worker",
            name=name,
            worker_kwargs={**worker_kwargs, "name": name},
        )
        self._prepare()
        self.env = dict(env or {})
        self.boot_timeout = boot_timeout
        self._program = "flame_dask.runner.start" if isolation == "process" else DASK_SPEC
        self._folder: str | None = None

    async def _start(self) -> None:
        # Its own, so that it can be removed when the worker had no time to do so.
        self._folder = tempfile.mkdtemp(prefix="flame-")
        self.worker_kwargs.setdefault("local_directory", self._folder)
        env = {**self.env, RUNNER_FOLDER: self._folder}
        if self.boot_timeout is not None:
            env[BOOT_TIMEOUT] = str(self.boot_timeout)
        preload = self.worker_kwargs.get("preload") or []
        if isinstance(preload, str):
            preload = [preload]
        options = {**self.worker_kwargs, "preload": ["flame_dask.runner.boot", *preload]}
        spec = json.dumps({"cls": self.worker_class, "opts": options})
        await self._launch([self.scheduler, "--spec", spec], env, program=self._program)

    def clean_up(self) -> None:
        """Kill what is left of the process and of all that it has started; remove its folder."""
        super().clean_up()
        if self._folder is not None:
            # Not in another thread: a pool is closed at the end of the interpreter too, when no
            # executor takes work any more. There is little in it, its worker has cleaned up.
            shutil.rmtree(self._folder, ignore_errors=True)


class SchedulerProcess(OwnProcess, SubprocessScheduler):
    """A scheduler process, as ``SubprocessCluster`` has one.

    Parameters
    ----------
    scheduler_kwargs
        Options of :class:`distributed.Scheduler`.
    timeout
        Seconds for it to tell its address.
    env
        Environment variables in addition to the parent's.
    """

    # As for the workers, only its complaints.
    _worth = staticmethod(lambda line: " - INFO - " not in line)

    def __init__(
        self,
        scheduler_kwargs: dict[str, Any] | None = None,
        timeout: int = 30,
        env: Mapping[str, str] | None = None,
    ) -> None:
        SubprocessScheduler.__init__(self, scheduler_kwargs, timeout)
        self._prepare()
        self.env = dict(env or {})

    async def _start(self) -> None:
        preload = self.scheduler_kwargs.get("preload") or []
        if isinstance(preload, str):
            preload = [preload]
        options = {**self.scheduler_kwargs, "preload": ["flame_dask.scheduler.boot", *preload]}
        spec = json.dumps({"cls": "distributed.Scheduler", "opts": options})
        await self._launch(["--spec", spec], self.env)
        try:
            self.address = await self._wait_for_address()
        except BaseException:  # who is opening the pool may give up
            self.clean_up()
            raise

    async def _wait_for_address(self) -> str:
        deadline = time.monotonic() + self.timeout
        while (address := self._told_address()) is None:
            assert self.process is not None
            ended = self.process.returncode is not None
            if ended or time.monotonic() > deadline:
                self.clean_up()
                if self._attendant is not None:
                    await asyncio.wait([self._attendant])
                tail = "\n".join(self.log)
                how = describe_exit(self.exit_code) if ended else f"not up after {self.timeout} s"
                raise RuntimeError(f"the scheduler did not start: {how}\n{tail}")
            await asyncio.sleep(ADDRESS_PAUSE)
        return address

    def _told_address(self) -> str | None:
        try:
            told = json.loads(Path(self.scheduler_kwargs["scheduler_file"]).read_text())
        except (OSError, ValueError):  # not there, or not written to its end
            return None
        address: str = told["address"]
        return address

    def clean_up(self) -> None:
        """Kill what is left of the process, and remove the file in which it told its address."""
        super().clean_up()
        Path(self.scheduler_kwargs["scheduler_file"]).unlink(missing_ok=True)


def subprocess_cluster(
    host: str | None = None,
    scheduler_port: int = 0,
    scheduler_kwargs: Mapping[str, Any] | None = None,
    dashboard_address: str | None = ":8787",
    silence_logs: int = logging.WARNING,
    security: Security | None = None,
    **kwargs: Any,
) -> SpecCluster:
    """Make a ``SubprocessCluster`` whose scheduler ends with its parent; it has no workers.

    Parameters
    ----------
    host, scheduler_port, scheduler_kwargs, dashboard_address, silence_logs, kwargs
        As for :func:`distributed.deploy.subprocess.SubprocessCluster`.
    security
        Certificates for all connections.
    """
    options = {
        "host": host or "127.0.0.1",
        "port": scheduler_port,
        "dashboard": dashboard_address is not None,
        "dashboard_address": dashboard_address,
        **({} if security is None else {"protocol": "tls://"}),
        **(scheduler_kwargs or {}),
    }
    return SpecCluster(
        workers={},
        scheduler={
            "cls": SchedulerProcess,
            "options": {
                "scheduler_kwargs": options,
                "env": secure.environment(security, "scheduler"),
            },
        },
        security=security,
        worker={"cls": RunnerProcess, "options": {}},
        name="SubprocessCluster",
        silence_logs=silence_logs,
        **kwargs,
    )


def kill_session(leader: int) -> None:
    """Kill all processes of a session, whatever groups they are in."""
    for _ in range(10):  # one may fork while the others are being killed
        killed = False
        for pid in psutil.pids():
            with suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
                if os.getsid(pid) == leader and is_running(psutil.Process(pid)):
                    os.kill(pid, signal.SIGKILL)
                    killed = True
        if not killed:
            return


def describe_exit(code: int | None) -> str:
    """Say in words how a process ended."""
    if code is None:
        return "its process ended"
    if code < 0:
        return f"its process was ended by signal {-code}"
    return f"its process ended with exit code {code}"


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

"""Runners on hosts that are reached by SSH, for ``SSHCluster``.

Dask's own class starts a fixed set of workers. Here each runner is a session of its own, on the
host that has the fewest. All that a runner needs travels through its standard input: nothing of it
is in the arguments of a process. That input stays open as long as the parent lives, and ends the
runner when it ends (G3), however that came about.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import importlib.util
import json
import shlex
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from distributed.deploy.spec import ProcessInterface

from flame_dask.backends import process as processes
from flame_dask.backends.base import Ending
from flame_dask.backends.process import describe_exit, pass_on
from flame_dask.backends.remote import RemoteBackend
from flame_dask.backends.secure import is_loopback
from flame_dask.backends.vendor import check, where
from flame_dask.constants import OOM_EXIT
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

#: Options of ``SSHCluster`` that a pool takes.
_TAKEN: Final = frozenset(
    {"hosts", "connect_options", "worker_options", "scheduler_options", "remote_python"}
)


#: Seconds within which a runner that is told to end can't have ended for that.
_CROSSING: Final = 0.1


class SSHBackend(RemoteBackend):
    """Runners on a list of hosts.

    Parameters
    ----------
    options
        The pool's options.
    given
        Options as for :class:`distributed.SSHCluster`: ``hosts``, all of which take runners, since
        the scheduler is in the parent; ``connect_options`` for ``asyncssh.connect``, one for all or
        one a host; ``worker_options``, ``scheduler_options``, and ``remote_python``.
    """

    def __init__(self, options: PoolOptions, given: Mapping[str, Any]) -> None:
        check("SSHCluster", given, {}, _TAKEN)
        if importlib.util.find_spec("asyncssh") is None:
            remedy = "install what it needs: python -m pip install 'flame-dask[ssh]'"
            raise PoolOptionsError("backend", "SSHCluster", remedy, problem="needs asyncssh")
        self._hosts = list(given.get("hosts") or ())
        if not self._hosts:
            place = where("SSHCluster", "hosts")
            raise PoolOptionsError(place, given.get("hosts"), "give a list of host names")
        connect = given.get("connect_options") or {}
        self._connect = (
            list(connect) if isinstance(connect, list | tuple) else [connect] * len(self._hosts)
        )
        if len(self._connect) != len(self._hosts):
            place = where("SSHCluster", "connect_options")
            remedy = f"give one mapping, or {len(self._hosts)} of them, one a host"
            raise PoolOptionsError(place, f"{len(self._connect)} mappings", remedy)
        python = given.get("remote_python") or sys.executable
        self._python = (
            list(python) if isinstance(python, list | tuple) else [python] * len(self._hosts)
        )
        scheduler = dict(given.get("scheduler_options") or {})
        super().__init__(options, "SSHCluster", scheduler, local=all(map(is_loopback, self._hosts)))
        self._worker_options = {
            "dashboard": False,
            **(given.get("worker_options") or {}),
            "nthreads": options.max_concurrency,
        }

    def worker(self) -> tuple[type, dict[str, Any]]:
        """Return what starts a runner, on the host that has the fewest."""
        workers = {} if self.cluster is None else self.cluster.workers
        busy = Counter(getattr(member, "place", None) for member in workers.values())
        place = min(range(len(self._hosts)), key=lambda number: (busy[number], number))
        return SSHRunner, {
            "host": self._hosts[place],
            "place": place,
            "connect_options": self._connect[place],
            "python": self._python[place],
            "worker_options": self._worker_options,
            "environment": self.environment(),
        }


def _process_class(over: asyncio.Event) -> type:
    """Make a class of processes that tell of their end at once.

    asyncssh's own tells when its output is closed, too; and that is so when all that it has started
    has ended as well.
    """
    import asyncssh

    class Process(asyncssh.SSHClientProcess[bytes]):
        def exit_status_received(self, status: int) -> None:
            super().exit_status_received(status)
            over.set()

        def exit_signal_received(self, *how: Any) -> None:
            super().exit_signal_received(*how)
            over.set()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            over.set()

    return Process


class SSHRunner(ProcessInterface):
    """A worker process at the other end of an SSH connection.

    Parameters
    ----------
    scheduler
        The address that it is to connect to.
    name
        The runner's id.
    host, place
        The host, and its number in the list.
    connect_options
        For ``asyncssh.connect``.
    python
        The interpreter on that host.
    worker_options
        Options of :class:`distributed.Worker`.
    environment
        Its environment variables, with certificates.
    """

    def __init__(
        self,
        scheduler: str,
        name: str,
        host: str,
        place: int,
        connect_options: Mapping[str, Any],
        python: str,
        worker_options: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        super().__init__(scheduler, name)
        self.name = name
        self.place = place
        self._scheduler = scheduler
        self._host = host
        self._connect_options = connect_options
        self._python = python
        self._options = dict(worker_options)
        self._environment = environment
        self._connection: Any = None
        self._process: Any = None
        self._attendant: asyncio.Task[None] | None = None
        self._there: dict[str, Any] = {}
        self._log: deque[str] = deque(maxlen=50)
        # When it was told to end, if it was.
        self._told: float | None = None
        self._ended_at = 0.0
        # Its process has ended, or the connection to it.
        self._over = asyncio.Event()
        self._exit_code: int | None = None

    async def start(self) -> None:
        """Start the worker; returns when its process is there."""
        import asyncssh

        self._connection = await asyncssh.connect(self._host, **self._connect_options)
        try:
            text = (importlib.resources.files("flame_dask.backends") / "ssh_start.py").read_text()
            command = f"exec {shlex.quote(self._python)} -u -c {shlex.quote(text)}"
            # As `connection.create_process` does it, with a class that tells of its end.
            _, self._process = await self._connection.create_session(
                _process_class(self._over), command, encoding=None
            )
            await self._process.redirect()
            spec = {
                "cls": "distributed.Worker",
                "opts": {**self._options, "name": self.name},
            }
            told = {
                "scheduler": self._scheduler,
                "environment": dict(self._environment),
                "spec": spec,
            }
            message = json.dumps(told).encode()
            self._process.stdin.write(b"%d\n" % len(message) + message)
            self._attendant = asyncio.ensure_future(self._attend())
            line = await self._process.stdout.readline()
            if not line:
                await asyncio.wait([self._attendant])
                words = " ".join(self._log) or "it said nothing"
                raise RuntimeError(f"{self._host}: {describe_exit(self._exit_code)}: {words}")
            self._there = json.loads(line)
        except BaseException:
            self._connection.close()
            raise
        await super().start()

    async def _attend(self) -> None:
        """Go with the process to its end, and keep its last words."""
        process = self._process
        reader = asyncio.ensure_future(self._read(process.stderr))
        try:
            await self._over.wait()
            self._ended_at = time.monotonic()
            # Whatever it has started holds its stderr too, and may go on.
            await asyncio.wait([reader], timeout=processes.LAST_WORDS_WAIT)
        finally:
            reader.cancel()
        code = process.returncode
        # A shell in between tells of a signal in a number of its own.
        self._exit_code = 128 - code if code is not None and code > 128 else code
        self._event_finished.set()

    async def _read(self, stderr: Any) -> None:
        async for raw in stderr:
            line = raw.decode(errors="replace")
            self._log.append(line.rstrip("\n"))
            pass_on(line)

    async def end(self, force: bool = False) -> None:
        """End the process: by letting go of it at first, unless ``force``."""
        async with self.lock:  # not while it is being started
            if self._process is None:
                return
            if self._told is None and not self._over.is_set():
                self._told = time.monotonic()
            if not force:
                # Not by a signal: servers don't pass one on to everybody's processes.
                with suppress(OSError):
                    self._process.stdin.write_eof()
                await self._ended(processes.TERMINATE_WAIT)
            if not self._event_finished.is_set():
                await self._kill()
            self._connection.close()
            await self._connection.wait_closed()
            if self._attendant is not None:
                self._attendant.cancel()
                await asyncio.wait([self._attendant])
            self._process = None

    async def _ended(self, seconds: float) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._event_finished.wait(), seconds)

    async def _kill(self) -> None:
        """Kill its process group, by another session on the same connection."""
        import asyncssh

        pid, folder = self._there["pid"], shlex.quote(self._there["folder"])
        command = f"kill -KILL -- -{pid}; rm -rf -- {folder}"
        with suppress(OSError, asyncssh.Error):  # the connection is lost, and so is the process
            await self._connection.run(command, timeout=processes.TERMINATE_WAIT)
        await self._ended(processes.TERMINATE_WAIT)

    async def close(self) -> None:
        """End the process."""
        await self.end()
        await super().close()

    def ending(self) -> Ending:
        """Say how the process ended."""
        code = self._exit_code
        loss: Any = None
        # News of its death and the order to end it, since its connection is gone, cross. What ends
        # as soon as it is told has not ended for that.
        ours = self._told is not None and self._ended_at - self._told > _CROSSING
        if code is not None and not ours:
            loss = "oom" if code == OOM_EXIT else "signal" if code < 0 else "exited"
        cause = describe_exit(code)
        return Ending(cause=cause, exit_code=code, log_tail=tuple(self._log), loss=loss)

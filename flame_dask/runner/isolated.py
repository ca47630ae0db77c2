"""Calls in processes of their own: ``isolation="process"`` (E3).

Each process leads a process group, so that all that a call starts goes with it, and stays in the
runner's session, so that it goes with the runner. It runs one call after the other while none of
them has to be ended. One is always kept warm for the next call; :mod:`flame_dask.runner.nursery`
makes them.

Pebble, the process pool that can kill a task, doesn't fit: it kills the process alone, and what a
call has started lives on.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final

from flame_dask.payload import Payload
from flame_dask.runner import here, memory, nursery, offspring, wire
from flame_dask.runner.channel import Message
from flame_dask.runner.guard import Guard
from flame_dask.runner.nursery import FORK, STATUS
from flame_dask.runner.terminator import PRESS_EVERY, QUIET_PAUSE, Terminator
from flame_dask.runner.threads import CallRaised, ProcessRun, Terms
from flame_dask.system import kernel_kills

logger = logging.getLogger("flame_dask.runner")

#: Seconds for the nursery to tell how a process has ended, and to end itself.
STATUS_WAIT: Final = 5.0

#: How many processes in a row may die before they have run anything.
ATTEMPTS: Final = 5

#: Starts the nursery with the module path of the runner.
_PROGRAM: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    "from flame_dask.runner.nursery import main; main(int(sys.argv[2]))"
)


class CallProcess:
    """The runner's side of a process that runs calls.

    Parameters
    ----------
    conn
        The socket that leads to it.
    status
        The pipe by which the nursery tells of its end.

    Attributes
    ----------
    pid
        Its pid, which is that of its group too; 0 until it is up.
    baseline
        Bytes of memory that it had from the beginning, most of it shared with the nursery.
    out_of_memory
        Whether it was killed since it took too much.
    """

    def __init__(self, conn: socket.socket, status: int) -> None:
        self.pid = 0
        self.baseline = 0
        self.out_of_memory = False
        self._conn = conn
        # Without a buffer: what is in there would not show when the socket is polled.
        self._stream = conn.makefile("rb", buffering=0)
        self._status = status
        self._exit: int | None = None
        self._closed = False
        self._orders: SimpleQueue[Message | None] | None = None
        self._poll = select.poll()
        self._poll.register(conn, select.POLLIN)
        self._poll.register(status, select.POLLIN)

    def wait_until_up(self) -> bool:
        """Wait until it is there; say whether it is."""
        try:
            if not self.pid:
                self.pid = wire.receive(self._stream)
                self.baseline = memory.resident(self.pid)
        except EOFError:
            return False
        return not select.select([self._status], [], [], 0)[0]

    def ask(self, request: object, note: Callable[[Message], None]) -> Any:
        """Have it run a call; return its answer.

        Parameters
        ----------
        request
            The call.
        note
            Takes what the call tells its parent meanwhile.

        Raises
        ------
        EOFError
            If it dies.
        """
        try:
            wire.send(self._conn, request)
        except OSError:
            raise EOFError("it is dead") from None
        while True:
            ready = dict(self._poll.poll())
            if self._conn.fileno() in ready:
                answer = wire.receive(self._stream)
                if answer[0] != wire.NOTE:
                    return answer
                note(answer[1])
                continue
            if self._hear():  # though its socket is held open, by a process that it has forked
                raise EOFError("it is dead")
            self._poll.unregister(self._status)  # the nursery is dead, the process is not

    def order(self, order: Message) -> None:
        """Hand an order to the call that runs in it; in one thread at a time, without waiting."""
        if self._orders is None:
            self._orders = SimpleQueue()
            # Its own: whoever reads what the process says must not wait for it to read.
            threading.Thread(target=self._pass_on, name="flame-orders", daemon=True).start()
        self._orders.put(order)

    def _pass_on(self) -> None:
        assert self._orders is not None, "this thread is for them"
        while (order := self._orders.get()) is not None:
            try:
                wire.send(self._conn, order)
            except OSError:  # it is dead, or done with
                return

    def signal(self, number: int) -> None:
        """Send a signal to its group."""
        if self.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def has_group(self) -> bool:
        """Tell whether anything runs in its group."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        return bool(offspring.members(self.pid))  # not just some that nobody has waited for

    def exit_status(self, seconds: float) -> int | None:
        """Return its exit code, or the negative number of the signal, if it is dead in time."""
        if self._exit is None and select.select([self._status], [], [], seconds)[0]:
            self._hear()
        return self._exit

    def _hear(self) -> bool:
        """Take what the nursery says about the end; say whether it could say anything."""
        told = os.read(self._status, STATUS.size)
        if len(told) == STATUS.size:
            (self._exit,) = STATUS.unpack(told)
        return bool(told)

    def close(self) -> None:
        """Close the ways to it: left to itself it ends then."""
        if not self._closed:
            self._closed = True
            if self._orders is not None:
                self._orders.put(None)
                # Whoever writes to it would hold the socket open.
                with suppress(OSError):
                    self._conn.shutdown(socket.SHUT_RDWR)
            self._stream.close()
            self._conn.close()
            os.close(self._status)


class CallProcesses:
    """The processes of a runner in which calls run.

    Parameters
    ----------
    info
        What the processes are to know of their parent.
    runner
        The runner's id.
    guard
        Kills their groups if the runner can't.
    grace
        Seconds between SIGTERM and SIGKILL.
    log
        Whether what calls print and log goes to their parent.
    """

    def __init__(
        self,
        info: here.ParentInfo | None,
        runner: str,
        guard: Guard,
        grace: float,
        log: bool = False,
    ) -> None:
        self._setting: tuple[Any, ...] = info, runner, log, None
        self._guard = guard
        self._grace = grace
        self._lock = threading.Lock()
        self._nursery: subprocess.Popen[bytes] | nursery.Forked | None = None
        self._control: socket.socket | None = None
        self._idle: list[CallProcess] = []
        self._busy: set[CallProcess] = set()
        self._outdated: set[CallProcess] = set()
        self._closed = False
        self._oom_kills = kernel_kills()

    def warm(self) -> None:
        """Start the nursery and wait until a first process is up."""
        process = self._take()
        with self._lock:
            self._busy.discard(process)
            self._idle.append(process)

    def renew(self, files: Path | None) -> None:
        """Let further calls have new processes, since the code is another one (J3).

        A process that has loaded a module can't be trusted to do without it, and a new one is there
        in milliseconds. Those that run calls go on, and are not used again.

        Parameters
        ----------
        files
            What the processes are told of where copied files are.
        """
        with self._lock:
            self._setting = *self._setting[:3], files
            self._outdated |= self._busy
            idle, self._idle = self._idle, []
            if idle and not self._closed:
                self._idle.append(self._spawn())
        for process in idle:
            self._kill(process)

    def run(
        self,
        terminator: Terminator,
        payload: Payload,
        inputs: Mapping[str, Payload] | None,
        terms: Terms,
        note: Callable[[Message], None],
        ready: Callable[[Callable[[], object]], object] | None = None,
    ) -> Payload | None:
        """Run a call in a process, and wait for its result.

        Parameters
        ----------
        terminator
            Ends it.
        payload, inputs, terms
            The call.
        note
            Takes what it tells its parent, on the way to the host.
        ready
            Waits for what the call needs, as long as what it is given does not return true.

        Raises
        ------
        CallRaised
            With what the function raised.
        """
        run = ProcessRun(terms)
        process: CallProcess | None = None
        answer: tuple[bool, Any] | None = None
        status: int | None = None
        try:
            if terminator.enter(run):
                if ready is not None:
                    ready(lambda: run.reason)
                process = self._take()
                if run.take(process):
                    with suppress(EOFError):
                        answer = process.ask((payload, inputs, terms), note)
        except CallRaised:  # it can't have what it needs
            if terminator.leave(run):
                return None
            raise
        except BaseException:
            # No process can be had, or there is no room for its answer.
            if process is not None:
                self._bury(process)
            terminator.leave_lost(run, "exited", None, None)
            raise
        if process is not None:
            if answer is None and run.terminated:
                self._wait_for_group(process)
            untouched = run.leave()
            # One that has taken orders may have some left to take, and is not used again.
            if untouched and not terms.mode and (answer is not None or run.reason):
                self._give_back(process)
            else:
                status = self._bury(process)
            if answer is None and not run.reason:
                cause = self._cause(process, status)
                died = status is not None and status < 0
                terminator.leave_lost(
                    run, cause, None if died else status, -status if died and status else None
                )
                return None
        if terminator.leave(run):
            return None
        assert answer is not None, "a call without an answer has lost its process, or was ended"
        finished, result = answer
        if not finished:
            raise CallRaised(*result)
        value: Payload | None = result
        return value

    @property
    def nursery(self) -> int | None:
        """The pid of the nursery."""
        forker = self._nursery
        return None if forker is None else forker.pid

    def busy(self) -> list[CallProcess]:
        """Return the processes that run calls."""
        with self._lock:
            return [process for process in self._busy if process.pid]

    def all(self) -> list[CallProcess]:
        """Return all processes that are up."""
        with self._lock:
            return [process for process in [*self._busy, *self._idle] if process.pid]

    def close(self) -> None:
        """Kill all processes. It takes a moment, and is not for the event loop."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            busy = list(self._busy)
            forker, self._nursery = self._nursery, None
            control, self._control = self._control, None
        for process in busy:
            process.signal(signal.SIGKILL)  # its own thread sees to the rest
        for process in idle:
            self._kill(process)
        if control is not None:
            control.close()
        if forker is not None:
            try:
                forker.wait(STATUS_WAIT)
            except subprocess.TimeoutExpired:
                forker.kill()
                forker.wait()

    def _take(self) -> CallProcess:
        """Return a process that is up and free, and have the next one made if it was the last.

        Raises
        ------
        OSError
            If none can be had.
        """
        for _ in range(ATTEMPTS):
            with self._lock:
                process = self._idle.pop() if self._idle else self._spawn()
                self._busy.add(process)
            new = not process.pid
            if process.wait_until_up():
                if new:
                    self._guard.add(process.pid)
                with self._lock:
                    if not self._idle and not self._closed:
                        self._idle.append(self._spawn())
                return process
            self._bury(process)  # it has died on its way, or between two calls
        raise OSError("there is no process for the call: the nursery dies again and again")

    def _give_back(self, process: CallProcess) -> None:
        with self._lock:
            self._busy.discard(process)
            if not self._closed and process not in self._outdated:
                self._idle.append(process)
                return
            self._outdated.discard(process)
        self._kill(process)

    def _wait_for_group(self, process: CallProcess) -> None:
        """Wait for what a process that was ended has started: it may refuse SIGTERM, too.

        The terminator sends SIGKILL after the grace, for the call is still registered.
        """
        end = time.monotonic() + 2 * self._grace + PRESS_EVERY
        while process.has_group() and time.monotonic() < end:
            time.sleep(QUIET_PAUSE)

    def _bury(self, process: CallProcess) -> int | None:
        """See a process and its group to their end; return its exit status."""
        process.signal(signal.SIGKILL)
        status = process.exit_status(STATUS_WAIT)
        with self._lock:
            self._busy.discard(process)
            self._outdated.discard(process)
        process.close()
        if process.pid:
            self._guard.remove(process.pid)
        return status

    def _kill(self, process: CallProcess) -> None:
        process.signal(signal.SIGKILL)
        process.close()
        if process.pid:
            self._guard.remove(process.pid)

    def _cause(self, process: CallProcess, status: int | None) -> str:
        if process.out_of_memory:
            return "oom"
        if status == -signal.SIGKILL:
            before, self._oom_kills = self._oom_kills, kernel_kills()
            if self._oom_kills > before:
                return "oom"
        return "signal" if status is not None and status < 0 else "exited"

    def _spawn(self) -> CallProcess:
        """Have a process made; it is not up yet. The lock is held."""
        ours, its = socket.socketpair()
        status, end = os.pipe()
        try:
            try:
                self._request([its.fileno(), end])
            except OSError:
                self._start_nursery()  # the first one, or the old one has died
                self._request([its.fileno(), end])
            wire.send(ours, (sys.path, dict(os.environ), *self._setting))
        except BaseException:
            ours.close()
            os.close(status)
            raise
        finally:
            its.close()
            os.close(end)
        return CallProcess(ours, status)

    def _request(self, descriptors: list[int]) -> None:
        if self._control is None:
            raise OSError("no nursery yet")
        socket.send_fds(self._control, [FORK], descriptors)

    def _start_nursery(self) -> None:
        if self._closed:
            raise OSError("the runner is closing")
        if self._control is not None:
            logger.warning("the nursery has died, here is another one")
            self._control.close()
        if self._nursery is not None:
            self._nursery.kill()
            self._nursery.wait()
        forked = nursery.forked()
        if forked is not None:
            self._nursery, self._control = forked, forked.control
            return
        ours, its = socket.socketpair()
        with its:
            self._nursery = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(its.fileno())],
                pass_fds=[its.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._control = ours

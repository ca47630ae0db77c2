"""The nursery: a small program that forks a process for each call that wants one of its own.

A runner can't fork by itself, for it has threads. And to start Python and import Dask for each
process takes half a second, where a fork takes a few milliseconds and shares what it can.

``multiprocessing`` has the same thing, its "forkserver". That one gives processes no group of their
own, runs the ``__main__`` of the runner in them, listens at a socket in the file system whose path
must not be long and which a killed runner leaves behind, and has a second process besides. Here
each request is a byte on a socket pair, along with the descriptors that the new process is to have.
"""

from __future__ import annotations

import gc
import os
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from flame_dask.runner import here, output, wire
from flame_dask.runner.attended import attended, audible
from flame_dask.runner.execution import CallRaised, work

#: How a process has ended, as the nursery tells it: an exit code, or a negative signal.
STATUS: Final = struct.Struct("=i")

#: Seconds between two looks whether a nursery has ended.
_PAUSE: Final = 0.005

#: The one request to the nursery.
FORK: Final = b"f"


class Forked:
    """A nursery that was forked from the runner, with what can be done to one that was started.

    Parameters
    ----------
    pid
        Its pid.
    control
        The socket that leads to it.
    """

    def __init__(self, pid: int, control: socket.socket) -> None:
        self.pid = pid
        self.control = control
        self._ended = False

    def kill(self) -> None:
        """Send SIGKILL to it, if it runs."""
        if not self._has_ended():
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = float("inf")) -> None:
        """Wait for its end.

        Raises
        ------
        subprocess.TimeoutExpired
            If it has not ended after so many seconds.
        """
        end = time.monotonic() + timeout
        while not self._has_ended():
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("the nursery", timeout)
            time.sleep(_PAUSE)

    def _has_ended(self) -> bool:
        if not self._ended:
            try:
                self._ended = os.waitpid(self.pid, os.WNOHANG)[0] != 0
            except ChildProcessError:  # somebody else has waited for all there are
                self._ended = True
        return self._ended


_forked: Forked | None = None


def fork(prepare: Callable[[], None]) -> None:
    """Fork a nursery; for a process that is about to become a runner, and has no threads.

    Parameters
    ----------
    prepare
        Called in the nursery at first.
    """
    global _forked  # noqa: PLW0603  # there is one a process
    ours, its = socket.socketpair()
    pid = os.fork()
    if pid:
        its.close()
        _forked = Forked(pid, ours)
        return
    code = 1
    try:
        ours.close()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)  # the runner's tells it of its parent's end
        os.close(nothing)
        prepare()
        main(its.detach())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def forked() -> Forked | None:
    """Return the nursery that was forked, if there is one that nobody has taken yet."""
    global _forked
    taken, _forked = _forked, None
    return taken


def main(descriptor: int) -> None:
    """Fork processes on request, until the runner is gone.

    Parameters
    ----------
    descriptor
        The socket that leads to the runner.
    """
    waker, wake = socket.socketpair()
    for end in (waker, wake):
        end.setblocking(False)
    # A runner's signals are for the runner to deal with.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    gc.collect()
    gc.freeze()  # the forked processes would copy these pages for nothing
    control = socket.socket(fileno=descriptor)
    with waker, wake, control, selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(waker, selectors.EVENT_READ)
        children: dict[int, int] = {}  # by pid: where their end is told
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if waker in ready:
                with suppress(BlockingIOError):
                    waker.recv(4096)
                _reap(children)
            if control in ready:
                # One request at a time: a read stops where descriptors come along.
                request, descriptors, _, _ = socket.recv_fds(control, 1, 2)
                if not request:
                    break
                conn, status = descriptors
                # What calls start must not hold them: their end would not show.
                os.set_inheritable(conn, False)
                os.set_inheritable(status, False)
                unused = [selector.fileno(), descriptor, waker.fileno(), wake.fileno()]
                pid = os.fork()
                if pid == 0:
                    _become_call_process(conn, [*unused, status, *children.values()])
                with suppress(ProcessLookupError, PermissionError):
                    os.setpgid(pid, pid)  # whoever is first: the child does it, too
                os.close(conn)
                children[pid] = status
        for pid in children:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        signal.set_wakeup_fd(-1)


def _reap(children: dict[int, int]) -> None:
    for pid in list(children):
        try:
            ended, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            ended, status = pid, 0
        if ended:
            pipe = children.pop(pid)
            with suppress(BrokenPipeError):  # the runner has lost interest
                os.write(pipe, STATUS.pack(os.waitstatus_to_exitcode(status)))
            os.close(pipe)


def _become_call_process(conn: int, unused: list[int]) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for descriptor in unused:
            os.close(descriptor)
        _serve(socket.socket(fileno=conn))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code)


def _serve(conn: socket.socket) -> None:
    """Run calls, one after the other, until the runner is gone."""
    gone = suppress(EOFError, BrokenPipeError)  # or it needs this process no more (J3)
    with conn, conn.makefile("rb") as stream, gone:
        path, environment, info, runner, log, files = wire.receive(stream)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
        here.arrive(info, runner, files)
        if log:
            output.install()
        run = partial(audible, conn) if log else work
        wire.send(conn, os.getpid())
        while True:
            payload, inputs, terms = wire.receive(stream)
            if terms.mode:
                attend = partial(attended, conn, stream, log)
                wire.send(conn, _answer(attend, payload, inputs, terms))
                return  # some of its orders may still be on their way
            wire.send(conn, _answer(run, payload, inputs, terms))
            # What was pickled in it need not wait for the next call.
            del payload, inputs


def _answer(run: Callable[..., Any], payload: Any, inputs: Any, terms: Any) -> tuple[bool, Any]:
    try:
        return True, run(payload, inputs, terms)
    except CallRaised as error:
        return False, error.args
    finally:
        _flush()  # it may be killed at any moment


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # a call may have put anything there
            stream.flush()

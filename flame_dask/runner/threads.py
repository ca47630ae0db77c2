"""How the work of a call is ended that runs in a thread or as a coroutine of the runner (E3).

**A thread** can't be killed. An exception can be raised in it (``PyThreadState_SetAsyncExc``),
which it meets when it next runs Python code; so one that waits in C code, ``time.sleep`` for
instance, goes on until that returns. Where the C code waits for a child process, that process is
ended, and with it the wait. User code may catch the exception, so it is raised again and again.

The exception must never strike when the call is over: the thread belongs to Dask's executor then.
What that needs is in :meth:`ThreadRun.seal`, and in the order of steps in
:func:`flame_dask.runner.execution.run_in_thread`.
"""

from __future__ import annotations

import asyncio
import ctypes
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from flame_dask.constants import GRACE_MARGIN
from flame_dask.payload import Payload
from flame_dask.runner import coroutines, offspring
from flame_dask.runner.channel import Channel

if TYPE_CHECKING:
    from flame_dask.runner.isolated import CallProcess

_set_exception: Final = ctypes.pythonapi.PyThreadState_SetAsyncExc
_set_exception.argtypes = (ctypes.c_ulong, ctypes.py_object)
_set_exception.restype = ctypes.c_int

_NO_EXCEPTION: Final = ctypes.py_object()

#: Seconds that a thread gets to meet the exception where it can't stay pending.
_MEETING: Final = 0.01


class CallTerminated(BaseException):
    """Raised in the thread of a call whose work has to end. Not for ``except Exception``."""


class CallRaised(Exception):
    """Carries what a call raised to its caller, pickled as a value.

    Dask pickles the exception of a task in a way that loses what built-in exceptions keep outside
    of their ``__dict__``, and lets a ``SystemExit`` end the worker.

    Parameters
    ----------
    text
        The exception's type and text, for logs and the dashboard.
    payload
        The exception, with traceback and causes.
    """

    def __init__(self, text: str, payload: Payload) -> None:
        super().__init__(text, payload)
        self.payload = payload

    def __str__(self) -> str:
        return str(self.args[0])

    def __repr__(self) -> str:
        return f"CallRaised({self.args[0]!r})"


class Terms(NamedTuple):
    """What a runner is told of a call, beside the call itself."""

    call: str
    """The call's id."""
    task: str
    """The key of its Dask task: another one each time that the call is tried again."""
    inline_limit: int
    """The most bytes of a result that travels with the completion; negative if the result is not
    wanted at all."""
    limit: float | None
    """Seconds that it may run."""
    link: bool
    """Whether it ends with its parent (G1)."""
    asynchronous: bool
    """Whether its function is an ``async def``."""
    mode: str = ""
    """``track`` if tracked resources in its result stay here, ``child`` or ``stream``; else
    nothing."""
    pool: str = ""
    """The pool's name, for these."""
    code: int = 0
    """The revision of the parent's code that it needs (J3)."""


def strike(thread: int) -> None:
    """Raise the exception in a thread, as soon as that runs Python code.

    While it is pending, CPython 3.11 lets no thread of the process call a function that is traced,
    by a debugger or to measure coverage: the interpreter starts the call over and over, to look for
    the exception first. The other calls would wait for the stuck one. So it is taken back there.
    """
    if sys.version_info >= (3, 12) or sys.gettrace() is None:
        _set_exception(thread, CallTerminated)
        return
    # In another thread: the handler of a signal is a function of Python, too, and called in the
    # main thread at any moment. That would wait for itself to take the exception back.
    helper = threading.Thread(target=_strike_for_a_moment, args=(thread,), name="flame-strike")
    helper.start()
    helper.join()


def _strike_for_a_moment(thread: int) -> None:
    """Raise the exception in a thread, and take it back. No function of Python is called here."""
    _set_exception(thread, CallTerminated)
    time.sleep(_MEETING)
    _set_exception(thread, _NO_EXCEPTION)
    # That leaves the interpreter looking for it: so one is raised and met here.
    try:  # not `suppress`, which is a function of Python
        _set_exception(threading.get_ident(), CallTerminated)
        while True:  # until it strikes, now
            pass
    except CallTerminated:
        pass


class Run:
    """A call while it runs, and the means to end it.

    Attributes
    ----------
    reason
        Why its work has to end: ``order``, ``deadline`` or ``parent gone``; empty if it need not.
    due
        When it has run for too long, by the monotonic clock.
    kept
        Whether it has begun something that lives on.
    children
        Pids of the processes that it has started.
    channel
        Its way to the parent, if it has one.
    """

    __slots__ = (
        "_asked",
        "_ender",
        "_signal",
        "_since",
        "_woken",
        "channel",
        "children",
        "due",
        "kept",
        "never_began",
        "reason",
        "terms",
    )

    #: What is done to the work itself, in words.
    means = ""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        # The host's clock comes first: the one here is for a host that is late, or gone (E2).
        limit = terms.limit
        self.due = float("inf") if limit is None else time.monotonic() + limit + GRACE_MARGIN
        self.reason = ""
        self.kept = False
        self.never_began = False
        self.children: list[int] = []
        self.channel: Channel | None = None
        self._asked = self._woken = False
        self._since = 0.0
        self._ender: threading.Thread | None = None
        self._signal = ""

    def end(self, reason: str) -> None:
        """Begin to end the work; on the event loop, as all that follows."""
        self.reason = reason
        self._since = time.monotonic()

    def press(self, grace: float) -> None:
        """Go on ending the work; called again and again until it is gone.

        Parameters
        ----------
        grace
            Seconds that processes get for a decent end.
        """
        if self.children and (self._ender is None or not self._ender.is_alive()):
            # In a thread of its own, since looking for processes takes a while.
            self._ender = threading.Thread(
                target=self._end_children, args=(grace,), name="flame-end", daemon=True
            )
            self._ender.start()

    def order(self, order: dict[str, Any]) -> None:
        """Take an order of the parent's."""
        if self.channel is not None:
            self.channel.put(order)

    def _is_asked(self, grace: float) -> bool:
        """Ask the work to end; say whether that is all that is done to it yet."""
        if self.channel is None:
            return False
        if time.monotonic() - self._since >= self.channel.asked_first * grace:
            if not self._woken:
                self._woken = True
                # What waits for orders runs no Python code, and meets no exception.
                self.channel.put({"kind": "give up"})
            return False
        if not self._asked:
            self._asked = True
            self.channel.put({"kind": "stop"})
        return True

    def how(self) -> str:
        """Return in words what has been done so far."""
        if self.never_began:
            return "not starting it"
        return f"{self.means} and {self._signal} to its processes" if self._signal else self.means

    def _end_children(self, grace: float) -> None:
        processes = offspring.family(self.children)
        if processes:
            self._signal = self._signal or "SIGTERM"
            offspring.send(processes, signal.SIGTERM)
            left = offspring.outlast(processes, grace)
            if left:
                self._signal = "SIGKILL"
                # Also what they have started in the meantime.
                offspring.send([*left, *offspring.family(self.children)], signal.SIGKILL)
                offspring.outlast(left, grace)


class ThreadRun(Run):
    """A call in a thread of the runner.

    Attributes
    ----------
    open
        Whether an exception may be raised in the thread. The thread itself sets it and takes it
        away.
    """

    __slots__ = ("_cancelled", "_flushed", "_lock", "_struck", "_thread", "open")

    means = "an exception in its thread"

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        self.open = False
        self._thread = threading.get_ident()
        self._lock = threading.RLock()
        self._struck = False
        self._flushed = False
        self._cancelled = False

    def press(self, grace: float) -> None:
        """Raise the exception, again."""
        if self._is_asked(grace):
            return
        if self._lock.acquire(blocking=False):  # else the thread has it, and the call is over
            try:
                if self.open:
                    # A coroutine is cancelled, at first nothing but that: so it can end decently.
                    waits = coroutines.cancel(self._thread)
                    if self._cancelled or not waits:
                        self._struck = True
                        strike(self._thread)
                    self._cancelled = waits
            finally:
                self._lock.release()
        super().press(grace)

    def seal(self) -> None:
        """Shut the exception out for good; called by the thread itself when ``open`` is false.

        The lock is not released any more: whoever is about to raise the exception has done so
        when the thread gets the lock, and nobody can afterwards. Up to three exceptions may still
        strike in here: one that was pending, one that was under way, and one that it raises itself.
        After each it has to be called again, which is why it is a lock that a thread may take more
        than once.

        An exception that is pending could be taken back, by raising none. But CPython would go on
        looking for it with each call of a function in the whole process, and 3.11 hangs then when
        it is traced. So it is raised, and met: that leaves nothing behind.
        """
        self._lock.acquire()
        if self._struck and not self._flushed:
            self._flushed = True
            _set_exception(self._thread, CallTerminated)
            while True:  # until it strikes, now
                pass


class CoroutineRun(Run):
    """A call that is a coroutine on the runner's event loop.

    Attributes
    ----------
    work
        The asyncio task that runs it.
    """

    __slots__ = ("work",)

    means = "cancelling its coroutine"

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        self.work: asyncio.Task[object] | None = None

    def press(self, grace: float) -> None:
        """Cancel it, again."""
        if self.work is not None:
            self.work.cancel()
        super().press(grace)


class ProcessRun(Run):
    """A call in a process of its own.

    Attributes
    ----------
    terminated
        Whether its process has got SIGTERM.
    """

    __slots__ = ("_killed", "_lock", "_process", "terminated")

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        # Whoever holds it knows that the process runs this call, and not the next one yet.
        self._lock = threading.Lock()
        self._process: CallProcess | None = None
        self.terminated = False
        self._killed = False

    def take(self, process: CallProcess) -> bool:
        """Let the call run in a process from now on; say whether it still may."""
        with self._lock:
            self._process = process
            return not self.reason

    def order(self, order: dict[str, Any]) -> None:
        """Hand an order on to the process."""
        with self._lock:
            if self._process is not None:
                self._process.order(order)

    def leave(self) -> bool:
        """Let go of the process; say whether it is untouched, and can run another call."""
        with self._lock:
            self._process = None
            return not self.terminated

    def press(self, grace: float) -> None:
        """Send the process group SIGTERM, and after the grace SIGKILL.

        What takes orders is asked first, and a call that runs in it is ended as in a thread.
        """
        with self._lock:
            if self._process is None:
                return
            asked = grace if self.terms.mode else 0.0
            if time.monotonic() - self._since < asked:
                self._process.order({"kind": "press"})
            elif not self.terminated:
                self.terminated = True
                self._process.signal(signal.SIGTERM)
            elif not self._killed and time.monotonic() - self._since >= asked + grace:
                self._killed = True
                self._process.signal(signal.SIGKILL)

    def how(self) -> str:
        """Return in words what has been done so far."""
        if self.never_began or not self.terminated:
            return "not starting it"
        return f"{'SIGKILL' if self._killed else 'SIGTERM'} to its processes"

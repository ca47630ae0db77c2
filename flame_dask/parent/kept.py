"""What a call has left on its runner, as its parent knows it."""

from __future__ import annotations

import asyncio
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from flame_dask.constants import GRACE_MARGIN
from flame_dask.errors import CallCancelled, CallTimeout, FlameError
from flame_dask.parent.futures import CallState
from flame_dask.payload import Payload

if TYPE_CHECKING:
    from flame_dask.parent.desk import CallDesk

#: What a request did when its time was up.
Phase = Literal["queued", "running"]

#: How long the next one may queue, run, and take in all.
Limits = tuple[float | None, ...]


class Hold:
    """One thing that is kept. When nothing in this process refers to it any more it is let go."""

    __slots__ = ("__weakref__", "index", "kept")

    def __init__(self, kept: Kept, index: int) -> None:
        self.kept = kept
        self.index = index


class _Request:
    """A call to what another call keeps."""

    __slots__ = ("expired", "holds", "limits", "line", "made", "since", "started", "state", "timer")

    def __init__(
        self, state: CallState, holds: Sequence[Hold], limits: Limits, line: _Line
    ) -> None:
        self.state = state
        self.holds = holds  # or else they might be let go before its turn comes
        self.limits = limits
        self.line = line
        self.made = self.since = time.monotonic()
        self.started: float | None = None
        # The limit that has passed, while the runner is asked whether it has begun.
        self.expired: float | None = None
        self.timer: asyncio.TimerHandle | None = None


class _Line:
    """Requests in the order in which they are made, of which the first few run."""

    __slots__ = ("requests", "running", "width")

    def __init__(self, width: int) -> None:
        self.width = width
        self.running = 0
        self.requests: dict[int, _Request] = {}


class Kept:
    """A call that lives on, and the requests to it.

    Parameters
    ----------
    desk
        Where it was sent from.
    key
        That of the call.
    runner
        The id of the runner that it is on.
    process
        Tells the process that it is in from all others.
    link
        Whether it ends with its parent.
    serves
        Whether it takes requests, and the order to stop.

    Attributes
    ----------
    life
        Is over when the call is.
    """

    def __init__(
        self, desk: CallDesk, key: str, runner: str, process: str, link: bool, serves: bool
    ) -> None:
        self.desk = desk
        self.key = key
        self.runner = runner
        self.process = process
        self.link = link
        self.serves = serves
        self.life = CallState(key, link)
        self._lasting: set[int] = set()
        self._requests: dict[int, _Request] = {}
        # One for all things that take one request at a time, which share a thread, and one for
        # each of the others, by its number.
        self._line = _Line(1)
        self._lines: dict[int, _Line] = {}
        # What is let go of as soon as nobody stands in line for it.
        self._parting: set[int] = set()
        self._count = itertools.count(1)
        self._holds: weakref.WeakValueDictionary[int, Hold] = weakref.WeakValueDictionary()

    # -- any thread ----------------------------------------------------------------------------

    def hold(self, index: int, *, lasting: bool = False) -> Hold:
        """Return what stands for one of the things that are kept.

        Parameters
        ----------
        index
            Its number.
        lasting
            Whether it stays though nobody refers to it.
        """
        hold = self._holds.get(index)
        if hold is None:
            self._holds[index] = hold = Hold(self, index)
            if lasting:
                self._lasting.add(index)
            elif index not in self._lasting:
                weakref.finalize(hold, self.release, index).atexit = False
        return hold

    def release(self, index: int) -> None:
        """Let one thing go, after what it was asked for so far."""
        self.desk.port.post(partial(self._part, index))

    def stop(self, limit: float | None) -> None:
        """Ask it to end; it is made to when so many seconds are over.

        What takes no orders, a function that runs, is ended at once.
        """
        if self.serves:
            # On the loop, so that it does not overtake requests that are on their way.
            self.desk.port.post(partial(self._order, "stop"))
            if limit is not None:
                self.desk.port.post(partial(self._end_after, limit))
        else:
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        if not self.life.done():
            self._order("kill")
            self.desk.cancel(self.life)

    def _end_after(self, limit: float) -> None:
        timer = asyncio.get_running_loop().call_later(limit, self.kill)
        self.life.when_done(timer.cancel)

    def _order(self, kind: str, **body: Any) -> None:
        self.desk.post({"what": "order", "key": self.key, "kind": kind, **body})

    def send(
        self,
        index: int,
        payload: Payload,
        limits: Limits,
        *,
        others: Sequence[Hold],
        link: bool,
        asynchronous: bool,
        track: bool,
    ) -> tuple[CallState, Callable[[dict[str, Payload]], None]]:
        """Make a request.

        Parameters
        ----------
        index
            What it is to.
        payload
            The call.
        limits
            How long it may take.
        others
            What else it needs.
        link
            Whether it ends with its last future.
        asynchronous
            Whether it is awaited there.
        track
            Whether what is in its result that has to stay does.

        Returns
        -------
        tuple
            Its state, and what sends it, on the event loop, with the values of the futures among
            its arguments.
        """
        no = next(self._count)
        state = CallState(f"{self.key}/{no}", link)
        line = self._lines.get(index, self._line)
        request = _Request(state, [self.hold(index), *others], limits, line)
        message = {
            "what": "order",
            "key": self.key,
            "kind": "request",
            "no": no,
            "index": index,
            "payload": payload.parts(),
            "limit": limits[1] if limits[2] is None else limits[2],
            "asynchronous": asynchronous,
            "track": track,
        }
        return state, partial(self._begin, no, request, message)

    # -- on the event loop ---------------------------------------------------------------------

    def _begin(
        self, no: int, request: _Request, message: dict[str, Any], inputs: dict[str, Payload]
    ) -> None:
        if self.life.done():
            self.desk.error(str(request.state.key), self._gone())
            return
        if inputs:
            message["inputs"] = {key: value.parts() for key, value in inputs.items()}
        request.since = time.monotonic()
        request.state.sent = request.since
        self._requests[no] = request
        request.state.when_done(partial(self._over, no))
        self.desk.port.post(message)
        request.line.requests[no] = request
        queue, _, total = request.limits
        if total is not None:  # it has waited for the futures among its arguments
            total = max(0.0, total - (request.since - request.made))
        self._set_clock(request, queue if total is None else total)
        self._move_on(request.line)

    def answered(
        self,
        no: int,
        result: Any = None,
        failure: Any = None,
        held: Any = (),
        dropped: bool = False,
    ) -> None:
        """Take the answer to a request, or that it was dropped and never begins."""
        request = self._requests.get(no)
        if request is None:
            self._take(held)  # nobody wants it any more
            return
        request.state.holds = self._take(held)
        key = str(request.state.key)
        if failure is not None:
            self.desk.raised(key, Payload.from_parts(failure))
        elif result is not None:
            self.desk.result(key, result)
        elif request.expired is not None:
            self._time_out(request, request.expired, "queued" if dropped else "running")
        # Else it was ended there, and its time is up here in a moment.

    def _take(self, held: Any) -> list[Hold]:
        for index, _, width in held:
            if width > 1:
                self._lines[index] = _Line(width)
        return [self.hold(index, lasting=bool(lasting)) for index, lasting, _ in held]

    def take(self, state: CallState, held: Any) -> None:
        """Let what is kept be held by the result that it is part of."""
        state.holds = self._take(held)

    def ended(self) -> None:
        """Answer those who wait: the call is over, as its ``life`` says."""
        for request in list(self._requests.values()):
            self.desk.error(str(request.state.key), self._gone())

    def _gone(self) -> FlameError:
        error = self.life.exception if self.life.done() else None
        if isinstance(error, FlameError):
            return error
        return CallCancelled(self.key, "the end of what it was to")

    def _over(self, no: int) -> None:
        request = self._requests.pop(no, None)
        if request is None:
            return
        if request.timer is not None:
            request.timer.cancel()
        line = request.line
        line.requests.pop(no, None)
        if request.started is not None:
            line.running -= 1
        self._move_on(line)
        if not line.requests:
            for index in [index for index in self._parting if self._lines[index] is line]:
                self._part(index)

    def _part(self, index: int) -> None:
        line = self._lines.get(index)
        if line is not None and line.requests:  # there it would not be in turn
            self._parting.add(index)
        else:
            self._parting.discard(index)
            self._order("release", index=index)

    def _move_on(self, line: _Line) -> None:
        for request in line.requests.values():  # those that run come first: it is a short look
            if line.running >= line.width:
                return
            if request.started is None:
                line.running += 1
                self._start(request)

    def _start(self, request: _Request) -> None:
        """Take note that it is the turn of a request; its time to run begins (E1)."""
        request.started = time.monotonic()
        _, run, total = request.limits
        if total is None and request.expired is None:
            if request.timer is not None:
                request.timer.cancel()
            self._set_clock(request, run)

    def _set_clock(self, request: _Request, limit: float | None) -> None:
        request.timer = None
        if limit is not None:
            loop = asyncio.get_running_loop()
            request.timer = loop.call_later(limit, self._expire, request, limit)

    def _expire(self, request: _Request, limit: float) -> None:
        """See to a request whose time is up: its work ends, its caller is told."""
        if request.started is not None:
            self._time_out(request, limit, "running")
        else:
            # Requests are sent ahead of their turn, and this one's may come while the order to drop
            # it is on its way. Who hears "queued" may try again: only the runner can say it (E2).
            request.expired = limit
            request.timer = asyncio.get_running_loop().call_later(
                GRACE_MARGIN, self._time_out, request, limit, "running"
            )
        self.desk.port.post({"what": "release", "keys": [str(request.state.key)]})

    def _time_out(self, request: _Request, limit: float, phase: Phase) -> None:
        now = time.monotonic()
        started = now if phase == "queued" or request.started is None else request.started
        error = CallTimeout(
            phase,
            queued=started - request.since,
            running=now - started,
            limit=limit,
            call=str(request.state.key),
        )
        self.desk.error(str(request.state.key), error)

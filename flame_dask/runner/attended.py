"""A call in a process of its own that takes orders meanwhile: a child, a stream, what is kept."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Final

from flame_dask.payload import Payload
from flame_dask.runner import wire
from flame_dask.runner.channel import Channel, Message, current
from flame_dask.runner.execution import run_in_thread, run_request, work
from flame_dask.runner.output import CallOutput
from flame_dask.runner.terminator import PRESS_EVERY
from flame_dask.runner.threads import Run, Terms

#: Seconds that processes get for a decent end which a call has started that is ended by itself.
_GRACE: Final = 1.0


class Attendant:
    """Does for one process what the runner's terminator does: it ends work in its threads."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}

    def enter(self, run: Run) -> bool:
        """Take note that a call begins."""
        self._runs[run.terms.task] = run
        return True

    def leave(self, run: Run) -> bool:
        """Take note that a call is over; say whether its work was ended."""
        self._runs.pop(run.terms.task, None)
        return bool(run.reason)

    def forget(self, task: str) -> None:
        """Strike off what has run in a call that is over."""
        for other in [each for each in self._runs if each.startswith(f"{task}/")]:
            self._runs.pop(other, None)

    def drop(self, task: str, number: int) -> None:
        """End a call within a call, if it runs."""
        inner = self._runs.get(f"{task}/{number}")
        if inner is not None:
            threading.Thread(
                target=self._press_on, args=(inner,), name="flame-drop", daemon=True
            ).start()

    def press(self, task: str) -> None:
        """End the work of a call, or go on doing so, with the calls within it."""
        for key, run in list(self._runs.items()):
            if key == task or key.startswith(f"{task}/"):
                self._press(run)

    def _press_on(self, run: Run) -> None:
        while self._runs.get(run.terms.task) is run:
            self._press(run)
            time.sleep(PRESS_EVERY)

    def _press(self, run: Run) -> None:
        if not run.reason:
            run.end("order")
        run.press(_GRACE)


def _channel(conn: socket.socket, log: bool) -> tuple[Channel, threading.Lock]:
    """Return a call's way to its parent, and the lock that is held while a note is written."""
    lock = threading.Lock()  # notes may come from several threads

    def send(message: Message) -> None:
        with lock, suppress(OSError):  # the runner is gone: this process is about to
            wire.send(conn, (wire.NOTE, message))

    channel = Channel(send, None)
    if log:
        channel.output = CallOutput(channel.tell)
    return channel, lock


def audible(
    conn: socket.socket,
    payload: Payload,
    inputs: Mapping[str, Payload] | None,
    terms: Terms,
) -> Payload | None:
    """Run a call in this thread, and have the parent hear what it says.

    Parameters, returns and errors are those of :func:`attended`.
    """
    channel, lock = _channel(conn, True)
    around = current.set(channel)
    try:
        result = work(payload, inputs, terms)
    finally:
        current.reset(around)
    with lock:  # nothing is half written when the answer follows
        return result


def attended(
    conn: socket.socket,
    stream: io.BufferedIOBase,
    log: bool,
    payload: Payload,
    inputs: Mapping[str, Payload] | None,
    terms: Terms,
) -> Payload | None:
    """Run a call in this thread, while another one takes its orders.

    Parameters
    ----------
    conn, stream
        The way to the runner.
    log
        Whether the parent hears what it prints and logs.
    payload, inputs, terms
        The call.

    Returns
    -------
    Payload or None
        Its result.

    Raises
    ------
    CallRaised
        With what it has raised.
    """
    attendant: Any = Attendant()
    channel, lock = _channel(conn, log)
    channel.run = partial(run_request, attendant, channel)

    def listen() -> None:
        with suppress(EOFError, OSError, ValueError):
            while True:
                order = wire.receive(stream)
                if order["kind"] == "press":
                    attendant.press(terms.task)
                    continue
                channel.put(order)
                if order["kind"] == "drop":  # after it has been put there, as in the terminator
                    attendant.drop(terms.task, order["no"])

    threading.Thread(target=listen, name="flame-listen", daemon=True).start()
    result = run_in_thread(
        attendant, payload, inputs, terms, channel, hand_over=lambda result, _: result
    )
    with lock:  # nothing is half written when the answer follows
        return result

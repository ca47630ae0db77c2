"""The way between what runs on a runner and its parent, beside a call and its result.

Most calls have no use for it. What lives on after it has answered (a placed child, tracked
resources), and what gives more than one answer (a stream, printed lines), talks through it: *notes*
go to the parent, *orders* come from there. Both take the same streams as calls and results do, by
way of the host, and so keep their order among each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame_dask.payload import Payload
    from flame_dask.runner.output import CallOutput
    from flame_dask.runner.threads import Terms

Message = dict[str, Any]

#: How a call is run in the present thread, so that its work can be ended (E3).
Runner = Callable[["Payload", "dict[str, Payload] | None", "Terms"], "Payload | None"]

#: The channel of the call that runs in this context.
current: ContextVar[Channel | None] = ContextVar("flame_channel", default=None)


class Channel:
    """A call's end of the way to its parent.

    Parameters
    ----------
    send
        Takes a message on its way to the host; in any thread.
    run
        Runs a further call in the present thread.

    Attributes
    ----------
    inbox
        Orders that have come in.
    children
        Pids of the processes that the call has started.
    keeper
        Keeps what stays of the call, if anything does.
    output
        Takes what the call writes, if the parent is to see that.
    asked_first
        The part of the grace for which work that has to end is just asked to, by an order to stop;
        0 if it takes no orders, so that it is ended at once.
    """

    __slots__ = (
        "_begun",
        "_dropped",
        "_lock",
        "asked_first",
        "children",
        "inbox",
        "keeper",
        "output",
        "run",
        "send",
    )

    def __init__(self, send: Callable[[Message], None], run: Any) -> None:
        self.send = send
        self.run = run
        self.asked_first = 0.0
        # Numbers of the requests that have begun, and of those that nobody wants any more.
        self._begun: set[int] = set()
        self._dropped: set[int] = set()
        self._lock = threading.Lock()
        self.keeper: Any = None
        self.children: list[int] = []
        self.output: CallOutput | None = None
        self.inbox: SimpleQueue[Message] = SimpleQueue()

    def tell(self, kind: str, **body: Any) -> None:
        """Send a note to the parent; in any thread.

        Parameters
        ----------
        kind
            What it is about.
        body
            What it says: only what msgpack can carry.
        """
        self.send({"kind": kind, **body})

    def put(self, order: Message) -> None:
        """Take an order in; in any thread."""
        if order["kind"] == "drop":
            self._drop(order["no"])  # it overtakes what it is about
        elif order["kind"] == "kill":
            self.asked_first = 0.0  # the order to end its work follows, and is carried out at once
        else:
            self.inbox.put(order)

    def begin(self, no: int) -> bool:
        """Take note that a request begins; say whether it may."""
        with self._lock:
            self._begun.add(no)
            return no not in self._dropped

    def over(self, no: int) -> None:
        """Take note that a request has been answered."""
        with self._lock:
            self._begun.discard(no)
            self._dropped.discard(no)

    def _drop(self, no: int) -> None:
        """See to it that a request does not begin; the parent is told so, unless it has."""
        with self._lock:
            self._dropped.add(no)
            begun = no in self._begun
        if not begun:
            self.tell("answer", no=no, dropped=True)

    def get(self, seconds: float | None = None) -> Message | None:
        """Wait for the next order.

        Parameters
        ----------
        seconds
            How long at most; ``None`` is no limit.

        Returns
        -------
        dict or None
            ``None`` if there was none in time.
        """
        try:
            return self.inbox.get(timeout=seconds)
        except Empty:
            return None


def here() -> Channel:
    """Return the channel of the call that runs in this context.

    Raises
    ------
    RuntimeError
        Outside of a runner's calls.
    """
    channel = current.get()
    if channel is None:
        raise RuntimeError("only a call on a runner of a pool has a way back to its parent")
    return channel

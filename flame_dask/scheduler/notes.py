"""What calls and their parents say to each other, beside calls and results, is handed on here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from flame_dask import dask_internals as internals
from flame_dask.core import events as ev
from flame_dask.scheduler.calls import HostCall

if TYPE_CHECKING:
    from distributed import Scheduler

Message = dict[str, Any]


class Notes:
    """Hands notes of calls on to their parents, and orders of these to the calls.

    Parameters
    ----------
    scheduler
        Dask's.
    calls, tasks
        The calls of the pool, by their keys and by those of their tasks.
    runner_at
        The runners, by their addresses.
    send
        Sends a message to a client.
    tell
        Tells the core of an event.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        calls: Mapping[str, HostCall],
        tasks: Mapping[str, HostCall],
        runner_at: Mapping[str, str],
        send: Callable[[str, Message], None],
        tell: Callable[[ev.Event], None],
    ) -> None:
        self._scheduler = scheduler
        self._calls = calls
        self._tasks = tasks
        self._runner_at = runner_at
        self._send = send
        self._tell = tell

    def on_note(self, worker: str, task: str, kind: str, **body: Any) -> None:
        """Take what a call says to its parent."""
        call = self._tasks.get(task)
        if call is None:
            return
        if kind == "kept" and not call.answered:
            # From here on it has no time limit, and is not started anew (H1, I1).
            self._tell(ev.CallKept(call.key))
        note = {"what": "note", "key": call.key, "kind": kind, "runner": self._runner_at[worker]}
        self._send(call.client, {**note, **body})

    def on_order(self, client: str, key: str, kind: str, **body: Any) -> None:
        """Take what a parent says to one of its calls."""
        call = self._calls.get(key)
        # One that is over has told its parent, or is about to.
        if call is not None and call.task is not None and call.address is not None:
            order = {"what": "order", "task": call.task, "kind": kind, **body}
            internals.send_to_worker(self._scheduler, call.address, order)

    def drop(self, client: str, key: str) -> None:
        """Let go of a request to what a call keeps; its key is that of the call, and a number."""
        call, _, number = key.rpartition("/")
        if number.isdecimal():
            self.on_order(client, call, "drop", no=int(number))

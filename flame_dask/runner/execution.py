"""How a call runs on its runner.

These functions are what Dask executes: the task's function. They open the call, run it, and decide
how its result goes back: a small one travels with the completion of the task, a large one stays
here, pickled, until the caller fetches it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import Any

from flame_dask.dask_internals import attach_result
from flame_dask.payload import Payload, check_exception, pack_value

_opening = threading.local()


def input_value(key: str) -> Any:
    """Stand in for a future among the arguments of a call: return its value.

    It is called by the unpickling of the call, in :func:`_open`.
    """
    return _opening.inputs[key].load()


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


def run_call(
    payload: Payload, inputs: Mapping[str, Payload] | None, key: str, inline_limit: int
) -> Payload | None:
    """Run a call in a thread of the runner.

    Parameters
    ----------
    payload
        The function and its arguments.
    inputs
        The values of futures among the arguments, by key.
    key
        The call's id, which is the key of its Dask task.
    inline_limit
        The most bytes of a result that travels with the completion; negative if the result is
        not wanted at all.

    Returns
    -------
    Payload or None
        The result, if it is to be fetched.

    Raises
    ------
    CallRaised
        With what the function raised, or a SerializationError.
    """
    try:
        fn, args, kwargs = _open(payload, inputs)
        return _hand_over(fn(*args, **kwargs), key, inline_limit)
    except BaseException as error:
        failure = _carried(error)
    # Not above: the error would become the context of its own carrier, and travel twice.
    raise failure


async def run_call_async(
    payload: Payload, inputs: Mapping[str, Payload] | None, key: str, inline_limit: int
) -> Payload | None:
    """Run a call of an ``async def`` function on the runner's event loop (B1).

    Parameters, returns and errors are those of :func:`run_call`.
    """
    try:
        fn, args, kwargs = _open(payload, inputs)
        return _hand_over(await fn(*args, **kwargs), key, inline_limit)
    except BaseException as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # the runner is closing
        failure = _carried(error)
    raise failure


def _open(payload: Payload, inputs: Mapping[str, Payload] | None) -> Any:
    if inputs is None:
        return payload.load()
    _opening.inputs = inputs
    try:
        return payload.load()
    finally:
        del _opening.inputs


def _carried(error: BaseException) -> CallRaised:
    """Put an exception into its carrier. Also Dask's Reschedule: a call starts once (F1)."""
    error = check_exception(error)
    try:
        text = str(error)
    except Exception:  # a foreign __str__ may raise anything
        text = "<its text can't be shown>"
    # Cut, since Dask makes an exception with a long text anew, without what is in it.
    return CallRaised(f"{type(error).__name__}: {text[:500]}", pack_value(error))


def _hand_over(value: Any, key: str, inline_limit: int) -> Payload | None:
    if inline_limit < 0:
        return None
    result = pack_value(value)
    if result.nbytes > inline_limit:
        return result.snapshot()  # it waits here while what it was made from may change
    attach_result(key, result.parts())
    return None


__all__ = ["CallRaised", "input_value", "run_call", "run_call_async"]

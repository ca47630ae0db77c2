"""How a call runs on its runner.

These functions are what Dask executes: the task's function. They open the call, run it, and decide
how its result goes back: a small one travels with the completion of the task, a large one stays
here, pickled, until the caller fetches it. While it runs the terminator knows of it, so that its
work can be ended (E3).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distributed import get_worker

from flame_dask.dask_internals import attach_result
from flame_dask.payload import Payload, check_exception, pack_value
from flame_dask.runner import offspring
from flame_dask.runner.threads import CallTerminated, CoroutineRun, Terms, ThreadRun

if TYPE_CHECKING:
    from flame_dask.runner.terminator import Terminator

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
    payload: Payload, inputs: Mapping[str, Payload] | None, terms: Terms
) -> Payload | None:
    """Run a call in a thread of the runner, or from there in a process of its own.

    Parameters
    ----------
    payload
        The function and its arguments.
    inputs
        The values of futures among the arguments, by key.
    terms
        What else there is to know.

    Returns
    -------
    Payload or None
        The result, if it is to be fetched; nothing if the work was ended. The host has been told of
        that by then, and an error would be one more line in the runner's log.

    Raises
    ------
    CallRaised
        With what the function raised, or a SerializationError.
    """
    plugin: Any = get_worker().plugins.get("flame")
    if plugin is None:
        return _hand_over(work(payload, inputs, terms), terms)
    if plugin.processes is None:
        return run_in_thread(plugin.terminator, payload, inputs, terms)
    result = plugin.processes.run(plugin.terminator, payload, inputs, terms)
    return _hand_over(result, terms)


def run_in_thread(
    terminator: Terminator, payload: Payload, inputs: Mapping[str, Payload] | None, terms: Terms
) -> Payload | None:
    """Run a call in this thread, where :class:`CallTerminated` may strike at any moment.

    Parameters, returns and errors are those of :func:`run_call`.
    """
    run = ThreadRun(terms)
    result: Payload | None = None
    failure: CallRaised | None = None
    book = offspring.ledger.set(run.children)
    try:
        try:
            run.open = True
            if terminator.enter(run):
                result = _hand_over(work(payload, inputs, terms), terms)
        finally:
            # Python looks for pending exceptions at calls and jumps only: not before this is done.
            run.open = False
            try:
                run.seal()
            except CallTerminated:
                try:
                    run.seal()
                except CallTerminated:
                    try:
                        run.seal()
                    except CallTerminated:
                        run.seal()
        # Here the thread is safe.
    except CallTerminated:
        pass
    except CallRaised as error:
        failure = error
    offspring.ledger.reset(book)
    if terminator.leave(run):
        return None
    if failure is not None:
        raise failure
    return result


async def run_call_async(
    payload: Payload, inputs: Mapping[str, Payload] | None, terms: Terms
) -> Payload | None:
    """Run a call of an ``async def`` function on the runner's event loop (B1).

    Parameters, returns and errors are those of :func:`run_call`.
    """
    plugin: Any = get_worker().plugins.get("flame")
    if plugin is None:
        return await _work_async(payload, inputs, terms)
    terminator: Terminator = plugin.terminator
    run = CoroutineRun(terms)
    if not terminator.enter(run):
        terminator.leave(run)
        return None
    book = offspring.ledger.set(run.children)
    # A task of its own. It can be cancelled without cancelling Dask's, and outlives that one, which
    # is cancelled as a worker closes: what becomes of the work then is not for Dask to say (G2).
    run.work = asyncio.create_task(_work_async(payload, inputs, terms))
    offspring.ledger.reset(book)

    def over(task: asyncio.Task[Payload | None]) -> None:
        if not task.cancelled():
            task.exception()  # looked at: nobody else may be there to do so
        terminator.leave(run)

    run.work.add_done_callback(over)  # before this coroutine is woken up
    failure: CallRaised | None = None
    result: Payload | None = None
    try:
        # Linked work, too: Dask would wait for it in vain if it refuses to be cancelled.
        result = await asyncio.shield(run.work)
    except asyncio.CancelledError:
        closing = asyncio.current_task()
        if not run.reason or (closing is not None and closing.cancelling()):
            raise  # the runner is closing
    except CallRaised as error:
        failure = error
    if run.reason:
        return None
    if failure is not None:
        raise failure
    return result


def work(payload: Payload, inputs: Mapping[str, Payload] | None, terms: Terms) -> Payload | None:
    """Do the work of a call here and now, in whatever thread or process this is.

    Returns
    -------
    Payload or None
        The result, if it is wanted.

    Raises
    ------
    CallRaised
        With what the function raised, or a SerializationError.
    """
    try:
        fn, args, kwargs = _open(payload, inputs)
        value = fn(*args, **kwargs)
        if terms.asynchronous:
            value = asyncio.run(value)
        return None if terms.inline_limit < 0 else pack_value(value)
    except CallTerminated:
        raise
    except BaseException as error:
        failure = _carried(error)
    # Not above: the error would become the context of its own carrier, and travel twice.
    raise failure


async def _work_async(
    payload: Payload, inputs: Mapping[str, Payload] | None, terms: Terms
) -> Payload | None:
    try:
        fn, args, kwargs = _open(payload, inputs)
        value = await fn(*args, **kwargs)
        return _hand_over(None if terms.inline_limit < 0 else pack_value(value), terms)
    except BaseException as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # the work is being ended, or the runner is closing
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


def _hand_over(result: Payload | None, terms: Terms) -> Payload | None:
    if result is None:
        return None
    if result.nbytes > terms.inline_limit:
        return result.snapshot()  # it waits here while what it was made from may change
    attach_result(terms.task, result.parts())
    return None


__all__ = [
    "CallRaised",
    "Terms",
    "input_value",
    "run_call",
    "run_call_async",
    "run_in_thread",
    "work",
]

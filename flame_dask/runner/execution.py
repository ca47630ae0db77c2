"""How a call runs on its runner.

These functions are what Dask executes: the task's function. They open the call, run it, and decide
how its result goes back: a small one travels with the completion of the task, a large one stays
here, pickled, until the caller fetches it. While it runs the terminator knows of it, so that its
work can be ended (E3).
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
from distributed import get_worker

from flame_dask.dask_internals import attach_result
from flame_dask.errors import BootError
from flame_dask.payload import Payload, check_exception, pack_value
from flame_dask.runner import coroutines, offspring, output
from flame_dask.runner.channel import Channel, current
from flame_dask.runner.threads import CallRaised, CallTerminated, CoroutineRun, Terms, ThreadRun

if TYPE_CHECKING:
    from flame_dask.runner.terminator import Terminator

_opening = threading.local()


def input_value(key: str) -> Any:
    """Stand in for a future among the arguments of a call: return its value.

    It is called by the unpickling of the call, in :func:`_open`.
    """
    return _opening.inputs[key].load()


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
        channel = _channel(plugin, terms)
        if not terms.code:
            return run_in_thread(plugin.terminator, payload, inputs, terms, channel)
        # Once it can be ended: it may have to wait for the parent.
        ready = partial(_has_code, plugin, terms)
        return run_in_thread(plugin.terminator, payload, inputs, terms, channel, wanted=ready)
    note = partial(plugin.note, terms.task)
    has_code = partial(_has_code, plugin, terms) if terms.code else None
    result = plugin.processes.run(plugin.terminator, payload, inputs, terms, note, has_code)
    return _hand_over(result, terms)


def _has_code(plugin: Any, terms: Terms, given_up: Callable[[], object] = lambda: False) -> bool:
    """Wait until the runner has the code that a call needs, or the call is given up (J3)."""
    try:
        if plugin.code is not None:
            plugin.code.require(terms.code, given_up)
    except BootError as error:
        failure = error
    else:
        return True
    raise carried(failure)


def _channel(plugin: Any, terms: Terms) -> Channel | None:
    """Return the way of a call to its parent; most calls need none."""
    if not terms.mode and not plugin.log:
        return None
    channel = Channel(partial(plugin.note, terms.task), None)
    channel.run = partial(run_request, plugin.terminator, channel)
    if plugin.log:
        channel.output = output.CallOutput(channel.tell)
    return channel


def run_in_thread(
    terminator: Terminator,
    payload: Payload,
    inputs: Mapping[str, Payload] | None,
    terms: Terms,
    channel: Channel | None = None,
    *,
    hand_over: Callable[[Payload | None, Terms], Payload | None] | None = None,
    wanted: Callable[[], bool] = lambda: True,
) -> Payload | None:
    """Run a call in this thread, where :class:`CallTerminated` may strike at any moment.

    Parameters, returns and errors are those of :func:`run_call`, but for these.

    Parameters
    ----------
    channel
        Its way to the parent.
    hand_over
        What to do with the result. Left out: as :func:`run_call` says.
    wanted
        Says whether it is still to be run, once its work can be ended.
    """
    run = ThreadRun(terms)
    run.channel = channel
    if channel is not None:
        channel.children = run.children
    hand_over = hand_over or _hand_over
    result: Payload | None = None
    failure: CallRaised | None = None
    book = offspring.ledger.set(run.children)
    around = current.set(channel)
    try:
        try:
            run.open = True
            if terminator.enter(run) and wanted():
                result = hand_over(work(payload, inputs, terms), terms)
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
    current.reset(around)
    offspring.ledger.reset(book)
    if terms.mode:
        terminator.forget(terms.task)
    if terminator.leave(run):
        return None
    if failure is not None:
        raise failure
    return result


def run_request(
    terminator: Terminator,
    channel: Channel,
    payload: Payload,
    inputs: Mapping[str, Payload] | None,
    terms: Terms,
) -> Payload | None:
    """Run a call to what another call keeps, in this thread.

    Parameters, returns and errors are those of :func:`run_in_thread`. Its result is returned, and
    what it prints is the other call's.
    """
    # It is ended by itself: the other one's order to stop is not for it.
    inner = Channel(channel.send, channel.run)
    inner.keeper, inner.output = channel.keeper, channel.output
    number = int(terms.task.rpartition("/")[2])
    try:
        return run_in_thread(
            terminator,
            payload,
            inputs,
            terms,
            inner,
            hand_over=lambda result, _: result,
            wanted=partial(channel.begin, number),
        )
    finally:
        if inner.children:
            # What it has started and left running ends with what is kept. In place: it is known.
            started = [*channel.children, *inner.children]
            channel.children[:] = [pid for pid in started if psutil.pid_exists(pid)]


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
    channel = _channel(plugin, terms)
    if not terminator.enter(run):
        terminator.leave(run)
        return None
    book = offspring.ledger.set(run.children)
    around = current.set(channel)
    # A task of its own. It can be cancelled without cancelling Dask's, and outlives that one, which
    # is cancelled as a worker closes: what becomes of the work then is not for Dask to say (G2).
    run.work = asyncio.create_task(_work_async(payload, inputs, terms, plugin.code))
    current.reset(around)
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
        value = _special(fn, args, kwargs, terms) if terms.mode else fn(*args, **kwargs)
        if terms.asynchronous:
            value = coroutines.run(value)
        return None if terms.inline_limit < 0 else pack_value(value)
    except CallTerminated:
        raise
    except BaseException as error:
        failure = carried(error)
    finally:
        output.finish(current.get())
    # Not above: the error would become the context of its own carrier, and travel twice.
    raise failure


async def _work_async(
    payload: Payload, inputs: Mapping[str, Payload] | None, terms: Terms, code: Any = None
) -> Payload | None:
    try:
        if terms.code and code is not None:
            await code.require_async(terms.code)
        fn, args, kwargs = _open(payload, inputs)
        value = await (_special(fn, args, kwargs, terms) if terms.mode else fn(*args, **kwargs))
        return _hand_over(None if terms.inline_limit < 0 else pack_value(value), terms)
    except BaseException as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise  # the work is being ended, or the runner is closing
        failure = carried(error)
    finally:
        output.finish(current.get())
    raise failure


def _special(fn: Any, args: Any, kwargs: Any, terms: Terms) -> Any:
    """Run a call that has more to say than a result."""
    # Here, since they run calls in their turn, and since most runners have no need of them.
    from flame_dask.runner.children import run_child
    from flame_dask.runner.keeper import run_more, run_tracked
    from flame_dask.runner.streams import run_stream

    modes = {"child": run_child, "track": run_tracked, "more": run_more, "stream": run_stream}
    return modes[terms.mode](fn, args, kwargs, terms)


def _open(payload: Payload, inputs: Mapping[str, Payload] | None) -> Any:
    if inputs is None:
        return payload.load()
    _opening.inputs = inputs
    try:
        return payload.load()
    finally:
        del _opening.inputs


def carried(error: BaseException) -> CallRaised:
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
    "carried",
    "input_value",
    "run_call",
    "run_call_async",
    "run_in_thread",
    "work",
]

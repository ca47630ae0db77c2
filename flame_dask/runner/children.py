"""Placed children, on the runner's side (H)."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

from flame_dask.child_spec import ChildSpec, is_object, is_process, stopper_of
from flame_dask.payload import pack_value
from flame_dask.runner import coroutines
from flame_dask.runner.channel import here as the_channel
from flame_dask.runner.keeper import Keeper, announce
from flame_dask.runner.threads import Terms
from flame_dask.tracking import Resource, waiter_of

#: Of a class whose methods may run at the same time: how many of them.
CONCURRENCY = "__flame_concurrency__"


def run_child(
    spec: Callable[..., Any] | ChildSpec,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    terms: Terms,
) -> Any:
    """Start a child, and go on for as long as it lives.

    Returns
    -------
    Any
        What a function returns; the exit code of a process; for other objects nothing. The
        coroutine of an ``async def``, to be awaited.

    Raises
    ------
    BaseException
        What its start has raised, or its function, or its stop.
    """
    if not is_object(spec):
        announce(the_channel(), pack_value(None), [])
        assert not isinstance(spec, ChildSpec), "that one makes an object"
        return spec(*args, **kwargs)
    child = _start(spec, args, kwargs)
    stop = stopper_of(spec, child)
    concurrency = int(getattr(type(child), CONCURRENCY, 1))
    keeper = Keeper(the_channel(), terms)
    waiter = waiter_of(child)
    try:
        keeper.add(Resource(child, waiter, concurrency))
        # Its parent's Child decides about its end, not the answer that the start has had.
        announce(the_channel(), pack_value(None), [[0, 1, concurrency]])
        how = keeper.serve()
    finally:
        keeper.close()
    if how == "stop" and stop is not None:
        ended = stop()
        if inspect.iscoroutine(ended):
            coroutines.run(ended)
    if not is_process(child) or waiter is None:
        return None
    if how == "stop":
        waiter()  # it has been asked, and may take its time
    return child.returncode if isinstance(child, subprocess.Popen) else child.exitcode


def _start(spec: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(spec, ChildSpec):
        child = spec.start(*spec.args, *args, **{**spec.kwargs, **kwargs})
    else:
        child = spec(*args, **kwargs)
    return coroutines.run(child) if inspect.iscoroutine(child) else child

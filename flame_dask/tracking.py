"""Tracked resources: what a call leaves on its runner, and is held there (rules I1 to I5)."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing.process
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

T = TypeVar("T")


class Resource(NamedTuple):
    """Something that stays on a runner."""

    value: Any
    """The thing itself."""
    ended: Callable[[], object] | None
    """Returns when it is over by itself, in a thread of its own; ``None`` if it never is."""
    concurrency: int
    """How many of the calls to it run at the same time."""


class Tracker:
    """What ``__flame_track__`` is given: it keeps things on the runner.

    Parameters
    ----------
    acc
        What is kept so far.
    runner
        The id of the runner that this is.

    Attributes
    ----------
    acc, runner
        As given.
    """

    def __init__(self, acc: list[Resource], runner: str) -> None:
        self.acc = acc
        self.runner = runner

    def keep(
        self, value: Any, *, ended: Callable[[], object] | None = None, concurrency: int = 1
    ) -> Any:
        """Keep something on this runner.

        Parameters
        ----------
        value
            What to keep.
        ended
            A function that returns when it is over by itself, a process that has exited, say. It
            is called in a thread of its own. Such a thing is held until then, also if nobody refers
            to it.
        concurrency
            How many of the calls to it may run at the same time; the others wait, in order.

        Returns
        -------
        Handle
            To be sent in its place: the parent gets a :class:`RemoteObject` for it.
        """
        self.acc.append(Resource(value, ended, concurrency))
        return Handle(len(self.acc) - 1, ended is not None, type(value).__qualname__)


class Handle(NamedTuple):
    """Stands for something that is kept; on its way to the parent it becomes a ``RemoteObject``."""

    number: int
    held: bool
    kind: str

    def __reduce__(self) -> Any:
        owner = getattr(_sending, "owner", None)
        if owner is None:
            raise TypeError("what stands for a tracked resource is only for a result")
        return resolve, (*owner, *self)


_sending = threading.local()


class sending:  # a context manager, named like contextlib's
    """While a result is pickled, say whose resources are in it.

    Parameters
    ----------
    pool, call
        The names of the pool and of the call that keeps them.
    """

    def __init__(self, pool: str, call: str) -> None:
        self._owner = pool, call

    def __enter__(self) -> None:
        _sending.owner = self._owner

    def __exit__(self, *exc_info: object) -> None:
        del _sending.owner


def resolve(pool: str, call: str, index: int, held: bool, kind: str) -> Any:
    """Make what the parent has of a resource; the unpickling of a result calls it.

    Raises
    ------
    RuntimeError
        In a process that is no parent.
    """
    if resolver is None:
        raise RuntimeError(f"a {kind} that call {call} has kept can be used in its parent only")
    return resolver(pool, call, index, held, kind)


#: Set by the parent's part of the package.
resolver: Callable[[str, str, int, bool, str], Any] | None = None


@runtime_checkable
class Trackable(Protocol):
    """What a call may return to have it, or a part of it, stay on the runner (I1).

    Examples
    --------
    >>> class Connection:
    ...     def __flame_track__(self, tracker):
    ...         return tracker.keep(self)
    >>> isinstance(Connection(), Trackable)
    True
    """

    def __flame_track__(self, tracker: Tracker) -> Any:
        """Return what is sent to the parent in place of this object.

        Parameters
        ----------
        tracker
            Its ``keep`` keeps something on this runner, and returns what stands for it.
        """


class keep(Generic[T]):  # used like a function
    r"""Have something that a call returns stay on its runner (I2).

    The parent gets a :class:`RemoteObject` in its place. It takes effect in the result of a call
    with ``track_resources=True``.

    Parameters
    ----------
    value
        Anything; it need not be possible to pickle it.
    concurrency
        How many of the calls to it run at the same time. The others wait, in order.

    Examples
    --------
    >>> def load(path):
    ...     return keep(open(path))
    >>> with pool.call(load, "/etc/hostname", track_resources=True) as file:  # doctest: +SKIP
    ...     file.call("readline")
    'worker-1\n'
    """

    def __init__(self, value: T, *, concurrency: int = 1) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency={concurrency!r}: give a whole number of at least 1")
        self.value = value
        self.concurrency = concurrency

    def __flame_track__(self, tracker: Tracker) -> Any:
        """Keep the value."""
        return tracker.keep(self.value, concurrency=self.concurrency)


def track_resources(data: Any, acc: list[Resource], runner: str) -> tuple[Any, list[Resource]]:
    """Find what is to stay on the runner (I1, I5).

    It looks into tuples, named tuples, lists, sets, keys and values of dicts, and dataclasses. A
    container of one's own calls it in its ``__flame_track__``.

    Parameters
    ----------
    data
        What a call has returned, or a part of it.
    acc
        What is kept so far: the tracker's ``acc``. What is found is added to it.
    runner
        The id of the runner: the tracker's ``runner``.

    Returns
    -------
    tuple
        The data with stand-ins in their places, and ``acc``. Containers without any are the same
        objects as before.

    Examples
    --------
    >>> class Box:
    ...     def __init__(self, inner):
    ...         self.inner = inner
    ...     def __flame_track__(self, tracker):
    ...         inner, _ = track_resources(self.inner, tracker.acc, tracker.runner)
    ...         return Box(inner)
    >>> box, acc = track_resources(Box([keep(open)]), [], "r-1")
    >>> box.inner, len(acc)
    ([Handle(number=0, held=False, kind='builtin_function_or_method')], 1)
    """
    if _holds_any(data):
        data = _walk(data, Tracker(acc, runner), {})
    return data, acc


def waiter_of(value: Any) -> Callable[[], object] | None:
    """Return what waits for the end of something that ends by itself; ``None`` if it doesn't."""
    if isinstance(value, subprocess.Popen):
        return value.wait
    if isinstance(value, threading.Thread | multiprocessing.process.BaseProcess):
        return value.join
    return None


#: What most results are made of, and nothing is in.
_PLAIN: Final = frozenset({bool, bytes, complex, float, int, str, type(None)})


def _is_kept(data: Any) -> bool:
    # As Python looks for such a method: not on the object, which may have any attribute.
    return hasattr(type(data), "__flame_track__") or waiter_of(data) is not None


def _parts(data: Any) -> Iterator[Any]:
    """Give what is in a container, in the order in which it is gone through."""
    if isinstance(data, tuple | list | set | frozenset):
        yield from data
    elif isinstance(data, dict):
        for pair in data.items():
            yield from pair
    elif dataclasses.is_dataclass(data):
        yield from _fields(data).values()


def _fields(data: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(data)]
    return {name: getattr(data, name) for name in names if hasattr(data, name)}


def _holds_any(data: Any) -> bool:
    """Tell whether anything in there is to be kept. That is quick, and copies nothing."""
    left, seen = [data], {}
    while left:
        item = left.pop()
        if type(item) in _PLAIN or isinstance(item, type) or id(item) in seen:
            continue
        if _is_kept(item):
            return True
        seen[id(item)] = item  # held, so that its id is not another's meanwhile
        left += _parts(item)
    return False


def _walk(data: Any, tracker: Tracker, seen: dict[int, list[Any]]) -> Any:
    """Return ``data`` with stand-ins; what has been seen before is the same again."""
    if type(data) in _PLAIN or isinstance(data, type):  # a class has the method, too
        return data
    # By identity, as pickling does: it may be there twice, or contain itself.
    known = seen.get(id(data))
    if known is None:
        known = seen[id(data)] = [data, data]
        known[1] = _replaced(data, tracker, seen, known)
    return known[1]


def _replaced(data: Any, tracker: Tracker, seen: dict[int, list[Any]], known: list[Any]) -> Any:
    if hasattr(type(data), "__flame_track__"):
        return data.__flame_track__(tracker)
    waiter = waiter_of(data)
    if waiter is not None:
        return tracker.keep(data, ended=waiter)
    old = [*_parts(data)]
    again: Any = None
    if isinstance(data, list | set | dict):
        # Of its own kind: a defaultdict has more to it than its items. What is in it and refers to
        # it gets the copy.
        known[1] = again = copy.copy(data)
        again.clear()
    elif not isinstance(data, tuple | frozenset) and old:
        known[1] = again = copy.copy(data)  # not by its constructor, which may check or compute
    new = [_walk(part, tracker, seen) for part in old]
    if all(part is before for part, before in zip(new, old, strict=True)):
        return data
    if isinstance(data, tuple | frozenset):
        # Not by its constructor, which may take them one by one, as that of a named tuple does.
        kind: Any = tuple if isinstance(data, tuple) else frozenset
        return kind.__new__(type(data), new)
    if isinstance(data, list):
        again.extend(new)
    elif isinstance(data, set):
        again.update(new)
    elif isinstance(data, dict):
        for key, value in zip(new[::2], new[1::2], strict=True):
            again[key] = value  # its update() may be for something else, as a Counter's is
    else:
        for name, value in zip(_fields(data), new, strict=True):
            object.__setattr__(again, name, value)  # it may be frozen
    return again

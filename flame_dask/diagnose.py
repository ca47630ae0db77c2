"""Finds out what it was, in a call or a result, that can't be pickled (rule B6).

A pickler says no more than ``cannot pickle '_thread.lock' object``. The walk below starts from the
whole, asks the pickler about each of its parts, goes into one that fails, and so on down to the
object none of whose parts fail: that one is the offender, and the way to it is its name.

The parts of an object are those that pickle would visit: what ``__reduce_ex__`` gives, not what
lies in ``__dict__``, so that an attribute that ``__getstate__`` leaves out is never accused.

It runs only after pickling has failed. Time, depth and the number of findings are bounded, and
nothing here shows the value of anything (rule F4): only names and types.
"""

from __future__ import annotations

import asyncio
import copyreg
import dataclasses
import dis
import enum
import functools
import inspect
import io
import itertools
import queue
import re
import socket
import subprocess
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import cloudpickle

__all__ = ["SECONDS", "Finding", "diagnose_call", "diagnose_value"]

SECONDS: Final = 1.0
"""How long a walk may take: the caller waits for its error meanwhile."""

_MAX_DEPTH: Final = 24
_MAX_OFFENDERS: Final = 3
_BATCH: Final = 64

MakePickler = Callable[..., Any]
"""Makes a pickler from a file and pickle's keywords, as ``cloudpickle.Pickler`` does."""


class Finding(NamedTuple):
    """What can't be pickled.

    Attributes
    ----------
    part
        Where it is: ``"closure variable 'lock' of function 'work'"``, ``"result['a'][1].conn"``.
    reason
        Its type, what to do instead, and up to two others like it, as it follows a colon.

    Examples
    --------
    >>> print(diagnose_value({"a": (i for i in "abc")}).reason)
    type generator can't be pickled (return a list, or use pool.stream for a generator function)
    """

    part: str
    reason: str


class _Place(NamedTuple):
    """The way to an object: a variable that has a name of its own, and steps on from there."""

    root: str  # in words: "closure variable 'cfg' of function 'work'"
    expr: str  # as Python writes it: "cfg"
    path: str = ""  # what follows expr: "['a'].conn"

    def __str__(self) -> str:
        if not self.path:
            return self.root
        whole = self.expr + self.path
        return whole if self.root == self.expr else f"{whole} (in {self.root})"

    def step(self, path: str) -> _Place:
        """Go on to a part."""
        return self._replace(path=self.path + path)

    def inside(self, root: str, expr: str) -> _Place:
        """Start afresh at a variable that belongs to the function or class at this place."""
        reached = "" if self == _FUNCTION else f", reached through {self}"
        return _Place(root + reached, expr)


_FUNCTION: Final = _Place("the function", "fn")
_Child = tuple[_Place, object]


def diagnose_call(
    fn: object,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    *,
    pickler: MakePickler = cloudpickle.Pickler,
    seconds: float = SECONDS,
) -> Finding | None:
    """Find what in a call can't be pickled.

    Parameters
    ----------
    fn, args, kwargs
        The call.
    pickler
        What decides whether an object can be pickled.
    seconds
        How long to look at most.

    Returns
    -------
    Finding or None
        None if each part of the call can be pickled.

    Examples
    --------
    >>> import threading
    >>> print(diagnose_call(print, (1,), {"file": threading.Lock()}).part)
    keyword argument 'file'
    """
    names = _parameter_names(fn)
    roots: list[_Child] = [(_FUNCTION, fn)]
    for i, arg in enumerate(args):
        name = f", the parameter {names[i]!r}" if i < len(names) else ""
        roots.append((_Place(f"args[{i}]{name}", f"args[{i}]"), arg))
    roots += [(_Place(f"keyword argument {key!r}", key), arg) for key, arg in kwargs.items()]
    return _Search(pickler, seconds, _CALL).run(roots)


def diagnose_value(
    value: object,
    *,
    name: str = "result",
    pickler: MakePickler = cloudpickle.Pickler,
    seconds: float = SECONDS,
) -> Finding | None:
    """Find what in a result can't be pickled.

    Parameters
    ----------
    value
        What a call returned.
    name
        What to call it.
    pickler, seconds
        As in ``diagnose_call``.

    Returns
    -------
    Finding or None
        None if the value can be pickled.

    Examples
    --------
    >>> print(diagnose_value({"a": [0, (i for i in "abc")]}).part)
    result['a'][1]
    """
    return _Search(pickler, seconds, _RESULT).run([(_Place(name, name), value)])


class _OutOfTimeError(Exception):
    """Ends a trial that takes too long."""


class _Sink(io.RawIOBase):
    """A file that keeps nothing, so that a trial of gigabytes takes no memory and can be ended."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        if time.monotonic() > self._deadline:
            raise _OutOfTimeError
        return len(data)


class _Offender(NamedTuple):
    part: str
    what: str
    remedy: str


class _Search:
    """One walk."""

    def __init__(self, pickler: MakePickler, seconds: float, side: int) -> None:
        self._pickler = pickler
        self._deadline = time.monotonic() + seconds
        self._side = side
        # Failing objects by id. Parts are often made on the fly (a state, a bound method): kept, so
        # that no id is used again.
        self._seen: dict[int, object] = {}

    def run(self, roots: Iterable[_Child]) -> Finding | None:
        found = (offender for place, obj in roots for offender in self._offenders(obj, place, 0))
        offenders = list(itertools.islice(found, _MAX_OFFENDERS))
        if not offenders:
            return None
        first, *others = offenders
        reason = f"{first.what} can't be pickled ({first.remedy})"
        if others:
            reason += f", nor can {' and '.join(other.part for other in others)}"
        return Finding(first.part, reason)

    def _failure(self, obj: object) -> Exception | None:
        """Try to pickle; give what was raised, ``_OutOfTimeError`` if it took too long."""
        if time.monotonic() > self._deadline:
            return _OutOfTimeError()
        try:
            # list.append gives None, which means "keep this buffer out of the stream".
            buffers: list[object] = []
            file = _Sink(self._deadline)
            self._pickler(file, protocol=5, buffer_callback=buffers.append).dump(obj)
        except Exception as error:  # a foreign __reduce__ may raise anything
            return error
        return None

    def _offenders(self, obj: object, place: _Place, depth: int) -> Iterator[_Offender]:
        error = None if type(obj) in _ATOMS else self._failure(obj)
        if error is None:
            return
        if _is_recursion(error):
            yield self._offender(obj, place, remedy="it is nested too deeply: flatten it")
            return
        self._seen[id(obj)] = obj
        exact = not isinstance(error, _OutOfTimeError) and depth < _MAX_DEPTH
        found = False
        # A thread is a thread, and not the lock that it holds.
        if exact and not isinstance(obj, _KNOWN):
            for part_place, part in self._suspects(_parts(obj, place)):
                if id(part) in self._seen:
                    # Known by another name; or a way back to where we come from, and then it may
                    # well be the only reason why this object fails.
                    found = True
                    continue
                for offender in self._offenders(part, part_place, depth + 1):
                    found = True
                    yield offender
            exact = time.monotonic() <= self._deadline
        if not found:
            yield self._offender(obj, place, exact=exact)

    def _suspects(self, parts: Iterator[_Child]) -> Iterator[_Child]:
        """Leave out parts that can be pickled, many at a time: a list may have millions."""
        while time.monotonic() <= self._deadline:
            batch = list(itertools.islice(parts, _BATCH))
            if not batch:
                return
            if len(batch) == 1 or self._failure([part for _, part in batch]) is not None:
                yield from batch

    def _offender(
        self, obj: object, place: _Place, *, remedy: str | None = None, exact: bool = True
    ) -> _Offender:
        if remedy is None:
            rows = (texts for kinds, *texts in _REMEDIES if isinstance(obj, kinds))
            remedy = next(rows, _OTHERWISE)[self._side]
        what = f"type {_type_name(obj)}" if exact else f"something in it (type {_type_name(obj)})"
        return _Offender(str(place), what, remedy)


def _type_name(obj: object) -> str:
    """Name the type of an object, with its module unless that is ``builtins``."""
    kind = type(obj)
    module = getattr(kind, "__module__", None)
    hidden = module in (None, "builtins")
    return kind.__qualname__ if hidden else f"{module}.{kind.__qualname__}"


def _is_recursion(error: BaseException) -> bool:
    # cloudpickle turns a RecursionError into a PicklingError.
    return isinstance(error, RecursionError) or isinstance(error.__cause__, RecursionError)


def _parts(obj: object, place: _Place) -> Iterator[_Child]:
    """Give what pickle would visit inside of an object, each part with its place."""
    try:
        yield from _known_parts(obj, place)
    except Exception:  # a foreign __reduce__ may raise anything: then the object has no parts
        return


def _known_parts(obj: Any, place: _Place) -> Iterator[_Child]:
    kind = type(obj)
    if kind is types.FunctionType:
        return _function_parts(obj, place)
    if issubclass(kind, type):
        return _class_parts(obj, place)
    if kind is functools.partial:
        return _partial_parts(obj, place)
    if isinstance(obj, (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)):
        return _method_parts(obj, place)
    if kind is dict:
        return _dict_parts(obj.items(), place)
    if isinstance(obj, tuple) and (fields := getattr(obj, "_fields", None)):
        return ((place.step(f".{name}"), item) for name, item in zip(fields, obj, strict=True))
    if kind is list or isinstance(obj, tuple):
        return ((place.step(f"[{i}]"), item) for i, item in enumerate(obj))
    if kind in (set, frozenset):
        return ((place.step(f".<element of type {_type_name(x)}>"), x) for x in obj)
    if isinstance(obj, BaseException):
        return _exception_parts(obj, place)
    return _reduced_parts(obj, place)


def _function_parts(fn: types.FunctionType, place: _Place) -> Iterator[_Child]:
    code = fn.__code__
    owner = f"function {fn.__qualname__!r}"
    for name, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
        try:
            content = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
        yield place.inside(f"closure variable {name!r} of {owner}", name), content
    for name in _global_names(code):
        if name in fn.__globals__:
            yield place.inside(f"global {name!r} used by {owner}", name), fn.__globals__[name]
    positional = code.co_varnames[: code.co_argcount]
    defaults = fn.__defaults__ or ()
    by_name = dict(zip(positional[len(positional) - len(defaults) :], defaults, strict=True))
    for name, default in (by_name | (fn.__kwdefaults__ or {})).items():
        yield place.inside(f"default of parameter {name!r} of {owner}", name), default
    for name, attribute in fn.__dict__.items():
        yield place.inside(f"attribute {name!r} of {owner}", name), attribute
    for name, annotation in fn.__annotations__.items():
        yield place.inside(f"annotation {name!r} of {owner}", name), annotation


def _global_names(code: types.CodeType) -> dict[str, None]:
    """Name the globals that code uses, the functions in it too: cloudpickle sends just these."""
    names = {
        str(op.argval): None for op in dis.get_instructions(code) if op.opname.endswith("_GLOBAL")
    }
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return names


def _class_parts(cls: type, place: _Place) -> Iterator[_Child]:
    here = place.inside(f"class {cls.__qualname__!r}", cls.__qualname__)
    for name, attribute in vars(cls).items():
        # The first two are descriptors of the class itself, which nobody pickles.
        if name not in ("__dict__", "__weakref__", "_abc_impl"):
            function = getattr(attribute, "__func__", attribute)  # of a class or static method
            yield here.step(f".{name}"), function
    for base in cls.__bases__:
        yield here.step(".__bases__"), base


def _partial_parts(obj: functools.partial[Any], place: _Place) -> Iterator[_Child]:
    yield place.step(".func"), obj.func
    for i, arg in enumerate(obj.args):
        yield place.step(f".args[{i}]"), arg
    for name, arg in obj.keywords.items():
        yield place.step(f".keywords[{name!r}]"), arg


def _method_parts(method: Any, place: _Place) -> Iterator[_Child]:
    name = f"method {method.__qualname__!r}"
    yield place.inside(f"the object of {name}", "self"), method.__self__
    if isinstance(method, types.MethodType):
        yield place.inside(f"the function of {name}", "fn"), method.__func__


def _dict_parts(items: Iterable[tuple[object, object]], place: _Place) -> Iterator[_Child]:
    for key, value in items:
        yield place.step(f"[{_key(key)}]"), value
        yield place.step(f".<key of type {_type_name(key)}>"), key


def _key(key: object) -> str:
    """Write a key of a dict, unless it might be somebody's secret (rule F4)."""
    if type(key) is str:
        # A short, plain word is a name, a longer one may be a token.
        return repr(key) if re.fullmatch(r"[\w .:/-]{1,32}", key) else "<str>"
    if type(key) in (int, float, bool, types.NoneType):
        return repr(key)
    return str(key) if isinstance(key, enum.Enum) else f"<{_type_name(key)}>"


def _exception_parts(error: BaseException, place: _Place) -> Iterator[_Child]:
    for i, arg in enumerate(error.args):
        yield place.step(f".args[{i}]"), arg
    for name, attribute in vars(error).items():
        yield place.step(f".{name}"), attribute
    yield place.step(".__cause__"), error.__cause__
    yield place.step(".__context__"), error.__context__
    yield place.step(".__class__"), type(error)


def _reduced_parts(obj: Any, place: _Place) -> Iterator[_Child]:
    reducer = cloudpickle.Pickler.dispatch_table.get(type(obj))
    reduced = obj.__reduce_ex__(5) if reducer is None else reducer(obj)
    if isinstance(reduced, str):  # the name of a global
        return
    func, args, state, items, pairs = (*reduced, None, None, None)[:5]
    for i, arg in enumerate(args):
        if arg is type(obj):
            yield place.step(".__class__"), arg
        else:
            yield place.step(f".__reduce__()[1][{i}]"), arg
    yield from _state_parts(obj, state, place)
    yield from ((place.step(f"[{i}]"), item) for i, item in enumerate(items or ()))
    yield from _dict_parts(pairs or (), place)
    if func is not copyreg.__newobj__:  # type: ignore[attr-defined]  # is there, undocumented
        yield place.step(".__reduce__()[0]"), func


def _state_parts(obj: Any, state: Any, place: _Place) -> Iterator[_Child]:
    if type(state) is tuple and len(state) == 2 and type(state[1]) is dict:
        # What the default gives for a class with __slots__: the __dict__ or None, and the slots.
        yield from _state_parts(obj, state[0], place)
        yield from _state_parts(obj, state[1], place)
    elif type(state) is list and dataclasses.is_dataclass(obj):
        # A frozen dataclass with slots.
        for field, item in zip(dataclasses.fields(obj), state, strict=True):
            yield place.step(f".{field.name}"), item
    elif type(state) is dict:
        for name, attribute in state.items():
            named = isinstance(name, str) and name.isidentifier()
            yield place.step(f".{name}" if named else f".<{_key(name)}>"), attribute
    elif state is not None:
        yield place.step(".__getstate__()"), state


def _parameter_names(fn: Any) -> list[str]:
    """Name the positional parameters of a callable, as far as that is known."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except Exception:  # no signature, or a foreign __signature__ that raises anything
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in itertools.takewhile(lambda p: p.kind in kinds, parameters)]


_ATOMS: Final = frozenset(
    {int, float, complex, bool, str, bytes, bytearray, types.NoneType, types.EllipsisType}
)

# What to do instead: the types, then the words for a call and for a result.
_CALL: Final = 0
_RESULT: Final = 1
_ELSEWHERE: Final = "it means something only in its own process: "
_REMEDIES: Final[tuple[tuple[tuple[type, ...], str, str], ...]] = (
    (
        (types.GeneratorType, types.AsyncGeneratorType),
        "pass a list of its items",
        "return a list, or use pool.stream for a generator function",
    ),
    (
        (types.CoroutineType, asyncio.Future, asyncio.AbstractEventLoop),
        "pass the async function and its arguments: a runner awaits it itself",
        "await it in an async function, and return what it gives",
    ),
    (
        (io.IOBase, socket.socket),
        "pass its path or address, and open it on the runner",
        "return what was read from it",
    ),
    (
        (subprocess.Popen, threading.Thread),
        "start it on the runner",
        "keep it on the runner with track_resources=True",
    ),
    (
        (
            *(type(threading.Lock()), type(threading.RLock()), threading.Condition),
            *(threading.Event, threading.Semaphore, threading.local),
            *(queue.Queue, queue.SimpleQueue, weakref.ReferenceType),
        ),
        _ELSEWHERE + "make it inside the function",
        _ELSEWHERE + "return plain data",
    ),
)
_KNOWN: Final = tuple(kind for kinds, *_ in _REMEDIES for kind in kinds)
_OTHERWISE: Final = (
    "pass what it takes to make it, and make it on the runner; or give its class __reduce__",
    "return plain data, or keep it on the runner with flame_dask.keep and track_resources=True",
)

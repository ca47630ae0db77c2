"""Payloads: what can't travel, and what is said about it (B1, B6, F4)."""

from __future__ import annotations

import enum
import functools
import io
import pickle
import socket
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import pytest

from flame_dask.diagnose import diagnose_call, diagnose_value
from flame_dask.errors import RunnerLost, SerializationError
from flame_dask.payload import Payload, pack_call, pack_value

LOCK = threading.Lock()


def add(a: int, b: int = 0) -> int:
    return a + b


def refusal(pack: Callable[..., Payload], *args: Any) -> SerializationError:
    with pytest.raises(SerializationError) as caught:
        pack(*args)
    return caught.value


@pytest.fixture
def offenders(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Things that can't be pickled, by the names of their types."""
    with socket.socket() as sock, (tmp_path / "out").open("wb") as file:
        yield {
            "generator": (i for i in range(3)),
            "_thread.lock": threading.Lock(),
            "socket.socket": sock,
            "_io.BufferedWriter": file,
        }


THING: object = None


def in_closure(thing: object) -> tuple[Any, ...]:
    def work() -> object:
        return thing

    return work, (), {}


def in_global(thing: object) -> tuple[Any, ...]:
    # A function by itself: this module's own globals are out of an offender's reach.
    fn = types.FunctionType(work_with_global.__code__, {"THING": thing}, "work")
    fn.__qualname__ = "work"
    return fn, (), {}


def work_with_global() -> object:
    def inner() -> object:
        return THING

    return inner()


def with_default(thing: object) -> tuple[Any, ...]:
    def work(a: int, b: object = thing) -> None: ...

    return work, (1,), {}


class Service:
    def __init__(self, conn: object) -> None:
        self.conn = conn

    def query(self) -> None: ...


CALLS: dict[str, tuple[Callable[[Any], tuple[Any, ...]], str]] = {
    "closure": (in_closure, "closure variable 'thing' of function 'in_closure.<locals>.work'"),
    "global": (in_global, "global 'THING' used by function 'work'"),
    "default": (
        with_default,
        "default of parameter 'b' of function 'with_default.<locals>.work'",
    ),
    "argument": (lambda x: (add, (1, x), {}), "args[1], the parameter 'b'"),
    "argument of a builtin": (lambda x: (print, (x,), {}), "args[0]"),
    "keyword": (lambda x: (add, (1,), {"b": x}), "keyword argument 'b'"),
    "nested argument": (
        lambda x: (add, ({"a": [0, Service(x)]},), {}),
        "args[0]['a'][1].conn (in args[0], the parameter 'a')",
    ),
    "nested keyword": (lambda x: (add, (), {"b": [x]}), "b[0] (in keyword argument 'b')"),
    "method": (
        lambda x: (Service(x).query, (), {}),
        "self.conn (in the object of method 'Service.query')",
    ),
    "partial argument": (
        lambda x: (functools.partial(add, x), (), {}),
        "fn.args[0] (in the function)",
    ),
    "partial keyword": (
        lambda x: (functools.partial(add, b=x), (), {}),
        "fn.keywords['b'] (in the function)",
    ),
    "partial function": (
        lambda x: (functools.partial(in_closure(x)[0]), (), {}),
        "closure variable 'thing' of function 'in_closure.<locals>.work', "
        "reached through fn.func (in the function)",
    ),
    "callable object": (lambda x: (Service(x), (), {}), "fn.conn (in the function)"),
}


@pytest.mark.parametrize("position", CALLS)
def test_offender_in_a_call(position: str, offenders: dict[str, Any]) -> None:
    """B6: it fails in the caller, at once, and says which variable or argument it was."""
    make, part = CALLS[position]
    for kind, thing in offenders.items():
        error = refusal(pack_call, *make(thing))
        assert error.part == part
        assert str(error).startswith(f"Can't send {part}: type {kind} can't be pickled (")
        assert isinstance(error.__cause__, (TypeError, pickle.PicklingError))
        assert error.__suppress_context__


@dataclass
class Record:
    conn: object


@dataclass(frozen=True, slots=True)
class Frozen:
    name: str
    conn: object


class Slotted:
    __slots__ = ("conn",)

    def __init__(self, conn: object) -> None:
        self.conn = conn


class Pair(NamedTuple):
    key: str
    conn: object


class Color(enum.Enum):
    RED = 1


class Listed(list[Any]):
    pass


def raised(thing: object) -> Exception:
    error = ValueError("no", thing)
    error.conn = Service(thing)  # type: ignore[attr-defined]
    return error


def of_local_class(thing: object) -> object:
    class Local:
        conn = thing

    return Local()


RESULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "itself": (lambda x: x, "result"),
    "path": (lambda x: {"a": (0, Service(x))}, "result['a'][1].conn"),
    "dataclass": (Record, "result.conn"),
    "slots of a dataclass": (lambda x: Frozen("a", x), "result.conn"),
    "slots": (Slotted, "result.conn"),
    "named tuple": (lambda x: Pair("a", x), "result.conn"),
    "enum as key": (lambda x: {Color.RED: x}, "result[Color.RED]"),
    "number as key": (lambda x: {None: 1, 7: x}, "result[7]"),
    "tuple as key": (lambda x: {(1, 2): x}, "result[<tuple>]"),
    "key": (lambda x: {Pair("a", x): 1}, "result.<key of type {module}.Pair>.conn"),
    "set": (lambda x: {Frozen("a", x)}, "result.<element of type {module}.Frozen>.conn"),
    "ordered dict": (lambda x: OrderedDict(a=x), "result['a']"),
    "deque": (lambda x: deque([x]), "result[0]"),
    "subclass of list": (lambda x: Listed([0, x]), "result[1]"),
    "function": (
        lambda x: [in_closure(x)[0]],
        "closure variable 'thing' of function 'in_closure.<locals>.work', "
        "reached through result[0]",
    ),
    "exception": (raised, "result.args[1]"),
    "local class": (
        of_local_class,
        "of_local_class.<locals>.Local.conn (in class 'of_local_class.<locals>.Local', "
        "reached through result.__class__)",
    ),
}


@pytest.mark.parametrize("position", RESULTS)
def test_offender_in_a_result(position: str, offenders: dict[str, Any]) -> None:
    """B6: the path to the part of the result."""
    make, part = RESULTS[position]
    for kind, thing in offenders.items():
        error = refusal(pack_value, make(thing))
        assert error.part == part.format(module=__name__)
        assert f"type {kind} can't be pickled (" in str(error)


def test_global_of_a_function_that_the_function_calls() -> None:
    """B6: both are named."""
    scope: dict[str, Any] = {"LOCK": LOCK, "__name__": "__main__"}
    exec("def helper():\n    LOCK.acquire()\ndef work():\n    return helper()", scope)
    error = refusal(pack_call, scope["work"], (), {})
    assert error.part == (
        "global 'LOCK' used by function 'helper', reached through "
        "global 'helper' used by function 'work'"
    )


def test_nothing_innocent_is_accused() -> None:
    """B6: neither what ``__getstate__`` leaves out, nor a container, nor a way back."""

    class Careful:
        def __init__(self) -> None:
            self.lock, self.log = threading.Lock(), (line for line in "")

        def __getstate__(self) -> dict[str, Any]:
            return {"log": self.log}

    assert refusal(pack_value, Careful()).part == "result.log"

    parent = Service(None)
    child = Service(parent)
    parent.conn, child.lock = child, LOCK  # type: ignore[attr-defined]
    assert refusal(pack_value, parent).part == "result.conn.lock"

    class Odd:
        """Has no part that is at fault, but one that leads back to it."""

        def __reduce__(self) -> Any:
            return 42, (Service(self),)

    assert refusal(pack_value, [Odd()]).part == "result[0]"

    # Found by one name, and its other names are no offenders of their own.
    error = refusal(pack_value, {"a": LOCK, "b": {"c": LOCK}})
    assert error.part == "result['a']"
    assert "nor can" not in str(error)


def test_several_offenders() -> None:
    """B6: the next ones are named too, so that one attempt shows what to do."""
    stream = (i for i in "ab")

    def work(a: object) -> object:
        return LOCK, stream

    error = refusal(pack_call, work, (threading.Event(),), {})
    assert "closure variable 'stream'" in error.part
    assert "nor can global 'LOCK' used by function" in str(error)
    assert "and args[0]" in str(error)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: (i for i in ""), "use pool.stream"),
        (io.BytesIO().getbuffer().__iter__, "return plain data"),
        (threading.Thread, "track_resources=True"),
        (threading.RLock, "only in its own process"),
        (sys._getframe, "flame_dask.keep"),
    ],
)
def test_remedy_fits_the_type(make: Callable[[], object], remedy: str) -> None:
    """B6: it says what to do instead."""
    assert remedy in str(refusal(pack_value, [make()]))


def test_no_value_is_shown() -> None:
    """F4: neither by its repr, nor as a key, nor in the pickler's words."""

    class Secret:
        def __repr__(self) -> str:
            return "hunter2"

        def __reduce__(self) -> str:
            raise pickle.PicklingError(f"can't pickle {self!r} hunter2")

    token = "hunter2" * 8
    for value in (Secret(), {token: LOCK}, {b"hunter2": LOCK}, {"hunter2\n": [Secret()]}):
        error = refusal(pack_value, value)
        assert "hunter2" not in f"{error} {error.part}"
        error = refusal(pack_call, add, (value,), {})
        assert "hunter2" not in f"{error} {error.part}"


def test_deep_nesting_is_named() -> None:
    """B6: as what it is, and not as some inner list."""
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    error = refusal(pack_value, {"tree": value})
    assert "it is nested too deeply" in str(error)
    while value:  # or its end would be a recursion, too
        value = value[0]


def test_a_walk_is_bounded_in_time() -> None:
    """B6: the caller waits for it. It then names the smallest thing known to hold the offender."""
    found = diagnose_value([[LOCK]], seconds=-1.0)
    assert found is not None
    assert found.part == "result"
    assert found.reason.startswith("something in it (type list) can't be pickled")

    value: Any = LOCK
    for _ in range(40):
        value = [value]
    error = refusal(pack_value, value)
    assert error.part == "result" + 24 * "[0]"
    assert "something in it (type list) can't be pickled" in str(error)


def test_one_in_very_many_is_found() -> None:
    """B6: in a long list, without asking about each item by itself."""
    items = [Record(i) for i in range(20_000)]
    items[-1].conn = LOCK
    trials = 0

    def pickler(*args: Any, **kwargs: Any) -> Any:
        nonlocal trials
        trials += 1
        return cloudpickle.Pickler(*args, **kwargs)

    found = diagnose_value(items, seconds=30.0, pickler=pickler)
    assert found is not None
    assert found.part == "result[19999].conn"
    assert trials < 1000


def test_nothing_to_find() -> None:
    """B6: the walk says so."""
    assert diagnose_call(add, (1,), {"b": [2]}) is None
    assert diagnose_value({"a": (1, Service(2))}) is None


def test_what_reduce_raises() -> None:
    """B6, F4: our own errors and a lack of memory pass as they are."""

    @dataclass
    class Raising:
        error: Exception

        def __reduce__(self) -> str:
            raise self.error

    for error in (RunnerLost("exited"), MemoryError()):
        with pytest.raises(type(error)):
            pack_value([Raising(error)])
        with pytest.raises(type(error)):
            pack_call(add, (Raising(error),), {})
    cause = ZeroDivisionError()
    refused = refusal(pack_call, add, (), {"b": Raising(cause)})
    assert refused.part == "keyword argument 'b'"
    assert refused.__cause__ is cause


def explode() -> None:
    raise ZeroDivisionError("hunter2")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return explode, ()


def test_what_cannot_be_loaded() -> None:
    """B6, F3: a typed error, whose cause is what unpickling raised."""
    payload = pack_value(Bomb())
    error = refusal(payload.load)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert "hunter2" not in str(error)

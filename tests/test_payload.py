"""Payloads: what travels, what does not, and what is said about it (rules B1, B6, F4)."""

from __future__ import annotations

import asyncio
import enum
import functools
import io
import json
import multiprocessing
import pickle
import re
import socket
import subprocess
import sys
import textwrap
import threading
import traceback
import tracemalloc
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import msgpack
import pytest
from dask.sizeof import sizeof
from distributed.core import clean_exception, error_message
from distributed.protocol import Serialize, ToPickle, dumps, loads
from distributed.protocol.serialize import dask_deserialize, dask_serialize

from flame_dask.diagnose import diagnose_call, diagnose_value
from flame_dask.errors import RunnerLost, SerializationError
from flame_dask.payload import OUT_OF_BAND, Payload, check_exception, pack_call, pack_value

ROOT = Path(__file__).resolve().parents[1]
MB = 1_000_000
LOCK = threading.Lock()


def add(a: int, b: int = 0) -> int:
    return a + b


def refusal(pack: Callable[..., Payload], *args: Any) -> SerializationError:
    with pytest.raises(SerializationError) as caught:
        pack(*args)
    return caught.value


def run(folder: Path, code: str) -> str:
    """Run code as the ``__main__`` of another process, and return what it printed."""
    script = folder / "script.py"
    script.write_text(textwrap.dedent(code), encoding="utf-8")
    process = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture(scope="module", autouse=True)
def functions_by_value() -> None:
    """In place of conftest's fixture: here it matters what goes by name and what by value."""


@pytest.fixture(autouse=True)
def nothing_is_left() -> None:
    """In place of conftest's fixture, which takes 0.1 s a test: no pool is opened here."""


# --- what travels ---------------------------------------------------------------------------------


def test_call_of_a_module_function() -> None:
    """B1: function and arguments come back; a small call is one small piece."""
    payload = pack_call(add, (1,), {"b": 2})
    fn, args, kwargs = payload.load()
    assert (fn, args, kwargs) == (add, (1,), {"b": 2})
    assert payload.buffers == ()
    assert payload.nbytes == len(payload.data) < 200


def test_code_that_goes_by_value_keeps_its_file() -> None:
    """B1: tracebacks have lines of the source, whatever cloudpickle makes of the file's name."""

    def outer() -> Any:
        return lambda: None

    fn, _, _ = pack_call(outer, (), {}).load()
    assert fn is not outer
    assert fn.__code__.co_filename == fn().__code__.co_filename == __file__


def test_closures_and_lambdas() -> None:
    """B1: they go by value, at the top and inside of arguments."""
    step = 3

    def count(n: int) -> int:
        return n + step

    fn, args, _ = pack_call(count, (1,), {}).load()
    assert fn is not count
    assert fn(*args) == 4
    _, (key,), _ = pack_call(sorted, (lambda x: -x,), {}).load()
    assert key(2) == -2


def test_functions_and_classes_of_main(tmp_path: Path) -> None:
    """B1: those of ``__main__`` work in a process with another ``__main__``, and come back."""
    out = run(
        tmp_path,
        """
        import pickle, subprocess, sys
        from dataclasses import dataclass
        from flame_dask.payload import pack_call

        FACTOR = 10

        @dataclass
        class Point:
            x: int

        def scaled(point):
            return Point(point.x * FACTOR)

        def apply(fn, items):  # of __main__, too, but only its arguments are given to sorted()
            return fn(items[0])

        runner = '''
        import pickle, sys
        from flame_dask.payload import pack_value
        fn, args, kwargs = pickle.load(sys.stdin.buffer).load()
        sys.stdout.buffer.write(pickle.dumps(pack_value(fn(*args, **kwargs))))
        '''.replace("        ", "")

        def on_runner(fn, *args, **kwargs):
            done = subprocess.run(
                [sys.executable, "-c", runner],
                input=pickle.dumps(pack_call(fn, args, kwargs)),
                stdout=subprocess.PIPE,
                check=True,
            )
            return pickle.loads(done.stdout).load()

        if __name__ == "__main__":
            result = on_runner(apply, scaled, items=[Point(2)])
            assert type(result) is Point, type(result)
            print(result.x, on_runner(list, [Point(3)])[0].x)
        """,
    )
    assert out == "20 3\n"


def test_main_of_a_spawned_process(tmp_path: Path) -> None:
    """B1: multiprocessing calls it ``__mp_main__``, which no runner can import."""
    out = run(
        tmp_path,
        """
        import multiprocessing, pickle, subprocess, sys

        def double(n):
            return 2 * n

        def child():
            from flame_dask.payload import pack_call
            assert double.__module__ == "__mp_main__"
            calls = [pack_call(double, (4,), {}), pack_call(map, (double, [4]), {})]
            load = "import sys, pickle; [c.load() for c in pickle.load(sys.stdin.buffer)]"
            subprocess.run([sys.executable, "-c", load], input=pickle.dumps(calls), check=True)

        if __name__ == "__main__":
            process = multiprocessing.get_context("spawn").Process(target=child)
            process.start()
            process.join(20)
            print(process.exitcode)
        """,
    )
    assert out == "0\n"


def test_modules_registered_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """B1: what cloudpickle was told to send by value goes so wherever it is in a call."""
    module = types.ModuleType("only_here")
    exec("def here(): return 1", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    by_name = pack_call(add, ([module.here],), {})
    cloudpickle.register_pickle_by_value(module)
    try:
        payloads = [pack_call(module.here, (), {}), pack_call(add, ([module.here],), {})]
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    monkeypatch.delitem(sys.modules, "only_here")
    assert payloads[0].load()[0]() == 1
    assert payloads[1].load()[1][0][0]() == 1
    with pytest.raises(SerializationError, match="No module named 'only_here'") as caught:
        by_name.load()
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_keep_their_type(kind: Any) -> None:
    """B1: as argument, keyword and result; large ones stay out of the stream."""
    for size in (0, 10, OUT_OF_BAND - 1, OUT_OF_BAND, 3 * OUT_OF_BAND):
        value = kind(bytes(range(256)) * (size // 256) + bytes(size % 256))
        call, result = pack_call(add, (value,), {"b": value}), pack_value(value)
        outside = size >= OUT_OF_BAND
        assert [len(call.buffers), len(result.buffers)] == ([2, 1] if outside else [0, 0])
        _, (arg,), kwargs = call.load()
        for loaded in (arg, kwargs["b"], result.load(), pickle.loads(pickle.dumps(result)).load()):
            assert type(loaded) is kind
            assert loaded == value


def test_memoryviews_keep_format_shape_and_access() -> None:
    """B1: the type must not depend on size, nor become bytes as with cloudpickle."""
    grid = memoryview(bytes(range(24))).cast("H", (3, 4))
    loaded = pack_value(grid).load()
    assert (loaded.format, loaded.shape, loaded.readonly) == ("H", (3, 4), True)
    assert loaded.tolist() == grid.tolist()
    assert pack_value(memoryview(b"").cast("d")).load().format == "d"

    gaps = memoryview(bytearray(range(10)))[::2]
    loaded = pack_value(gaps).load()
    assert (loaded.tolist(), loaded.readonly) == ([0, 2, 4, 6, 8], False)


def test_large_arguments_of_a_lambda() -> None:
    """B1: they stay out of the stream whichever pickler it takes, and are kept once."""
    payload = pack_call(lambda data: len(data) + 1, (bytes(MB),), {})
    assert len(payload.data) < 2000
    fn, args, _ = payload.load()
    assert fn(*args) == MB + 1

    np = pytest.importorskip("numpy")
    payload = pack_value([np.ones(MB), lambda: None])  # it is the second that plain pickle can't do
    assert len(payload.buffers) == 1
    assert payload.load()[0].sum() == MB


def test_bytes_loaded_where_they_were_made_are_not_copied() -> None:
    """B1: immutable, so that one object serves both."""
    data = bytes(MB)
    assert pack_value(data).load() is data


def test_parts_travel_in_msgpack() -> None:
    """B1: for a message that has no pickle in it; buffers arrive as bytes, and are writable."""
    payload = pack_call(add, (bytearray(b"a" * MB),), {"b": bytes(MB)})
    parts = msgpack.unpackb(msgpack.packb(payload.parts()), use_list=False)
    _, (loaded,), kwargs = Payload.from_parts(parts).load()
    assert (type(loaded), loaded) == (bytearray, b"a" * MB)
    assert kwargs["b"] == bytes(MB)


def test_bytes_that_are_a_slice_of_a_message() -> None:
    """B1: what a transport delivers may be a part of more."""
    one, two = b"a" * OUT_OF_BAND, b"b" * OUT_OF_BAND
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(pack_call(add, (one, two), {}), protocol=5, buffer_callback=buffers.append)
    message = memoryview(b"".join(buffer.raw() for buffer in buffers))
    pieces = [message[:OUT_OF_BAND], message[OUT_OF_BAND:]]
    assert pickle.loads(data, buffers=pieces).load()[1] == (one, two)


@pytest.mark.parametrize("wrap", [Serialize, ToPickle])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, "array"])
def test_50_mb_travel_without_copies(kind: Any, wrap: Any) -> None:
    """B1: none is made on the way to distributed's frames, nor from these to an array."""
    size = 50 * MB
    array = kind == "array"
    value = pytest.importorskip("numpy").ones(size // 8) if array else kind(bytes(size))
    tracemalloc.start()
    try:
        payload = pack_call(add, (value,), {})
        frames = dumps({"payload": wrap(payload)})
        assert tracemalloc.get_traced_memory()[1] < MB
        assert payload.nbytes >= size
        assert sum(memoryview(frame).nbytes for frame in frames) >= size

        arrived = loads(frames)["payload"]
        assert tracemalloc.get_traced_memory()[1] < MB
        _, (loaded,), _ = arrived.load()
        # Python can't make a bytearray of memory that is there already.
        copies = 1 if kind is bytearray else 0
        assert tracemalloc.get_traced_memory()[1] < copies * size + MB
    finally:
        tracemalloc.stop()
    assert type(loaded) is type(value)
    assert memoryview(loaded) == memoryview(value)


@pytest.mark.parametrize("transport", [bytes, bytearray, memoryview, pickle.PickleBuffer])
@pytest.mark.parametrize("size", [10, OUT_OF_BAND])
def test_arrays_stay_writable(transport: Any, size: int) -> None:
    """B1: or read-only, in whatever form the transport delivers the buffers."""
    np = pytest.importorskip("numpy")
    free, fixed = np.arange(size), np.arange(size)
    fixed.flags.writeable = False
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(
        pack_value([free, fixed, np.asfortranarray(np.ones((size, 2)))]),
        protocol=5,
        buffer_callback=buffers.append,
    )
    assert len(buffers) == (3 if size == OUT_OF_BAND else 0)
    received = [transport(bytearray(buffer.raw())) for buffer in buffers]
    one, two, grid = pickle.loads(data, buffers=received).load()
    assert [a.flags.writeable for a in (one, two, grid)] == [True, False, True]
    one[0] = 7
    assert (one[1:] == free[1:]).all()
    assert (two == fixed).all()
    assert grid.flags.f_contiguous
    assert (grid == 1).all()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_pickle_protocol(protocol: int) -> None:
    """B1: also where there are no buffers out of band."""
    value = bytearray(2 * OUT_OF_BAND)
    again = pickle.loads(pickle.dumps(pack_value(value), protocol))
    loaded = again.load()
    assert loaded == value
    loaded[0] = 1


def test_a_large_stream_is_not_copied_either() -> None:
    """B1: what pickle puts into the stream itself, such as text, leaves it as one buffer."""
    payload = pack_value("x" * MB)
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(payload, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 200
    assert len(buffers) == 1
    assert pickle.loads(data, buffers=buffers).load() == "x" * MB


def test_payload_is_an_immutable_value() -> None:
    """F4: and shows nothing of its contents; Dask knows its size."""
    payload = pack_value(bytes(MB))
    with pytest.raises(AttributeError):
        payload.data = b""  # type: ignore[misc]
    assert "x00" not in repr(payload)
    assert sizeof(payload) >= MB
    assert re.fullmatch(r"<Payload: [\d,]+ bytes, 1 out of band>", repr(payload))


def test_snapshot_is_safe_from_changes() -> None:
    """B1: a call that waits holds the arguments that it was made with."""
    data, fixed = bytearray(MB), bytes(MB)
    payload = pack_call(add, (data, fixed), {})
    snapshot = payload.snapshot()
    data[0] = 9
    assert payload.load()[1][0][0] == 9
    _, (loaded, constant), _ = snapshot.load()
    assert loaded[0] == 0
    assert constant is fixed
    constant = pack_value(fixed)
    assert constant.snapshot() is constant


class Handle:
    """Only Dask can send this."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


def test_types_that_dask_alone_can_send() -> None:
    """B1: a call that works with ``Client.submit`` works here, too."""
    dask_serialize.register(Handle)(lambda handle: ({}, []))
    dask_deserialize.register(Handle)(lambda header, frames: Handle())
    try:
        _, ((handle,),), _ = pack_call(lambda x: x, ([Handle()],), {}).load()
        assert isinstance(handle, Handle)
        error = refusal(pack_call, add, (Handle(), LOCK), {})
        assert error.part == "args[1], the parameter 'b'"
    finally:
        for registry in (dask_serialize, dask_deserialize):
            registry._lookup.pop(Handle)


# --- what does not --------------------------------------------------------------------------------


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


# --- exceptions -----------------------------------------------------------------------------------


class TwoArguments(Exception):
    """The classic trap."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{code}: {why}")
        self.code = code


class Wordy(Exception):
    """Unpickles by itself, but says "code code 5" then."""

    def __init__(self, code: object) -> None:
        super().__init__(f"code {code}")


class Newer(Exception):
    """The trap in ``__new__``, which tblib falls into."""

    def __new__(cls, code: int, why: str) -> Newer:
        return super().__new__(cls, why)

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)


class Slots(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


class NoFile(FileNotFoundError):
    def __init__(self, name: str) -> None:
        super().__init__(2, "no such file", name)


def no_words() -> None: ...


class Hopeless(Exception):
    """Its own ``__reduce__`` is wrong."""

    def __reduce__(self) -> tuple[Any, ...]:
        return no_words, (1, 2)


class Disguised(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return ValueError, self.args


class Mute(Exception):
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __str__(self) -> str:
        raise RuntimeError


def thrown(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """Raise and catch, for a traceback."""
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def arrived(error: BaseException) -> BaseException:
    """What the parent gets to see."""
    back = pickle.loads(pickle.dumps(pack_value(check_exception(error)))).load()
    assert isinstance(back, BaseException)
    return back


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyError("a"),
        FileNotFoundError(2, "no such file", "a.txt"),
        subprocess.CalledProcessError(1, ["false"], b"out"),
        multiprocessing.ProcessError(),
        KeyboardInterrupt(),
        TwoArguments(5, "no"),
        SystemExit(3),
        ModuleNotFoundError("No module named 'a'", name="a"),
        json.JSONDecodeError("no", "{", 1),
        NoFile("a.txt"),
        Wordy(5),
        ExceptionGroup("all", [KeyError(3), TwoArguments(5, "no")]),
        RunnerLost("oom", runner="r-1"),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_that_survive(error: BaseException) -> None:
    """B1: unchanged here, and there with type, text, attributes and traceback."""
    caught = thrown(error)
    assert check_exception(caught) is caught
    back = arrived(caught)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert repr(back) == repr(error)
    assert vars(back) == vars(error)
    for name in ("name", "code", "value", "errno", "filename", "lineno", "object"):
        assert getattr(back, name, None) == getattr(error, name, None)
    assert back.__traceback__ is not None
    assert back.__traceback__.tb_frame.f_code.co_name == "thrown"


def test_more_of_an_exception_that_survives() -> None:
    """B1: what it keeps in slots, notes, and fields of built-in exceptions."""
    stop, slots = StopIteration(5), Slots(7)
    slots.add_note("careful")
    assert arrived(stop).value == 5  # type: ignore[attr-defined]
    assert arrived(slots).code == 7  # type: ignore[attr-defined]
    assert arrived(slots).__notes__ == ["careful"]
    # Inside of a result, too. distributed makes plain pickle send these in tblib's way.
    (error,) = pack_value([UnicodeDecodeError("ascii", b"x", 0, 1, "bad")]).load()
    assert str(error) == "'ascii' codec can't decode byte 0x78 in position 0: bad"
    assert str(pack_value(Newer(5, "why")).load()) == "why"
    group = pack_value(BaseExceptionGroup("all", [SystemExit(3), Newer(5, "why")])).load()
    assert [str(part) for part in group.exceptions] == ["3", "why"]
    assert group.exceptions[0].code == 3


@pytest.mark.parametrize(
    "error",
    [UnicodeDecodeError("ascii", b"x", 0, 1, "bad"), SyntaxError("bad", ("a.py", 1, 2, "text"))],
)
def test_text_that_dask_would_lose(error: Exception) -> None:
    """B1: a payload keeps it. When Dask sends the exception itself, there is a note of it."""
    back = arrived(error)
    assert (type(back), str(back)) == (type(error), str(error))
    sent: Any = error_message(check_exception(error))["exception"]
    by_dask = clean_exception(sent.data)[1]
    assert type(by_dask) is type(error)
    assert str(error) in by_dask.__notes__


def test_causes_are_carried() -> None:
    """B1: the chain is that of the runner, even if it goes round."""
    error = thrown(ValueError("outer"), thrown(TwoArguments(5, "inner")))
    back = arrived(error)
    assert type(back.__cause__) is TwoArguments
    assert back.__cause__.__traceback__ is not None
    assert (back.__context__, back.__suppress_context__) == (None, True)

    assert error.__cause__
    error.__cause__.__cause__ = error
    back = pack_value(error).load()
    assert back.__cause__.__cause__ is back


def test_context_is_carried() -> None:
    """B1: the exception during whose handling it was raised, whether shown or not."""
    with pytest.raises(ValueError, match="outer") as caught:  # noqa: PT012
        try:
            raise KeyError("inner")
        except KeyError:
            raise ValueError("outer")  # noqa: B904
    back = arrived(caught.value)
    assert type(back.__context__) is KeyError
    assert not back.__suppress_context__
    caught.value.__suppress_context__ = True
    assert arrived(caught.value).__suppress_context__


def test_a_cause_that_cannot_be_sent() -> None:
    """B1: costs the chain, whose text goes along, but not the type."""
    error = thrown(ValueError("outer"), thrown(Hopeless("inner")))
    back = arrived(error)
    assert type(back) is ValueError
    assert back.__cause__ is None
    (note,) = back.__notes__
    assert note.startswith("Remote traceback:\n")
    assert "Hopeless: inner" in note
    assert "in thrown" in note


def test_a_traceback_too_deep_to_send() -> None:
    """B1: that of a RecursionError."""

    def deeper() -> None:
        deeper()

    with pytest.raises(RecursionError) as caught:
        deeper()
    back = arrived(caught.value)
    assert type(back) is RecursionError
    assert "in deeper" in "".join(traceback.format_exception(back))


@pytest.mark.parametrize(
    "error", [Hopeless("why"), Disguised("why"), Newer(5, "why"), raised(LOCK)]
)
def test_exceptions_that_do_not_survive(error: Exception) -> None:
    """B6, F3: their place is taken by an error with type, text and traceback."""
    back = arrived(thrown(error))
    assert type(back) is SerializationError
    name = type(error).__name__
    assert back.part.startswith(f"the {name} that was raised, for ")
    assert f"{name}: " in str(back)
    assert "why" in str(back) or name == "ValueError"
    assert "Remote traceback:\nTraceback (most recent call last):" in str(back)
    assert "in thrown" in str(back)


def test_the_reason_that_an_exception_does_not_survive() -> None:
    """B6: the attribute, or the class."""
    error = ValueError("no")
    error.conn = Service(LOCK)  # type: ignore[attr-defined]
    back = check_exception(error)
    assert isinstance(back, SerializationError)
    assert back.part == "the ValueError that was raised, for exception.conn.conn"
    back = check_exception(Hopeless("why"))
    assert isinstance(back, SerializationError)
    assert back.part == "the Hopeless that was raised, for its class"
    assert "TypeError (give it __reduce__)" in str(back)


def test_text_of_an_exception_is_bounded_and_without_secrets() -> None:
    """F4: it is text from elsewhere."""
    error = thrown(Hopeless("x" * 100_000 + " password=hunter2"))
    text = str(arrived(error))
    assert len(text) < 12_000
    assert "hunter2" not in text
    assert "password=<hidden>" in text

    assert "Mute" in str(arrived(thrown(Mute())))

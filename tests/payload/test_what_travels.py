"""Payloads: what travels, and how (B1, B6)."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import textwrap
import threading
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import msgpack
import pytest
from dask.sizeof import sizeof
from distributed.protocol import Serialize, ToPickle, dumps, loads
from distributed.protocol.serialize import dask_deserialize, dask_serialize

from flame_dask.errors import SerializationError
from flame_dask.payload import OUT_OF_BAND, Payload, pack_call, pack_value

ROOT = Path(__file__).resolve().parents[2]
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

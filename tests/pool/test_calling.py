"""``pool.call``: values, errors, what can't travel, and how calls differ (B1, B2, B6, F4)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Reschedule

from flame_dask import FlamePool, PoolOptionsError, SerializationError


def inc(x: int) -> int:
    return x + 1


def test_b1_returns_the_value(shared: FlamePool) -> None:
    assert shared.call(divmod, 7, 2) == (3, 1)
    assert shared.call(int, "ff", base=16) == 255
    assert shared.call(os.getpid) != os.getpid()


def test_b1_closures_lambdas_methods_and_partials(shared: FlamePool) -> None:
    offset = 5

    def add(x: int, *, more: int = 0) -> int:
        return x + offset + more

    class Adder:
        def __init__(self, by: int) -> None:
            self.by = by

        def add(self, x: int) -> int:
            return self.by + x

    assert shared.call(add, 1, more=10) == 16
    assert shared.call(lambda x: x * offset, 3) == 15
    assert shared.call(functools.partial(add, more=1), 1) == 7
    assert shared.call(Adder(3).add, 4) == 7
    assert shared.call(Adder, 9).by == 9


def test_b1_async_functions_run_on_the_event_loop(shared: FlamePool) -> None:
    async def nap(value: str) -> tuple[str, bool]:
        await asyncio.sleep(0.01)
        return value, asyncio.get_running_loop().is_running()

    class Asker:
        async def __call__(self, x: int) -> int:
            await asyncio.sleep(0)
            return x + 1

    assert shared.call(nap, "slept") == ("slept", True)
    assert shared.call(functools.partial(nap, "slept")) == ("slept", True)
    assert shared.call(Asker(), 1) == 2


def test_b1_async_functions_raise(shared: FlamePool) -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        shared.call(fail)


def test_b1_nothing_is_imported_from_the_test_module(shared: FlamePool) -> None:
    """Functions of modules that the runner lacks travel by value, when told to."""
    assert shared.call(inc, 1) == 2
    assert shared.call(lambda: inc(2)) == 3


def test_b1_large_arguments_and_results(shared: FlamePool) -> None:
    array = np.arange(700_000, dtype="f8")
    text = os.urandom(3_000_000)

    def both(array: np.ndarray[Any, Any], text: bytes) -> tuple[np.ndarray[Any, Any], bytes]:
        return array * 2, text

    doubled, same = shared.call(both, array, text)
    assert (doubled == array * 2).all()
    assert same == text
    assert shared.call(len, bytearray(200_000)) == 200_000


@pytest.mark.parametrize("size", [0, 1, 65_000, 65_536, 66_000, 1_000_000])
def test_b1_results_about_the_inline_limit(shared: FlamePool, size: int) -> None:
    assert shared.call(bytes, size) == bytes(size)


def test_b1_a_mutated_argument_is_what_it_was(shared: FlamePool) -> None:
    """What ``submit`` was given may be changed at once: the call has its own copy."""
    data = np.ones(300_000)
    future = shared.submit(np.sum, data)
    data[:] = 0
    assert future.result(10) == 300_000


def test_b1_errors_keep_type_arguments_and_remote_traceback(shared: FlamePool) -> None:
    def deep(x: int) -> int:
        raise LookupError("not there", x)

    def outer() -> None:
        deep(7)

    with pytest.raises(LookupError) as caught:
        shared.call(outer)
    assert caught.value.args == ("not there", 7)
    text = "".join(traceback.format_exception(caught.value))
    assert "deep(7)" in text
    assert 'raise LookupError("not there", x)' in text


def test_b1_errors_keep_their_chain(shared: FlamePool) -> None:
    def outer() -> None:
        try:
            {}["key"]
        except KeyError as error:
            raise RuntimeError("wrapped") from error

    with pytest.raises(RuntimeError, match="wrapped") as caught:
        shared.call(outer)
    assert isinstance(caught.value.__cause__, KeyError)


def test_b1_an_exception_class_of_the_caller_is_the_same_class(shared: FlamePool) -> None:
    class Refused(Exception):
        def __init__(self, code: int, why: str) -> None:
            super().__init__(f"{code}: {why}")
            self.code = code

    def refuse() -> None:
        raise Refused(403, "no")

    with pytest.raises(Refused, match="403: no") as caught:
        shared.call(refuse)
    assert caught.value.code == 403


def test_b1_long_messages_keep_their_type(shared: FlamePool) -> None:
    def fail() -> None:
        raise OSError(5, "x" * 50_000)

    with pytest.raises(OSError, match="xxx") as caught:
        shared.call(fail)
    assert caught.value.errno == 5
    assert caught.value.strerror == "x" * 50_000


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_b1_not_even_an_exit_ends_the_runner(shared: FlamePool, kind: type[BaseException]) -> None:
    """``sys.exit`` in a function is its caller's business, not that of the other calls."""

    def leave() -> None:
        raise kind(3)

    async def leave_async() -> None:
        raise kind(3)

    before = shared.call(os.getpid)
    for fn in (leave, leave_async):
        with pytest.raises(kind) as caught:
            shared.call(fn)
        assert caught.value.args == (3,)
    assert shared.call(os.getpid) == before


def test_b1_cancelled_errors_arrive(shared: FlamePool) -> None:
    def cancelled(kind: type[BaseException]) -> None:
        raise kind()

    async def cancelled_async() -> None:
        raise asyncio.CancelledError

    with pytest.raises(concurrent.futures.CancelledError):
        shared.call(cancelled, concurrent.futures.CancelledError)
    with pytest.raises(asyncio.CancelledError):
        shared.call(cancelled, asyncio.CancelledError)
    with pytest.raises(asyncio.CancelledError):
        shared.call(cancelled_async)
    with pytest.raises(TimeoutError):
        shared.call(cancelled, TimeoutError)


def test_f1_rescheduling_starts_nothing_anew(shared: FlamePool, tmp_path: Path) -> None:
    """Dask would start the task of a function that raises ``Reschedule`` once more."""

    def again(path: str) -> None:
        from distributed import Reschedule

        with open(path, "a") as file:
            file.write("started\n")
        raise Reschedule

    path = tmp_path / "starts"
    with pytest.raises(Reschedule):
        shared.call(again, str(path))
    assert path.read_text() == "started\n"


def test_b1_reserved_keywords(shared: FlamePool) -> None:
    def show(**kwargs: Any) -> dict[str, Any]:
        return kwargs

    assert shared.call(show, other=1, timeout="10s", queue_timeout=5, priority=3) == {"other": 1}
    with pytest.raises(PoolOptionsError, match="timeout"):
        shared.call(show, timeout="soon")


def test_b2_identical_calls_are_different_calls(shared: FlamePool, tmp_path: Path) -> None:
    def count(path: str) -> int:
        with open(path, "a") as file:
            file.write("x")
        return os.path.getsize(path)

    path = str(tmp_path / "count")
    futures = [shared.submit(count, path) for _ in range(10)]
    assert len({future.key for future in futures}) == 10
    for future in futures:
        future.result(10)
    assert os.path.getsize(path) == 10


def test_b6_an_unpicklable_closure_variable_is_named(shared: FlamePool) -> None:
    latch = threading.Lock()

    def fetch() -> bool:
        return latch.locked()

    before = shared.status().counters["submitted"]
    for start in (shared.call, shared.submit, shared.cast):
        with pytest.raises(SerializationError, match="latch") as caught:
            start(fetch)
        assert "latch" in caught.value.part
    assert shared.status().counters["submitted"] == before


def test_b6_an_unpicklable_argument_is_named(shared: FlamePool) -> None:
    with pytest.raises(SerializationError, match="conn"):
        shared.call(inc, {"a": {"conn": threading.Lock()}})


def test_b6_an_unpicklable_result_is_named(shared: FlamePool) -> None:
    def make() -> dict[str, Any]:
        return {"fine": 1, "rows": [0, threading.Lock()]}

    with pytest.raises(SerializationError, match=r"rows.*1") as caught:
        shared.call(make)
    assert "rows" in caught.value.part


def test_b6_a_result_that_does_not_unpickle_fails(shared: FlamePool) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return int, ("not a number",)

    with pytest.raises(SerializationError, match="ValueError"):
        shared.call(Trap)
    future = shared.submit(Trap)
    with pytest.raises(SerializationError, match="ValueError"):
        future.result(10)


def test_b6_an_argument_that_does_not_unpickle_fails(shared: FlamePool) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return int, ("not a number",)

    with pytest.raises(SerializationError, match="ValueError"):
        shared.call(inc, Trap())


def test_f3_an_exception_that_does_not_unpickle_does_not_hang(shared: FlamePool) -> None:
    class Trap(Exception):
        def __reduce__(self) -> Any:
            return int, ("not a number",)

    class Unsendable(Exception):
        pass

    def spring() -> None:
        raise Trap("sprung")

    def with_lock() -> None:
        error = Unsendable("has a lock")
        error.lock = threading.Lock()  # type: ignore[attr-defined]
        raise error

    for fn, words in ((spring, "sprung"), (with_lock, "has a lock")):
        began = time.monotonic()
        with pytest.raises(SerializationError, match=words):
            shared.call(fn)
        assert time.monotonic() - began < 5


def test_f3_deep_recursion_arrives(shared: FlamePool) -> None:
    def dig(n: int) -> int:
        return dig(n + 1)

    with pytest.raises(RecursionError):
        shared.call(dig, 0)

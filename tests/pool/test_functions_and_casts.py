"""``@pool.function`` and ``pool.cast`` (B4, B5)."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame_dask import CallTimeout, FlamePool, PoolOptionsError
from flame_dask.parent.function import PoolFunction
from support import on_local

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]


def test_b4_a_pool_function(shared: FlamePool) -> None:
    @shared.function
    def add(x: int, y: int = 1) -> int:
        """Add."""
        return x + y

    assert isinstance(add, PoolFunction)
    assert add.__name__ == "add"
    assert add.__doc__ == "Add."
    assert add(2) == 3
    assert add(2, y=5) == 7
    assert add.local(2) == 3
    future = add.submit(10)
    assert future.result(10) == 11
    assert list(add.map([1, 2], [10, 20])) == [11, 22]
    assert add.cast(1) is None


def test_b4_a_pool_function_runs_on_the_pool(shared: FlamePool) -> None:
    pid = shared.function(os.getpid)
    assert pid() == shared.call(os.getpid)
    assert pid.local() == os.getpid()


def test_b4_a_pool_function_with_options(shared: FlamePool) -> None:
    @shared.function(timeout=0.2)
    def nap(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    assert nap(0) == 0
    with pytest.raises(CallTimeout):
        nap(0.5)
    assert nap(0.3, timeout=10) == 0.3  # a call's own keyword comes first


def test_a2_options_of_a_pool_function_are_checked_at_once(shared: FlamePool) -> None:
    with pytest.raises(PoolOptionsError, match="timeout"):
        shared.function(timeout="soon")
    with pytest.raises(PoolOptionsError, match="did you mean timeout"):
        shared.function(timout=1)


def test_b4_a_pool_function_within_another_call(shared: FlamePool) -> None:
    """On a runner it is the plain function."""

    @shared.function
    def inner(x: int) -> tuple[int, int]:
        return x + 1, os.getpid()

    @shared.function
    def outer(x: int) -> tuple[int, bool]:
        value, pid = inner(x)
        return value * 10, pid == os.getpid()

    assert outer(1) == (20, True)
    assert shared.call(inner, 1)[0] == 2
    assert [value for value, _ in shared.map(inner, [1, 2])] == [2, 3]


def test_b4_a_recursive_pool_function(shared: FlamePool) -> None:
    @shared.function
    def factorial(n: int) -> int:
        return 1 if n == 0 else n * int(factorial(n - 1))

    assert factorial(5) == 120


def test_b4_an_async_pool_function(shared: FlamePool) -> None:
    @shared.function
    async def slow(x: int) -> int:
        import asyncio

        await asyncio.sleep(0)
        return x + 1

    assert slow(1) == 2
    assert shared.call(slow, 1) == 2


# -- cast ----------------------------------------------------------------------------------------


def test_b5_cast_returns_none_at_once(shared: FlamePool, tmp_path: Path, until: Until) -> None:
    def write(path: str) -> str:
        time.sleep(0.3)
        Path(path).write_text("done")
        return "nobody hears of it"

    began = time.monotonic()
    assert shared.cast(write, str(tmp_path / "file")) is None
    assert time.monotonic() - began < 0.25
    until((tmp_path / "file").exists)
    until(lambda: shared.status().leases == 0)


def test_b5_a_result_of_a_cast_stays_away(shared: FlamePool, until: Until) -> None:
    """Nor does it matter that it can't be pickled."""
    shared.cast(threading.Lock)
    shared.cast(bytes, 50_000_000)
    until(lambda: not shared._desk._open)
    assert shared.status().counters["cast_errors"] == 0


def test_b5_a_failure_is_logged_counted_and_reported(
    make_pool: MakePool,
    backend: Any,
    caplog: pytest.LogCaptureFixture,
    flame_log: Any,
    until: Until,
) -> None:
    reported: list[tuple[BaseException, str]] = []

    def take(error: BaseException) -> None:
        reported.append((error, threading.current_thread().name))

    def go_wrong() -> None:
        raise ValueError("a cast fails")

    pool = make_pool(max=1, on_cast_error=take)
    with caplog.at_level(logging.ERROR, logger="flame_dask"):
        pool.cast(go_wrong)
        until(lambda: reported)
    [(error, thread)] = reported
    assert isinstance(error, ValueError)
    assert "IO loop" not in thread
    assert thread != threading.main_thread().name
    [record] = [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert record.exc_info is not None
    assert "a cast fails" in caplog.text
    assert "in go_wrong" in caplog.text
    assert pool.status().counters["cast_errors"] == 1


@on_local
def test_b5_a_failing_hook_harms_nothing(
    make_pool: MakePool, backend: Any, flame_log: Any, until: Until
) -> None:
    def take(error: BaseException) -> None:
        raise RuntimeError("the hook fails too")

    pool = make_pool(max=1, on_cast_error=take)
    pool.cast(int, "no number")
    until(lambda: any("the hook fails too" in text for text in flame_log.texts()))
    assert pool.call(int, "7") == 7


@on_local
def test_b5_cast_has_no_limit_unless_given(
    make_pool: MakePool, backend: Any, flame_log: Any, tmp_path: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=1, timeout=0.2, queue_timeout=0.2)

    def nap_and_write(seconds: float, name: str) -> None:
        time.sleep(seconds)
        Path(name).write_text("done")

    pool.cast(nap_and_write, 0.6, str(tmp_path / "one"))
    pool.cast(nap_and_write, 0.0, str(tmp_path / "two"))  # waits for longer than queue_timeout
    pool.cast(nap_and_write, 0.0, str(tmp_path / "three"), queue_timeout=0.1)
    pool.cast(nap_and_write, 0.0, str(tmp_path / "four"), timeout=0.1)
    until((tmp_path / "two").exists)
    assert (tmp_path / "one").exists()
    until(lambda: pool.status().counters["cast_errors"] == 2)
    assert not (tmp_path / "three").exists()
    assert not (tmp_path / "four").exists()
    assert sum("CallTimeout" in text for text in flame_log.texts()) == 2


def test_b5_casts_are_not_lost_when_the_pool_closes(
    make_pool: MakePool, backend: Any, tmp_path: Path
) -> None:
    """What runs may end (A6)."""
    pool = make_pool(max=1)
    pool.call(int)

    def nap_and_write(path: str) -> None:
        time.sleep(0.3)
        Path(path).write_text("done")

    pool.cast(nap_and_write, str(tmp_path / "file"))
    pool.close()
    assert (tmp_path / "file").exists()

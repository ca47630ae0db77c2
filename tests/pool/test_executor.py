"""``pool.get_executor()``: a ``concurrent.futures.Executor`` (B4)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame_dask import CallCancelled, FlamePool, PoolClosed, SerializationError
from support import on_local

Until = Callable[..., Any]


def square(x: int) -> int:
    return x * x


def fail() -> None:
    raise ValueError("on purpose")


def wait_for_file(path: str) -> str:
    end = time.monotonic() + 20
    while time.monotonic() < end and not Path(path).exists():
        time.sleep(0.005)
    return path


def test_b4_executor_submit_and_map(shared: FlamePool) -> None:
    with shared.get_executor() as executor:
        assert isinstance(executor, concurrent.futures.Executor)
        future = executor.submit(pow, 2, exp=10)
        assert isinstance(future, concurrent.futures.Future)
        assert future.result(10) == 1024
        assert list(executor.map(square, range(10))) == [x * x for x in range(10)]
        futures = [executor.submit(square, i) for i in range(5)]
        done, pending = concurrent.futures.wait(futures, timeout=10)
        assert len(done) == 5
        assert not pending
        assert {f.result() for f in concurrent.futures.as_completed(futures)} == {0, 1, 4, 9, 16}


def test_b4_executor_errors(shared: FlamePool) -> None:
    with shared.get_executor() as executor:
        future = executor.submit(fail)
        with pytest.raises(ValueError, match="on purpose"):
            future.result(10)
        assert isinstance(future.exception(), ValueError)
        with pytest.raises(ValueError, match="on purpose"):
            list(executor.map(lambda x: fail(), [1]))
        with pytest.raises(SerializationError):
            executor.submit(square, threading.Lock())


def test_b4_executor_keywords_are_the_functions_own(shared: FlamePool) -> None:
    with shared.get_executor() as executor:
        future = executor.submit(
            lambda timeout, priority: (timeout, priority), timeout=1, priority=2
        )
        assert future.result(10) == (1, 2)


def test_b4_executor_callbacks(shared: FlamePool, until: Until) -> None:
    seen: list[int] = []
    with shared.get_executor() as executor:
        executor.submit(square, 3).add_done_callback(lambda f: seen.append(f.result()))
    until(lambda: seen == [9])


def test_e4_executor_cancel(shared: FlamePool, tmp_path: Path, until: Until) -> None:
    with shared.get_executor() as executor:
        future = executor.submit(wait_for_file, str(tmp_path / "gate"))
        released = shared.status().counters["released"]
        assert future.cancel()
        assert future.cancelled()
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(5)
        until(lambda: shared.status().counters["released"] == released + 1)
        assert concurrent.futures.wait([future], timeout=5).done == {future}
        (tmp_path / "gate").touch()


def test_b4_executor_map_times_out_and_cancels(
    shared: FlamePool, tmp_path: Path, until: Until
) -> None:
    gate = tmp_path / "gate"
    with shared.get_executor() as executor:
        results = executor.map(wait_for_file, [str(gate)] * 3, timeout=0.1)
        with pytest.raises(TimeoutError):
            next(results)
        gate.touch()
    until(lambda: not shared._desk._open)


@pytest.mark.parametrize("cancel", [False, True])
def test_b4_executor_shutdown(shared: FlamePool, tmp_path: Path, cancel: bool) -> None:
    gate = tmp_path / "gate"
    executor = shared.get_executor()
    future = executor.submit(wait_for_file, str(gate))
    if not cancel:
        threading.Timer(0.1, gate.touch).start()
    executor.shutdown(cancel_futures=cancel)
    assert future.done()
    assert future.cancelled() == cancel
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 1)
    gate.touch()
    assert shared.call(square, 2) == 4  # the pool is as it was


def test_b4_executor_shutdown_without_waiting(shared: FlamePool, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    executor = shared.get_executor()
    future = executor.submit(wait_for_file, str(gate))
    executor.shutdown(wait=False)
    assert not future.done()
    gate.touch()
    assert future.result(10) == str(gate)


@on_local
def test_b4_executors_share_one_thread_that_ends_with_the_pool(
    make_pool: Callable[..., FlamePool], backend: Any
) -> None:
    """Whether or not they are shut down."""
    pool = make_pool(max=1)
    before = set(threading.enumerate())
    for _ in range(5):
        executor = pool.get_executor()
        assert executor.submit(square, 2).result(20) == 4
        del executor
    gc.collect()
    more = [t for t in threading.enumerate() if t not in before and "executor" in t.name]
    assert len(more) == 1
    pool.close()
    assert not more[0].is_alive()


@on_local
def test_a6_executor_of_a_closed_pool(
    make_pool: Callable[..., FlamePool], backend: Any, tmp_path: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=1, shutdown_timeout=0.1)
    executor = pool.get_executor()
    running = executor.submit(wait_for_file, str(tmp_path / "gate"))
    queued = executor.submit(square, 1)
    until(lambda: pool.status().leases == 1)
    pool.close()
    for future in (queued, running):
        with pytest.raises(PoolClosed):
            future.result(5)
    with pytest.raises(RuntimeError):
        executor.submit(square, 1)
    executor.shutdown()


def test_b4_executor_in_an_event_loop(shared: FlamePool) -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        with shared.get_executor() as executor:
            jobs = [loop.run_in_executor(executor, square, i) for i in range(5)]
            return list(await asyncio.gather(*jobs))

    assert asyncio.run(main()) == [0, 1, 4, 9, 16]


def test_e4_cancelling_an_await_ends_the_call(
    shared: FlamePool, tmp_path: Path, until: Until
) -> None:
    released = shared.status().counters["released"]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        executor = shared.get_executor()
        job = loop.run_in_executor(executor, wait_for_file, str(tmp_path / "gate"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(job, 0.1)

    asyncio.run(main())
    until(lambda: shared.status().counters["released"] == released + 1)
    (tmp_path / "gate").touch()


def test_b4_many_threads_submit(shared: FlamePool) -> None:
    with (
        shared.get_executor() as executor,
        concurrent.futures.ThreadPoolExecutor(8) as threads,
    ):
        futures = list(threads.map(lambda i: executor.submit(square, i), range(100)))
        assert [future.result(20) for future in futures] == [i * i for i in range(100)]


def test_f4_cancelled_call_is_a_cancelled_error() -> None:
    assert issubclass(CallCancelled, concurrent.futures.CancelledError)

"""Pools with ``asynchronous=True``, in the caller's own event loop (A4, A6, B1, B3, B4, E4)."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import dask.config
import distributed
import psutil
import pytest

from flame_dask import (
    BootError,
    CallCancelled,
    CallTimeout,
    FlamePool,
    PoolClosed,
    PoolNotFound,
    SerializationError,
    get_pool,
)
from support import on_local


def inc(x: int) -> int:
    return x + 1


def fail() -> None:
    raise ValueError("on purpose")


def wait_for_file(path: str) -> str:
    end = time.monotonic() + 20
    while time.monotonic() < end and not os.path.exists(path):
        time.sleep(0.005)
    return path


async def until(condition: Callable[[], Awaitable[bool]], deadline: float = 10.0) -> None:
    end = time.monotonic() + deadline
    while not await condition():
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.005)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


@pytest.fixture
def options(backend: Any, fast: dict[str, Any]) -> dict[str, Any]:
    return {**fast, "backend": backend, "asynchronous": True}


def test_a4_everything_is_awaitable(options: dict[str, Any]) -> None:
    async def main() -> None:
        async with FlamePool("async", min=1, max=1, max_concurrency=8, **options) as pool:
            assert pool.asynchronous
            assert await pool.call(inc, 1) == 2
            with pytest.raises(ValueError, match="on purpose"):
                await pool.call(fail)
            future = pool.submit(inc, 2)
            assert await future == 3
            assert await future.result() == 3
            assert await pool.submit(fail).exception() is not None
            assert await pool.client.gather([future, pool.submit(inc, 9)]) == [3, 10]
            assert await asyncio.gather(*(pool.call(inc, i) for i in range(8))) == [*range(1, 9)]
            assert pool.cast(inc, 1) is None
            status = await pool.status()
            assert [runner.state for runner in status.runners] == ["ready"]
            assert [event.action for event in await pool.events()] == ["grow"]
            assert pool.dashboard_link is None or pool.dashboard_link.startswith("http")
            large = await pool.call(bytes, 3_000_000)
            assert len(large) == 3_000_000
            with pytest.raises(SerializationError):
                await pool.call(inc, threading.Lock())
        with pytest.raises(PoolClosed):
            await pool.call(inc, 1)
        with pytest.raises(PoolClosed):
            await pool.status()
        assert await future == 3  # as long as one likes

    asyncio.run(main())


def test_a4_await_and_close(options: dict[str, Any]) -> None:
    async def main() -> None:
        pool = FlamePool("async", max=1, **options)
        with pytest.raises(PoolClosed):
            pool.call(inc, 1)  # it is not open yet
        assert await pool is pool
        assert get_pool("async") is pool
        assert await pool.call(inc, 1) == 2
        await asyncio.gather(pool.close(), pool.close())
        await pool.close()
        with pytest.raises(PoolNotFound):
            get_pool("async")

    asyncio.run(main())


def test_a4_never_opened(options: dict[str, Any]) -> None:
    async def main() -> None:
        pool = FlamePool("async", max=1, **options)
        await pool.close()
        with pytest.raises(PoolNotFound):
            get_pool("async")

    asyncio.run(main())


def test_a4_with_is_refused(options: dict[str, Any]) -> None:
    async def main() -> None:
        pool = FlamePool("async", max=1, **options)
        with pytest.raises(TypeError, match="async with"), pool:
            pass
        await pool.close()

    asyncio.run(main())


@on_local
def test_b3_async_wait_and_as_completed(options: dict[str, Any]) -> None:
    async def main() -> None:
        async with FlamePool("async", max=1, max_concurrency=8, **options) as pool:
            futures = [pool.submit(inc, i) for i in range(5)]
            done, _ = await distributed.wait(futures, timeout=20)
            assert len(done) == 5
            async for future in distributed.as_completed(futures):
                assert future.done()
            values = [r async for _, r in distributed.as_completed(futures, with_results=True)]
            assert sorted(values) == [1, 2, 3, 4, 5]

    asyncio.run(main())


@on_local
def test_b4_async_map(options: dict[str, Any]) -> None:
    async def main() -> None:
        async with FlamePool("async", max=1, max_concurrency=4, **options) as pool:
            assert [x async for x in pool.map(inc, range(20))] == [*range(1, 21)]
            unordered = [x async for x in pool.map(inc, range(20), ordered=False)]
            assert sorted(unordered) == [*range(1, 21)]
            results = pool.map(inc, itertools.count())
            assert [await anext(results) for _ in range(5)] == [1, 2, 3, 4, 5]
            await results.aclose()
            mixed = pool.map(int, ["1", "x"], return_exceptions=True)
            one, error = [x async for x in mixed]
            assert one == 1
            assert isinstance(error, ValueError)
            with pytest.raises(ValueError, match="invalid literal"):
                [x async for x in pool.map(int, ["x"])]

    asyncio.run(main())


def test_e4_cancelling_the_awaiting_task(options: dict[str, Any], gate: Path) -> None:
    async def main() -> None:
        async with FlamePool("async", min=1, max=1, max_concurrency=1, **options) as pool:
            running = asyncio.ensure_future(pool.call(wait_for_file, str(gate)))
            await until(lambda: has(pool, "leases", 1))
            queued = asyncio.ensure_future(pool.call(inc, 1))
            await until(lambda: has(pool, "waiters", 1))
            queued.cancel()
            with pytest.raises(asyncio.CancelledError):
                await queued
            await until(lambda: has(pool, "waiters", 0))
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await until(lambda: released(pool, 2))
            assert await pool.call(inc, 1) == 2  # the slot is free: its work has been ended
            running = asyncio.ensure_future(pool.call(wait_for_file, str(gate)))
            await until(lambda: has(pool, "leases", 1))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.call(inc, 1), 0.1)
            await until(lambda: released(pool, 3))
            gate.touch()
            await running

    async def has(pool: FlamePool, what: str, count: int) -> bool:
        return bool(getattr(await pool.status(), what) == count)

    async def released(pool: FlamePool, count: int) -> bool:
        return bool((await pool.status()).counters["released"] == count)

    asyncio.run(main())


@on_local
def test_e4_cancelling_a_future(options: dict[str, Any], gate: Path) -> None:
    async def main() -> None:
        async with FlamePool("async", min=1, max=1, **options) as pool:
            future = pool.submit(wait_for_file, str(gate))
            await future.cancel()
            assert future.cancelled()
            with pytest.raises(CallCancelled):
                await future
            gate.touch()

    asyncio.run(main())


@on_local
def test_e2_async_timeouts(options: dict[str, Any], gate: Path) -> None:
    async def main() -> None:
        async with FlamePool("async", min=1, max=1, **options) as pool:
            with pytest.raises(CallTimeout) as caught:
                await pool.call(wait_for_file, str(gate), timeout=0.2)
            assert caught.value.phase == "running"
            gate.touch()

    asyncio.run(main())


@on_local
def test_b1_the_loop_stays_free(options: dict[str, Any]) -> None:
    """Pickling apart, nothing of a call blocks the caller's event loop."""

    async def main() -> None:
        async with FlamePool("async", min=1, max=1, **options) as pool:
            longest = 0.0
            job = asyncio.ensure_future(pool.call(time.sleep, 0.5))
            while not job.done():
                began = time.monotonic()
                await asyncio.sleep(0)
                longest = max(longest, time.monotonic() - began)
            assert longest < 0.3

    asyncio.run(main())


@on_local
def test_b4_async_functions_and_executor(options: dict[str, Any]) -> None:
    async def main() -> None:
        async with FlamePool("async", max=1, **options) as pool:

            @pool.function
            def double(x: int) -> int:
                return 2 * x

            assert await double(2) == 4
            assert await double.submit(3) == 6
            assert [x async for x in double.map([1, 2])] == [2, 4]
            loop = asyncio.get_running_loop()
            executor = pool.get_executor()
            assert await loop.run_in_executor(executor, inc, 1) == 2
            assert await asyncio.wrap_future(executor.submit(inc, 2)) == 3
            executor.shutdown(wait=False)

    asyncio.run(main())


def test_a6_async_closing_with_calls(options: dict[str, Any], gate: Path) -> None:
    async def main() -> None:
        pool = await FlamePool("async", min=1, max=1, max_concurrency=1, **options)
        running = asyncio.ensure_future(pool.call(wait_for_file, str(gate)))
        await asyncio.sleep(0.1)
        queued = asyncio.ensure_future(pool.call(inc, 1))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(pool.close())
        with pytest.raises(PoolClosed):
            await queued
        assert not closing.done()
        gate.touch()
        assert await running == str(gate)
        await closing

    asyncio.run(main())


@on_local
def test_a6_whoever_gives_up_waiting_for_the_close_does_not_stop_it(
    options: dict[str, Any], gate: Path
) -> None:
    async def main() -> None:
        pool = await FlamePool("async", min=1, max=1, **options)
        running = asyncio.ensure_future(pool.call(wait_for_file, str(gate)))
        await asyncio.sleep(0.1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pool.close(), 0.1)
        gate.touch()
        await pool.close()
        assert await running == str(gate)
        with pytest.raises(PoolNotFound):
            get_pool("async")

    asyncio.run(main())


def test_a5_async_opening_fails_cleanly(options: dict[str, Any], tmp_path: Path) -> None:
    preload = tmp_path / "no_luck.py"
    preload.write_text("raise RuntimeError('no luck')\n")
    cls, more = options["backend"]

    async def main() -> None:
        bad = {**options, "backend": (cls, {**more, "preload": [str(preload)]})}
        with dask.config.set({"flame.boot-retries": 0}), pytest.raises(BootError):
            await FlamePool("async", min=1, max=1, **bad)
        with pytest.raises(PoolNotFound):
            get_pool("async")
        bad = {**options, "backend": (cls, {"scheduler_kwargs": {"no_such": 1}})}
        with pytest.raises(BootError):
            await FlamePool("async", min=1, max=1, **bad)
        async with FlamePool("async", min=1, max=1, **options) as pool:
            assert await pool.call(inc, 1) == 2

    asyncio.run(main())


def test_a5_giving_up_while_it_opens(options: dict[str, Any], tmp_path: Path) -> None:
    preload = tmp_path / "slow.py"
    preload.write_text("import time; time.sleep(30)\n")
    cls, more = options["backend"]

    async def main() -> None:
        slow = {**options, "backend": (cls, {**more, "preload": [str(preload)]})}
        pool = FlamePool("async", min=1, max=1, **slow)

        async def open_it() -> None:
            await pool

        with pytest.raises(TimeoutError):
            await asyncio.wait_for(open_it(), 1.5)
        with pytest.raises(PoolNotFound):
            get_pool("async")

    asyncio.run(main())
    assert not any(
        "distributed.Worker" in " ".join(child.cmdline()) for child in psutil.Process().children()
    )

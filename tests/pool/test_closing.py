"""How pools end (A6, D3, F3)."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import distributed
import psutil
import pytest

from flame_dask import CallCancelled, FlamePool, PoolClosed, PoolNotFound, get_pool
from support import on_local

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]


def inc(x: int) -> int:
    return x + 1


def wait_for_file(path: str) -> str:
    end = time.monotonic() + 30
    while time.monotonic() < end and not os.path.exists(path):
        time.sleep(0.005)
    return path


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def test_a6_with_no_calls(make_pool: MakePool, backend: Any) -> None:
    pool = make_pool("once", min=1, max=1)
    runner = pool.call(os.getpid)
    pool.close()
    assert not psutil.pid_exists(runner)
    assert "closed" in repr(pool)
    for use in (
        lambda: pool.call(inc, 1),
        lambda: pool.submit(inc, 1),
        lambda: pool.map(inc, [1]),
        lambda: pool.cast(inc, 1),
        pool.status,
        pool.events,
        lambda: pool.get_executor().submit(inc, 1),
        lambda: pool.function(inc)(1),
    ):
        with pytest.raises((PoolClosed, RuntimeError)) as caught:
            use()
        assert isinstance(caught.value, PoolClosed)
    with pytest.raises(PoolNotFound):
        get_pool("once")


@on_local
def test_a6_it_is_idempotent(make_pool: MakePool, backend: Any) -> None:
    with make_pool(max=1) as pool:
        pool.close()
        pool.close()
    pool.close()


def test_a6_never_a_call(make_pool: MakePool, backend: Any) -> None:
    make_pool(max=1).close()


def test_a6_queued_calls_fail_at_once_and_running_ones_end(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=1, shutdown_timeout=20)
    running = pool.submit(wait_for_file, str(gate))
    until(lambda: pool.status().leases == 1)
    queued = pool.submit(inc, 1)
    depending = pool.submit(inc, queued)
    until(lambda: pool.status().waiters == 1)
    closing = threading.Thread(target=pool.close)
    closing.start()
    for future in (queued, depending):
        with pytest.raises(PoolClosed):
            future.result(2)
    assert closing.is_alive()
    assert not running.done()
    with pytest.raises(PoolClosed):
        pool.submit(inc, 1)
    gate.touch()
    closing.join(10)
    assert not closing.is_alive()
    assert running.result(0) == str(gate)


def test_a6_running_calls_have_shutdown_timeout(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=2, shutdown_timeout=0.3)
    running = [pool.submit(wait_for_file, str(gate)) for _ in range(2)]
    until(lambda: pool.status().leases == 2)
    began = time.monotonic()
    pool.close()
    assert 0.3 <= time.monotonic() - began < 9
    for future in running:
        with pytest.raises(PoolClosed):
            future.result(0)


@on_local
def test_a6_a_waiting_caller_is_told(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=1, shutdown_timeout=0.1)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            pool.call(wait_for_file, str(gate), timeout=None)
        except PoolClosed as error:
            errors.append(error)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    until(lambda: pool.status().waiters == 2)
    pool.close()
    for caller in callers:
        caller.join(5)
    assert len(errors) == 3


@on_local
def test_a6_large_results_are_delivered_first(make_pool: MakePool, backend: Any) -> None:
    pool = make_pool(min=1, max=1, max_concurrency=8)
    futures = [pool.submit(bytes, 5_000_000) for _ in range(4)]
    pool.close()
    assert [len(future.result(0)) for future in futures] == [5_000_000] * 4


@on_local
def test_a6_from_several_threads_at_once(make_pool: MakePool, backend: Any) -> None:
    pool = make_pool(min=1, max=1)
    threads = [threading.Thread(target=pool.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert pool.cluster.status == distributed.Status.closed


@on_local
def test_a6_from_another_thread_than_it_was_opened_in(backend: Any, fast: dict[str, Any]) -> None:
    opened: list[FlamePool] = []
    thread = threading.Thread(
        target=lambda: opened.append(FlamePool("thread", max=1, backend=backend, **fast))
    )
    thread.start()
    thread.join()
    [pool] = opened
    assert pool.call(inc, 1) == 2
    pool.close()


def test_a6_while_it_opens(
    backend: Any, fast: dict[str, Any], tmp_path: Path, until: Until
) -> None:
    """Whoever opens it is told, and does not wait for ever (F3)."""
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(30)\n")
    cls, options = backend
    errors: list[BaseException] = []

    def open_it() -> None:
        try:
            FlamePool(
                "slow", min=1, max=1, backend=(cls, {**options, "preload": [str(slow)]}), **fast
            )
        except PoolClosed as error:
            errors.append(error)

    thread = threading.Thread(target=open_it)
    thread.start()

    def booting() -> bool:
        try:
            return bool(get_pool("slow").status().booting == 1)
        except (PoolNotFound, PoolClosed):
            return False

    until(booting)
    get_pool("slow").close()
    thread.join(10)
    assert not thread.is_alive()
    assert len(errors) == 1


@on_local
def test_a6_from_a_hook(make_pool: MakePool, backend: Any, until: Until) -> None:
    pools: list[FlamePool] = []
    done = threading.Event()

    def close(result: Any, event: Any) -> None:
        pools[0].close()
        done.set()

    pools.append(make_pool(max=1, on_grow_end=close))
    future = pools[0].submit(inc, 1)
    assert done.wait(20)
    with pytest.raises((PoolClosed, AssertionError)) if not future.done() else _nothing():
        future.result(5)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc_info: object) -> None: ...


def test_a6_an_interrupted_close_can_be_repeated(
    make_pool: MakePool, backend: Any, gate: Path, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(min=1, max=1)
    shut = pool._shut

    async def interrupted() -> None:
        raise OSError("cut off")

    monkeypatch.setattr(pool, "_shut", interrupted)
    with pytest.raises(OSError, match="cut off"):
        pool.close()
    monkeypatch.setattr(pool, "_shut", shut)
    pool.close()


def test_a6_a_closed_pool_can_be_collected(make_pool: MakePool, backend: Any) -> None:
    def use() -> list[weakref.ref[Any]]:
        with FlamePool("gone", max=1, backend=backend) as pool:
            future = pool.submit(inc, 1)
            future.result(20)
            return [weakref.ref(pool), weakref.ref(pool.client), weakref.ref(future)]

    refs = use()
    gc.collect()
    assert [ref() for ref in refs] == [None, None, None]


def test_e4_futures_of_a_closed_pool(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    pool = make_pool(max=1)
    cancelled = pool.submit(wait_for_file, str(gate))
    cancelled.cancel()
    gate.touch()
    done = pool.submit(inc, 1)
    done.result(20)
    pool.close()
    assert done.result() == 2
    with pytest.raises(CallCancelled):
        cancelled.result()
    del done, cancelled
    gc.collect()


def test_a6_a_closed_name_can_be_used_again(make_pool: MakePool) -> None:
    for _ in range(2):
        with make_pool("again", max=1) as pool:
            assert get_pool("again") is pool
            assert pool.call(inc, 1) == 2


def test_a6_the_cluster_was_closed_by_somebody_else(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    """Callers are told, and closing still works (F3)."""
    pool = make_pool(min=1, max=1, max_concurrency=1)
    running = pool.submit(wait_for_file, str(gate), timeout=None)
    queued = pool.submit(inc, 1, timeout=None)
    until(lambda: pool.status().waiters == 1)
    pool.cluster.close()
    for future in (running, queued):
        with pytest.raises((PoolClosed, RuntimeError)):
            future.result(10)
    with pytest.raises(PoolClosed):
        pool.call(inc, 1)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 10


def test_a6_k1_somebody_else_closes_the_cluster_at_the_same_time(
    make_pool: MakePool, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is through first lets go of the event loop, which goes on for the other one."""
    pool = make_pool(max=1)
    prepare = pool._backend._prepare_end  # type: ignore[attr-defined]

    async def while_it_is_let_go(cluster: Any) -> None:
        await asyncio.to_thread(cluster._loop_runner.stop)
        await prepare(cluster)

    monkeypatch.setattr(pool._backend, "_prepare_end", while_it_is_let_go)
    pool.close()
    assert pool.cluster.status == distributed.Status.closed


def test_a6_the_client_was_closed_by_somebody_else(
    make_pool: MakePool, backend: Any, gate: Path, until: Until
) -> None:
    pool = make_pool(min=1, max=1, max_concurrency=1)
    running = pool.submit(wait_for_file, str(gate), timeout=None)
    until(lambda: pool.status().leases == 1)
    pool.client.close()
    with pytest.raises((PoolClosed, RuntimeError)):
        running.result(10)
    with pytest.raises(PoolClosed):
        pool.call(inc, 1)
    gate.touch()
    pool.close()


@on_local
def test_a4_without_another_client_the_pools_is_the_default(
    make_pool: MakePool, backend: Any
) -> None:
    pool = make_pool(max=1)
    assert distributed.default_client() is pool.client
    assert dask.config.get("scheduler", None) is None
    pool.close()
    with pytest.raises(ValueError, match="No clients found"):
        distributed.default_client()

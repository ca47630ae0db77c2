"""Hooks, status and events (C9, C10)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame_dask import BootError, CallTimeout, FlamePool, PoolStatus, ScaleEvent
from support import on_local

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]


def inc(x: int) -> int:
    return x + 1


def wait_for_file(path: str) -> int:
    end = time.monotonic() + 20
    while time.monotonic() < end and not os.path.exists(path):
        time.sleep(0.005)
    return os.getpid()


class Diary:
    """Takes down what the hooks of a pool are told, and where."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Any, ScaleEvent]] = []
        self.threads: set[str] = set()
        self.loops: set[bool] = set()

    def note(self, kind: str, result: Any, event: ScaleEvent) -> None:
        import asyncio

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self.loops.add(False)
        else:
            self.loops.add(True)
        self.threads.add(threading.current_thread().name)
        self.entries.append((kind, result, event))

    def hooks(self) -> dict[str, Any]:
        return {
            "on_grow_start": lambda event: self.note("start", None, event),
            "on_grow_end": lambda result, event: self.note("end", result, event),
            "on_shrink": lambda event: self.note("shrink", None, event),
        }

    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.entries]


def test_c9_order_and_contents(make_pool: MakePool, backend: Any, until: Until) -> None:
    diary = Diary()
    pool = make_pool("hooked", max=1, idle_shutdown_after=0.1, **diary.hooks())
    assert pool.call(inc, 1) == 2
    until(lambda: diary.kinds() == ["start", "end", "shrink"])
    start, end, shrink = (event for _, _, event in diary.entries)
    assert [event.name for event in (start, end, shrink)] == ["hooked"] * 3
    assert start.boot_id == end.boot_id == shrink.boot_id == "hooked-1"
    assert [event.count for event in (start, end, shrink)] == [1, 1, 0]
    assert diary.entries[1][1] == "ok"
    assert "1 calls" in start.reason
    assert "idle" in shrink.reason
    # Never on an event loop, and always in the same thread.
    assert diary.loops == {False}
    assert len(diary.threads) == 1
    assert "hooked" in next(iter(diary.threads))


@on_local
def test_c9_only_what_is_beyond_min(
    make_pool: MakePool, backend: Any, tmp_path: Path, until: Until
) -> None:
    diary = Diary()
    gate = tmp_path / "gate"
    pool = make_pool(min=1, max=2, max_concurrency=1, idle_shutdown_after=0.1, **diary.hooks())
    assert diary.kinds() == []
    futures = [pool.submit(wait_for_file, str(gate)) for _ in range(2)]
    until(lambda: diary.kinds() == ["start", "end"])
    assert diary.entries[0][2].count == 2
    assert diary.entries[1][2].count == 2
    gate.touch()
    for future in futures:
        future.result(10)
    until(lambda: diary.kinds() == ["start", "end", "shrink"])
    assert diary.entries[2][2].count == 1


@on_local
def test_c9_a_failed_boot_is_reported(
    make_pool: MakePool, backend: Any, tmp_path: Path, until: Until
) -> None:
    diary = Diary()
    preload = tmp_path / "no_luck.py"
    preload.write_text("raise RuntimeError('no luck')\n")
    cls, options = backend
    pool = make_pool(backend=(cls, {**options, "preload": [str(preload)]}), max=1, **diary.hooks())
    waiting = pool.submit(inc, 1)
    until(lambda: diary.kinds()[:2] == ["start", "end"])
    waiting.cancel()
    _, result, event = diary.entries[1]
    assert isinstance(result, BootError)
    assert "no luck" in "\n".join(result.log_tail)
    assert event.boot_id == diary.entries[0][2].boot_id


def test_c9_exceptions_in_hooks_harm_nothing(
    make_pool: MakePool, flame_log: Any, until: Until
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("a broken hook")

    pool = make_pool(
        max=1, idle_shutdown_after=0.1, on_grow_start=broken, on_grow_end=broken, on_shrink=broken
    )
    assert pool.call(inc, 1) == 2
    until(lambda: sum("a broken hook" in text for text in flame_log.texts()) == 3)
    assert pool.call(inc, 1) == 2


def test_c9_a_slow_hook_delays_no_call(make_pool: MakePool) -> None:
    release = threading.Event()
    pool = make_pool(max=1, on_grow_start=lambda event: release.wait(20))
    began = time.monotonic()
    assert pool.call(inc, 1) == 2
    assert time.monotonic() - began < 15
    release.set()


@on_local
def test_c9_a_hook_may_use_the_pool(make_pool: MakePool, backend: Any, until: Until) -> None:
    pools: list[FlamePool] = []
    seen: list[int] = []
    pool = make_pool(
        max=1, on_grow_end=lambda result, event: seen.append(pools[0].call(inc, event.count))
    )
    pools.append(pool)
    pool.cast(inc, 1)
    until(lambda: seen == [2])


@on_local
def test_c9_hooks_that_are_due_run_before_the_pool_is_closed(
    make_pool: MakePool, backend: Any
) -> None:
    diary = Diary()
    pool = make_pool(max=1, **diary.hooks())
    assert pool.call(inc, 1) == 2
    pool.close()
    assert diary.kinds() == ["start", "end", "shrink"]


def test_c10_status(make_pool: MakePool, backend: Any, tmp_path: Path, until: Until) -> None:
    gate = tmp_path / "gate"
    pool = make_pool("looked-at", min=1, max=2, max_concurrency=1)
    futures = [pool.submit(wait_for_file, str(gate)) for _ in range(3)]
    until(lambda: [r.state for r in pool.status().runners] == ["ready", "ready"])
    until(lambda: pool.status().leases == 2)
    status = pool.status()
    assert isinstance(status, PoolStatus)
    assert status.name == "looked-at"
    assert (status.leases, status.waiters, status.booting, status.wanted) == (2, 1, 0, 2)
    assert [(r.id, r.kind, r.leases, r.idle) for r in status.runners] == [
        ("looked-at-1", "min", 1, 0.0),
        ("looked-at-2", "elastic", 1, 0.0),
    ]
    workers = pool.client.scheduler_info()["workers"]
    assert {r.address: r.id for r in status.runners} == {
        address: worker["name"] for address, worker in workers.items()
    }
    assert {str(name) for name in pool.cluster.workers} == {"looked-at-1", "looked-at-2"}
    gate.touch()
    for future in futures:
        future.result(10)
    counters = pool.status().counters
    expected = {"submitted": 3, "started": 3, "ended": 3, "boots": 2, "cast_errors": 0}
    assert {name: counters[name] for name in expected} == expected


@on_local
def test_c10_events(make_pool: MakePool, backend: Any, tmp_path: Path, until: Until) -> None:
    gate = tmp_path / "gate"
    began = time.time()
    pool = make_pool(max=1, max_concurrency=1, idle_shutdown_after=0.1)
    running = pool.submit(wait_for_file, str(gate))
    until(lambda: pool.status().leases == 1)
    with pytest.raises(CallTimeout):
        pool.call(inc, 1, timeout=0.05)
    gate.touch()
    running.result(10)
    until(lambda: pool.status().runners == ())
    events = pool.events()
    assert [event.action for event in events] == ["grow", "hold", "refuse", "shrink"]
    assert all(event.reason for event in events)
    assert all(began - 1 <= event.time <= time.time() + 1 for event in events)
    assert events[0].figures["waiters"] == 1
    assert "max=1" in events[1].reason

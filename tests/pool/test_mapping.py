"""``pool.map``: lazy, bounded, in order or not (B4)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flame_dask import CallTimeout, FlamePool, PoolClosed, SerializationError
from support import on_both

Until = Callable[..., Any]


def square(x: int) -> int:
    return x * x


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def reciprocal(x: int) -> float:
    return 1 / x


def wait_for_file(path: str) -> str:
    end = time.monotonic() + 20
    while time.monotonic() < end and not Path(path).exists():
        time.sleep(0.005)
    return path


class Counted:
    """An endless iterator that knows how many items were taken from it."""

    def __init__(self) -> None:
        self.taken = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.taken += 1
        return self.taken - 1


def test_b4_map_in_order(shared: FlamePool) -> None:
    assert list(shared.map(square, range(50))) == [x * x for x in range(50)]
    assert list(shared.map(pow, [2, 3], [10, 2])) == [1024, 9]
    assert list(shared.map(pow, [2, 3, 4], itertools.repeat(2))) == [4, 9, 16]
    assert list(shared.map(square, [])) == []


def test_b4_map_in_order_whatever_ends_first(shared: FlamePool) -> None:
    times = [0.2, 0.0, 0.1]
    assert list(shared.map(nap, times)) == times


def test_b4_map_unordered(shared: FlamePool) -> None:
    assert list(shared.map(nap, [0.4, 0.0], ordered=False)) == [0.0, 0.4]
    assert sorted(shared.map(square, range(50), ordered=False)) == [x * x for x in range(50)]


def test_b4_map_hands_further_keywords_on(shared: FlamePool) -> None:
    assert list(shared.map(int, ["10", "11"], base=2, timeout=10)) == [2, 3]


@pytest.mark.parametrize("ordered", [True, False])
def test_b4_map_over_an_endless_iterator_looks_ahead_a_bounded_way(
    shared: FlamePool, ordered: bool
) -> None:
    items = Counted()
    slots = shared.options.max * shared.options.max_concurrency
    results = shared.map(square, items, ordered=ordered)
    assert items.taken == 0  # nothing is started before somebody asks
    got = [next(results) for _ in range(100)]
    assert len(set(got)) == 100
    if ordered:
        assert got == [x * x for x in range(100)]
    assert 100 <= items.taken <= 100 + slots
    results.close()
    assert items.taken <= 100 + slots


def test_b4_map_raises_when_the_result_is_due(shared: FlamePool) -> None:
    results = shared.map(reciprocal, [1, 2, 0, 4])
    assert next(results) == 1
    assert next(results) == 0.5
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


@pytest.mark.parametrize("ordered", [True, False])
def test_b4_map_returns_exceptions(shared: FlamePool, ordered: bool) -> None:
    results = list(shared.map(reciprocal, [1, 0, 2], return_exceptions=True, ordered=ordered))
    assert [r for r in results if not isinstance(r, Exception)] == [1, 0.5]
    assert [type(r) for r in results if isinstance(r, Exception)] == [ZeroDivisionError]


@on_both("how", ["drop"], local=["close", "error"])
def test_b4_map_leaving_early_ends_what_is_under_way(
    make_pool: Callable[..., FlamePool], backend: Any, tmp_path: Path, until: Until, how: str
) -> None:
    pool = make_pool(max=1, max_concurrency=2)
    gate = tmp_path / "gate"

    def first_or_wait(i: int, path: str) -> int:
        if i == 0:
            return 0
        if i == 1 and how == "error":
            raise ValueError("stop")
        wait_for_file(path)
        return i

    results = pool.map(first_or_wait, itertools.count(), itertools.repeat(str(gate)))
    assert next(results) == 0
    if how == "close":
        results.close()
    elif how == "drop":
        del results
    else:
        with pytest.raises(ValueError, match="stop"):
            next(results)
    until(lambda: not pool._desk._open)
    until(lambda: pool.status().counters["released"] >= 1)
    until(lambda: pool.status().waiters == 0)
    gate.touch()
    until(lambda: pool.status().leases == 0)


def test_b4_map_with_a_failing_source(shared: FlamePool, until: Until) -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        list(shared.map(square, source()))
    until(lambda: not shared._desk._open)


def test_b6_map_with_an_item_that_can_not_travel(shared: FlamePool, until: Until) -> None:
    import threading

    with pytest.raises(SerializationError):
        list(shared.map(square, [1, threading.Lock(), 3]))
    until(lambda: not shared._desk._open)


def test_e2_map_with_a_timeout(shared: FlamePool) -> None:
    results = shared.map(nap, [0.0, 1.0], timeout=0.3, return_exceptions=True)
    first, second = list(results)
    assert first == 0.0
    assert isinstance(second, CallTimeout)


def test_a6_map_ends_with_its_pool(make_pool: Callable[..., FlamePool], backend: Any) -> None:
    pool = make_pool(max=1, max_concurrency=1)
    results = pool.map(square, itertools.count())
    assert next(results) == 0
    pool.close()
    with pytest.raises(PoolClosed):
        list(itertools.islice(results, 3))  # what was under way may have ended well
    with pytest.raises(PoolClosed):
        pool.map(square, [1])

"""``stream``: items come as a generator on a runner makes them (B7)."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from flame_dask import (
    CallCancelled,
    CallTimeout,
    FlamePool,
    PoolClosed,
    PoolOptionsError,
    RunnerLost,
    SerializationError,
)
from support import LOCAL, free, lines, note, runner_pid, wait_for_file

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("processes_end")


#: The most items that both sides hold: those of so many messages, and what waits for one.
HELD = 9 * 512 + 512


# -- generators ------------------------------------------------------------------------------------


def count(to: int) -> Iterator[int]:
    yield from range(to)


async def count_async(to: int) -> AsyncIterator[int]:
    for number in range(to):
        await asyncio.sleep(0)
        yield number


def endless(log: str) -> Iterator[int]:
    """As fast as it can."""
    note(log, "began")
    made = 0
    try:
        while True:
            yield made
            made += 1
            if made % 64 == 0:
                Path(f"{log}.made").write_text(str(made))
    finally:
        note(log, "over")


def busy(log: str) -> Iterator[int]:
    """Yields a few, then never again, and never waits."""
    note(log, "began")
    try:
        yield from range(3)
        while True:
            pass
    finally:
        note(log, "over")


def pausing(log: str) -> Iterator[int]:
    note(log, "began")
    try:
        yield from range(3)
        while True:
            time.sleep(0.005)
    finally:
        note(log, "over")


async def waiting(log: str) -> AsyncIterator[int]:
    """Waits for something that does not come."""
    note(log, "began")
    try:
        for number in range(3):
            yield number
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0)
        note(log, "over")


async def endless_async(log: str) -> AsyncIterator[int]:
    note(log, "began")
    made = 0
    try:
        while True:
            yield made
            made += 1
    finally:
        await asyncio.sleep(0)
        note(log, "over")


def take(stream: Any) -> tuple[list[Any], BaseException | None]:
    """Take items until there are no more; return these, and what has ended them."""
    found: list[Any] = []
    try:
        for item in stream:
            found.append(item)
    except BaseException as error:
        return found, error
    return found, None


# -- items -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [count, count_async, range, lambda n: [*range(n)]])
@pytest.mark.parametrize("many", [0, 1, 513, 10_000])
def test_b7_all_items_in_order(lasting: FlamePool, until: Until, fn: Any, many: int) -> None:
    if many > 1000 and fn is count_async:
        many = 2000  # it takes its time
    assert list(lasting.stream(fn, many)) == list(range(many))
    until(lambda: free(lasting), 3)


def test_b7_items_of_all_kinds(lasting: FlamePool) -> None:
    items = [None, True, "text", b"bytes", 1.5, 2j, [1, {"a": (2,)}], {3}, int, ValueError("no")]

    def give() -> Iterator[Any]:
        yield from items
        yield lambda x: x + len(items)

    *found, function = lasting.stream(give)
    assert found[:-1] == items[:-1]
    assert isinstance(found[-1], ValueError)
    assert function(1) == 11


def test_b7_large_items(lasting: FlamePool) -> None:
    def give() -> Iterator[Any]:
        for number in range(30):
            yield np.full(250_000, number, dtype="f8")

    sums = [array.sum() / 250_000 for array in lasting.stream(give)]
    assert sums == list(range(30))
    assert sum(map(len, lasting.stream(lambda: (bytes(300_000) for _ in range(50))))) == 15_000_000


def test_b7_an_item_that_changes_afterwards(lasting: FlamePool) -> None:
    """It arrives as it was when it was yielded."""

    def give() -> Iterator[Any]:
        row: list[int] = []
        array = np.zeros(20_000)
        for number in range(2000):
            row.append(number)
            array[:] = number
            yield (row, array) if number % 100 == 0 else len(row)
            row[-1] = -1
            array[:] = -1

    pairs = [item for item in lasting.stream(give) if isinstance(item, tuple)]
    assert [row[-1] for row, _ in pairs] == list(range(0, 2000, 100))
    assert [set(array) for _, array in pairs] == [{number} for number in range(0, 2000, 100)]


def test_b7_items_come_as_they_are_made(lasting: FlamePool, tmp_path: Path) -> None:
    """Not when there are many of them."""
    gates = [tmp_path / f"gate{i}" for i in range(3)]

    def give(paths: list[str]) -> Iterator[int]:
        for number, path in enumerate(paths):
            yield number
            wait_for_file(path)

    with lasting.stream(give, [str(gate) for gate in gates]) as stream:
        for number, gate in enumerate(gates):
            assert next(stream) == number
            gate.touch()
        assert list(stream) == []
        assert list(stream) == []


def test_b7_several_take_from_one_stream(lasting: FlamePool) -> None:
    stream = lasting.stream(count, 3000)
    with ThreadPoolExecutor(4) as executor:
        parts = [executor.submit(list, stream) for _ in range(4)]
        found = [item for part in parts for item in part.result(20)]
    assert sorted(found) == list(range(3000))


def test_b7_c2_it_has_a_slot(make_pool: MakePool, log: Path) -> None:
    pool = make_pool(max=1, max_concurrency=1, backend=LOCAL)
    with pool.stream(endless, str(log)) as stream:
        assert next(stream) == 0
        with pytest.raises(CallTimeout) as caught:
            pool.call(int, queue_timeout=0.2)
        assert caught.value.phase == "queued"
        waiting = pool.stream(count, 2, queue_timeout=20)
    assert list(waiting) == [0, 1]
    with pool.stream(endless, str(log)) as stream:
        next(stream)
        with pytest.raises(CallTimeout):
            list(pool.stream(count, 2, queue_timeout=0.2))


# -- back-pressure ---------------------------------------------------------------------------------


def test_b7_a_slow_consumer_makes_the_generator_wait(
    lasting: FlamePool, log: Path, until: Until
) -> None:
    made_file = Path(f"{log}.made")

    def made() -> int:
        return int(made_file.read_text() or 0) if made_file.exists() else 0

    with lasting.stream(endless, str(log)) as stream:
        taken = next(stream) + 1
        for _ in range(3):
            until(made)
            rest = made() - 1
            while made() > rest:  # until it stands still
                rest = made()
                began = time.monotonic()
                until(lambda began=began: time.monotonic() > began + 0.2)
            assert made() <= taken + HELD
            for _ in range(5000):
                assert next(stream) == taken
                taken += 1
    until(lambda: lines(log)[1:] == ["over"], 3)


def test_b7_of_large_items_there_are_few(lasting: FlamePool, log: Path, until: Until) -> None:
    def give(log: str) -> Iterator[bytes]:
        for number in range(100):
            note(log, number)
            yield bytes([number]) * 10_000_000

    with lasting.stream(give, str(log)) as stream:
        for number in range(3):
            assert next(stream)[0] == number
            until(lambda number=number: len(lines(log)) > number + 1)
            began = time.monotonic()
            until(lambda began=began: time.monotonic() > began + 0.1)
            assert len(lines(log)) <= number + 4


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_b7_a_million_items_in_little_memory(lasting: FlamePool, until: Until) -> None:
    """On both sides: those that are under way are few."""
    here = psutil.Process()
    there = psutil.Process(runner_pid(lasting))

    def resident() -> int:
        family = [here, there, *here.children(recursive=True)]
        return sum(process.memory_info().rss for process in {p.pid: p for p in family}.values())

    stream = lasting.stream(count, 1_000_000)
    expected, before, most = 0, 0, 0
    for item in stream:
        assert item == expected
        expected += 1
        if expected % 50_000 == 0:
            before = before or resident()
            most = max(most, resident())
    assert expected == 1_000_000
    assert most - before < 60 * 2**20


# -- ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fn", [endless, busy, pausing, waiting, endless_async])
@pytest.mark.parametrize("way", ["close", "drop", "with"])
def test_b7_e4_what_nobody_takes_any_more_ends(
    lasting: FlamePool, log: Path, until: Until, way: str, fn: Any
) -> None:
    """Within a second: its ``finally`` has run, its slot is free, its runner stays."""
    runner = lasting.status().runners[0].id
    stream: Any = lasting.stream(fn, str(log))
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    if way == "close":
        stream.close()
        assert list(stream) == []
        stream.close()
    elif way == "drop":
        del stream
        gc.collect()
    else:
        with stream:
            pass
    until(lambda: lines(log) == ["began", "over"], 1.5)
    until(lambda: free(lasting), 1.5)
    assert lasting.status().runners[0].id == runner


def test_b7_closed_before_it_has_begun(lasting: FlamePool, log: Path, until: Until) -> None:
    for _ in range(5):
        lasting.stream(endless, str(log)).close()
        lasting.stream(endless, str(log))  # dropped
    until(lambda: free(lasting), 5)
    assert lines(log).count("began") == lines(log).count("over")


def test_b7_closed_by_another_thread(lasting: FlamePool, log: Path, until: Until) -> None:
    stream = lasting.stream(pausing, str(log))
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    timer = threading.Timer(0.2, stream.close)
    timer.start()
    assert list(stream) == []
    timer.join()
    until(lambda: lines(log) == ["began", "over"], 3)


@pytest.mark.parametrize(
    "error", [LookupError("on purpose", 7), SystemExit(3), KeyboardInterrupt()]
)
def test_b7_b1_an_error_comes_after_the_items_before_it(
    lasting: FlamePool, error: BaseException
) -> None:
    def give() -> Iterator[int]:
        yield from range(1500)
        raise error

    async def give_async() -> AsyncIterator[int]:
        for number in range(5):
            yield number
        raise error

    for fn, many in ((give, 1500), (give_async, 5)):
        found, caught = take(lasting.stream(fn))
        assert found == list(range(many))
        assert type(caught) is type(error)
        assert caught.args == error.args


def test_b7_an_error_after_all_the_items(lasting: FlamePool) -> None:
    def give(many: int) -> Iterator[int]:
        yield from range(many)
        raise LookupError("at last")

    for many in (0, 1, 3000):
        found, error = take(lasting.stream(give, many))
        assert found == list(range(many))
        assert isinstance(error, LookupError)


def test_b7_b6_an_item_that_can_not_be_sent(lasting: FlamePool) -> None:
    def give() -> Iterator[Any]:
        yield 1
        yield [2]
        yield {"lock": threading.Lock()}
        yield 3

    found, error = take(lasting.stream(give))
    assert found == [1, [2]]
    assert isinstance(error, SerializationError)
    assert "lock" in error.part
    with pytest.raises(SerializationError):
        lasting.stream(count, threading.Lock())


def test_b7_what_is_no_stream(lasting: FlamePool) -> None:
    async def no_generator() -> int:
        return 5

    for fn in (int, no_generator):
        _, error = take(lasting.stream(fn))
        assert isinstance(error, TypeError)
        assert "something to iterate over" in str(error)
    with pytest.raises(PoolOptionsError, match="items would come twice"):
        lasting.stream(count, 5, retries=1)

    def fail(x: int) -> Iterator[int]:
        raise LookupError("before the first")

    _, error = take(lasting.stream(fail, 1))
    assert isinstance(error, LookupError)


def test_b7_e2_timeout_is_for_all_of_it(lasting: FlamePool, log: Path, until: Until) -> None:
    began = time.monotonic()
    found, error = take(lasting.stream(pausing, str(log), timeout=0.5))
    assert found == [0, 1, 2]
    assert isinstance(error, CallTimeout)
    assert error.phase == "running"
    assert 0.4 < time.monotonic() - began < 3
    until(lambda: lines(log) == ["began", "over"], 3)


def test_b7_f2_its_runner_is_killed(
    make_pool: MakePool, own: dict[str, Any], log: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=2, **own)
    stream = pool.stream(pausing, str(log))
    assert next(stream) == 0
    os.kill(runner_pid(pool), signal.SIGKILL)
    found, error = take(stream)
    assert found in ([], [1], [1, 2])
    assert isinstance(error, RunnerLost)
    assert (error.cause, error.signal) == ("signal", 9)
    assert lines(log) == ["began"]
    assert list(pool.stream(count, 3, queue_timeout=20)) == [0, 1, 2]


def test_b7_a6_the_pool_closes(make_pool: MakePool, own: dict[str, Any], log: Path) -> None:
    pool = make_pool(max=1, max_concurrency=2, **{**own, "shutdown_timeout": 1})
    stream = pool.stream(pausing, str(log))
    assert next(stream) == 0
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 8
    _, error = take(stream)
    assert isinstance(error, PoolClosed | CallCancelled | RunnerLost)
    with pytest.raises(PoolClosed):
        pool.stream(count, 3)
    stream.close()


def test_b7_streams_side_by_side(lasting: FlamePool) -> None:
    streams = [lasting.stream(count, 2000) for _ in range(6)]
    assert list(zip(*streams, strict=True)) == [(number,) * 6 for number in range(2000)]


def test_b7_inputs_that_are_futures(lasting: FlamePool) -> None:
    assert list(lasting.stream(count, lasting.submit(int, "3"))) == [0, 1, 2]
    failed = lasting.submit(int, "three")
    _, error = take(lasting.stream(count, failed))
    assert isinstance(error, ValueError)


# -- in a pool that is asynchronous ----------------------------------------------------------------


def test_a4_b7_asynchronous(
    own: dict[str, Any], fast: dict[str, Any], log: Path, until: Until
) -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise LookupError("on purpose")

    async def main() -> None:
        async with FlamePool(
            "async", max=1, max_concurrency=4, asynchronous=True, **fast, **own
        ) as pool:
            for fn in (count, count_async):
                assert [item async for item in pool.stream(fn, 1500)] == list(range(1500))
            failing = pool.stream(fail)
            assert await anext(failing) == 1
            with pytest.raises(LookupError):
                await anext(failing)
            with pytest.raises(StopAsyncIteration):
                await anext(failing)
            async with pool.stream(endless, f"{log}0") as stream:
                async for item in stream:
                    if item == 2000:
                        break
            stream = pool.stream(waiting, f"{log}1")
            assert await anext(stream) == 0
            await stream.aclose()
            assert [item async for item in stream] == []
            stream = pool.stream(pausing, f"{log}2")
            assert [await anext(stream) for _ in range(3)] == [0, 1, 2]
            taking = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.05)
            taking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await taking
            stream = pool.stream(endless_async, f"{log}3")
            assert await anext(stream) == 0
            del stream, taking
            gc.collect()
            end = time.monotonic() + 3
            while (await pool.status()).leases:
                assert time.monotonic() < end
                await asyncio.sleep(0.01)

    asyncio.run(main())
    assert [lines(Path(f"{log}{i}")) for i in range(4)] == [["began", "over"]] * 4

"""``pool.submit``: a ``distributed.Future`` in all that Dask does with futures (B3, E4)."""

from __future__ import annotations

import concurrent.futures
import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import numpy as np
import pytest

from flame_dask import CallCancelled, FlamePool, PoolFuture, RunnerLost

Until = Callable[..., Any]


def inc(x: int) -> int:
    return x + 1


def nap(seconds: float, value: Any = None) -> Any:
    time.sleep(seconds)
    return value


def fail(text: str = "on purpose") -> None:
    raise ValueError(text)


def wait_for_file(path: str) -> str:
    """Run until a file is there: the test decides when the call ends."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if os.path.exists(path):
            return path
        time.sleep(0.005)
    raise TimeoutError(path)


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def test_b3_returns_at_once(shared: FlamePool, gate: Path) -> None:
    future = shared.submit(wait_for_file, str(gate))
    assert isinstance(future, distributed.Future)
    assert isinstance(future, PoolFuture)
    assert future.status == "pending"
    assert not future.done()
    gate.touch()
    assert future.result(10) == str(gate)
    assert future.done()
    assert future.status == "finished"
    assert future.exception() is None
    assert future.result() == str(gate)


def test_b3_result_with_a_timeout_leaves_the_call_alone(shared: FlamePool, gate: Path) -> None:
    future = shared.submit(wait_for_file, str(gate))
    with pytest.raises(TimeoutError, match=r"0\.05"):
        future.result(timeout=0.05)
    gate.touch()
    assert future.result(10) == str(gate)


def test_b3_looking_in_again_and_again_leaves_no_trail(shared: FlamePool, gate: Path) -> None:
    future = shared.submit(wait_for_file, str(gate))
    for _ in range(50):
        with pytest.raises(TimeoutError):
            future.result(timeout=0)
    assert len(future.call._wakers or ()) == 0
    gate.touch()
    assert future.result(10) == str(gate)


def test_b3_errors(shared: FlamePool) -> None:
    future = shared.submit(fail, "bad")
    with pytest.raises(ValueError, match="bad"):
        future.result(10)
    assert future.status == "error"
    error = future.exception()
    assert isinstance(error, ValueError)
    assert future.traceback() is not None
    with pytest.raises(ValueError, match="bad"):
        future.result(10)  # as often as one likes


def test_b3_distributed_wait(shared: FlamePool, gate: Path) -> None:
    late = shared.submit(wait_for_file, str(gate))
    soon = [shared.submit(inc, i) for i in range(5)]
    done, pending = distributed.wait([late, *soon], return_when="FIRST_COMPLETED", timeout=10)
    assert done
    assert late in pending
    distributed.wait(soon, timeout=10)
    gate.touch()
    done, pending = distributed.wait([late, *soon], timeout=10)
    assert done == {late, *soon}
    assert not pending


def test_b3_distributed_wait_times_out(shared: FlamePool, gate: Path) -> None:
    late = shared.submit(wait_for_file, str(gate))
    with pytest.raises(TimeoutError):
        distributed.wait([late], timeout=0.05)
    gate.touch()
    assert late.result(10)


def test_b3_distributed_wait_on_a_failed_one(shared: FlamePool) -> None:
    future = shared.submit(fail)
    done, _ = distributed.wait([future], timeout=10)
    assert done == {future}


def test_b3_as_completed(shared: FlamePool) -> None:
    futures = [shared.submit(nap, 0.2 - i * 0.05, i) for i in range(3)]
    order = [future.result() for future in distributed.as_completed(futures)]
    assert sorted(order) == [0, 1, 2]
    assert order[-1] == 0
    pairs = dict(distributed.as_completed(futures, with_results=True))
    assert {future.key: value for future, value in pairs.items()} == {
        future.key: i for i, future in enumerate(futures)
    }


def test_b3_as_completed_with_a_failed_and_a_cancelled_one(shared: FlamePool, gate: Path) -> None:
    bad, never = shared.submit(fail), shared.submit(wait_for_file, str(gate))
    never.cancel()
    seen = set(distributed.as_completed([bad, never]))
    assert seen == {bad, never}
    gate.touch()


def test_b3_gather(shared: FlamePool) -> None:
    futures = [shared.submit(inc, i) for i in range(5)]
    assert shared.client.gather(futures) == [1, 2, 3, 4, 5]
    assert shared.client.gather({"a": futures[0], "b": [futures[1]]}) == {"a": 1, "b": [2]}
    bad = shared.submit(fail)
    with pytest.raises(ValueError, match="on purpose"):
        shared.client.gather([*futures, bad])
    assert shared.client.gather([*futures, bad], errors="skip") == [1, 2, 3, 4, 5]


def test_b3_gather_waits(shared: FlamePool, gate: Path) -> None:
    future = shared.submit(wait_for_file, str(gate))
    threading.Timer(0.1, gate.touch).start()
    assert shared.client.gather([future]) == [str(gate)]


def test_b3_gather_together_with_plain_futures(shared: FlamePool) -> None:
    plain = [shared.client.submit(inc, i, pure=False) for i in range(3)]
    ours = [shared.submit(inc, i + 10) for i in range(3)]
    mixed = [x for pair in zip(plain, ours, strict=True) for x in pair]
    assert shared.client.gather(mixed) == [1, 11, 2, 12, 3, 13]
    distributed.wait(mixed)
    assert {future.status for future in distributed.as_completed(mixed)} == {"finished"}


def test_b3_add_done_callback(shared: FlamePool, until: Until) -> None:
    seen: list[tuple[Any, str]] = []
    good, bad = shared.submit(inc, 1), shared.submit(fail)
    for future in (good, bad):
        future.add_done_callback(lambda f: seen.append((f.status, threading.current_thread().name)))
    until(lambda: len(seen) == 2)
    assert sorted(status for status, _ in seen) == ["error", "finished"]
    assert all("IO loop" not in thread for _, thread in seen)
    good.add_done_callback(lambda f: seen.append((f.result(), "late")))
    until(lambda: (2, "late") in seen)


def test_e4_cancel_a_running_call(shared: FlamePool, gate: Path) -> None:
    future = shared.submit(wait_for_file, str(gate))
    future.cancel()
    assert future.cancelled()
    assert future.status == "cancelled"
    with pytest.raises(CallCancelled) as caught:
        future.result(5)
    assert isinstance(caught.value, concurrent.futures.CancelledError)
    gate.touch()


def test_e4_cancel_through_the_client(shared: FlamePool, gate: Path) -> None:
    plain = shared.client.submit(wait_for_file, str(gate), pure=False)
    ours = shared.submit(wait_for_file, str(gate))
    shared.client.cancel([plain, ours])
    assert plain.cancelled()
    assert ours.cancelled()
    gate.touch()


def test_e4_cancelling_what_is_done_changes_nothing(shared: FlamePool) -> None:
    future = shared.submit(inc, 1)
    assert future.result(10) == 2
    future.cancel()
    assert future.result(10) == 2
    assert future.status == "finished"


def test_e4_cancel_wakes_whoever_waits(shared: FlamePool, gate: Path) -> None:
    future = shared.submit(wait_for_file, str(gate))
    threading.Timer(0.1, future.cancel).start()
    with pytest.raises(CallCancelled):
        future.result(10)
    gate.touch()


def test_e4_a_queued_call_just_leaves_the_queue(
    make_pool: Callable[..., FlamePool], backend: Any, gate: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=1)
    running = pool.submit(wait_for_file, str(gate))
    until(lambda: pool.status().leases == 1)
    queued = pool.submit(inc, 1)
    until(lambda: pool.status().waiters == 1)
    queued.cancel()
    until(lambda: pool.status().waiters == 0)
    with pytest.raises(CallCancelled):
        queued.result(1)
    assert pool.status().leases == 1
    gate.touch()
    assert running.result(10)


def test_b3_dropping_the_last_reference_ends_a_queued_call(
    make_pool: Callable[..., FlamePool], backend: Any, gate: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=1)
    running = pool.submit(wait_for_file, str(gate))
    until(lambda: pool.status().leases == 1)
    queued = pool.submit(inc, 1)
    until(lambda: pool.status().waiters == 1)
    del queued
    gc.collect()
    until(lambda: pool.status().waiters == 0)
    assert pool.status().counters["released"] == 1
    gate.touch()
    assert running.result(10)


def test_b3_the_value_outlives_its_runner(
    make_pool: Callable[..., FlamePool], backend: Any, until: Until
) -> None:
    """Small ones come with the completion, large ones were fetched: both are in the parent."""
    pool = make_pool(max=1, max_concurrency=2, idle_shutdown_after=0.1)
    small = pool.submit(inc, 1)
    large = pool.submit(os.urandom, 5_000_000)
    kept = pool.submit(np.ones, 700_000)
    distributed.wait([small, large, kept])
    until(lambda: pool.status().runners == ())
    assert small.result() == 2
    assert len(large.result()) == 5_000_000
    assert pool.client.gather([small, kept])[1].sum() == 700_000
    assert large.result() == large.result()


def test_b3_the_value_outlives_its_pool(make_pool: Callable[..., FlamePool], backend: Any) -> None:
    pool = make_pool(max=1)
    small, large, bad = (
        pool.submit(inc, 1),
        pool.submit(bytes, 5_000_000),
        pool.submit(fail),
    )
    distributed.wait([small, large, bad])
    pool.close()
    assert small.result() == 2
    assert len(large.result()) == 5_000_000
    with pytest.raises(ValueError, match="on purpose"):
        bad.result()
    assert small.status == "finished"


@pytest.mark.usefixtures("kills_runners")
def test_b3_a_large_value_is_lost_with_its_runner_only_until_it_is_delivered(
    make_pool: Callable[..., FlamePool], backend: Any
) -> None:
    """A call whose result can't be fetched fails, and does not hang (F2, F3)."""
    pool = make_pool(max=1)
    future = pool.submit(Bomb)
    with pytest.raises(RunnerLost):
        future.result(20)


class Bomb:
    """A large value whose runner dies as it is sent: between its end and its delivery."""

    def __reduce__(self) -> Any:
        timer = threading.Timer(0.0, os._exit, (1,))
        timer.start()
        return bytes, (bytes(10_000_000),)


# -- futures as arguments ------------------------------------------------------------------------


def test_b3_futures_as_arguments(shared: FlamePool) -> None:
    one, two = shared.submit(inc, 0), shared.submit(inc, 1)
    assert shared.call(lambda a, b: a + b, one, b=two) == 3
    assert shared.submit(inc, shared.submit(inc, shared.submit(inc, 0))).result(10) == 3


def test_b3_futures_nested_in_containers(shared: FlamePool) -> None:
    one, two = shared.submit(inc, 0), shared.submit(inc, 1)

    def total(data: dict[str, Any]) -> int:
        return int(data["list"][0]) + int(data["deep"]["pair"][1]) + int(data["list"][1])

    assert shared.call(total, {"list": [one, one], "deep": {"pair": (0, two)}}) == 4


def test_b3_futures_in_a_closure(shared: FlamePool) -> None:
    one = shared.submit(inc, 0)

    def use() -> Any:
        return one

    assert shared.call(use) == 1


def test_b3_large_futures_as_arguments(shared: FlamePool) -> None:
    array = shared.submit(np.ones, 700_000)
    assert shared.call(np.sum, array) == 700_000


def test_b3_an_argument_that_is_not_done_yet(shared: FlamePool, gate: Path) -> None:
    late = shared.submit(wait_for_file, str(gate))
    future = shared.submit(lambda path: f"got {path}", late)
    assert future.status == "pending"
    del late  # the call still needs it
    gc.collect()
    gate.touch()
    assert future.result(10) == f"got {gate}"


def test_b3_a_failed_argument_fails_the_call(shared: FlamePool) -> None:
    bad = shared.submit(fail, "root of it")
    with pytest.raises(ValueError, match="root of it"):
        shared.call(inc, bad)
    with pytest.raises(ValueError, match="root of it"):
        shared.submit(inc, [bad]).result(10)


def test_b3_a_cancelled_argument_fails_the_call(shared: FlamePool, gate: Path) -> None:
    never = shared.submit(wait_for_file, str(gate))
    future = shared.submit(inc, never)
    never.cancel()
    with pytest.raises(CallCancelled):
        future.result(10)
    gate.touch()


def test_b3_a_future_of_another_pool_as_an_argument(
    shared: FlamePool, make_pool: Callable[..., FlamePool], backend: Any
) -> None:
    other = make_pool(max=1)
    assert shared.call(inc, other.submit(inc, 1)) == 3


def test_b3_a_future_stays_a_future_for_plain_dask(shared: FlamePool) -> None:
    """Dask doesn't know the key of ours, and says so; it does not hang."""
    ours = shared.submit(inc, 1)
    assert ours.result(10) == 2
    future = shared.client.submit(inc, ours)
    with pytest.raises(concurrent.futures.CancelledError):
        future.result(10)


# -- many ----------------------------------------------------------------------------------------


def tasks_and_state(pool: FlamePool) -> dict[str, int]:
    """What the scheduler, the host and the client hold for the pool."""

    def look(dask_scheduler: Any) -> dict[str, int]:
        host = dask_scheduler.plugins["flame"]
        return {
            "tasks": len(dask_scheduler.tasks),
            "wanted": sum(len(c.wants_what) for c in dask_scheduler.clients.values()),
            "host calls": len(host.calls),
            "core calls": len(host.core.calls),
        }

    found: dict[str, int] = pool.client.run_on_scheduler(look)
    found["futures"] = len(pool.client.futures)
    found["references"] = len(pool.client.refcount)
    found["desk"] = len(pool._desk._open)
    return found


def test_b3_failed_futures_are_dropped_too(shared: FlamePool, until: Until) -> None:
    """An exception holds the frames that it went through, and these hold the future."""
    before = tasks_and_state(shared)

    def go_wrong() -> None:
        future = shared.submit(fail)
        with pytest.raises(ValueError, match="on purpose"):
            future.result(10)
        with pytest.raises(ValueError, match="on purpose"):
            shared.client.gather([future])
        assert isinstance(future.exception(), ValueError)
        cancelled = shared.submit(nap, 0.2)
        cancelled.cancel()
        with pytest.raises(CallCancelled):
            cancelled.result(10)
        with pytest.raises(CallCancelled):
            shared.client.gather([cancelled])

    go_wrong()
    gc.collect()
    until(lambda: tasks_and_state(shared) == before)


def objects(pool: FlamePool) -> int:
    """How many objects there are in the parent and on the scheduler."""

    def count() -> int:
        import gc

        gc.collect()
        return len(gc.get_objects())

    there: int = pool.client.run_on_scheduler(count)
    return there + count()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_b3_ten_thousand_dropped_futures_leave_nothing(shared: FlamePool, until: Until) -> None:
    nothing = tasks_and_state(shared)

    def burst(n: int) -> None:
        # So many take their time in the queue, where the machine has other work as well.
        futures = [shared.submit(inc, i, queue_timeout=90) for i in range(n)]
        distributed.wait(futures)
        assert futures[-1].result() == n
        del futures
        until(lambda: tasks_and_state(shared) == nothing, 30)

    burst(1_000)
    before = objects(shared)
    for _ in range(2):
        burst(5_000)
    # Logs of Dask, of bounded length, still fill up.
    assert objects(shared) - before < 2_000


@pytest.mark.slow
def test_b3_neither_do_calls_one_after_the_other(shared: FlamePool, until: Until) -> None:
    """To Dask, each call after a pause is a new computation, and it keeps these."""
    nothing = tasks_and_state(shared)
    for _ in range(200):
        shared.call(inc, 1)
    before = objects(shared)
    for _ in range(1_000):
        shared.call(inc, 1)
    until(lambda: tasks_and_state(shared) == nothing, 30)
    assert objects(shared) - before < 1_000


@pytest.mark.slow
def test_b3_the_runner_forgets_what_was_delivered(shared: FlamePool, until: Until) -> None:
    futures = [shared.submit(bytes, 200_000) for _ in range(20)]
    futures += [shared.submit(inc, i) for i in range(100)]
    distributed.wait(futures)

    def look(dask_worker: Any) -> tuple[int, int]:
        return len(dask_worker.state.tasks), len(dask_worker.data)

    until(lambda: set(shared.client.run(look).values()) == {(0, 0)})

"""Dask's own tools on a pool's cluster, and several pools and threads at once (A4)."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
import distributed
import pytest

from flame_dask import FlamePool, PoolNotFound, PoolOptionsError, get_pool
from flame_dask import call as call_by_name
from flame_dask import cast as cast_by_name

#: As in ``support``, which runners can't import, other than this file: plain Dask has them do so.
on_local = pytest.mark.parametrize("backend", ["local"], indirect=True)

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]


def inc(x: int) -> int:
    return x + 1


def a_function_with_a_name(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


# -- what Dask shows -----------------------------------------------------------------------------


def test_a4_the_scheduler_knows_calls_by_the_functions_name(shared: FlamePool) -> None:
    def look(dask_scheduler: Any) -> set[str]:
        return set(dask_scheduler.task_prefixes)

    future = shared.submit(a_function_with_a_name, 0.3)
    prefixes = shared.client.run_on_scheduler(look)
    assert "a_function_with_a_name" in prefixes
    assert future.key.startswith("a_function_with_a_name-")
    future.result(10)
    assert shared.client.run_on_scheduler(look) >= {"a_function_with_a_name"}


def test_a4_d3_whoever_wants_fewer_workers_gets_no_runner(shared: FlamePool) -> None:
    """And the scheduler is idle as ever: Dask's option for its end keeps its meaning."""

    def look(dask_scheduler: Any) -> tuple[int, list[str], str]:
        choice = dask_scheduler.workers_to_close(n=1)
        return len(dask_scheduler.workers), choice, dask_scheduler.check_idle.__module__

    assert shared.call(inc, 1) == 2
    assert shared.client.run_on_scheduler(look) == (1, [], "distributed.scheduler")


def test_a4_the_task_stream_shows_calls(shared: FlamePool) -> None:
    with distributed.get_task_stream(shared.client) as stream:
        futures = [shared.submit(a_function_with_a_name, 0.05) for _ in range(3)]
        distributed.wait(futures)
    entries = [e for e in stream.data if e["key"].startswith("a_function_with_a_name")]
    assert {entry["key"] for entry in entries} == {future.key for future in futures}
    assert {entry["status"] for entry in entries} == {"OK"}
    computed = [s for e in entries for s in e["startstops"] if s["action"] == "compute"]
    assert all(span["stop"] - span["start"] >= 0.05 for span in computed)


def test_a4_the_task_stream_shows_failures(shared: FlamePool) -> None:
    def break_down() -> None:
        raise ValueError("shown in red")

    with distributed.get_task_stream(shared.client) as stream, contextlib.suppress(ValueError):
        shared.call(break_down)
    [entry] = [e for e in stream.data if e["key"].startswith("break_down")]
    assert entry["status"] == "error"


def test_a4_the_dashboard_is_there(shared: FlamePool) -> None:
    assert shared.dashboard_link is not None
    assert shared.dashboard_link == shared.cluster.dashboard_link
    with urllib.request.urlopen(shared.dashboard_link, timeout=10) as page:
        assert page.status == 200
        assert b"Dask" in page.read()
    assert "127.0.0.1" in shared.dashboard_link


def test_a4_prometheus_counts_calls(shared: FlamePool) -> None:
    assert shared.dashboard_link is not None
    shared.call(inc, 1)
    url = shared.dashboard_link.replace("/status", "/health")
    with urllib.request.urlopen(url, timeout=10) as page:
        assert page.read() == b"ok"


# -- plain Dask ----------------------------------------------------------------------------------


def test_a4_plain_submit_and_map(shared: FlamePool) -> None:
    client = shared.client
    assert client.submit(inc, 1).result(10) == 2
    assert client.gather(client.map(inc, range(10))) == list(range(1, 11))
    assert client.submit(inc, client.submit(inc, 1)).result(10) == 3
    with pytest.raises(ZeroDivisionError):
        client.submit(lambda: 1 / 0).result(10)
    assert client.submit(inc, 1).result(10) == 2  # its values are cached, as ever


def test_a4_plain_graphs_and_data(shared: FlamePool) -> None:
    client = shared.client
    total = dask.delayed(sum)([dask.delayed(inc)(i) for i in range(5)])
    assert client.compute(total).result(10) == 15
    [data] = client.scatter([list(range(5))])
    assert client.submit(sum, data).result(10) == 10
    assert client.nthreads()


def test_a4_plain_futures_and_ours_together(shared: FlamePool) -> None:
    plain = shared.client.submit(inc, 1)
    ours = shared.submit(inc, 2)
    done, _ = distributed.wait([plain, ours], timeout=10)
    assert done == {plain, ours}
    assert shared.client.gather([plain, ours]) == [2, 3]


def test_a4_a_plain_task_and_calls_side_by_side(shared: FlamePool, until: Until) -> None:
    plain = shared.client.submit(a_function_with_a_name, 0.5, pure=False)
    assert shared.call(inc, 1) == 2
    assert plain.result(10) == 0.5


def test_a4_a_client_that_was_there_before_stays_the_default(
    make_pool: MakePool, backend: Any
) -> None:
    """``dask.compute`` goes on using it: a pool that is at zero runners would never answer."""
    cluster = distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
    )
    mine = distributed.Client(cluster)
    assert distributed.default_client() is mine
    pool = make_pool(max=1)
    assert distributed.default_client() is mine
    assert dask.delayed(inc)(1).compute() == 2
    assert pool.status().counters["boots"] == 0
    # Dask's functions work with the pool's futures all the same.
    futures = [pool.submit(inc, i) for i in range(3)]
    assert len(distributed.wait(futures, timeout=20).done) == 3
    assert sorted(f.result() for f in distributed.as_completed(futures)) == [1, 2, 3]
    late = pool.submit(a_function_with_a_name, 0.3)
    assert distributed.wait([late], timeout=10).done == {late}
    pool.close()
    assert distributed.default_client() is mine
    assert mine.submit(inc, 5).result(10) == 6
    mine.close()
    cluster.close()


# -- several pools, many threads -----------------------------------------------------------------


@on_local
def test_a4_two_pools_at_once(make_pool: MakePool, backend: Any) -> None:
    one = make_pool("one", max=1, max_concurrency=4)
    two = make_pool("two", max=1, max_concurrency=4)
    futures = [pool.submit(a_function_with_a_name, 0.2) for pool in (one, two) for _ in range(2)]
    began = time.monotonic()
    distributed.wait(futures, timeout=20)
    assert time.monotonic() - began < 15
    for pool in (one, two):
        assert distributed.wait([pool.submit(inc, 1)], timeout=10).done
        assert pool.call(inc, 1) == 2
        assert pool.client.gather([pool.submit(inc, 2)]) == [3]
    assert two.call(inc, one.submit(inc, 1)) == 3
    assert one.cluster is not two.cluster
    assert one.call(_pid) != two.call(_pid)
    one.close()
    assert two.call(inc, 1) == 2


def _pid() -> int:
    import os

    return os.getpid()


def test_a4_waiting_for_futures_of_the_pool_that_is_not_the_default(
    make_pool: MakePool, backend: Any
) -> None:
    """Each pool has an event loop of its own; ``distributed.wait`` uses the default client's."""
    pools = [make_pool(f"pool-{i}", min=1, max=1, max_concurrency=4) for i in range(2)]
    for pool in pools:
        late = []
        for _ in range(5):
            future = pool.submit(a_function_with_a_name, 0.1)
            began = time.monotonic()
            distributed.wait([future], timeout=10)
            late.append(time.monotonic() - began)
        assert sorted(late)[2] < 0.3


@on_local
def test_a4_by_name(make_pool: MakePool, backend: Any, until: Until) -> None:
    pool = make_pool("named", max=1)
    assert get_pool("named") is pool
    assert call_by_name("named", inc, 1) == 2
    assert call_by_name("named", int, "ff", base=16, timeout=10) == 255
    assert cast_by_name("named", inc, 1) is None
    until(lambda: pool.status().counters["ended"] == 3)
    with pytest.raises(PoolOptionsError, match="is the name of an open pool"):
        make_pool("named", max=1)
    assert pool.call(inc, 1) == 2
    with pytest.raises(PoolNotFound, match="named") as caught:
        get_pool("nmaed")
    assert "named" in caught.value.known
    pool.close()
    for use in (
        lambda: get_pool("named"),
        lambda: call_by_name("named", inc, 1),
        lambda: cast_by_name("named", inc, 1),
    ):
        with pytest.raises(PoolNotFound):
            use()


@on_local
@pytest.mark.slow
def test_a4_twenty_threads_call_one_pool(make_pool: MakePool, backend: Any) -> None:
    pool = make_pool(min=1, max=2, max_concurrency=4, queue_timeout=60)
    with ThreadPoolExecutor(20) as threads:

        def work(i: int) -> list[int]:
            got = [pool.call(inc, i * 100 + j) for j in range(20)]
            got += [pool.submit(inc, i * 100 + j).result(30) for j in range(20, 30)]
            got += list(pool.map(inc, range(i * 100 + 30, i * 100 + 40)))
            return got

        for i, got in enumerate(threads.map(work, range(20))):
            assert got == [i * 100 + j + 1 for j in range(40)]
    status = pool.status()
    assert status.counters["ended"] == 800
    assert (status.leases, status.waiters) == (0, 0)


@on_local
def test_a4_threads_that_end_while_their_calls_run(make_pool: MakePool, backend: Any) -> None:
    pool = make_pool(max=1, max_concurrency=8)
    futures: list[Any] = []
    starters = [
        threading.Thread(target=lambda: futures.append(pool.submit(a_function_with_a_name, 0.2)))
        for _ in range(8)
    ]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert [future.result(20) for future in futures] == [0.2] * 8

"""Calls with a key, and the runners that they prefer: C7."""

from __future__ import annotations

import pickle

import pytest

from flame_dask.core import instructions as do
from flame_dask.core.affinity import Affinities
from flame_dask.core.invariants import check
from flame_dask.core.records import Runner
from flame_dask.testing import Script


def two(**options: object) -> Script:
    """A pool with two runners that stay."""
    settings = {"min": 2, "max": 2, "max_concurrency": 2, "boots": 0.0}
    return Script(**(settings | options)).open().run_for(1)  # type: ignore[arg-type]


def served(pool: Script, *keys: object, work: float | None = 1.0) -> list[str | None]:
    """Make a call for each key, one after the other; return where they ran."""
    runners = []
    for key in keys:
        call = pool.submit(work=work, affinity=key)  # type: ignore[arg-type]
        runners.append(pool.runner_of(call))
        pool.run_for(2)
    return runners


@pytest.mark.parametrize("placement", ["spread", "pack"])
def test_c7_a_key_goes_where_it_went_before(placement):
    pool = two(placement=placement)
    others = [pool.submit() for _ in range(3)]  # so that there is one slot left, on pool-2
    assert served(pool, "a") == ["pool-2"]
    for call in others:
        pool.end(call)
    # Without the key each of these would be on the older runner.
    assert served(pool, "a", None, "a", "a") == ["pool-2", "pool-1", "pool-2", "pool-2"]


def test_c7_each_key_has_its_own_runner():
    pool = two(max_concurrency=1)
    first, second = pool.submit(affinity="a"), pool.submit(affinity="b")
    pool.end(first).end(second)
    assert served(pool, "b", "a", "b", "b", None) == [
        "pool-2",
        "pool-1",
        "pool-2",
        "pool-2",
        "pool-1",
    ]


def test_c7_equal_keys_are_one_key():
    pool = two(max_concurrency=1)
    first, second = pool.submit(affinity=("user", 0)), pool.submit(affinity=("user", 1))
    pool.end(first).end(second)
    assert served(pool, ("user", True), ("user", 1.0)) == ["pool-2", "pool-2"]


def test_c7_no_call_waits_for_its_runner_while_another_has_a_slot():
    pool = two(max_concurrency=1)
    first = pool.submit(affinity="a")
    other = pool.submit(affinity="a")
    assert [pool.runner_of(call) for call in (first, other)] == ["pool-1", "pool-2"]
    pool.end(first).end(other)
    assert served(pool, "a") == ["pool-2"]  # the last one that served it


def test_c7_c4_the_order_of_service_is_that_of_the_queue():
    pool = two(max_concurrency=1)
    busy = [pool.submit(affinity="a"), pool.submit(affinity="b")]
    waiting = [pool.submit(affinity=key) for key in ("b", "a", "b")]
    pool.end(busy[0])  # the runner of "a" is free, and the first in the queue is a "b"
    assert pool.waiting == waiting[1:]
    assert pool.runner_of(waiting[0]) == "pool-1"
    pool.end(busy[1])
    assert pool.runner_of(waiting[1]) == "pool-2"


def test_c7_c4_of_two_free_slots_each_waiter_gets_its_own():
    pool = Script(max=2, max_concurrency=1, boots=[0.5, 0.5], idle_shutdown_after=100.0).open()
    first, second = pool.submit(affinity="a"), pool.submit(affinity="b")
    pool.run_for(1)
    waiting = [pool.submit(affinity="b"), pool.submit(affinity="a")]
    pool.configure(max_concurrency=2)
    assert [pool.runner_of(call) for call in (first, second)] == ["pool-1", "pool-2"]
    assert [pool.runner_of(call) for call in waiting] == ["pool-2", "pool-1"]


def test_c7_c5_d1_a_key_does_not_keep_a_surplus_runner():
    """After a spike one runner is enough for the work, and the other goes."""
    pool = Script(max=2, max_concurrency=2, boots=0.0, idle_shutdown_after=10.0).open()
    long = pool.submit()
    spike = [pool.submit(work=1) for _ in range(2)]
    pool.run_for(0)
    assert [pool.runner_of(call) for call in (long, *spike)] == ["pool-1", "pool-1", "pool-2"]
    home = pool.submit(work=1, affinity="b")
    assert pool.runner_of(home) == "pool-2"
    pool.run_for(2)
    # As long as both have been needed of late, it stays there.
    assert served(pool, "b", "b") == ["pool-2"] * 2
    # Then the trickle moves on to the one that is needed, and the other is idle and goes.
    assert served(pool, *"bbbbbbbbbb")[-6:] == ["pool-1"] * 6
    pool.run_for(10)
    assert pool.alive == ["pool-1"]


def test_c7_a_runner_that_drains_is_forgotten():
    pool = two(max_concurrency=1)
    first, second = pool.submit(affinity="a"), pool.submit(affinity="b")
    pool.end(second)
    pool.leave("pool-1", "SIGTERM")
    assert served(pool, "a") == ["pool-2"]
    pool.end(first).run_for(1)
    assert served(pool, "a") == ["pool-2"]  # though there is a new first one
    assert len(pool.ready) == 2


def test_c7_f1_a_call_that_is_started_anew_goes_elsewhere_and_stays_there():
    pool = two(max_concurrency=1)
    call = pool.submit(affinity="a", retries=1)
    pool.lose("pool-1")
    starts = [start.runner for start in pool.told(do.Start)]
    assert starts == ["pool-1", "pool-2"]
    pool.end(call).run_for(1)
    assert served(pool, "a", "a") == ["pool-2", "pool-2"]


def test_c7_d5_a_used_runner_takes_no_further_call():
    pool = two(max_concurrency=1, single_use=True)
    assert served(pool, "a") == ["pool-1"]
    assert served(pool, "a") == ["pool-2"]


def test_c7_the_memory_of_keys_is_bounded():
    affinities = Affinities(limit=3)
    runners = [Runner(no, f"r{no}", 1, False, None) for no in range(2)]
    for number in range(1000):
        affinities.note(number, runners[number % 2])
    assert dict(affinities) == {997: runners[1], 998: runners[0], 999: runners[1]}
    affinities.note(997, runners[0])  # used again
    affinities.note(1000, runners[0])
    assert affinities.last(998) is None
    assert affinities.last(997) is runners[0]
    affinities.leave(runners[0])
    assert dict(affinities) == {999: runners[1]}
    affinities.leave(runners[0])
    affinities.leave(runners[1])
    assert len(affinities) == len(affinities._keys) == 0


def test_c7_a_pool_remembers_ten_thousand():
    pool = Script(min=1, max=1, max_concurrency=1, boots=0.0).open().run_for(1)
    memory = pool.core._fleet._affinities
    runner = pool.core.runners["pool-1"]
    for number in range(10_050):
        memory.note(number, runner)
    assert len(memory) == 10_000
    assert memory.last(49) is None
    assert memory.last(50) is runner
    check(pool.core)
    copy = pickle.loads(pickle.dumps(pool.core))
    check(copy)
    pool.lose("pool-1")
    assert len(memory) == 0


def test_c7_what_is_wrong_with_the_memory_is_seen():
    pool = two(max_concurrency=1)
    served(pool, "a")
    memory = pool.core._fleet._affinities
    memory._last["b"] = pool.core.runners["pool-1"]
    with pytest.raises(AssertionError, match="C7: keys and their runners are not the same"):
        check(pool.core)
    memory._last.pop("b")
    memory._limit = 0
    with pytest.raises(AssertionError, match="C7: 1 keys are remembered, at most 0 may be"):
        check(pool.core)
    memory._limit = 9
    gone = Runner(9, "pool-9", 1, False, None)
    gone.state = "draining"
    memory.note("c", gone)
    with pytest.raises(AssertionError, match="C7: pool-9 is draining, and 'c' would prefer it"):
        check(pool.core)

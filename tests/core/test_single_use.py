"""Runners that are used once: D5."""

from __future__ import annotations

import pytest

from flame_dask.core import instructions as do
from flame_dask.testing import HANGS, Script


def starts(pool: Script) -> dict[str, list[str]]:
    """Return the calls of each runner."""
    calls: dict[str, list[str]] = {}
    for start in pool.told(do.Start):
        calls.setdefault(start.runner, []).append(start.call)
    return calls


def test_d5_each_runner_runs_one_call():
    pool = Script(max=4, single_use=True, stop=0.1).open()
    calls = [pool.submit(work=1) for _ in range(20)]
    pool.run()
    assert {pool.answers[call] for call in calls} == {"ended"}
    assert len(starts(pool)) == 20
    assert pool.peak == 4
    assert pool.alive == []


@pytest.mark.parametrize("most", [2, 4])
def test_d5_min_is_refilled(most):
    pool = Script(min=2, max=most, single_use=True, stop=0.1).open().run_for(1)
    calls = [pool.submit(work=1) for _ in range(20)]
    pool.run_for(100)
    assert {pool.answers[call] for call in calls} == {"ended"}
    assert len(pool.ready) == 2
    assert len(pool.alive) == 2
    assert pool.peak == most


def test_d5_c3_at_max_the_replacement_boots_as_soon_as_the_old_one_is_gone():
    pool = Script(min=1, max=1, single_use=True, stop=2.0).open().run_for(1)
    pool.submit(work=1)
    waiting = pool.submit(work=1)
    pool.run_for(1)
    assert pool.stopping == ["pool-1"]
    pool.run_for(2)
    assert pool.booting == ["pool-2"]
    pool.run_for(0.5)
    assert pool.runner_of(waiting) == "pool-2"


def test_d5_no_call_starts_on_a_runner_after_one_of_its_calls_has_ended():
    pool = Script(max=1, max_concurrency=4, single_use=True).open()
    calls = [pool.submit() for _ in range(4)]
    waiting = pool.submit()
    pool.run_for(1)
    pool.end(calls[0])
    assert pool.told(do.Drain) == [do.Drain("pool-1", "single use")]
    assert pool.waiting == [waiting]
    pool.end(calls[1]).end(calls[2])
    assert pool.draining == ["pool-1"]
    assert pool.leases("pool-1") == 1
    pool.end(calls[3])
    pool.run_for(1)
    assert pool.told(do.Stop) == [do.Stop("pool-1", "drained")]
    assert pool.runner_of(waiting) == "pool-2"


def test_d5_until_then_it_takes_calls():
    pool = Script(max=1, max_concurrency=4, single_use=True).open()
    first = pool.submit()
    pool.run_for(1)
    second = pool.submit()
    assert starts(pool) == {"pool-1": [first, second]}


@pytest.mark.parametrize("ending", [0.5, None])
def test_d5_the_end_of_work_that_was_terminated_counts(ending):
    pool = Script(max=1, max_concurrency=2, single_use=True, ending=ending, grace=1.0).open()
    call = pool.submit(run=1)
    pool.submit()
    pool.run_for(10)
    assert isinstance(pool.answers[call], do.Expired)
    reason = "single use" if ending else f"call {call} can't be ended"
    assert pool.told(do.Drain) == [do.Drain("pool-1", reason)]


def test_d5_work_that_is_lost_counts():
    pool = Script(max=2, max_concurrency=2, single_use=True).open()
    lost, _ = pool.submit(), pool.submit()
    pool.run_for(1)
    pool.lose_call(lost, "oom")
    assert pool.draining == ["pool-1"]


def test_d5_f1_lost_work_is_tried_again_on_another_runner():
    pool = Script(max=2, max_concurrency=2, single_use=True).open()
    lost, _ = pool.submit(retries=1), pool.submit()
    pool.run_for(1)
    pool.lose_call(lost, "oom")
    assert pool.waiting == [lost]
    pool.run_for(1)
    assert starts(pool)["pool-2"] == [lost]


def test_d5_a_call_that_never_started_counts_for_nothing():
    pool = Script(max=1, single_use=True).open()
    pool.submit()
    pool.run_for(1)
    gone, late = pool.submit(), pool.submit(queue=1)
    pool.release(gone)
    pool.run_for(2)
    assert isinstance(pool.answers[late], do.Expired)
    assert pool.ready == ["pool-1"]


def test_d5_an_unused_runner_is_idle_like_any_other():
    pool = Script(max=1, single_use=True, idle_shutdown_after=10.0).open()
    pool.release(pool.submit())
    pool.run_for(10.4)
    assert pool.ready == ["pool-1"]
    pool.run_for(0.1)
    assert pool.alive == []


def test_d5_c8_switched_on_it_lets_the_used_runners_go():
    pool = Script(min=3, max=3, boots=[0.5, 0.5, 0.5, HANGS]).open().run_for(1)
    first, second = pool.submit(), pool.submit()
    pool.end(first)
    again = pool.submit()
    assert pool.runner_of(again) == "pool-1"
    pool.configure(single_use=True)
    assert pool.draining == ["pool-1"]
    assert pool.ready == ["pool-2", "pool-3"]
    pool.end(second)
    assert pool.ready == ["pool-3"]


def test_d5_c8_switched_on_it_leaves_no_surplus_to_a_lowered_max():
    pool = Script(min=3, max=3, stop=None).open().run_for(1)
    pool.end(pool.submit())
    pool.configure(min=2, max=2, single_use=True)
    assert pool.stopping == ["pool-1"]
    assert pool.ready == ["pool-2", "pool-3"]


def test_d5_c8_switched_off():
    pool = Script(max=1, single_use=True).open()
    call = pool.submit()
    pool.run_for(1)
    pool.configure(single_use=False)
    pool.end(call)
    assert pool.ready == ["pool-1"]


def test_d5_a5_a_pool_that_opens_while_it_works_opens_after_all():
    pool = Script(min=2, max=2, single_use=True, boots=[0.5, 2.0, 0.5]).open()
    pool.submit(work=1)
    pool.run_for(1.5)
    assert pool.told(do.OpenDone) == []
    pool.run_for(5)
    assert pool.told(do.OpenDone) == [do.OpenDone()]

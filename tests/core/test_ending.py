"""Work that has to end and does not: E3, and how a pool that closes deals with it (A6)."""

from __future__ import annotations

import pytest

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.testing import Script


def two_calls(**options: object) -> tuple[Script, str, str]:
    """A runner with two calls; work that is terminated goes on until the test ends it."""
    settings = {"max": 1, "max_concurrency": 3, "ending": None, "grace": 1.5, "stop": 1.0}
    pool = Script(**(settings | options)).open()
    calls = [pool.submit(), pool.submit()]
    pool.run_for(1)
    return pool, *calls


def preempted(call: str, runner: str = "pool-1") -> do.Lost:
    return do.Lost(call, runner, "preempted", None, None)


def test_e3_work_that_goes_within_the_grace_costs_a_slot_for_so_long_and_no_more():
    pool, first, _ = two_calls(ending=1.4, max_concurrency=2)
    waiting = pool.submit()
    pool.release(first)
    pool.run_for(1.3)
    assert pool.waiting == [waiting]
    pool.run_for(10)
    assert pool.runner_of(waiting) == "pool-1"
    assert pool.ready == ["pool-1"]


@pytest.mark.parametrize("how", ["released", "expired"])
def test_e3_a_runner_with_work_that_is_still_there_takes_no_more_and_finishes_the_rest(how):
    pool = Script(max=1, max_concurrency=3, ending=None, grace=1.5, shutdown_timeout=30.0).open()
    call, other = pool.submit(run=1 if how == "expired" else None), pool.submit()
    pool.run_for(1.5)
    pool.release(call)  # nothing new for one that has expired
    pool.run_for(1.4)
    assert pool.runner_of(pool.submit(work=0)) == "pool-1"
    pool.run_for(0.1)
    assert pool.told(do.Drain) == [do.Drain("pool-1", f"call {call} can't be ended")]
    waiting = pool.submit()
    pool.run_for(10)
    assert pool.waiting == [waiting]
    assert pool.leases("pool-1") == 2
    pool.end(other)
    assert pool.told(do.Stop) == [
        do.Stop("pool-1", "only calls that can't be ended are left", force=True)
    ]
    assert pool.answers[other] == "ended"
    assert pool.told(do.Lost) == []


def test_e3_a_runner_with_nothing_else_on_it_goes_at_once():
    pool, first, other = two_calls()
    pool.end(other).release(first)
    pool.run_for(1.5)
    assert [stop.force for stop in pool.told(do.Stop)] == [True]
    assert pool.core.calls == {}
    assert pool.answers[first] == "released"


def test_e3_the_replacement_is_booted_at_once_if_there_is_room():
    pool, first, _ = two_calls(max=2, max_concurrency=2)
    pool.release(first)
    pool.run_for(1.5)
    waiting = pool.submit()
    assert pool.draining == ["pool-1"]
    assert pool.booting == ["pool-2"]
    pool.run_for(1)
    assert pool.runner_of(waiting) == "pool-2"


def test_e3_c3_the_replacement_is_booted_as_soon_as_there_is_room():
    pool, first, other = two_calls(min=1)
    pool.release(first)
    pool.run_for(5)
    assert pool.alive == ["pool-1"]  # draining counts towards max (C1)
    pool.end(other)
    pool.run_for(1)
    assert pool.alive == ["pool-2"]


def test_e3_the_other_calls_have_shutdown_timeout():
    pool, first, other = two_calls(shutdown_timeout=10.0)
    pool.release(first)
    pool.run_for(11.4)
    assert pool.draining == ["pool-1"]
    pool.run_for(0.1)
    assert pool.told(do.Lost) == [preempted(other)]
    assert pool.told(do.Stop) == [do.Stop("pool-1", "shutdown_timeout is over", force=True)]
    assert pool.decided("retire") == ["pool-1: shutdown_timeout is over"]
    assert pool.core.calls == {}
    assert pool.core.counters["lost"] == 1


def test_e3_without_shutdown_timeout_the_other_calls_take_as_long_as_they_do():
    pool, first, other = two_calls(shutdown_timeout=None)
    pool.release(first)
    pool.run_for(1e6)
    assert pool.draining == ["pool-1"]
    assert pool.core.next_deadline() is None
    pool.end(other)
    assert pool.stopping == ["pool-1"]


def test_e3_a_second_stuck_call_gives_the_others_no_more_time():
    pool, first, second = two_calls(shutdown_timeout=10.0)
    third = pool.submit()
    pool.release(first)
    pool.run_for(5)
    pool.release(second)
    pool.run_for(6.4)
    assert pool.draining == ["pool-1"]
    assert pool.decided("retire") == [f"pool-1: call {second} can't be ended"]
    pool.run_for(0.1)
    assert pool.told(do.Lost) == [preempted(third)]


def test_e3_work_that_ends_after_all_leaves_the_others_their_time_and_the_runner_draining():
    pool, first, other = two_calls(shutdown_timeout=10.0)
    pool.release(first)
    pool.run_for(5)
    pool.end(first, "an exception in its thread")
    pool.run_for(100)
    assert pool.draining == ["pool-1"]
    assert pool.core.next_deadline() is None
    pool.end(other)
    assert pool.told(do.Stop) == [do.Stop("pool-1", "drained")]
    assert pool.answers[other] == "ended"


def test_e3_as_long_as_one_is_stuck_the_time_runs():
    pool, first, second = two_calls(shutdown_timeout=10.0)
    third = pool.submit()
    pool.release(first).release(second)
    pool.run_for(5)
    pool.end(first)
    pool.run_for(6.5)
    assert pool.told(do.Lost) == [preempted(third)]


def test_e3_a_runner_that_drains_already_gets_its_limit_when_a_call_is_stuck():
    pool, *_ = two_calls(min=1, max=2, shutdown_timeout=10.0)
    for _ in range(6):
        pool.submit()
    pool.run_for(1)
    pool.configure(max=1)
    [draining] = pool.draining
    on_it = list(pool.core.runners[draining].leases)
    pool.run_for(50)
    assert pool.draining == [draining]
    pool.release(on_it[0])
    pool.run_for(1.5 + 9.9)
    assert pool.draining == [draining]
    pool.run_for(0.1)
    assert pool.told(do.Lost) == [preempted(call, draining) for call in on_it[1:]]


def test_e3_no_grace_at_all():
    pool, first, other = two_calls(grace=0.0)
    pool.release(first)
    assert pool.draining == ["pool-1"]
    pool.end(other)
    assert pool.stopping == ["pool-1"]


def test_e3_no_time_for_the_others_at_all():
    pool, first, other = two_calls(shutdown_timeout=0.0)
    pool.release(first)
    pool.run_for(1.5)
    assert pool.told(do.Lost) == [preempted(other)]
    assert pool.stopping == ["pool-1"]


def test_e3_c8_deadlines_that_are_set_stay_as_they_are():
    pool, first, other = two_calls(shutdown_timeout=10.0)
    pool.release(first)
    pool.configure(grace=100.0)
    pool.run_for(1.5)
    assert pool.draining == ["pool-1"]
    pool.configure(shutdown_timeout=100.0)
    pool.run_for(10)
    assert pool.told(do.Lost) == [preempted(other)]


def test_e3_a_stuck_call_of_a_lost_runner_ends_without_a_word():
    pool, first, other = two_calls()
    pool.release(first)
    pool.run_for(2)
    pool.lose("pool-1", "signal")
    assert [lost.call for lost in pool.told(do.Lost)] == [other]
    assert pool.answers[first] == "released"
    assert pool.core.next_deadline() is None


def test_e3_a_stuck_call_whose_work_is_lost_is_over():
    pool, first, other = two_calls()
    pool.release(first)
    pool.run_for(2)
    pool.lose_call(first, "signal")
    assert pool.answers[first] == "released"
    assert pool.leases("pool-1") == 1
    pool.end(other)
    assert pool.told(do.Stop) == [do.Stop("pool-1", "drained")]


def test_e3_whoever_is_told_of_a_released_stuck_call_again_does_nothing():
    pool, first, _ = two_calls()
    pool.release(first)
    pool.run_for(2)
    log = list(pool.log)
    pool.release(first)
    assert pool.log == log
    assert pool.core.counters["released"] == 1


def test_e3_the_rung_of_the_ladder_is_told():
    pool, first, other = two_calls()
    pool.release(first)
    pool.end(first, "SIGKILL to its processes").end(other)
    assert pool.decided("retire") == [f"call {first} ended by SIGKILL to its processes"]
    assert pool.ready == ["pool-1"]


def test_e3_a_stuck_call_is_in_the_snapshot_as_a_lease():
    pool, first, _ = two_calls()
    pool.release(first)
    pool.run_for(2)
    snapshot = pool.core.snapshot(pool.now)
    assert snapshot.leases == 2
    assert snapshot.runners[0].state == "draining"


def test_a6_what_is_left_after_shutdown_timeout_is_stopped_by_force():
    pool, first, other = two_calls(shutdown_timeout=5.0)
    pool.end(first).close()
    pool.run_for(5)
    assert pool.answers[other] == do.Refused(other)
    assert pool.told(do.Stop) == [do.Stop("pool-1", "shutdown_timeout is over", force=True)]


def test_a6_what_ends_in_time_is_stopped_gently():
    pool, first, other = two_calls(shutdown_timeout=5.0)
    pool.close().end(first).end(other)
    assert pool.told(do.Stop) == [do.Stop("pool-1", "drained")]


def test_a6_a_pool_that_closes_does_not_wait_for_what_can_not_be_ended():
    pool, first, other = two_calls(shutdown_timeout=500.0)
    pool.release(first).close()
    pool.run_for(1.5)
    assert pool.draining == ["pool-1"]
    pool.end(other)
    pool.run_for(1)
    assert pool.told(do.CloseDone)
    assert pool.now < 10


def test_a6_e3_the_end_of_the_pool_comes_before_that_of_a_runner_with_a_stuck_call():
    pool, first, other = two_calls(shutdown_timeout=5.0)
    pool.close().release(first)
    pool.run_for(5)
    assert pool.answers == {first: "released", other: do.Refused(other)}
    pool.run_for(1)
    assert pool.told(do.CloseDone)
    assert pool.core.next_deadline() is None


def test_e3_a_clock_that_nobody_looked_at_does_not_matter():
    pool, first, other = two_calls(shutdown_timeout=10.0)
    pool.release(first)
    pool.now += 1000
    pool.tell(ev.Tick())
    assert pool.draining == ["pool-1"]  # the time of the others begins now
    pool.run_for(9.9)
    assert other not in pool.answers
    pool.run_for(0.1)
    assert pool.answers[other] == preempted(other)

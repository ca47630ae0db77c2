"""Calls whose work has begun something that lives on: a child (H1), tracked resources (I1)."""

from __future__ import annotations

import pickle

import pytest

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.transitions import IllegalTransition
from flame_dask.testing import HANGS, Script


def kept(*, retries: int = 0, run: float | None = 5.0, **options: object) -> tuple[Script, str]:
    """A pool whose only runner, a second old, has a call that lives on."""
    pool = Script(**({"max": 2, "stop": 1.0} | options))  # type: ignore[arg-type]
    call = pool.open().submit(run=run, retries=retries)
    return pool.run_for(1).keep(call), call


@pytest.mark.parametrize("limits", [{"run": 5.0}, {"total": 5.0}, {"queue": 5.0, "run": 5.0}])
def test_h1_i1_a_kept_call_has_no_deadline(limits):
    pool = Script(max=1).open()
    call = pool.submit(**limits)
    pool.run_for(1)
    assert pool.core.next_deadline() is not None
    pool.keep(call)
    assert pool.core.next_deadline() is None
    pool.run_for(1e6)
    assert pool.told(do.Terminate) == pool.told(do.Expired) == []
    pool.end(call)
    assert pool.answers[call] == "ended"


def test_h1_what_is_kept_at_the_instant_of_its_deadline_is_in_time():
    pool = Script(max=1).open()
    call = pool.submit(run=5.0)
    pool.run_for(5)
    pool.now += 0.5  # the deadline, and nobody has looked at the clock
    pool.keep(call).run_for(100)
    assert pool.told(do.Expired) == []
    assert pool.core.calls[call].state == "kept"


def test_h1_i1_it_holds_its_slot_and_its_runner_does_not_idle_down():
    pool, call = kept(idle_shutdown_after=10.0)
    pool.run_for(1000)
    assert pool.ready == ["pool-1"]
    assert pool.leases("pool-1") == 1
    other = pool.submit(work=1)
    assert pool.booting == ["pool-2"]  # it counts as demand
    pool.run_for(100)
    assert pool.runner_of(other) == "pool-2"
    assert pool.alive == ["pool-1"]
    pool.end(call).run_for(11)
    assert pool.alive == []


def test_h1_other_slots_of_its_runner_take_calls():
    pool, call = kept(max_concurrency=2)
    other = pool.submit(run=5.0)
    assert pool.runner_of(other) == "pool-1"
    pool.run_for(5)
    assert pool.answers[other].phase == "running"
    assert call not in pool.answers


@pytest.mark.parametrize("how", ["runner", "work"])
def test_h1_f1_it_is_never_started_anew(how):
    pool, call = kept(retries=3)
    if how == "runner":
        pool.lose("pool-1", "signal")
    else:
        pool.lose_call(call, "signal")
    assert pool.told(do.Requeued) == []
    assert pool.told(do.Lost) == [do.Lost(call, "pool-1", "signal", None, None)]
    pool.run_for(10)
    assert len(pool.told(do.Start)) == 1


def test_h4_i3_one_that_is_released_is_terminated():
    pool, call = kept(ending=0.5)
    pool.release(call)
    assert pool.answers[call] == "released"
    assert [order.call for order in pool.told(do.Terminate)] == [call]
    assert pool.leases("pool-1") == 1  # until its work is gone
    pool.run_for(1)
    assert pool.leases("pool-1") == 0
    assert pool.core.counters["released"] == 1


def test_e3_one_that_can_not_be_ended_is_stuck():
    pool, call = kept(ending=None)
    pool.release(call).run_for(2)
    assert pool.told(do.Stop) == [
        do.Stop("pool-1", "only calls that can't be ended are left", force=True)
    ]


def test_c8_its_runner_drains_for_as_long_as_it_lives():
    pool, call = kept(max_concurrency=2)
    others = [pool.submit() for _ in range(2)]
    pool.run_for(1)
    pool.end(others[0]).configure(max=1)
    [leaving] = pool.draining
    assert leaving == pool.runner_of(call) or pool.leases(leaving) == 1
    pool.run_for(1e6)
    assert pool.draining == [leaving]
    assert call not in pool.answers


def test_e5_a_runner_that_is_told_to_go_gives_it_shutdown_timeout():
    pool, call = kept(shutdown_timeout=20.0)
    pool.leave("pool-1").run_for(19.9)
    assert call not in pool.answers
    pool.run_for(0.1)
    assert pool.told(do.Lost) == [do.Lost(call, "pool-1", "preempted", None, None)]


def test_a6_a_closing_pool_lets_it_end_for_shutdown_timeout():
    pool, call = kept(shutdown_timeout=20.0)
    pool.close().run_for(19.9)
    assert pool.draining == ["pool-1"]
    assert call not in pool.answers
    pool.run_for(2)
    assert pool.answers[call] == do.Refused(call)
    assert pool.told(do.Stop) == [do.Stop("pool-1", "shutdown_timeout is over", force=True)]
    assert len(pool.told(do.CloseDone)) == 1


def test_a6_one_that_ends_in_time_has_ended():
    pool, call = kept(shutdown_timeout=20.0)
    pool.close().run_for(10)
    pool.end(call).run_for(1)
    assert pool.answers[call] == "ended"
    assert len(pool.told(do.CloseDone)) == 1


def test_d5_its_end_uses_a_runner_up():
    pool, call = kept(single_use=True)
    assert pool.ready == ["pool-1"]
    pool.end(call)
    assert pool.stopping == ["pool-1"]


def test_h1_it_is_counted_once():
    pool, call = kept()
    assert pool.core.counters["submitted"] == pool.core.counters["started"] == 1
    assert pool.core.snapshot(pool.now).leases == 1
    pool.end(call)
    assert pool.core.counters["ended"] == 1


@pytest.mark.parametrize("state", ["unknown", "ended", "ending", "stuck", "kept"])
def test_h1_stale_news_of_it_changes_nothing(state):
    pool, call = kept(ending=None, max_concurrency=2)
    pool.submit()
    if state == "ended":
        pool.end(call)
    elif state in ("ending", "stuck"):
        pool.release(call).run_for(1 if state == "ending" else 2)
        assert pool.core.calls[call].state == state
    pool.tell(ev.Tick())
    before = pickle.dumps(pool.core)
    assert pool.tell(ev.CallKept("nobody" if state == "unknown" else call)) == []
    assert pickle.dumps(pool.core) == before


def test_h1_a_call_that_waits_has_begun_nothing():
    pool = Script(max=1, boots=HANGS).open()
    call = pool.submit()
    before = pickle.dumps(pool.core)
    with pytest.raises(IllegalTransition, match=r"call-1 is waiting, 'kept' is impossible"):
        pool.keep(call)
    assert pickle.dumps(pool.core) == before

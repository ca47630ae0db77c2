"""Runners that somebody else tells to go: E5."""

from __future__ import annotations

import pytest

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.testing import HANGS, Script


def busy(**options: object) -> Script:
    """A runner with two calls, and a backend that takes a second to stop one."""
    settings = {"max": 2, "max_concurrency": 2, "shutdown_timeout": 30.0, "stop": 1.0}
    pool = Script(**(settings | options)).open()
    pool.submit(), pool.submit()
    return pool.run_for(1)


def test_e5_a_runner_that_is_told_to_go_takes_no_new_work_and_finishes_what_it_has():
    pool = busy().leave("pool-1", "SIGTERM")
    assert pool.told(do.Drain) == [do.Drain("pool-1", "SIGTERM")]
    assert pool.decided("shrink") == ["pool-1: SIGTERM"]
    new = pool.submit(work=1)
    assert pool.booting == ["pool-2"]
    pool.run_for(10)
    pool.end("call-1").end("call-2")
    pool.run_for(1)
    assert pool.told(do.Stop) == [do.Stop("pool-1", "drained")]
    assert {pool.answers[call] for call in ("call-1", "call-2", new)} == {"ended"}
    assert pool.runner_of(new) == "pool-2"


def test_e5_what_does_not_finish_within_shutdown_timeout_is_lost_as_preempted():
    pool = busy().leave("pool-1")
    pool.end("call-1")
    pool.run_for(29.9)
    assert pool.draining == ["pool-1"]
    pool.run_for(0.1)
    assert pool.told(do.Lost) == [do.Lost("call-2", "pool-1", "preempted", None, None)]
    assert pool.told(do.Stop) == [do.Stop("pool-1", "shutdown_timeout is over", force=True)]
    pool.run_for(1)
    assert pool.alive == []


@pytest.mark.parametrize("leases", [0, 1])
def test_e5_no_shutdown_timeout_is_no_limit(leases):
    pool = busy(shutdown_timeout=None).end("call-1")
    if not leases:
        pool.end("call-2")
    pool.leave("pool-1")
    pool.run_for(1e6)
    assert pool.draining == ["pool-1"] * leases


def test_e5_a_runner_without_calls_goes_at_once():
    pool = busy().end("call-1").end("call-2").leave("pool-1", "spot notice")
    assert pool.told(do.Drain) == [do.Drain("pool-1", "spot notice")]
    assert pool.told(do.Stop) == [do.Stop("pool-1", "spot notice")]


def test_e5_no_time_at_all():
    pool = busy(shutdown_timeout=0.0).leave("pool-1")
    assert [lost.cause for lost in pool.told(do.Lost)] == ["preempted", "preempted"]
    assert pool.stopping == ["pool-1"]


def test_e5_f2_calls_of_a_leaving_runner_that_dies_are_preempted_whatever_killed_it():
    pool = busy().leave("pool-1")
    pool.tell(ev.RunnerLost("pool-1", "signal", None, 9))
    assert pool.told(do.Lost) == [
        do.Lost(call, "pool-1", "preempted", None, 9) for call in ("call-1", "call-2")
    ]
    assert pool.decided("retire") == ["pool-1: lost: preempted"]
    assert pool.core.next_deadline() is None


def test_e5_f2_a_call_that_dies_alone_on_a_leaving_runner_is_preempted_too():
    pool = busy().leave("pool-1").lose_call("call-1", "signal")
    assert pool.told(do.Lost) == [do.Lost("call-1", "pool-1", "preempted", None, None)]


def test_e5_a_draining_runner_gets_its_limit_when_it_is_told_to_go():
    pool = busy()
    for _ in range(2):
        pool.submit()
    pool.run_for(1)
    pool.configure(max=1)
    assert pool.draining == ["pool-2"]
    pool.run_for(100)
    pool.leave("pool-2")
    pool.run_for(29.9)
    assert pool.draining == ["pool-2"]
    pool.run_for(0.1)
    assert [lost.runner for lost in pool.told(do.Lost)] == ["pool-2", "pool-2"]


def test_e5_a_second_notice_changes_nothing():
    pool = busy().leave("pool-1")
    pool.run_for(20)
    log = list(pool.log)
    pool.leave("pool-1")
    assert pool.log == log
    pool.run_for(10)
    assert len(pool.told(do.Lost)) == 2


def test_e5_e3_a_stuck_call_neither_moves_the_limit_nor_lifts_it_when_it_ends():
    pool = busy(ending=None).leave("pool-1")
    pool.release("call-1")
    pool.run_for(10)
    pool.end("call-1")  # it was stuck
    pool.run_for(19.9)
    assert pool.draining == ["pool-1"]
    pool.run_for(0.1)
    assert pool.answers["call-2"] == do.Lost("call-2", "pool-1", "preempted", None, None)


def test_e5_e3_a_leaving_runner_with_nothing_but_stuck_calls_is_stopped_by_force():
    pool = busy(ending=None).leave("pool-1")
    pool.release("call-1").end("call-2")
    pool.run_for(1.5)
    assert [stop.force for stop in pool.told(do.Stop)] == [True]


def test_e5_e3_a_notice_to_a_runner_with_a_stuck_call_does_not_move_its_limit():
    pool = busy(ending=None).release("call-1")
    pool.run_for(11.5)
    pool.leave("pool-1")
    pool.run_for(19.9)
    assert pool.draining == ["pool-1"]
    pool.run_for(0.1)
    assert pool.stopping == ["pool-1"]


def test_e5_a_runner_that_boots_never_gets_ready():
    pool = Script(max=1, boots=HANGS, stop=1.0).open()
    pool.submit()
    pool.leave("pool-1", "SIGTERM")
    assert pool.stopping == ["pool-1"]
    assert pool.core.last_problem is not None
    assert pool.core.last_problem.cause == "the worker went away while booting (SIGTERM)"
    pool.tell(ev.RunnerReady("pool-1"))
    assert pool.ready == []
    pool.run_for(10)
    assert len(pool.told(do.Boot)) == 2  # the call still waits for one


def test_e5_min_is_refilled():
    pool = Script(min=2, max=3).open().run_for(1).leave("pool-1")
    pool.run_for(1)
    assert pool.ready == ["pool-2", "pool-3"]


def test_e5_c3_a_leaving_runner_counts_towards_max_until_it_is_gone():
    pool = busy(max=1).leave("pool-1")
    waiting = pool.submit()
    assert pool.alive == ["pool-1"]
    pool.end("call-1").end("call-2")
    pool.run_for(2)
    assert pool.runner_of(waiting) == "pool-2"


@pytest.mark.parametrize("state", ["gone", "stopping"])
def test_e5_a_notice_that_comes_too_late_changes_nothing(state):
    pool = busy(stop=None).lose("pool-1")
    if state == "gone":
        pool.tell(ev.RunnerStopped("pool-1"))
    log = list(pool.log)
    pool.leave("pool-1")
    assert pool.log == log


def test_e5_a6_a_leaving_runner_of_a_pool_that_closes():
    pool = busy(shutdown_timeout=10.0).leave("pool-1")
    pool.run_for(4)
    pool.close()
    pool.run_for(6)
    assert [lost.cause for lost in pool.told(do.Lost)] == ["preempted", "preempted"]
    pool.run_for(1)
    assert pool.told(do.CloseDone)
    assert pool.core.next_deadline() is None

"""Calls that may start more than once, and calls whose own work is lost: F1, F2."""

from __future__ import annotations

import pytest

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.testing import Script


def running(**options: object) -> tuple[Script, str]:
    """A pool with a call that may be retried once, on its first runner."""
    limits = {name: options.pop(name) for name in ("queue", "run", "total") if name in options}
    pool = Script(**({"max": 2, "stop": 1.0} | options)).open()
    call = pool.submit(retries=1, **limits)
    return pool.run_for(1), call


def starts(pool: Script, call: str) -> list[str]:
    return [start.runner for start in pool.told(do.Start) if start.call == call]


LOSSES = {
    "its runner": lambda pool, call: pool.lose("pool-1"),
    "its work": lambda pool, call: pool.lose_call(call),
    "its time on a leaving runner": lambda pool, call: pool.leave("pool-1").run_for(30),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_f1_a_call_with_a_retry_left_runs_again_and_its_caller_hears_nothing(loss):
    pool, call = running(shutdown_timeout=30.0)
    LOSSES[loss](pool, call)
    assert pool.told(do.Requeued) == [do.Requeued(call)]
    assert pool.answers == {}
    pool.run_for(1)
    assert starts(pool, call) == ["pool-1", "pool-1" if loss == "its work" else "pool-2"]
    pool.end(call)
    assert pool.answers == {call: "ended"}
    assert pool.core.counters["retried"] == 1
    assert pool.core.counters["lost"] == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_h1_i1_what_lives_on_is_not_started_anew_and_has_no_deadline(loss):
    pool, call = running(shutdown_timeout=30.0, run=5.0)
    pool.keep(call).run_for(60)
    assert pool.answers == {}
    LOSSES[loss](pool, call)
    pool.run_for(10)
    assert starts(pool, call) == ["pool-1"]
    assert pool.told(do.Requeued) == []
    assert isinstance(pool.answers[call], do.Lost)


def test_f1_n_retries_are_at_most_n_more_starts():
    pool = Script(max=1).open()
    call = pool.submit(retries=3)
    for _ in range(4):
        pool.run_for(1)
        pool.lose(str(starts(pool, call)[-1]))
    pool.run_for(10)
    assert len(starts(pool, call)) == 4
    assert isinstance(pool.answers[call], do.Lost)
    assert pool.core.counters["retried"] == 3


def test_f1_without_retries_nothing_starts_twice():
    pool = Script(max=1).open()
    call = pool.submit()
    pool.run_for(1)
    pool.lose_call(call)
    pool.run_for(10)
    assert starts(pool, call) == ["pool-1"]
    assert pool.told(do.Requeued) == []


@pytest.mark.parametrize("loss", LOSSES)
def test_f1_a_call_that_has_been_answered_is_not_run_again(loss):
    pool, call = running(shutdown_timeout=30.0, ending=None, grace=60.0)
    pool.release(call)
    LOSSES[loss](pool, call)
    pool.run_for(10)
    assert starts(pool, call) == ["pool-1"]
    assert pool.answers == {call: "released"}
    assert pool.core.calls == {}


@pytest.mark.parametrize("loss", ["its runner", "its work"])
def test_f1_a6_a_pool_that_closes_runs_nothing_again(loss):
    pool, call = running()
    pool.close()
    LOSSES[loss](pool, call)
    assert isinstance(pool.answers[call], do.Lost)
    assert pool.told(do.Requeued) == []
    pool.run_for(1)
    assert pool.told(do.CloseDone)


def test_f1_it_waits_behind_those_that_wait_already():
    pool = Script(max=1).open()
    first = pool.submit(retries=1)
    pool.run_for(1)
    second = pool.submit(work=1)
    pool.lose_call(first)
    assert pool.runner_of(second) == "pool-1"
    pool.run_for(1)
    assert starts(pool, first) == ["pool-1", "pool-1"]


def test_f1_c4_of_several_the_one_with_the_higher_priority_is_served_first():
    pool = Script(min=2, max=2, max_concurrency=2).open().run_for(1)
    low, other, high = pool.submit(retries=1), pool.submit(), pool.submit(retries=1, priority=5)
    more = pool.submit()
    assert starts(pool, low) == starts(pool, high) == ["pool-1"]
    pool.end(more)
    pool.lose("pool-1")  # one slot is free, on the runner of the others
    assert starts(pool, high) == ["pool-1", "pool-2"]
    assert pool.waiting == [low]
    assert other not in pool.answers


def test_f1_it_can_be_cancelled_while_it_waits_again():
    pool, call = running(max=1)
    pool.lose("pool-1")
    pool.release(call)
    pool.run_for(10)
    assert starts(pool, call) == ["pool-1"]
    assert pool.answers == {call: "released"}


def test_f1_e1_the_queue_limit_counts_anew():
    pool, call = running(max=1, queue=5, boots=[0.5, 60.0], boot_timeout=None)
    pool.run_for(9)
    pool.lose("pool-1")
    pool.run_for(4.9)
    assert pool.waiting == [call]
    pool.run_for(0.1)
    answer = pool.answers[call]
    assert isinstance(answer, do.Expired)
    assert (answer.phase, answer.limit) == ("booting", 5)


def test_f1_e1_no_time_in_the_queue_is_enough_for_a_free_slot():
    pool = Script(min=2, max=2).open().run_for(1)
    call = pool.submit(queue=0.0, retries=1)
    pool.lose("pool-1")
    assert starts(pool, call) == ["pool-1", "pool-2"]


def test_f1_e1_the_run_limit_counts_anew_when_it_starts():
    pool, call = running(run=10, boots=[0.5, 3.0])
    pool.run_for(8.5)  # 9 s
    pool.lose_call(call)
    pool.run_for(9.9)
    assert call not in pool.answers
    pool.run_for(0.1)
    answer = pool.answers[call]
    assert isinstance(answer, do.Expired)
    assert (answer.phase, answer.limit, answer.running) == ("running", 10, 19)


def test_f1_e1_a_total_limit_counts_from_the_beginning():
    pool, call = running(total=10)
    pool.run_for(5)
    pool.lose("pool-1")
    pool.run_for(3.9)
    assert call not in pool.answers
    pool.run_for(0.1)
    answer = pool.answers[call]
    assert isinstance(answer, do.Expired)
    assert (answer.phase, answer.limit) == ("running", 10)


def test_f1_e2_the_seconds_of_all_waits_and_runs_add_up():
    pool = Script(max=1, boots=[0.5, 3.0], stop=1.0).open()
    call = pool.submit(total=20, retries=1)
    pool.run_for(5.5)  # half a second booting, 5 s running
    pool.lose("pool-1")
    pool.run_for(100)  # a second until it is gone, 3 s booting, the rest running
    answer = pool.answers[call]
    assert isinstance(answer, do.Expired)
    assert (answer.queued, answer.booting, answer.running) == (1, 3.5, 15.5)


def test_f1_e2_while_it_waits_again_its_runs_are_told_too():
    pool = Script(max=1, stop=None).open()
    call = pool.submit(total=20, retries=1)
    pool.run_for(5.5)
    pool.lose("pool-1")
    pool.run_for(20)
    answer = pool.answers[call]
    assert isinstance(answer, do.Expired)
    assert (answer.phase, answer.queued, answer.booting, answer.running) == ("queued", 14.5, 0.5, 5)


def test_f1_e1_a_call_whose_time_is_over_is_not_started_again():
    pool = Script(min=2, max=2).open().run_for(1)
    call = pool.submit(total=10, retries=1)
    pool.now += 50  # nobody has looked at the clock
    pool.lose("pool-1")
    assert starts(pool, call) == ["pool-1"]
    assert isinstance(pool.answers[call], do.Expired)


def test_f1_c4_a_call_that_runs_again_does_not_overtake_after_its_runner_is_gone():
    pool = Script(min=2, max=2).open().run_for(1)
    calls = [pool.submit(retries=1), pool.submit()]
    waiting = pool.submit()
    pool.lose("pool-1")
    pool.end(calls[1])
    assert pool.runner_of(waiting) == "pool-2"
    pool.run_for(1)
    assert starts(pool, calls[0]) == ["pool-1", "pool-3"]


def test_f1_played_work_starts_anew_with_the_call():
    """The test kit: what was planned for the lost work does not end the new one."""
    pool = Script(max=1).open()
    call = pool.submit(work=10, retries=1)
    pool.run_for(5.5)
    pool.lose_call(call)
    pool.run_for(9.9)
    assert pool.answers == {}
    pool.run_for(0.1)
    assert pool.answers == {call: "ended"}


def test_f2_a_call_whose_own_process_dies_is_lost_alone():
    pool = Script(max=1, max_concurrency=2).open()
    dies, goes_on = pool.submit(), pool.submit()
    waiting = pool.submit()
    pool.run_for(1)
    pool.tell(ev.CallLost(dies, "signal", None, 9))
    assert pool.told(do.Lost) == [do.Lost(dies, "pool-1", "signal", None, 9)]
    assert pool.runner_of(waiting) == "pool-1"
    assert goes_on not in pool.answers
    assert pool.core.counters["lost"] == 1
    assert pool.ready == ["pool-1"]


def test_f2_the_last_work_of_a_draining_runner_is_lost():
    pool = Script(max=1).open()
    call = pool.submit()
    pool.run_for(1)
    pool.close().lose_call(call, "oom")
    pool.run_for(0)
    assert pool.told(do.CloseDone)

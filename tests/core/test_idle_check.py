"""Runners that are asked before they go: D2."""

from __future__ import annotations

import pytest

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.testing import Script


def idle(**options: object) -> Script:
    """A pool whose runner has just fallen idle; checks are answered by the test."""
    settings = {"max": 2, "idle_check": True, "check": None, "idle_shutdown_after": 10.0}
    pool = Script(**(settings | options)).open()
    pool.submit(work=1)
    return pool.run_for(1.5)


def asked(**options: object) -> Script:
    return idle(**options).run_for(10)


def asks(pool: Script) -> list[do.AskIdle]:
    return pool.told(do.AskIdle)


def test_d2_a_runner_whose_time_is_over_is_asked_and_stays_until_it_answers():
    pool = idle().run_for(9.9)
    assert asks(pool) == []
    pool.run_for(0.1)
    assert asks(pool) == [do.AskIdle("pool-1", 1)]
    pool.run_for(1000)  # it is not asked again while it has not answered
    assert len(asks(pool)) == 1
    assert pool.ready == ["pool-1"]
    assert pool.core.next_deadline() is None


def test_d2_it_goes_when_the_check_is_true():
    pool = asked(stop=1.0)
    pool.run_for(2)
    pool.answer_idle(asks(pool)[0], True)
    assert pool.stopping == ["pool-1"]
    assert pool.decided("shrink") == ["pool-1: idle for 12 s"]
    pool.run_for(1)
    assert pool.alive == []


def test_d2_it_stays_when_the_check_is_false_and_is_asked_again_after_another_interval():
    pool = asked().run_for(2)
    pool.answer_idle(asks(pool)[0], False)
    pool.run_for(9.9)
    assert len(asks(pool)) == 1
    pool.run_for(0.1)
    assert asks(pool) == [do.AskIdle("pool-1", 1), do.AskIdle("pool-1", 2)]
    assert pool.core.snapshot(pool.now).runners[0].idle == 22.0  # and has been idle all the time
    pool.answer_idle(asks(pool)[1], True)
    assert pool.ready == []
    assert pool.decided("shrink") == ["pool-1: idle for 22 s"]


def test_d2_a_check_that_is_false_for_a_while():
    answers = iter([False, False, True])
    pool = idle(check=lambda runner: next(answers)).run_for(29)
    assert pool.ready == ["pool-1"]
    assert len(asks(pool)) == 2
    pool.run_for(1)
    assert pool.alive == []


def test_d2_a_runner_that_is_asked_takes_calls_and_its_answer_is_too_late_then():
    pool = asked()
    call = pool.submit()
    assert pool.runner_of(call) == "pool-1"
    pool.answer_idle(asks(pool)[0], True)
    assert pool.ready == ["pool-1"]
    pool.end(call)
    pool.answer_idle(asks(pool)[0], True)  # it is idle again, and this was about the time before
    assert pool.ready == ["pool-1"]
    pool.run_for(9.9)
    assert len(asks(pool)) == 1
    pool.run_for(0.1)
    assert len(asks(pool)) == 2


def test_d2_an_answer_to_an_earlier_question_changes_nothing():
    pool = asked()
    pool.end(pool.submit())
    pool.run_for(10)
    old, new = asks(pool)
    pool.answer_idle(old, True)
    assert pool.ready == ["pool-1"]
    pool.answer_idle(old, False)
    pool.answer_idle(new, True)
    assert pool.ready == []


@pytest.mark.parametrize("runner", ["pool-1", "pool-9"])
def test_d2_an_answer_nobody_asked_for_changes_nothing(runner):
    pool = idle()
    pool.tell(ev.IdleAnswer(runner, 1, True))
    assert pool.ready == ["pool-1"]


def test_d2_a_runner_that_is_needed_by_now_stays_and_is_asked_again_when_it_is_not():
    pool = asked()
    pool.configure(min=0, buffer=1)
    pool.answer_idle(asks(pool)[0], True)
    assert pool.ready == ["pool-1"]
    pool.run_for(100)
    assert len(asks(pool)) == 1
    pool.configure(buffer=0)
    assert len(asks(pool)) == 2
    pool.answer_idle(asks(pool)[1], True)
    assert pool.ready == []


def test_d2_a_pool_that_opens_lets_nobody_go():
    pool = asked(boots=[0.5, 60.0], boot_timeout=None)
    pool.configure(min=2)
    pool.tell(ev.Open())
    pool.configure(min=2, min_idle_shutdown_after=5.0)
    pool.answer_idle(asks(pool)[0], True)
    assert pool.ready == ["pool-1"]
    pool.run_for(60)
    assert pool.told(do.OpenDone) == [do.OpenDone(), do.OpenDone()]
    assert len(asks(pool)) == 2


def test_d2_only_those_are_asked_that_would_go():
    pool = Script(
        min=1, max=4, idle_check=True, check=None, idle_shutdown_after=10.0, boots=0.0
    ).open()
    for _ in range(4):
        pool.submit(work=1)
    pool.run_for(20)
    assert {ask.runner for ask in asks(pool)} == {"pool-2", "pool-3", "pool-4"}


def test_d2_the_min_group_is_asked_when_it_may_go():
    pool = Script(
        min=2, max=2, idle_check=True, check=lambda runner: runner == "pool-2",
        min_idle_shutdown_after=10.0,
    ).open()  # fmt: skip
    pool.run_for(11)
    assert {ask.runner for ask in asks(pool)} == {"pool-1", "pool-2"}
    assert pool.alive == ["pool-1"]  # and the other one rests
    pool.run_for(100)
    assert pool.alive == ["pool-1"]


def test_d2_a_runner_that_becomes_one_of_min_is_not_let_go_by_an_answer():
    pool = Script(min=1, max=2, idle_check=True, check=None, idle_shutdown_after=10.0).open()
    pool.run_for(1)
    pool.submit(work=1)
    pool.submit(work=1)
    pool.run_for(20)
    assert [ask.runner for ask in asks(pool)] == ["pool-2"]
    pool.lose("pool-1")
    pool.answer_idle(asks(pool)[0], True)
    assert pool.ready == ["pool-2"]
    pool.run_for(100)
    assert pool.ready == ["pool-2"]


def test_d2_c8_a_longer_idle_time_makes_an_answer_worth_nothing():
    pool = asked()
    pool.configure(idle_shutdown_after=100.0)
    pool.answer_idle(asks(pool)[0], True)
    assert pool.ready == ["pool-1"]
    pool.run_for(89.9)
    assert len(asks(pool)) == 1
    pool.run_for(0.1)
    assert len(asks(pool)) == 2


def test_d2_c8_other_options_do_not_repeat_a_question():
    pool = asked()
    pool.configure(idle_shutdown_after=5.0)
    pool.run_for(1)
    assert len(asks(pool)) == 1
    pool.answer_idle(asks(pool)[0], True)
    assert pool.ready == []


def test_d2_c8_a_refusal_still_counts_after_a_change_of_options():
    pool = asked()
    pool.answer_idle(asks(pool)[0], False)
    pool.run_for(5)
    pool.configure(buffer=0)
    pool.run_for(4.9)
    assert len(asks(pool)) == 1
    pool.run_for(0.1)
    assert len(asks(pool)) == 2


def test_d2_c8_without_a_check_nobody_is_asked():
    pool = asked()
    pool.configure(idle_check=False)
    assert pool.ready == []
    assert pool.decided("shrink") == ["pool-1: idle for 10 s"]


def test_d2_c8_with_a_check_from_now_on():
    pool = idle(idle_check=False)
    pool.configure(idle_check=True)
    pool.run_for(10)
    assert len(asks(pool)) == 1


@pytest.mark.parametrize("event", ["close", "lose", "leave"])
def test_d2_a_runner_that_goes_otherwise_while_it_is_asked(event):
    pool = asked(stop=None)
    if event == "close":
        pool.close()
    else:
        getattr(pool, event)("pool-1")
    assert pool.stopping == ["pool-1"]
    pool.answer_idle(asks(pool)[0], True)
    pool.answer_idle(asks(pool)[0], False)
    assert pool.stopping == ["pool-1"]
    pool.tell(ev.RunnerStopped("pool-1"))
    assert pool.core.next_deadline() is None

"""Calls: who is served when (C4), until when each may take (E1), what it is told then (E2)."""

from __future__ import annotations

import pytest

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.backoff import Backoff
from flame_dask.testing import HANGS, Script, Up


def expired(pool: Script, call: str) -> do.Expired:
    answer = pool.answers[call]
    assert isinstance(answer, do.Expired)
    return answer


def order(pool: Script) -> list[str]:
    return [start.call for start in pool.told(do.Start)]


def busy(**options: object) -> tuple[Script, str]:
    """A pool of one runner with one slot, and the call that holds it."""
    pool = Script(max=1, **options).open()
    call = pool.submit()
    pool.run_for(1)
    return pool, call


def test_c4_first_come_first_served():
    pool, first = busy()
    calls = [pool.submit(work=1) for _ in range(5)]
    pool.end(first)
    pool.run_for(10)
    assert order(pool) == [first, *calls]


def test_c4_a_higher_priority_is_served_earlier_and_within_one_it_is_first_come_first_served():
    pool, first = busy()
    low = [pool.submit(work=1, priority=-1) for _ in range(2)]
    normal = [pool.submit(work=1) for _ in range(2)]
    high = [pool.submit(work=1, priority=7) for _ in range(2)]
    pool.end(first)
    pool.run_for(10)
    assert order(pool) == [first, *high, *normal, *low]


def test_c4_a_newcomer_does_not_overtake_a_waiter():
    pool, first = busy(max_concurrency=1)
    waiting = pool.submit(work=1)
    pool.end(first)
    newcomer = pool.submit(work=1)
    pool.run_for(5)
    assert order(pool) == [first, waiting, newcomer]


def test_c4_a_waiter_whose_caller_left_is_skipped():
    pool, first = busy()
    left, stays = pool.submit(), pool.submit()
    pool.release(left)
    pool.end(first)
    assert pool.runner_of(left) is None
    assert pool.runner_of(stays) == "pool-1"
    assert pool.told(do.Terminate) == []


def test_c4_a_waiter_that_left_costs_no_boot():
    pool = Script(max=9, boots=HANGS, boot_timeout=10.0).open()
    calls = [pool.submit() for _ in range(3)]
    for call in calls:
        pool.release(call)
    pool.run_for(60)
    assert len(pool.told(do.Boot)) == 3
    assert pool.alive == []


def test_c4_a_waiter_whose_deadline_passed_is_skipped_even_if_nobody_looked_at_the_clock():
    pool, first = busy()
    late, stays = pool.submit(queue=5), pool.submit()
    pool.now += 50
    pool.end(first)
    assert expired(pool, late).queued == 50
    assert pool.runner_of(late) is None
    assert pool.runner_of(stays) == "pool-1"


def test_c4_the_slot_of_a_caller_that_has_just_gone_returns_to_the_pool():
    pool, first = busy()
    second, third = pool.submit(), pool.submit()
    pool.end(first)
    assert pool.runner_of(second) == "pool-1"
    pool.release(second)  # it left while the slot was on its way to it
    assert pool.told(do.Terminate) == [do.Terminate(second, "pool-1", "its caller is gone")]
    pool.run_for(0)
    assert pool.runner_of(third) == "pool-1"
    assert pool.answers[second] == "released"


def test_c4_a_slot_is_free_when_the_work_is_gone_and_not_before():
    pool, first = busy(ending=2.0, grace=10.0)
    second = pool.submit()
    pool.release(first)
    pool.run_for(1.9)
    assert pool.waiting == [second]
    pool.run_for(0.1)
    assert pool.runner_of(second) == "pool-1"


def test_c4_many_waiters_that_leave_in_any_order_cost_nothing_later():
    pool = Script(max=1, boots=HANGS, boot_timeout=None)
    calls = [f"x{number}" for number in range(20_000)]
    core = pool.core
    for call in calls:
        core.handle(0.0, ev.CallSubmitted(call, ev.Limits(queue=100.0)))
    for call in calls[1::2] + calls[0:-2:2]:
        core.handle(1.0, ev.CallReleased(call))
    assert len(core.queue) == 1
    assert len(core.queue._heap) < 200
    assert len(core._book._due._heap) < 200
    core.handle(2.0, ev.RunnerReady("pool-1"))
    assert core.calls[calls[-2]].state == "running"


def test_e1_without_a_timeout_of_its_own_a_call_has_the_queue_limit_then_the_run_limit():
    pool, first = busy()
    call = pool.submit(queue=5, run=10)
    pool.run_for(4)
    pool.end(first)
    pool.run_for(9.9)
    assert call not in pool.answers
    pool.run_for(0.1)
    answer = expired(pool, call)
    assert (answer.phase, answer.limit) == ("running", 10)
    assert (answer.queued, answer.booting, answer.running) == (4, 0, 10)


def test_e1_the_queue_limit_bounds_the_wait_alone():
    pool, first = busy()
    call = pool.submit(queue=5, run=10)
    pool.run_for(5)
    answer = expired(pool, call)
    assert (answer.phase, answer.limit) == ("queued", 5)
    assert (answer.queued, answer.booting, answer.running) == (5, 0, 0)
    pool.end(first)
    assert pool.runner_of(call) is None


def test_e1_a_timeout_of_its_own_bounds_the_two_together():
    pool, first = busy()
    call = pool.submit(queue=1, run=1, total=7)
    pool.run_for(4)
    pool.end(first)
    pool.run_for(2.9)
    assert call not in pool.answers
    pool.run_for(0.1)
    answer = expired(pool, call)
    assert (answer.phase, answer.limit) == ("running", 7)
    assert (answer.queued, answer.booting, answer.running) == (4, 0, 3)


def test_e1_no_limit_is_for_ever():
    pool, first = busy()
    call = pool.submit()
    pool.run_for(1e6)
    assert pool.waiting == [call]
    assert pool.core.next_deadline() is None
    pool.end(first)
    pool.run_for(1e6)
    assert pool.runner_of(call) == "pool-1"


def test_e1_no_time_at_all_is_enough_for_a_free_slot():
    pool = Script(min=1, max=1).open().run_for(1)
    served, refused = pool.submit(queue=0.0), pool.submit(queue=0.0)
    assert pool.runner_of(served) == "pool-1"
    assert expired(pool, refused).queued == 0


def test_e1_a_call_that_has_no_time_to_wait_costs_no_boot():
    pool = Script(max=1).open()
    pool.submit(queue=0.0)
    assert pool.alive == []


def test_e1_what_happens_at_the_deadline_is_in_time():
    pool, first = busy()
    call = pool.submit(queue=5.0)
    pool.now += 5.0
    pool.end(first)
    assert isinstance(pool.answers[call], do.Expired)  # its turn came when its time was up
    running = pool.submit(run=5.0)
    pool.now += 5.0
    pool.end(running)
    assert pool.answers[running] == "ended"


def test_e2_the_work_of_an_expired_call_is_terminated_and_holds_its_slot_until_it_is_gone():
    pool = Script(max=1, ending=3.0, grace=10.0).open()
    call = pool.submit(work=100, run=10)
    waiting = pool.submit()
    pool.run_for(10.5)
    assert pool.told(do.Terminate) == [do.Terminate(call, "pool-1", "its time is up")]
    assert pool.leases("pool-1") == 1
    assert pool.waiting == [waiting]
    pool.run_for(3)
    assert pool.runner_of(waiting) == "pool-1"


def test_e2_the_phase_is_booting_while_a_boot_is_under_way_and_the_seconds_say_for_how_long():
    pool = Script(max=2, boots=[0.5, 100.0], boot_timeout=None).open()
    pool.submit()
    pool.run_for(1)
    call = pool.submit(queue=5)
    pool.run_for(5)
    answer = expired(pool, call)
    assert (answer.phase, answer.queued, answer.booting) == ("booting", 0, 5)


def test_e2_seconds_queued_and_booting_are_told_apart():
    pool = Script(max=2, boots=[0.5, 6.0], boot_timeout=None).open()
    first = pool.submit()
    pool.run_for(1)
    second = pool.submit()  # its boot takes until 7
    pool.run_for(2)
    third = pool.submit(total=20)
    pool.run_for(12)  # 4 s of its wait were a boot's, of which second got the slot
    pool.end(first)
    pool.run_for(8)
    answer = expired(pool, third)
    assert pool.runner_of(second) == "pool-2"
    assert (answer.queued, answer.booting, answer.running) == (8, 4, 8)
    assert answer.queued + answer.booting + answer.running == 20


def test_e2_a_boot_before_the_call_came_is_not_its_own():
    pool = Script(max=1, boots=[Up(5.0)]).open()
    first = pool.submit()
    pool.run_for(7)
    call = pool.submit(queue=3)
    pool.run_for(3)
    assert expired(pool, call).booting == 0
    pool.end(first)


def test_e2_nothing_is_left_of_a_call_that_expired_in_the_queue():
    pool, _ = busy()
    call = pool.submit(queue=1)
    pool.run_for(1)
    assert call not in pool.core.calls
    assert call not in pool.core.queue
    assert pool.core.next_deadline() is None
    assert pool.decided("refuse") == ["no slot within 1 s (queued)"]


def test_f2_a_lost_runner_fails_its_own_calls_alone():
    pool = Script(max=2, max_concurrency=2).open()
    calls = [pool.submit() for _ in range(4)]
    pool.run_for(1)
    pool.tell(ev.RunnerLost("pool-1", "signal", None, 9))
    assert pool.told(do.Lost) == [
        do.Lost(call, "pool-1", "signal", None, 9)
        for call in calls
        if pool.runner_of(call) == "pool-1"
    ]
    assert len(pool.told(do.Lost)) == 2
    assert pool.leases("pool-2") == 2


def test_f2_who_has_been_answered_is_not_told_of_a_loss():
    pool = Script(max=1, max_concurrency=3, ending=None).open()
    released, timed_out, runs = pool.submit(), pool.submit(run=1), pool.submit()
    pool.run_for(2)
    pool.release(released)
    pool.lose("pool-1")
    assert [lost.call for lost in pool.told(do.Lost)] == [runs]
    assert isinstance(pool.answers[timed_out], do.Expired)


def test_f1_a_lost_call_is_not_started_again():
    pool = Script(max=1).open()
    call = pool.submit()
    pool.run_for(1)
    pool.lose("pool-1")
    pool.run_for(10)
    assert order(pool) == [call]
    assert pool.core.calls == {}


@pytest.mark.parametrize("state", ["waiting", "booting", "ready", "draining", "stopping"])
def test_f2_a_runner_is_lost_in_every_state(state):
    pool = Script(min=2, max=2, boots=HANGS if state == "booting" else 0.5, stop=None).open()
    pool.run_for(1)
    call = pool.submit() if state != "booting" else None
    runner = pool.alive[0]
    if state in ("draining", "stopping"):
        pool.configure(min=1, max=1)
        runner = pool.alive[1]
    if state == "stopping":
        assert pool.stopping == [runner]
        before = list(pool.log)
        pool.lose(runner)
        assert pool.log == before  # it was on its way out
        return
    pool.lose(runner)
    assert runner in pool.stopping
    pool.tell(ev.RunnerStopped(runner))
    assert runner not in pool.alive
    if state in ("waiting", "ready"):
        assert pool.runner_of(str(call)) == runner
        assert isinstance(pool.answers[str(call)], do.Lost)


def test_f2_a_draining_runner_that_is_lost_fails_its_calls():
    pool = Script(min=2, max=2).open().run_for(1)
    calls = [pool.submit(), pool.submit()]
    pool.configure(min=1, max=1)
    assert pool.draining == ["pool-2"]
    pool.lose("pool-2")
    assert isinstance(pool.answers[calls[1]], do.Lost)
    assert calls[0] not in pool.answers
    pool.run_for(10)
    assert pool.alive == ["pool-1"]


def test_e2_a_boot_that_begins_during_the_wait_counts_from_its_begin():
    pool = Script(max=1, boots=3.0).open()
    pool.submit()
    pool.run_for(3)
    call = pool.submit(total=20)
    pool.run_for(4)
    pool.lose("pool-1")
    pool.run_for(16)
    answer = expired(pool, call)
    assert (answer.phase, answer.queued, answer.booting, answer.running) == ("running", 4, 3, 13)


def test_e2_seconds_of_several_boots_add_up():
    pool = Script(max=1, boots=3.0).open()
    pool.submit(work=1)
    pool.run_for(4)
    pool.run_for(5)
    pool.lose("pool-1")
    call = pool.submit(total=20)
    pool.run_for(20)
    answer = expired(pool, call)
    assert (answer.queued, answer.booting, answer.running) == (0, 3, 17)


def test_e2_the_phase_is_booting_while_one_boot_cools_and_another_lacks_room():
    exact = Backoff(base=1.0, jitter=0.0)
    pool = Script(max=2, boots=HANGS, boot_timeout=1.0, stop=None, backoff=exact).open()
    pool.submit(queue=2.2)
    pool.run_for(0.5)
    pool.submit()
    pool.run_for(1.7)
    assert (pool.core._boots.cooling, pool.core._boots.owed) == (1, 2)
    answer = expired(pool, "call-1")
    assert (answer.phase, answer.booting) == ("booting", pytest.approx(2.2))

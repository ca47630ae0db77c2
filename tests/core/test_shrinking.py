"""Shrinking: D1, D3, D4, who gets calls so that a pool can shrink (C5), and other options (C8)."""

from __future__ import annotations

import pytest

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.testing import HANGS, Script


def spread_over(pool: Script, calls: list[str]) -> dict[str | None, int]:
    where = [pool.runner_of(call) for call in calls]
    return {runner: where.count(runner) for runner in where}


# -- C5 -------------------------------------------------------------------------------------------
def test_c5_spread_takes_the_runner_with_the_fewest_leases():
    pool = Script(min=3, max=3, max_concurrency=4, placement="spread").open().run_for(1)
    calls = [pool.submit() for _ in range(6)]
    assert spread_over(pool, calls) == {"pool-1": 2, "pool-2": 2, "pool-3": 2}
    pool.end(calls[1])
    assert pool.runner_of(pool.submit()) == "pool-2"


def test_c5_pack_takes_the_fullest_runner_that_has_a_slot():
    pool = Script(min=3, max=3, max_concurrency=3, placement="pack").open().run_for(1)
    calls = [pool.submit() for _ in range(5)]
    assert spread_over(pool, calls) == {"pool-1": 3, "pool-2": 2}
    pool.end(calls[0])
    pool.end(calls[1])  # now pool-2 is fuller than pool-1
    assert pool.runner_of(pool.submit()) == "pool-2"
    assert pool.runner_of(pool.submit()) == "pool-1"


@pytest.mark.parametrize("placement", ["spread", "pack"])
@pytest.mark.parametrize("slots", [1, 4])
@pytest.mark.parametrize("pause", [0.0, 0.3, 2.0])
def test_c5_after_a_spike_a_trickle_leaves_one_runner(placement, slots, pause):
    """Eight runners; then what one can carry. One is left within three idle_shutdown_after."""
    idle = 10.0
    pool = Script(
        max=8, max_concurrency=slots, placement=placement, idle_shutdown_after=idle
    ).open()
    for _ in range(8 * slots):
        pool.submit(work=5)
    pool.run_for(5.5)
    assert len(pool.ready) == 8
    spike_end = pool.now
    trickle = []
    while pool.now < spike_end + 3 * idle:
        trickle += [pool.submit(work=1) for _ in range(slots)]
        pool.run_for(1 + pause)
    pool.run_for(1)
    assert len(pool.alive) == 1
    assert len(pool.told(do.Boot)) == 8
    for call in trickle:
        record = pool.started_at(call)
        assert record is not None
    assert pool.told(do.Expired) == []
    submitted = [start.call for start in pool.told(do.Start, since=spike_end)]
    assert submitted == trickle  # each at once: none was queued, let alone waited for a boot


@pytest.mark.parametrize("placement", ["spread", "pack"])
def test_c5_a_trickle_that_comes_and_goes_does_not_keep_the_spike_alive(placement):
    """Demand that alternates between 0 and 1 renewed the memory of the spike once."""
    pool = Script(max=4, max_concurrency=2, placement=placement, idle_shutdown_after=10.0).open()
    for _ in range(8):
        pool.submit(work=1)
    pool.run_for(1.5)
    calls = []
    for _ in range(28):
        calls += [pool.submit(work=0.5), pool.submit(work=0.5)]
        pool.run_for(1)
    late = calls[-20:]
    assert spread_over(pool, late) == {"pool-1": 20}
    assert pool.alive == ["pool-1"]


def test_c5_surplus_runners_are_used_while_the_others_are_full():
    """The memory of the demand is over, but runners with long calls are still there."""
    pool = Script(max=3, max_concurrency=2, idle_shutdown_after=5.0).open()
    calls = [pool.submit() for _ in range(6)]
    pool.run_for(1)
    for call in calls:
        if call not in ("call-1", "call-2", "call-3"):
            pool.end(call)
    assert {pool.runner_of(call) for call in calls[:3]} == {"pool-1", "pool-2"}
    pool.run_for(4.9)
    assert pool.ready == ["pool-1", "pool-2", "pool-3"]
    before = pool.submit(work=0.01)  # still remembered
    assert pool.runner_of(before) == "pool-3"
    pool.run_for(10)
    assert pool.ready == ["pool-1", "pool-2"]


def test_c5_the_oldest_are_favoured():
    pool = Script(max=3, idle_shutdown_after=5.0).open()
    first = [pool.submit(work=20.0), pool.submit(work=1), pool.submit(work=1)]
    pool.run_for(10)
    assert pool.ready == ["pool-1"]
    assert pool.runner_of(first[0]) == "pool-1"


# -- D1 -------------------------------------------------------------------------------------------
def test_d1_an_idle_runner_stops_after_its_time():
    pool = Script(max=1, idle_shutdown_after=30.0, stop=1.0).open()
    pool.submit(work=2)
    pool.run_for(32.4)
    assert pool.ready == ["pool-1"]
    pool.run_for(0.2)
    assert pool.stopping == ["pool-1"]
    pool.run_for(1)
    assert pool.alive == []


def test_d1_the_clock_starts_when_the_runner_is_ready():
    pool = Script(max=1, boots=100.0, boot_timeout=None, idle_shutdown_after=10.0).open()
    pool.release(pool.submit())
    pool.run_for(109)
    assert pool.ready == ["pool-1"]
    pool.run_for(1)
    assert pool.alive == []


def test_d1_the_clock_restarts_with_each_lease():
    pool = Script(max=1, idle_shutdown_after=10.0).open()
    for _ in range(5):
        pool.submit(work=0.5)
        pool.run_for(9)
    assert pool.ready == ["pool-1"]
    assert len(pool.told(do.Boot)) == 1


def test_d1_a_lease_however_long_keeps_its_runner():
    pool = Script(max=1, idle_shutdown_after=10.0).open()
    call = pool.submit()
    pool.run_for(1e5)
    assert pool.leases("pool-1") == 1
    pool.end(call)
    pool.run_for(9.9)
    assert pool.ready == ["pool-1"]
    pool.run_for(0.1)
    assert pool.ready == []


def test_d1_none_is_never():
    pool = Script(max=1, idle_shutdown_after=None).open()
    pool.submit(work=1)
    pool.run_for(1e6)
    assert pool.ready == ["pool-1"]


def test_d1_no_idle_time_stops_a_runner_at_once_but_not_before_a_waiter_had_it():
    pool = Script(max=1, idle_shutdown_after=0.0).open()
    calls = [pool.submit(work=1), pool.submit(work=1)]
    pool.run_for(2.5)
    assert [pool.runner_of(call) for call in calls] == ["pool-1", "pool-1"]
    pool.run_for(0)
    assert pool.alive == []


def test_d1_the_min_group_stays_for_ever_by_default():
    pool = Script(min=2, max=5, idle_shutdown_after=10.0).open().run_for(1e6)
    assert pool.ready == ["pool-1", "pool-2"]
    assert {info.kind for info in pool.core.snapshot(pool.now).runners} == {"min"}


def test_d1_after_work_the_min_group_is_left():
    pool = Script(min=2, max=5, idle_shutdown_after=10.0).open().run_for(1)
    for _ in range(5):
        pool.submit(work=1)
    pool.run_for(1)
    kinds = [info.kind for info in pool.core.snapshot(pool.now).runners]
    assert kinds == ["min", "min", "elastic", "elastic", "elastic"]
    pool.run_for(60)
    assert pool.ready == ["pool-1", "pool-2"]


def test_d1_min_idle_shutdown_after_lets_the_min_group_go_and_the_next_call_brings_it_back():
    pool = Script(min=2, max=5, min_idle_shutdown_after=60.0, idle_shutdown_after=5.0).open()
    pool.run_for(60)
    assert pool.ready == ["pool-1", "pool-2"]
    pool.run_for(1)
    assert pool.alive == []
    pool.run_for(1000)
    assert pool.alive == []
    call = pool.submit(work=1)
    assert len(pool.booting) == 2
    pool.run_for(0.5)
    assert pool.runner_of(call) == "pool-3"
    pool.run_for(59)
    assert len(pool.ready) == 2
    pool.run_for(10)
    assert pool.alive == []


def test_d1_a_resting_member_of_min_is_not_booted_again_and_again():
    """A trickle that one of two runners carries: the other rests, until a call finds no slot."""
    pool = Script(min=2, max=2, max_concurrency=2, min_idle_shutdown_after=10.0).open()
    for _ in range(200):
        pool.submit(work=0.5)
        pool.run_for(1)
    assert pool.ready == ["pool-1"]
    assert len(pool.told(do.Boot)) == 2
    calls = [pool.submit(work=5) for _ in range(3)]
    assert pool.booting == ["pool-3"]
    pool.run_for(20)
    assert {pool.answers[call] for call in calls} == {"ended"}


def test_d1_the_oldest_are_the_min_group_and_another_takes_the_place_of_one_that_is_lost():
    pool = Script(min=1, max=2, idle_shutdown_after=10.0).open().run_for(1)
    pool.submit(work=1)
    pool.submit(work=1)
    pool.run_for(2)
    pool.lose("pool-1")
    [info, *_] = [i for i in pool.core.snapshot(pool.now).runners if i.state == "ready"]
    assert (info.id, info.kind) == ("pool-2", "min")
    pool.run_for(100)
    assert pool.ready == ["pool-2"]
    assert len(pool.told(do.Boot)) == 2


def test_d1_a_buffer_is_idle_and_stays():
    pool = Script(max=5, buffer=2, idle_shutdown_after=10.0).open().run_for(1000)
    assert len(pool.ready) == 2
    pool.submit(work=1)
    assert len(pool.alive) == 3
    pool.run_for(100)
    assert len(pool.ready) == 2


def test_d1_a_buffer_is_not_stopped_and_booted_again_with_each_dip_of_the_demand():
    pool = Script(max=5, buffer=1, idle_shutdown_after=10.0).open().run_for(1)
    for _ in range(100):
        pool.submit(work=0.5)
        pool.run_for(1)
    assert len(pool.told(do.Boot)) == 2
    pool.run_for(20)  # and then it does go
    assert len(pool.ready) == 1


def buffer_over_its_time() -> Script:
    """Leave a buffer idle that goes as soon as it has not been needed for a while."""
    pool = Script(max=5, buffer=1, idle_shutdown_after=10.0).open()
    pool.submit(work=20)
    pool.run_for(25)
    assert pool.ready == ["pool-1", "pool-2"]
    assert pool.core.next_deadline() == 30.5
    return pool


def test_d1_a_buffer_goes_when_it_has_not_been_needed_for_a_while():
    pool = buffer_over_its_time()
    pool.run_for(5.5)
    assert pool.ready == ["pool-1"]
    assert pool.core.next_deadline() is None


def test_d1_a_pool_that_closes_does_not_ring_for_its_buffer():
    pool = buffer_over_its_time().close()
    pool.run()
    assert pool.told(do.CloseDone)
    assert pool.core.next_deadline() is None


def test_d1_a_pool_that_opens_does_not_ring_for_its_buffer():
    pool = buffer_over_its_time()
    pool.configure(min=5)
    pool.tell(ev.Open())
    pool.now = 30.5
    pool.tell(ev.Tick())
    due = pool.core.next_deadline()
    assert due is None or due > 30.5


# -- D3, D4 ---------------------------------------------------------------------------------------
def test_d3_closed_to_new_work_then_drained_then_stopped():
    pool = Script(min=2, max=2, max_concurrency=2).open().run_for(1)
    calls = [pool.submit(work=5) for _ in range(4)]
    pool.configure(min=1, max=1)
    assert pool.draining == ["pool-2"]
    late = pool.submit(work=1)
    pool.run_for(4)
    assert pool.waiting == [late]
    assert pool.leases("pool-2") == 2
    pool.run_for(10)
    assert {pool.answers[call] for call in [*calls, late]} == {"ended"}
    assert pool.runner_of(late) == "pool-1"
    steps = [i for _, i in pool.log if isinstance(i, do.Drain | do.Stop) and i.runner == "pool-2"]
    assert [type(step) for step in steps] == [do.Drain, do.Stop]


def test_d3_a_call_that_comes_at_the_last_moment_keeps_the_runner():
    pool = Script(max=1, idle_shutdown_after=10.0).open()
    pool.submit(work=1)
    pool.run_for(11.4)
    pool.now = 11.5  # its time is up, nobody has looked at the clock
    call = pool.submit(work=1)
    assert pool.runner_of(call) == "pool-1"
    pool.run_for(1)
    assert pool.answers[call] == "ended"


def test_d3_a_call_that_comes_too_late_gets_another_runner():
    pool = Script(max=1, idle_shutdown_after=10.0, stop=2.0).open()
    pool.submit(work=1)
    pool.run_for(11.5)
    call = pool.submit(work=1)
    assert pool.stopping == ["pool-1"]
    pool.run_for(5)
    assert pool.runner_of(call) == "pool-2"


def test_d4_min_0_and_no_work_leaves_nothing():
    pool = Script(max=20, idle_shutdown_after=10.0).open()
    for _ in range(30):
        pool.submit(work=3)
    pool.run()
    assert pool.alive == []
    assert pool.core.calls == {}
    assert pool.core.next_deadline() is None
    assert pool.core.counters["ended"] == 30


# -- C8 -------------------------------------------------------------------------------------------
def test_c8_runners_above_a_lowered_max_drain_and_none_is_killed_with_work_on_it():
    pool = Script(max=4).open()
    calls = [pool.submit(work=5) for _ in range(4)]
    pool.run_for(1)
    pool.configure(max=2)
    assert len(pool.draining) == 2
    pool.run_for(4.5)
    assert {pool.answers[call] for call in calls} == {"ended"}
    assert pool.ready == ["pool-1", "pool-2"]


def test_c8_the_idle_go_first_then_the_youngest():
    pool = Script(min=4, max=4).open().run_for(1)
    calls = [pool.submit() for _ in range(4)]
    pool.end(calls[1])
    pool.configure(min=2, max=2)
    assert pool.stopping == ["pool-2"]
    assert pool.draining == ["pool-4"]


def test_c8_boots_above_a_lowered_max_are_given_up():
    pool = Script(max=4, boots=[0.5, 60.0, 60.0, 60.0], boot_timeout=None).open()
    for _ in range(4):
        pool.submit()
    pool.run_for(1)
    pool.configure(max=2)
    assert pool.ready == ["pool-1"]
    assert pool.booting == ["pool-2"]
    assert pool.draining == []


def test_c8_runners_that_are_leaving_already_are_no_surplus():
    """Four stay and two go: a max of four is met, and no other has to drain."""
    pool = Script(max=6, stop=None, idle_shutdown_after=1.0).open()
    calls = [pool.submit() for _ in range(6)]
    pool.run_for(1)
    pool.end(calls[4])
    pool.end(calls[5])
    pool.run_for(2)
    assert len(pool.stopping) == 2
    pool.configure(max=4)
    assert len(pool.ready) == 4
    assert pool.draining == []


def test_c8_c1_the_ceiling_comes_down_with_the_runners():
    pool = Script(max=3, boots=0.5).open()
    calls = [pool.submit() for _ in range(3)]
    pool.run_for(1)
    pool.configure(max=1)
    assert pool.core.ceiling == 3
    pool.end(calls[2])
    pool.run_for(0)
    assert pool.core.ceiling == 2
    pool.end(calls[1])
    pool.run_for(0)
    assert pool.core.ceiling == 1


def test_c8_a_shorter_idle_time_counts_from_when_a_runner_fell_idle():
    pool = Script(max=2, idle_shutdown_after=100.0).open()
    pool.submit(work=1)
    pool.run_for(51.5)
    pool.configure(idle_shutdown_after=60.0)
    assert pool.core.next_deadline() == 61.5
    pool.configure(idle_shutdown_after=20.0)
    assert pool.stopping == ["pool-1"]


def test_c8_a_longer_idle_time_too():
    pool = Script(max=2, idle_shutdown_after=10.0).open()
    pool.submit(work=1)
    pool.run_for(5)
    pool.configure(idle_shutdown_after=100.0)
    pool.run_for(90)
    assert pool.ready == ["pool-1"]
    pool.configure(idle_shutdown_after=None)
    pool.run_for(1000)
    assert pool.ready == ["pool-1"]


def test_c8_a_lowered_min_lets_the_youngest_go():
    pool = Script(min=3, max=3, idle_shutdown_after=10.0).open().run_for(50)
    pool.configure(min=1)
    pool.run_for(0)
    assert pool.ready == ["pool-1"]


def test_c8_more_slots_serve_waiters_at_once():
    pool = Script(max=1).open()
    calls = [pool.submit() for _ in range(3)]
    pool.run_for(1)
    assert pool.leases("pool-1") == 1
    pool.configure(max_concurrency=3)
    assert pool.leases("pool-1") == 3
    assert {pool.runner_of(call) for call in calls} == {"pool-1"}


def test_c8_fewer_slots_take_effect_as_calls_end():
    pool = Script(max=1, max_concurrency=3).open()
    calls = [pool.submit() for _ in range(3)]
    pool.run_for(1)
    pool.configure(max_concurrency=1)
    waiting = pool.submit()
    pool.end(calls[0]).end(calls[1])
    assert pool.waiting == [waiting]
    pool.end(calls[2])
    assert pool.runner_of(waiting) == "pool-1"


def test_c8_another_placement():
    pool = Script(min=2, max=2, max_concurrency=4).open().run_for(1)
    calls = [pool.submit() for _ in range(3)]
    pool.configure(placement="pack")
    more = [pool.submit() for _ in range(2)]
    assert spread_over(pool, calls + more) == {"pool-1": 4, "pool-2": 1}


def test_c8_nothing_changes_in_a_pool_that_closes():
    pool = Script(min=1, max=1, boots=HANGS, stop=None).open().close()
    pool.configure(min=5, max=5)
    pool.run_for(100)
    assert pool.alive == ["pool-1"]
    pool.tell(ev.RunnerStopped("pool-1"))
    assert pool.told(do.CloseDone)

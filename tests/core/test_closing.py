"""Closing: A6."""

from __future__ import annotations

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.testing import HANGS, Fails, Script


def test_a6_an_empty_pool_closes_at_once():
    pool = Script(max=1).open().close()
    assert pool.told(do.CloseDone) == [do.CloseDone()]


def test_a6_closing_is_idempotent():
    pool = Script(min=1, max=1, stop=5.0).open().run_for(1).close().close()
    pool.run_for(2)
    pool.close()
    assert len(pool.told(do.Stop)) == 1
    pool.run_for(5)
    pool.close()
    assert pool.told(do.CloseDone) == [do.CloseDone()]


def test_a6_queued_calls_fail_at_once_and_leases_may_finish():
    pool = Script(max=1, shutdown_timeout=30.0).open()
    running = pool.submit(work=10)
    queued = [pool.submit(), pool.submit()]
    pool.run_for(1)
    pool.close()
    assert [pool.answers[call] for call in queued] == [do.Refused(call) for call in queued]
    assert pool.draining == ["pool-1"]
    assert pool.told(do.CloseDone) == []
    pool.run_for(10)
    assert pool.answers[running] == "ended"
    assert pool.told(do.CloseDone)
    assert pool.alive == []


def test_a6_leases_are_ended_after_shutdown_timeout():
    pool = Script(max=2, shutdown_timeout=30.0, stop=2.0).open()
    calls = [pool.submit(), pool.submit(work=5)]
    pool.run_for(1)
    pool.close()
    pool.run_for(29.9)
    assert pool.answers == {calls[1]: "ended"}
    pool.run_for(0.1)
    assert pool.answers[calls[0]] == do.Refused(calls[0])
    assert pool.stopping == ["pool-1"]
    pool.run_for(2)
    assert pool.told(do.CloseDone)


def test_a6_who_has_been_answered_is_not_told_of_the_end():
    pool = Script(max=1, max_concurrency=2, shutdown_timeout=5.0, ending=None).open()
    released, runs = pool.submit(), pool.submit()
    pool.run_for(1)
    pool.release(released)
    pool.close()
    pool.run_for(5)
    assert pool.answers == {released: "released", runs: do.Refused(runs)}
    assert pool.told(do.CloseDone)


def test_a6_a_deadline_that_comes_while_the_pool_closes_still_counts():
    pool = Script(max=1, shutdown_timeout=30.0).open()
    call = pool.submit(run=3)
    pool.run_for(1)
    pool.close()
    pool.run_for(3)
    assert isinstance(pool.answers[call], do.Expired)
    assert pool.told(do.CloseDone)


def test_a6_no_shutdown_timeout_is_no_limit():
    pool = Script(max=1, shutdown_timeout=None).open()
    call = pool.submit()
    pool.run_for(1)
    pool.close()
    pool.run_for(1e6)
    assert pool.draining == ["pool-1"]
    pool.end(call)
    pool.run_for(0)
    assert pool.told(do.CloseDone)


def test_a6_no_time_at_all():
    pool = Script(max=1, shutdown_timeout=0.0).open()
    call = pool.submit()
    pool.run_for(1)
    pool.close()
    assert pool.answers[call] == do.Refused(call)
    assert pool.stopping == ["pool-1"]


def test_a6_boots_are_given_up_and_what_is_owed_is_forgotten():
    pool = Script(max=3, boots=[HANGS, Fails(0.1), HANGS], stop=1.0).open()
    for _ in range(3):
        pool.submit()
    pool.run_for(0.2)
    pool.close()
    assert pool.stopping == ["pool-1", "pool-3"]
    pool.run_for(1)
    assert pool.told(do.CloseDone)
    pool.run_for(100)
    assert len(pool.told(do.Boot)) == 3


def test_a6_a_boot_that_gets_ready_while_the_pool_closes_is_not_used():
    pool = Script(min=1, max=1, boots=HANGS, stop=None).open().close()
    pool.tell(ev.RunnerReady("pool-1"))
    assert pool.ready == []
    assert pool.told(do.OpenDone) == []
    pool.tell(ev.RunnerStopped("pool-1"))
    assert pool.told(do.CloseDone)


def test_a6_calls_that_come_later_fail_at_once():
    pool = Script(min=1, max=1).open().run_for(1).close()
    call = pool.submit()
    assert pool.answers[call] == do.Refused(call)
    assert pool.core.calls == {}
    pool.run_for(1)
    late = pool.submit()
    assert pool.answers[late] == do.Refused(late)


def test_a6_a_runner_lost_while_the_pool_closes():
    pool = Script(max=1).open()
    call = pool.submit()
    pool.run_for(1)
    pool.close().lose("pool-1")
    assert isinstance(pool.answers[call], do.Lost)
    pool.run_for(0)
    assert pool.told(do.CloseDone)


def test_a6_a_closed_pool_does_not_open_again():
    pool = Script(min=1, max=1).close().open().run_for(10)
    assert not pool.core.opening
    assert pool.told(do.OpenDone) == []
    assert pool.alive == []

"""What a pool tells of itself: hooks (C9), decisions and the snapshot (C10)."""

from __future__ import annotations

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.testing import HANGS, Fails, Script, Up


def test_c9_boots_beyond_min_are_news_and_those_of_min_are_not():
    pool = Script(min=2, max=4).open().run_for(1)
    assert pool.told(do.Scaled) == []
    for _ in range(4):
        pool.submit(work=1)
    assert [(news.runner, news.runners) for news in pool.news("grow_start")] == [
        ("pool-3", 3),
        ("pool-4", 4),
    ]
    assert pool.news("grow_end") == []
    pool.run_for(0.5)
    assert [(n.runner, n.runners, n.problem) for n in pool.news("grow_end")] == [
        ("pool-3", 3, None),
        ("pool-4", 4, None),
    ]


def test_c9_a_replacement_within_min_is_no_news():
    pool = Script(min=2, max=4).open().run_for(1)
    pool.lose("pool-1")
    pool.run_for(1)
    assert len(pool.ready) == 2
    assert pool.told(do.Scaled) == []


def test_c9_a_boot_that_fails_is_news_with_its_problem():
    pool = Script(max=1, boots=[Fails(0.1, cause="quota"), Up(0.5)]).open()
    pool.submit()
    pool.run_for(5)
    starts, ends = pool.news("grow_start"), pool.news("grow_end")
    assert (
        [news.runner for news in starts] == [news.runner for news in ends] == ["pool-1", "pool-2"]
    )
    assert ends[0].problem is not None
    assert ends[0].problem.cause == "quota"
    assert ends[1].problem is None


def test_c9_a_boot_that_is_given_up_has_an_end_too():
    pool = Script(max=3, boots=HANGS, stop=0.0).open()
    for _ in range(3):
        pool.submit()
    pool.configure(max=2)
    [end] = pool.news("grow_end")
    assert (end.runner, end.reason) == ("pool-3", "max is 2 now")
    assert end.problem is not None
    assert end.problem.phase == "cancelled"
    pool.close()
    assert [news.runner for news in pool.news("grow_end")] == ["pool-3", "pool-1", "pool-2"]


def test_c9_shrinking_is_news_with_the_number_that_is_left():
    pool = Script(min=1, max=3, idle_shutdown_after=10.0).open().run_for(1)
    for _ in range(3):
        pool.submit(work=1)
    pool.run_for(60)
    assert [(n.runner, n.runners, n.reason) for n in pool.news("shrink")] == [
        ("pool-3", 2, "idle for 10 s"),
        ("pool-2", 1, "idle for 10 s"),
    ]


def test_c10_each_decision_has_a_reason_and_figures():
    pool = Script(max=2, idle_shutdown_after=10.0).open()
    for _ in range(3):
        pool.submit(work=1)
    pool.run_for(60)
    decisions = pool.core.decisions()
    assert [(line.at, line.action, line.reason) for line in decisions] == [
        (0.0, "grow", "1 more: 1 calls, min 0, buffer 0"),
        (0.0, "grow", "1 more: 2 calls, min 0, buffer 0"),
        (0.0, "hold", "max=2 reached, calls wait"),
        (11.5, "shrink", "pool-2: idle for 10 s"),
        (12.5, "shrink", "pool-1: idle for 10 s"),
    ]
    assert [line.figures["booting"] for line in decisions] == [0, 1, 2, 0, 0]
    assert [line.figures["waiters"] for line in decisions] == [1, 2, 3, 0, 0]
    assert {line.figures["leases"] for line in decisions} == {0}
    assert [line.figures["ready"] for line in decisions] == [0, 0, 0, 1, 0]
    assert [line.figures["total"] for line in decisions] == [0, 1, 2, 2, 1]


def test_c10_hold_is_said_once_and_not_for_each_waiter():
    pool = Script(min=1, max=1).open().run_for(1)
    for _ in range(100):
        pool.submit(work=0.1)
    pool.run_for(60)
    assert len(pool.decided("hold")) == 1


def test_c10_a_full_pool_whose_queue_comes_and_goes_does_not_flood_its_log():
    pool = Script(min=1, max=1).open().run_for(1)
    for _ in range(100):
        pool.submit(work=1)
        pool.submit(work=1)
        pool.run_for(3)
    assert len(pool.decided("hold")) == 1


def test_c10_hold_is_not_said_while_a_boot_is_on_its_way():
    pool = Script(max=2).open()
    pool.submit()
    pool.submit()
    assert pool.decided("hold") == []
    pool.submit()
    assert len(pool.decided("hold")) == 1


def test_c10_hold_is_said_again_after_something_else_happened():
    pool = Script(max=1, idle_shutdown_after=5.0).open()
    for _ in range(2):
        pool.submit(work=1)
        pool.submit(work=1)
        pool.run_for(60)
    assert [line.action for line in pool.core.decisions()] == ["grow", "hold", "shrink"] * 2


def test_c10_retire_tells_of_failures_and_losses():
    pool = Script(max=1, boots=[Fails(0.1, cause="quota"), HANGS, Up(0.5)], boot_timeout=5.0).open()
    pool.submit()
    pool.run_for(10)
    pool.lose("pool-3", "oom")
    assert pool.decided("retire") == [
        "boot pool-1 failed (start): quota",
        "pool-2: boot: not ready within boot_timeout=5 s",
        "boot pool-2 failed (connect): not ready within boot_timeout=5 s",
        "pool-3: lost: oom",
    ]


def test_c10_retire_tells_how_the_process_of_a_lost_runner_ended():
    pool = Script(max=2, stop=None, idle_shutdown_after=5.0).open()
    pool.submit(), pool.submit(work=1)
    pool.run_for(7)
    pool.lose("pool-1", "signal")
    how = "its process was ended by signal 9"
    pool.tell(ev.RunnerStopped("pool-1", (), how))
    pool.tell(ev.RunnerStopped("pool-2", (), how))  # it had been told to stop: no news
    assert pool.decided("retire") == ["pool-1: lost: signal", f"pool-1: {how}"]


def test_c10_refuse_tells_of_calls_that_get_no_slot():
    pool = Script(max=1, boots=HANGS).open()
    pool.submit(queue=2)
    pool.run_for(2)
    pool.close()
    pool.submit()
    assert pool.decided("refuse") == ["no slot within 2 s (booting)", "the pool closes"]


def test_c10_the_log_is_bounded():
    pool = Script(max=1, boots=HANGS, boot_timeout=None)
    for _ in range(2000):
        pool.submit(queue=0.0)
    assert len(pool.core.decisions()) == 1000


def test_c10_the_snapshot():
    pool = Script(min=1, max=4, boots=[0.5, 0.5, 60.0], boot_timeout=None, stop=None).open()
    pool.run_for(1)
    pool.submit()
    second = pool.submit()
    pool.run_for(1)
    pool.end(second)
    for _ in range(2):
        pool.submit()
    pool.run_for(3)
    snapshot = pool.core.snapshot(pool.now)
    assert [(i.id, i.state, i.leases, i.kind) for i in snapshot.runners] == [
        ("pool-1", "ready", 1, "min"),
        ("pool-2", "ready", 1, "elastic"),
        ("pool-3", "booting", 0, "elastic"),
    ]
    assert (snapshot.leases, snapshot.waiters, snapshot.booting, snapshot.wanted) == (2, 1, 1, 3)
    assert snapshot.counters["submitted"] == 4


def test_c10_idle_seconds():
    pool = Script(min=1, max=1).open().run_for(4.5)
    assert pool.core.snapshot(pool.now).runners[0].idle == 4.0
    pool.submit()
    assert pool.core.snapshot(pool.now).runners[0].idle == 0.0


def test_c10_counters_count():
    pool = Script(max=1, max_concurrency=5, boots=[Fails(0.1), Up(0.5)]).open()
    ends, expires, released, lost = (
        pool.submit(work=1),
        pool.submit(run=2),
        pool.submit(),
        pool.submit(),
    )
    pool.run_for(5)
    pool.release(released)
    pool.lose("pool-2")
    pool.close()
    refused = pool.submit()
    pool.run_for(1)
    assert pool.core.counters == {
        "submitted": 5,
        "started": 4,
        "ended": 1,  # though the work of the expired one ended as well
        "expired": 1,
        "released": 1,
        "refused": 1,
        "lost": 1,
        "retried": 0,
        "boots": 2,
        "boot_failures": 1,
        "runners_lost": 1,
        "runners_stopped": 2,
    }
    assert pool.answers.keys() == {ends, expires, released, lost, refused}

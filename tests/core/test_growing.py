"""Growing: C1, C2, C3, C6, and the parts of A5 that have to do with boots."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.backoff import Backoff
from flame_dask.testing import HANGS, Dies, Fails, Script, Up, fail_every

EXACT = Backoff(base=1.0, factor=2.0, cap=8.0, jitter=0.0, open_retries=2)


def test_a5_opening_boots_min_at_once_and_is_done_when_all_are_ready():
    pool = Script(min=3, max=5, boots=[1.0, 3.0, 2.0]).open()
    assert pool.booting == ["pool-1", "pool-2", "pool-3"]
    pool.run_for(2.9)
    assert pool.told(do.OpenDone) == []
    pool.run_for(0.1)
    assert pool.told(do.OpenDone) == [do.OpenDone()]
    assert pool.ready == ["pool-1", "pool-2", "pool-3"]


def test_a5_min_0_boots_nothing():
    pool = Script(max=5).open()
    assert pool.told(do.OpenDone)
    assert pool.alive == []


def test_a5_a_boot_that_fails_while_opening_is_tried_again():
    pool = Script(min=2, max=2, boots=[0.5, Fails(0.1), 0.5]).open().run_for(5)
    assert pool.told(do.OpenDone)
    assert pool.told(do.OpenFailed) == []
    assert [boot.attempt for boot in pool.told(do.Boot)] == [1, 1, 2]


def test_a5_opening_fails_past_the_retries_and_all_that_was_started_is_taken_down():
    bad = Fails(0.1, cause="quota", phase="start", log_tail=("no quota left",))
    pool = Script(min=3, max=3, boots=[Up(0.5), HANGS, bad], stop=1.0, backoff=EXACT).open()
    pool.run_for(1.1 + 2.1 + 0.1)
    [failed] = pool.told(do.OpenFailed)
    assert failed.problem.cause == "quota"
    assert failed.problem.attempts == 3
    assert failed.problem.log_tail == ("no quota left",)
    assert pool.stopping == ["pool-1", "pool-2"]
    pool.run_for(1)
    assert pool.alive == []
    assert pool.told(do.CloseDone)
    assert pool.told(do.OpenDone) == []


@pytest.mark.parametrize("bad", [Fails(0.1), Dies(0.1), HANGS])
def test_a5_opening_fails_however_a_boot_fails(bad):
    pool = Script(min=1, max=1, boots=bad, boot_timeout=2.0).open()
    pool.run()
    assert len(pool.told(do.OpenFailed)) == 1
    assert len(pool.told(do.Boot)) == 3
    assert pool.alive == []


def test_a5_a_runner_that_is_ready_early_stays_until_all_are():
    """It may idle down only then: else opening might never end."""
    pool = Script(min=2, max=2, boots=[1.0, 20.0], min_idle_shutdown_after=5.0).open()
    pool.run_for(19)
    assert pool.ready == ["pool-1"]
    pool.run_for(1)
    assert pool.told(do.OpenDone)


def test_c1_never_more_than_max_although_every_third_boot_fails():
    """Eight calls at once start eight boots at once (C2), and no failure counts twice."""
    pool = Script(max=8, boots=fail_every(3, 0.5, Fails(0.3)), stop=0.7).open()
    calls = [pool.submit(work=5) for _ in range(8)]
    assert len(pool.booting) == 8
    assert {at for at, instruction in pool.log if isinstance(instruction, do.Boot)} == {0.0}
    pool.run_for(60)
    assert pool.peak == 8
    assert {pool.answers[call] for call in calls} == {"ended"}
    assert pool.core.counters["boot_failures"] > 0


def test_c1_what_may_still_cost_money_counts():
    """A boot that timed out takes its place until the backend says that it is gone."""
    pool = Script(max=1, boots=[HANGS, 0.5], boot_timeout=10.0, stop=None).open()
    call = pool.submit(work=1)
    pool.run_for(100)
    assert pool.stopping == ["pool-1"]
    assert pool.waiting == [call]
    pool.tell(ev.RunnerStopped("pool-1"))
    assert pool.booting == ["pool-2"]


def test_c1_a_draining_runner_counts():
    pool = Script(min=2, max=2, boots=0.5).open().run_for(1)
    calls = [pool.submit(), pool.submit()]
    pool.configure(min=1, max=1).configure(max=2, min=1)
    assert pool.draining == ["pool-2"]
    waiting = pool.submit()
    assert pool.alive == ["pool-1", "pool-2"]
    assert pool.waiting == [waiting]
    pool.end(calls[1])
    assert pool.alive == ["pool-1", "pool-2"]  # it stops
    pool.run_for(0)
    assert pool.booting == ["pool-3"]


@pytest.mark.parametrize(
    ("calls", "slots", "least", "buffer", "most", "boots"),
    [
        (0, 1, 0, 0, 9, 0),
        (1, 1, 0, 0, 9, 1),
        (5, 2, 0, 0, 9, 3),
        (4, 2, 0, 0, 9, 2),
        (4, 2, 0, 1, 9, 3),
        (0, 2, 0, 2, 9, 2),
        (1, 2, 3, 0, 9, 3),
        (1, 2, 3, 1, 9, 3),
        (50, 2, 0, 3, 9, 9),
        (50, 50, 0, 0, 9, 1),
        (51, 50, 0, 0, 9, 2),
    ],
)
def test_c2_runners_wanted(calls, slots, least, buffer, most, boots):
    pool = Script(min=least, max=most, max_concurrency=slots, buffer=buffer).open()
    for _ in range(calls):
        pool.submit()
    assert len(pool.booting) == boots
    assert pool.core.snapshot(pool.now).wanted == boots
    pool.run_for(1)
    assert len(pool.ready) == boots


def test_c2_a_slow_boot_delays_no_other():
    pool = Script(max=2, boots=[100.0, 0.5], boot_timeout=None).open()
    slow, fast = pool.submit(work=1), pool.submit(work=1)
    pool.run_for(0.5)
    assert pool.runner_of(slow) == "pool-2"
    pool.run_for(1)
    assert pool.runner_of(fast) == "pool-2"


def test_c2_a_failing_boot_delays_no_other():
    pool = Script(max=3, boots=[Fails(0.1), 0.5, 0.5], backoff=EXACT).open()
    calls = [pool.submit() for _ in range(3)]
    pool.run_for(0.2)
    assert pool.booting == ["pool-2", "pool-3"]
    pool.run_for(0.3)
    assert [pool.runner_of(call) for call in calls] == ["pool-2", "pool-3", None]
    # The one that failed is owed: nothing is booted in its place before its time.
    assert len(pool.told(do.Boot)) == 3
    pool.run_for(0.6)
    assert pool.booting == ["pool-4"]


def test_c2_the_issues_sequence_min_1_max_2_two_slots():
    """One runner before opening returns, the third call boots the second, the fifth waits."""
    pool = Script(min=1, max=2, max_concurrency=2).open()
    pool.run_for(0.5)
    assert pool.told(do.OpenDone)
    assert pool.ready == ["pool-1"]

    first = [pool.submit(work=10), pool.submit(work=10)]
    assert pool.alive == ["pool-1"]
    third = pool.submit(work=10)
    assert pool.booting == ["pool-2"]
    pool.run_for(0.5)
    fourth = pool.submit(work=10)
    assert [pool.runner_of(call) for call in [*first, third, fourth]] == ["pool-1"] * 2 + [
        "pool-2"
    ] * 2

    fifth, sixth = pool.submit(work=1), pool.submit(work=1, total=0.1)
    assert pool.waiting == [fifth, sixth]
    assert pool.decided("hold") == ["max=2 reached, calls wait"]
    pool.run_for(0.1)
    expired = pool.answers[sixth]
    assert isinstance(expired, do.Expired)
    assert (expired.phase, expired.queued, expired.booting) == ("queued", pytest.approx(0.1), 0)
    assert sixth not in pool.core.calls

    pool.run_for(60)
    assert pool.answers[fifth] == "ended"
    assert pool.ready == ["pool-1"]


def test_c2_two_calls_at_once_on_an_empty_pool_share_a_runner():
    pool = Script(max=1, max_concurrency=2).open()
    calls = [pool.submit(work=1), pool.submit(work=1)]
    pool.run_for(0.5)
    assert [pool.runner_of(call) for call in calls] == ["pool-1", "pool-1"]


def test_c3_a_lost_runner_of_min_is_replaced():
    pool = Script(min=2, max=2).open().run_for(1)
    pool.lose("pool-1")
    assert pool.ready == ["pool-2"]
    pool.run_for(0)
    assert pool.booting == ["pool-3"]
    pool.run_for(1)
    assert pool.ready == ["pool-2", "pool-3"]


def test_c3_every_kind_of_loss_leads_back_to_min():
    pool = Script(min=3, max=3, boots=[0.5, 0.5, 0.5, Fails(0.1), Dies(0.2), HANGS, 0.5]).open()
    pool.run_for(1)
    for runner in pool.ready:
        pool.lose(runner)
    pool.run_for(100)
    assert len(pool.ready) == 3


def test_c3_a_stopped_runner_makes_room_for_waiters():
    pool = Script(max=1, stop=5.0).open()
    first = pool.submit()
    pool.run_for(1)
    pool.lose("pool-1")
    second = pool.submit(work=1)
    assert pool.waiting == [second]
    assert pool.stopping == ["pool-1"]
    assert pool.decided("hold") == ["max=1 reached, 1 of them leaving, calls wait"]
    pool.run_for(5)
    assert pool.booting == ["pool-2"]
    assert isinstance(pool.answers[first], do.Lost)


def test_c3_raised_limits_boot_at_once():
    pool = Script(max=1).open()
    for _ in range(3):
        pool.submit()
    assert len(pool.booting) == 1
    pool.configure(max=3)
    assert len(pool.booting) == 3
    pool.configure(max=5, min=5)
    assert len(pool.booting) == 5


def test_c6_back_off_is_exponential_and_capped():
    pool = Script(max=1, boots=Fails(0.0), backoff=EXACT).open()
    pool.submit()
    pool.run_for(60)
    times = [at for at, instruction in pool.log if isinstance(instruction, do.Boot)]
    assert [b - a for a, b in itertools.pairwise(times)] == [1, 2, 4] + [8] * 6
    assert [boot.attempt for boot in pool.told(do.Boot)] == list(range(1, len(times) + 1))


def test_c6_jitter_is_bounded():
    backoff = Backoff(base=1.0, factor=1.0, cap=30.0, jitter=0.25)
    pool = Script(max=50, boots=Fails(0.0), backoff=backoff).open()
    for _ in range(50):
        pool.submit()
    pool.run_for(1)
    second = [at for at, boot in pool.log if isinstance(boot, do.Boot) and boot.attempt == 2]
    assert len(second) == 50
    assert min(second) >= 0.75
    assert max(second) <= 1.0
    assert len(set(second)) == 50  # what was refused together does not come back together


def test_c6_back_off_never_overflows():
    assert Backoff(jitter=0.0).delay(10**6, random.Random(0)) == 30.0


def test_c6_waiters_keep_waiting_and_the_last_problem_is_part_of_what_they_raise():
    bad = Fails(0.1, cause="no capacity", log_tail=("sorry",))
    pool = Script(max=1, boots=bad, backoff=EXACT).open()
    call = pool.submit(queue=5.0)
    pool.run_for(4.9)
    assert pool.waiting == [call]
    pool.run_for(0.1)
    expired = pool.answers[call]
    assert isinstance(expired, do.Expired)
    assert expired.phase == "booting"
    assert expired.booting == pytest.approx(5.0)
    assert expired.boot_problem is not None
    assert expired.boot_problem.cause == "no capacity"
    assert expired.boot_problem.log_tail == ("sorry",)
    assert expired.boot_problem.attempts == 3


def test_c6_a_failing_boot_without_waiters_is_not_tried_again():
    pool = Script(max=1, boots=Fails(0.1), backoff=EXACT).open()
    call = pool.submit()
    pool.run_for(0.2)
    pool.release(call)
    pool.run()
    assert len(pool.told(do.Boot)) == 1
    assert pool.core.next_deadline() is None


def test_c6_a_failing_boot_of_min_is_tried_for_ever():
    pool = Script(min=1, max=1, boots=[0.5, *[Fails(0.1)] * 20, Up(0.5)]).open().run_for(1)
    pool.lose("pool-1")
    pool.run_for(600)
    assert pool.ready == ["pool-22"]


def test_c6_callers_that_come_and_go_do_not_get_around_the_back_off():
    """Each call would be a reason to boot at once, if what is owed went with its caller."""
    pool = Script(max=1, boots=Fails(0.0), backoff=EXACT).open()
    for _ in range(300):
        pool.submit(queue=0.1)
        pool.run_for(0.1)
    assert len(pool.told(do.Boot)) == 6  # at 0, 1, 3, 7, 15, 23


def test_c6_after_its_back_off_a_boot_does_not_wait_for_the_others():
    """Owed boots that nobody wants any more hold nobody up."""
    backoff = Backoff(base=10.0, factor=1.0, jitter=0.9)
    pool = Script(max=9, boots=[*[Fails(0.0)] * 9, Up(0.5)], backoff=backoff).open()
    for call in [pool.submit() for _ in range(9)]:
        pool.release(call)
    pool.run_for(0)
    assert pool.core.counters["boot_failures"] == 9
    first = pool.core.next_deadline()
    assert first is not None
    call = pool.submit()
    pool.run(first + 0.5)
    assert pool.runner_of(call) == "pool-10"
    pool.run_for(60)
    assert len(pool.told(do.Boot)) == 10


def test_c6_a_success_does_not_forgive_another_boots_failures():
    pool = Script(
        min=2, max=2, boots=[0.5, Fails(0.1), Fails(0.1), Fails(0.1)], backoff=EXACT
    ).open()
    pool.run()
    assert [failed.problem.attempts for failed in pool.told(do.OpenFailed)] == [3]


def test_c6_an_old_problem_is_not_blamed():
    """A failure that was over before the call came has not cost it anything."""
    pool = Script(max=1, boots=[Fails(0.1), Up(0.5)]).open()
    first = pool.submit()
    pool.run_for(5)
    second = pool.submit(queue=1.0)
    pool.run_for(1)
    expired = pool.answers[second]
    assert isinstance(expired, do.Expired)
    assert expired.phase == "queued"
    assert expired.boot_problem is None
    pool.end(first)


def test_c6_a_call_that_waited_for_a_failed_boot_and_then_ran_too_long_knows_both():
    pool = Script(max=1, boots=[Fails(0.5, cause="flaky"), Up(0.5)], backoff=EXACT).open()
    call = pool.submit(total=10)
    pool.run_for(10)
    expired = pool.answers[call]
    assert isinstance(expired, do.Expired)
    assert (expired.phase, expired.queued, expired.booting, expired.running) == (
        "running",
        0,
        2.0,
        8.0,
    )
    assert expired.boot_problem is not None
    assert expired.boot_problem.cause == "flaky"


def test_c6_the_last_words_of_a_boot_that_timed_out_come_with_its_end():
    pool = Script(max=2, boots=HANGS, boot_timeout=3.0, stop=None).open()
    call = pool.submit(queue=5)
    pool.run_for(4)
    assert pool.core.last_problem is not None
    assert pool.core.last_problem.log_tail == ()
    pool.tell(ev.RunnerStopped("pool-1", ("cannot resolve scheduler",)))
    pool.run_for(1)
    expired = pool.answers[call]
    assert isinstance(expired, do.Expired)
    assert expired.boot_problem is not None
    assert expired.boot_problem.phase == "connect"
    assert "boot_timeout=3 s" in str(expired.boot_problem.cause)
    assert expired.boot_problem.log_tail == ("cannot resolve scheduler",)


def test_c6_the_last_words_of_another_runner_are_not_mixed_in():
    pool = Script(max=2, boots=[Up(0.5), HANGS], boot_timeout=3.0, stop=None).open()
    pool.submit()
    pool.submit(queue=6)
    pool.run_for(4)
    pool.lose("pool-1")
    pool.tell(ev.RunnerStopped("pool-1", ("I was fine",)))
    assert pool.core.last_problem is not None
    assert pool.core.last_problem.log_tail == ()


def test_boot_timeout_is_that_of_the_boots_start():
    pool = Script(max=1, boots=HANGS, boot_timeout=3.0).open()
    pool.submit(queue=3.0)
    pool.configure(boot_timeout=None)
    pool.run_for(3.0)
    assert pool.core.last_problem is not None
    assert "boot_timeout=3 s" in str(pool.core.last_problem.cause)


def test_a_runner_that_is_ready_too_late_is_not_used():
    pool = Script(max=1, boots=[HANGS, 0.5], boot_timeout=3.0, stop=None).open()
    call = pool.submit()
    pool.run_for(4)
    pool.tell(ev.RunnerReady("pool-1"))
    assert pool.runner_of(call) is None
    assert pool.stopping == ["pool-1"]


def test_a_lowered_max_while_boots_are_owed():
    """What is owed beyond it is not booted; what was booted beyond it goes, the latest first."""
    pool = Script(max=4, boots=[HANGS, HANGS, Fails(0.1), Fails(0.1), HANGS], backoff=EXACT).open()
    for _ in range(4):
        pool.submit()
    pool.run_for(0.5)
    assert pool.booting == ["pool-1", "pool-2"]
    pool.configure(max=1)
    assert pool.booting == ["pool-1"]
    pool.run_for(20)
    assert len(pool.told(do.Boot)) == 4
    assert pool.peak == 4


def test_ten_thousand_owed_boots_cost_no_more_than_their_number():
    """Forgetting one was O(n) once, so that a spike of expiring callers took O(n * n)."""
    pool = Script(max=5000, boots=Fails(0.0), backoff=Backoff(base=100.0))
    simulator = super(Script, pool)  # without the checks after each event
    start = time.process_time()
    for _ in range(5000):
        simulator.tell(ev.CallSubmitted(f"x{len(pool.core.calls)}", ev.Limits(queue=1.0)))
    assert pool.core.counters["boots"] == 5000
    for runner in list(pool.core.runners):
        simulator.tell(ev.BootFailed(runner, ev.BootProblem("start", "no")))
    pool.now = 2.0
    simulator.tell(ev.Tick())
    assert pool.core.counters["expired"] == 5000
    assert time.process_time() - start < 3


def test_c6_a_boot_that_failed_in_the_very_moment_of_the_call_is_blamed():
    pool = Script(max=1, boots=[Fails(0.0, cause="refused"), HANGS], backoff=EXACT).open()
    call = pool.submit(queue=5)
    pool.run_for(5)
    expired = pool.answers[call]
    assert isinstance(expired, do.Expired)
    assert pool.booting == ["pool-2"]  # nothing is owed: the next one is under way
    assert expired.boot_problem is not None
    assert expired.boot_problem.cause == "refused"

"""The tables of lives: each step can happen, and nothing else can."""

from __future__ import annotations

import itertools
import pickle
from typing import get_args

import pytest

from flame_dask.core import events as ev
from flame_dask.core.transitions import (
    CALL,
    RUNNER,
    CallState,
    IllegalTransition,
    RunnerState,
    Story,
)
from flame_dask.testing import HANGS, Dies, Fails, Script

PROBLEM = ev.BootProblem("apps", "no such port")


def boots(**options: object) -> Script:
    pool = Script(max=2, boots=HANGS, stop=None, **options).open()
    pool.submit()
    return pool


def refused() -> Script:
    pool = boots()
    pool.tell(ev.BootRefused("pool-1", PROBLEM))
    return pool


def ready(**options: object) -> Script:
    pool = Script(max=2, stop=None, **options).open()
    pool.submit()
    return pool.run_for(1)


def stuck() -> Script:
    """Call-1 is stuck on a draining runner, call-2 goes on there."""
    pool = Script(max=1, max_concurrency=2, stop=None, ending=None, shutdown_timeout=5.0).open()
    calls = [pool.submit(), pool.submit()]
    return pool.run_for(1).release(calls[0]).run_for(2)


def draining() -> Script:
    return ready(shutdown_timeout=5.0).close()


def stopping() -> Script:
    pool = ready()
    return pool.lose("pool-1")


RUNNER_STORIES = {
    ("booting", "ready"): ready,
    ("booting", "failed"): lambda: Script(min=1, max=1, boots=Fails()).open().run_for(0),
    ("booting", "timed out"): lambda: boots(boot_timeout=1.0).run_for(1),
    ("booting", "refused"): refused,
    ("booting", "lost"): lambda: Script(min=1, max=1, boots=Dies(), stop=None).open().run_for(0),
    ("booting", "not needed"): lambda: boots().close(),
    ("ready", "drain"): draining,
    ("ready", "lost"): stopping,
    ("draining", "drained"): lambda: draining().end("call-1"),
    ("draining", "lost"): lambda: draining().lose("pool-1"),
    ("draining", "evicted"): lambda: stuck().end("call-2"),
    ("draining", "pool closes"): lambda: draining().run_for(5),
    ("stopping", "stopped"): lambda: (s := stopping(), s.tell(ev.RunnerStopped("pool-1")))[0],
}


def kept(**options: object) -> Script:
    return ready(ending=None, **options).keep("call-1")


CALL_STORIES = {
    ("waiting", "slot"): ready,
    ("waiting", "expired"): lambda: (s := boots(), s.submit(queue=0.0))[0],
    ("waiting", "released"): lambda: boots().release("call-1"),
    ("waiting", "pool closes"): lambda: boots().close(),
    ("running", "kept"): kept,
    ("running", "done"): lambda: ready().end("call-1"),
    ("running", "expired"): lambda: (s := ready(max_concurrency=2), s.submit(run=0.0))[0],
    ("running", "released"): lambda: ready(ending=None).release("call-1"),
    ("running", "pool closes"): lambda: draining().run_for(5),
    ("running", "runner lost"): stopping,
    ("running", "runner evicted"): lambda: ready(shutdown_timeout=5.0).leave("pool-1").run_for(5),
    ("running", "work lost"): lambda: ready().lose_call("call-1"),
    ("running", "requeued"): lambda: (s := ready(), s.submit(retries=1), s.run_for(1))[0].lose_call(
        "call-2"
    ),
    ("kept", "done"): lambda: kept().end("call-1"),
    ("kept", "released"): lambda: kept().release("call-1"),
    ("kept", "pool closes"): lambda: kept(shutdown_timeout=5.0).close().run_for(5),
    ("kept", "runner lost"): lambda: kept().lose("pool-1"),
    ("kept", "runner evicted"): lambda: kept(shutdown_timeout=5.0).leave("pool-1").run_for(5),
    ("kept", "work lost"): lambda: kept().lose_call("call-1"),
    ("ending", "stuck"): stuck,
    ("ending", "runner evicted"): lambda: (
        ready(ending=None, grace=60.0, shutdown_timeout=5.0)
        .release("call-1")
        .leave("pool-1")
        .run_for(5)
    ),
    ("ending", "work lost"): lambda: ready(ending=None).release("call-1").lose_call("call-1"),
    ("ending", "done"): lambda: ready(ending=None).release("call-1").end("call-1"),
    ("ending", "runner lost"): lambda: ready(ending=None).release("call-1").lose("pool-1"),
    ("ending", "pool closes"): lambda: (
        ready(ending=None, grace=60.0, shutdown_timeout=5.0).release("call-1").close().run_for(5)
    ),
    ("stuck", "done"): lambda: stuck().end("call-1"),
    ("stuck", "runner lost"): lambda: stuck().lose("pool-1"),
    ("stuck", "runner evicted"): lambda: stuck().end("call-2"),
    ("stuck", "work lost"): lambda: stuck().lose_call("call-1"),
    ("stuck", "pool closes"): lambda: stuck().configure(shutdown_timeout=1.0).close().run_for(1),
}


def steps(pool: Script, subject: str) -> list[tuple[str, str, str]]:
    """Return (before, event, after) of a subject's life."""
    story = [(event, after) for _, event, after in pool.core.story.of(subject)]
    return [(before, event, after) for (_, before), (event, after) in itertools.pairwise(story)]


@pytest.mark.parametrize(("state", "event"), RUNNER)
def test_each_step_of_a_runner_happens(state, event):
    pool = RUNNER_STORIES[state, event]()
    assert (state, event, RUNNER[state, event]) in steps(pool, "pool-1")


@pytest.mark.parametrize(("state", "event"), CALL)
def test_each_step_of_a_call_happens(state, event):
    pool = CALL_STORIES[state, event]()
    taken = steps(pool, "call-1") + steps(pool, "call-2")
    assert (state, event, CALL[state, event]) in taken


@pytest.mark.parametrize(
    ("table", "states", "start", "end"),
    [
        (RUNNER, get_args(RunnerState), "booting", "gone"),
        (CALL, get_args(CallState), "waiting", "ended"),
    ],
)
def test_each_state_is_reached_and_each_but_the_last_is_left(table, states, start, end):
    reached = {start}
    for _ in states:
        reached |= {after for (before, _), after in table.items() if before in reached}
    assert reached == set(states)
    assert {before for before, _ in table} == set(states) - {end}


@pytest.mark.parametrize(
    ("table", "step", "states"),
    [
        (RUNNER, Story.runner, get_args(RunnerState)),
        (CALL, Story.call, get_args(CallState)),
    ],
)
def test_what_no_table_has_is_refused(table, step, states):
    story = Story()
    story.begin(1.0, "x", "boot", "booting")
    events = {event for _, event in table} | {"nonsense"}
    for state, event in itertools.product(states, events):
        if (state, event) in table:
            continue
        with pytest.raises(IllegalTransition) as caught:
            step(story, 2.0, "x", state, event)
        assert (caught.value.subject, caught.value.state, caught.value.event) == ("x", state, event)
        assert caught.value.story == [(1.0, "boot", "booting")]
    assert len(story.of("x")) == 1


@pytest.mark.parametrize(
    ("pool", "event"),
    [
        (ready, ev.RunnerReady("pool-1")),
        (boots, ev.RunnerStopped("pool-1")),
        (ready, ev.RunnerStopped("pool-1")),
        (draining, ev.RunnerStopped("pool-1")),
        (boots, ev.CallEnded("call-1")),
        (boots, ev.CallLost("call-1", "oom")),
        (boots, ev.CallKept("call-1")),
        (boots, ev.CallSubmitted("call-1")),
        (ready, ev.CallSubmitted("call-1")),
    ],
)
def test_an_impossible_event_raises_with_the_story_and_changes_nothing(pool, event):
    core = pool().core
    subject = event[0]
    before = pickle.dumps(core)
    with pytest.raises(IllegalTransition, match=subject) as caught:
        core.handle(1e6, event)
    assert pickle.dumps(core) == before
    assert caught.value.story == core.story.of(subject)
    assert caught.value.story
    known = core.runners.get(subject) or core.calls[subject]
    assert caught.value.state == known.state
    assert core.handle(2.0, ev.Tick()) == []  # and no clock has jumped


def test_the_text_tells_the_story():
    pool = ready()
    with pytest.raises(IllegalTransition) as caught:
        pool.tell(ev.RunnerReady("pool-1"))
    text = (
        "pool-1 is ready, 'ready' is impossible. Story: 0.000 boot -> booting; 0.500 ready -> ready"
    )
    assert str(caught.value) == text


def test_the_story_is_bounded():
    story = Story(length=10)
    for number in range(100):
        story.begin(float(number), "x", "boot", "booting")
    assert len(story.of("x")) == 10


@pytest.mark.parametrize(
    "event",
    [
        ev.RunnerReady("pool-1"),
        ev.RunnerLost("pool-1", "exited"),
        ev.RunnerStopped("pool-1", (), "its process was ended by signal 9"),
        ev.RunnerLeaving("pool-1", "SIGTERM"),
        ev.IdleAnswer("pool-1", 1, True),
        ev.BootFailed("pool-1", ev.BootProblem("start", "refused")),
        ev.BootRefused("pool-1", PROBLEM),
        ev.CallEnded("call-1", "SIGKILL to its processes"),
        ev.CallLost("call-1", "oom"),
        ev.CallReleased("call-1"),
        ev.CallKept("call-1"),
    ],
)
def test_news_of_an_earlier_life_changes_nothing(event):
    pool = ready()
    pool.lose("pool-1")
    pool.tell(ev.RunnerStopped("pool-1"))
    pool.run()
    before = pickle.dumps(pool.core)
    assert pool.tell(event) == []
    assert pickle.dumps(pool.core) == before


@pytest.mark.parametrize("state", [ready, draining])
def test_a_failed_boot_of_a_runner_that_said_it_is_ready_is_a_loss(state):
    """The news crossed: the worker's own was quicker than the backend's."""
    pool = state()
    pool.tell(ev.BootFailed("pool-1", ev.BootProblem("start", "gone again")))
    assert pool.core.counters["runners_lost"] == 1
    assert pool.core.counters["lost"] == 1
    assert "pool-1" not in pool.alive


def test_c6_a_runner_that_says_it_can_not_get_ready_is_stopped_and_tried_again():
    pool = boots()
    pool.tell(ev.BootRefused("pool-1", PROBLEM))
    assert pool.stopping == ["pool-1"]
    assert pool.core.counters["boot_failures"] == 1
    # It holds its place until nothing of it is left (C1).
    assert pool.core.runners["pool-1"].state == "stopping"
    # When it is ready after all, or gone, that is no news.
    pool.tell(ev.RunnerReady("pool-1"))
    pool.tell(ev.BootRefused("pool-1", PROBLEM))
    assert pool.core.counters["boot_failures"] == 1
    pool.tell(ev.RunnerStopped("pool-1"))
    pool.run_for(5)
    assert "pool-2" in pool.core.runners


def test_a_clock_that_goes_back_stands_still():
    pool = ready(idle_shutdown_after=10.0)
    pool.end("call-1")
    pool.run_for(9)
    assert pool.core.handle(0.0, ev.Tick()) == []
    assert pool.core.next_deadline() == 11.0
    pool.run_for(1)
    assert pool.stopping == ["pool-1"]

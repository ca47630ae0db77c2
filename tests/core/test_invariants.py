"""The check itself: it sees what is wrong, and says all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from flame_dask.core import events as ev
from flame_dask.core.invariants import check
from flame_dask.core.records import Runner
from flame_dask.testing import HANGS, Script, Up

Break = Callable[[Any], object]


def a_pool() -> Script:
    """A pool with a runner in each state, and a call in each."""
    boots = [Up(0.5), Up(0.5), Up(0.5), HANGS]
    pool = Script(min=3, max=5, max_concurrency=2, boots=boots, stop=None, ending=None).open()
    pool.run_for(1)
    running = [pool.submit(run=50) for _ in range(6)]
    pool.configure(min=2, max=2)  # pool-3 drains
    pool.configure(min=1, max=4)
    pool.submit(queue=50)  # pool-4 boots
    pool.release(running[0])
    return pool.keep(running[-1])


def asked_pool() -> Script:
    """A pool whose only runner is asked whether it may go."""
    pool = Script(max=1, idle_check=True, check=None, idle_shutdown_after=10.0).open()
    pool.submit(work=1)
    return pool.run_for(20)


def first(core: Any, state: str) -> Any:
    everybody = [*core.runners.values(), *core.calls.values()]
    return next(one for one in everybody if one.state == state)


def idle(core: Any) -> None:
    """Leave an elastic runner idle for too long: 50 s."""
    runner = core.runners["pool-2"]
    for call in list(runner.leases):
        core._book.end(core._now, core.calls[call], "done")
        core._fleet.give_back(core._now, runner, call)
    core._fleet._idle._due.discard(runner)
    runner.idle_since = runner.idle_clock = core._now - 50
    core.queue.discard(first(core, "waiting").id)


BREAKS: dict[str, Break] = {
    "C1: 4 runners": lambda core: setattr(core, "ceiling", 2),
    "C8: the ceiling": lambda core: setattr(core, "ceiling", 9),
    "is gone": lambda core: setattr(first(core, "booting"), "state", "gone"),
    "at most 1 may": lambda core: setattr(core, "most_leases", 1),
    "has leases": lambda core: first(core, "booting").leases.update(x=None),
    "D3": lambda core: first(core, "draining").leases.clear(),
    "knows nothing of it": lambda core: first(core, "ready").leases.update({"call-7": None}),
    "is ended": lambda core: setattr(first(core, "waiting"), "state", "ended"),
    "in the queue: False": lambda core: core.queue.discard(first(core, "waiting").id),
    "in the queue: True": lambda core: core.queue.push(first(core, "running").id, 0),
    "on None": lambda core: setattr(first(core, "running"), "runner", None),
    "which is gone": lambda core: core.runners.pop(first(core, "running").runner.id),
    "without a lease": lambda core: first(core, "ready").leases.clear(),
    "waits and is over": lambda core: core.queue.push("nobody", 0),
    "F3": lambda core: core.calls.pop(first(core, "waiting").id),
    "is kept as": lambda core: setattr(first(core, "booting"), "id", "x"),
    "the ready runners": lambda core: core._fleet.ready.popitem(),
    "leases: 5 by the books": lambda core: setattr(core._fleet, "leases", 5),
    "boots: 3 by the books": lambda core: setattr(core._boots, "under_way", 3),
    "the min group": lambda core: setattr(first(core, "ready"), "kind", "elastic"),
    "the size of the min group": lambda core: setattr(core._fleet, "floor", 2),
    "rest": lambda core: setattr(core._fleet._group, "rested", 2),
    "C5: 2 of 2 are favoured, not 1": lambda core: setattr(core._fleet._placement, "_target", 1),
    "believes to be in": lambda core: setattr(first(core, "ready"), "group", "surplus"),
    "can be picked": lambda core: core._fleet._placement._load["favoured"].set(
        first(core, "ready"), 0
    ),
    "has room": lambda core: core._fleet.give_back(0, first(core, "ready"), "call-1"),
    "A6": lambda core: setattr(core, "closing", True),
    "C3: 1 short": lambda core: (setattr(core._boots, "under_way", 0), core.runners.popitem()),
    "C6": lambda core: core._boots._due.append(2),
    "E2: the boot clock": lambda core: setattr(core._boots, "_since", None),
    "idle since 1.0": lambda core: setattr(first(core, "booting"), "idle_since", 1.0),
    "D1: pool-2 is idle since": idle,
    "the alarm is at": lambda core: setattr(core._alarm, "at", 1e9),
    "was due": lambda core: setattr(core, "_now", 1e9),
    "has a deadline and needs none": lambda core: core._book._due.set("nobody", 99),
    "a grace and no deadline": lambda core: core._book._due.discard(first(core, "ending").id),
    "E3: {'call-1'} of pool-1 are stuck": lambda core: setattr(
        core.calls["call-1"], "state", "stuck"
    ),
    "waits for nothing but stuck calls": lambda core: [
        setattr(core.calls[call], "state", "stuck") for call in first(core, "draining").leases
    ],
    "is ready, leaving: True": lambda core: setattr(first(core, "ready"), "leaving", True),
    "D5: pool-1 is ready": lambda core: (
        setattr(core, "options", core.options._replace(single_use=True)),
        setattr(first(core, "ready"), "used", True),
    ),
    "is to be evicted for no reason": lambda core: core._evictions.limit(
        0, first(core, "draining"), 99
    ),
    "H1, I1: call-6 is kept": lambda core: setattr(first(core, "kept"), "retries", 1),
    "call-6 has a deadline": lambda core: core._book._due.set(first(core, "kept").id, 99),
    "F1": lambda core: core.counters.update(started=7),
    "is due at 99": lambda core: core._book._due.set(first(core, "running").id, 99),
    "a limit and no deadline": lambda core: core._book._due.discard(first(core, "running").id),
    "does not boot": lambda core: core._boots._limits.set("pool-1", 99),
    "is not idle": lambda core: core._fleet._idle._due.set(first(core, "ready"), 99),
}


def test_the_pool_that_is_broken_below_is_sound():
    core = a_pool().core
    check(core)
    runner_states = {runner.state for runner in core.runners.values()}
    assert runner_states == {"booting", "ready", "draining"}
    assert {call.state for call in core.calls.values()} == {
        *("waiting", "running", "kept", "ending"),
    }


@pytest.mark.parametrize("problem", BREAKS)
def test_what_is_broken_is_seen(problem):
    core = a_pool().core
    BREAKS[problem](core)
    with pytest.raises(AssertionError) as caught:
        check(core)
    assert problem in str(caught.value)


def ask_one_that_works(core: Any) -> None:
    core.runners["pool-1"].idle_since = None


def ask_again(core: Any) -> None:
    core._fleet._idle.over["elastic"].set(core.runners["pool-1"], 0)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (ask_one_that_works, "is asked, is ready, idle since None"),
        (ask_again, "is asked and could be asked again"),
        (lambda core: core._fleet._idle.asked.clear(), "D1: pool-1 is idle since 1.5"),
        (lambda core: setattr(core.runners["pool-1"], "idle_clock", 0), "before it fell idle"),
    ],
)
def test_d2_what_is_broken_is_seen(change, problem):
    core = asked_pool().core
    check(core)
    change(core)
    with pytest.raises(AssertionError, match=problem):
        check(core)


def test_all_that_is_wrong_is_said():
    core = a_pool().core
    core.ceiling = 1
    core._alarm.at = 1e9
    core.calls.popitem()
    with pytest.raises(AssertionError) as caught:
        check(core)
    assert len(str(caught.value).splitlines()) >= 3


def test_c5_an_old_runner_in_the_surplus_is_seen():
    core = Script(min=0, max=2).core
    for runner in (Runner(1, "a", 1, False, None), Runner(2, "b", 1, False, None)):
        runner.state = "ready"
        core.runners[runner.id] = runner
        core._fleet.join(0.0, runner)
    placement = core._fleet._placement
    placement._target = 1
    placement._move(core.runners["b"], "favoured")
    with pytest.raises(AssertionError, match="is favoured before"):
        check(core)


def test_a_script_checks_after_each_event(monkeypatch):
    pool = a_pool()
    pool.core.ceiling = 1
    with pytest.raises(AssertionError, match="C1"):
        pool.tell(ev.Tick())

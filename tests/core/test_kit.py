"""The test kit itself: scripts, simulated boots, and the model's eye for what is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.events import Limits, PoolOptionsView
from flame_dask.core.pool import PoolState
from flame_dask.testing import HANGS, Arrival, Dies, Fails, Script, Simulator, Up, fail_every
from flame_dask.testing.model import PoolModel


def test_boots_in_all_forms():
    assert Script(min=1, max=1, boots=2).open().run_for(2).ready == ["pool-1"]
    assert Script(min=1, max=1, boots=Up(2.0)).open().run_for(2).ready == ["pool-1"]
    assert Script(min=2, max=2, boots=[1, Up(2.0)]).open().run_for(2).ready == ["pool-1", "pool-2"]
    odd = Script(min=2, max=2, boots=lambda boot: Up(1.0) if boot.runner == "pool-1" else HANGS)
    assert odd.open().run_for(5).booting == ["pool-2"]
    assert odd.ready == ["pool-1"]


def test_the_last_boot_of_a_list_goes_on():
    pool = Script(min=3, max=3, boots=[1.0, 2.0]).open().run_for(1.5)
    assert pool.ready == ["pool-1"]
    assert pool.run_for(0.5).ready == ["pool-1", "pool-2", "pool-3"]


def test_random_deaths():
    lives = iter([3.0, None])
    pool = Script(min=1, max=1, lifetime=lambda: next(lives)).open().run_for(1000)
    assert pool.core.counters["runners_lost"] == 1
    assert pool.ready == ["pool-2"]


def test_fail_every_third():
    boots = fail_every(3, 1.0, Dies())
    assert [next(boots) for _ in range(6)] == [Up(1.0), Up(1.0), Dies(), Up(1.0), Up(1.0), Dies()]


def test_equal_seeds_give_equal_stories():
    def story(seed: int) -> list[object]:
        pool = Script(max=3, boots=fail_every(2, 0.5, Fails(0.1)), seed=seed).open()
        for _ in range(5):
            pool.submit(work=1)
        return list(pool.run_for(20).log)

    assert story(1) == story(1)
    assert story(1) != story(2)


def test_runner_seconds_and_the_peak():
    pool = Simulator(PoolOptionsView(max=2, idle_shutdown_after=5), boots=1.0, stop=2.0)
    pool.run(arrivals=[Arrival(0.0, 10.0), Arrival(0.0, 4.0)])
    assert pool.runner_seconds == (1 + 10 + 5 + 2) + (1 + 4 + 5 + 2)
    assert pool.peak == 2
    assert pool.now == 18.0


def test_runner_seconds_of_those_that_are_there():
    pool = Script(min=2, max=2).open().run_for(10)
    assert pool.runner_seconds == 20.0


def test_arrivals_have_limits_and_priorities():
    pool = Script(max=1)
    pool.run(
        until=20,
        arrivals=[
            Arrival(0.0, 5.0),
            Arrival(1.0, 1.0, priority=-1),
            Arrival(2.0, 1.0),
            Arrival(3.0, 1.0, Limits(queue=1.0)),
        ],
    )
    assert [start.call for start in pool.told(do.Start)] == ["call-1", "call-3", "call-2"]
    assert isinstance(pool.answers["call-4"], do.Expired)
    assert pool.started_at("call-2") == 6.5
    assert pool.started_at("call-4") is None


def test_the_kit_needs_no_hypothesis():
    code = """if True:
        import sys
        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "hypothesis":
                    raise ImportError(name)
        sys.meta_path.insert(0, Blocker())
        import flame_dask.testing
        print(flame_dask.testing.Script(min=1, max=1).open().run_for(1).ready)
    """
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "['pool-1']\n"


class Wrong(PoolState):
    """A core that changes what it says."""

    def __init__(self, change, **options) -> None:
        super().__init__(PoolOptionsView(max=2, **options))
        self.change = change

    def handle(self, now, event):
        return self.change(super().handle(now, event))


def twice(kind):
    return lambda out: [i for i in out for _ in range(2 if isinstance(i, kind) else 1)]


def without(kind):
    return lambda out: [i for i in out if not isinstance(i, kind)]


@pytest.mark.parametrize(
    "change",
    [
        twice(do.Boot),
        twice(do.Start),
        twice(do.Stop),
        twice(do.Drain),
        twice(do.Expired),
        twice(do.Refused),
        twice(do.Lost),
        twice(do.Scaled),
        without(do.Boot),
        without(do.Start),
        without(do.Stop),
        without(do.Drain),
        without(do.Expired),
        without(do.Refused),
        without(do.Lost),
        lambda out: [i for i in out if not (isinstance(i, do.Scaled) and i.kind == "grow_end")],
        lambda out: list(reversed(out)),
        lambda out: [i._replace(queued=9.0) if isinstance(i, do.Expired) else i for i in out],
        lambda out: [i._replace(runner="x") if isinstance(i, do.Start) else i for i in out],
    ],
)
def test_the_model_sees_what_is_wrong(change):
    def story(core: PoolState) -> None:
        pool = PoolModel(core)
        pool.tell(ev.Open())
        for number in range(4):
            pool.tell(ev.CallSubmitted(f"c{number}", Limits(total=50)))
        pool.tell(ev.RunnerReady("pool-1"))
        pool.tell(ev.RunnerReady("pool-2"))
        pool.tell(ev.RunnerLost("pool-2", "exited"))
        pool.tell(ev.CallEnded("c0"))
        pool.now = 50.0
        pool.tell(ev.Tick())
        pool.tell(ev.CallSubmitted("c4", Limits()))
        pool.tell(ev.Close())
        pool.now = 100.0
        pool.tell(ev.Tick())

    story(PoolState(PoolOptionsView(max=2)))
    with pytest.raises((AssertionError, KeyError, ValueError)):
        story(Wrong(change))


def always(kind, **changes):
    return lambda out: [i._replace(**changes) if isinstance(i, kind) else i for i in out]


@pytest.mark.parametrize(
    "change",
    [
        twice(do.Requeued),
        twice(do.AskIdle),
        twice(do.Terminate),
        without(do.Terminate),
        without(do.Requeued),
        without(do.AskIdle),
        without(do.Lost),
        always(do.Stop, force=True),
        always(do.Stop, force=False),
        always(do.AskIdle, number=7),
        always(do.Lost, cause="exited"),
        lambda out: [
            do.Lost(i.call, "p", "x", None, 1) if type(i) is do.Requeued else i for i in out
        ],
        lambda out: [do.Drain(i.runner, "idle") if type(i) is do.AskIdle else i for i in out],
    ],
)
def test_the_model_sees_what_is_wrong_at_the_end_of_calls_and_runners(change):
    options = {"max_concurrency": 2, "single_use": True, "idle_check": True, "grace": 1.0}

    def story(core: PoolState) -> None:
        pool = PoolModel(core)
        pool.tell(ev.Open())
        for number in range(4):
            pool.tell(ev.CallSubmitted(f"c{number}", Limits(), 0, 1 if number == 0 else 0))
        pool.tell(ev.RunnerReady("pool-1"))
        pool.tell(ev.RunnerReady("pool-2"))
        pool.tell(ev.CallLost("c0", "oom"))  # waits again: pool-1 drains
        pool.tell(ev.CallReleased("c2"))
        pool.now = 1.0
        pool.tell(ev.Tick())  # it is stuck: pool-2 drains
        pool.now = 31.0
        pool.tell(ev.Tick())  # c3 is preempted
        pool.tell(ev.RunnerStopped("pool-2"))
        pool.tell(ev.CallReleased("c0"))
        pool.tell(ev.RunnerReady("pool-3"))
        pool.now = 61.0
        pool.tell(ev.Tick())
        [(runner, number)] = pool.asks().items()
        pool.tell(ev.IdleAnswer(runner, number, False))
        pool.now = 91.0
        pool.tell(ev.Tick())
        [(runner, number)] = pool.asks().items()
        pool.tell(ev.IdleAnswer(runner, number, True))

    story(PoolState(PoolOptionsView(max=2, **options)))
    with pytest.raises((AssertionError, KeyError, ValueError)):
        story(Wrong(change, **options))

"""Random tests of a pool's core: anything happens, in any order, at any time.

:class:`PoolMachine` is a hypothesis state machine: it makes events up, and leaves the judgement to
:class:`~flame_dask.testing.model.PoolModel` and :mod:`flame_dask.core.invariants`. It needs
hypothesis: the extra ``test``.

In a test module::

    from flame_dask.testing.machine import PoolMachine

    TestPool = PoolMachine.TestCase
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from flame_dask.core import events as ev
from flame_dask.core.backoff import Backoff
from flame_dask.core.events import BootProblem, Event, Limits, PoolOptionsView
from flame_dask.core.pool import PoolState
from flame_dask.testing.model import PoolModel

_REFUSED = BootProblem("start", "refused", ("no space left",))

_limit = st.none() | st.sampled_from([0.0, 0.5, 1.0, 3.0, 10.0, 40.0])
_timeout = st.none() | st.sampled_from([0.0, 1.0, 5.0, 30.0])
_seldom = st.sampled_from([False, False, True])
_limits = st.builds(Limits, queue=_limit, run=_limit, total=_limit)


@st.composite
def options(draw: st.DrawFn) -> PoolOptionsView:
    """Draw options of a small pool."""
    most = draw(st.integers(1, 6))
    return PoolOptionsView(
        min=draw(st.integers(0, most)),
        max=most,
        max_concurrency=draw(st.integers(1, 4)),
        buffer=draw(st.integers(0, 2)),
        placement=draw(st.sampled_from(["spread", "pack"])),
        boot_timeout=draw(_timeout),
        shutdown_timeout=draw(_timeout),
        idle_shutdown_after=draw(_timeout),
        min_idle_shutdown_after=draw(_timeout),
        single_use=draw(_seldom),
        idle_check=draw(st.booleans()),
        grace=draw(st.sampled_from([0.0, 0.5, 2.0])),
    )


#: The states of a call that has work on a runner.
_WORKING = ("running", "kept", "ending", "stuck")

_Step = TypeVar("_Step", bound=Callable[..., None])


def _has(*states: str) -> Callable[[_Step], _Step]:
    """Let a rule run only while there is a runner in one of these states."""
    return precondition(lambda self: bool(self.pool.runners_in(*states)))


def _has_call(*states: str) -> Callable[[_Step], _Step]:
    return precondition(lambda self: bool(self.pool.calls_in(*states)))


class PoolMachine(RuleBasedStateMachine):
    """Drives :class:`~flame_dask.core.pool.PoolState` through random events.

    All invariants, and all that :class:`~flame_dask.testing.model.PoolModel` knows, are checked
    after each step; besides, that what is impossible raises and changes nothing, and that what is
    stale changes nothing.

    At the end all boots succeed and all work ends. Then nobody waits any more, what is wanted is
    there (C3), and a pool that closes has closed (A6).
    """

    @initialize(options=options(), seed=st.integers(0, 3), opens=st.booleans())
    def start(self, options: PoolOptionsView, seed: int, opens: bool) -> None:
        """Make a pool."""
        backoff = Backoff(base=0.5, cap=4.0, open_retries=1)
        self.pool = PoolModel(PoolState(options, name="r", seed=seed, backoff=backoff))
        self.opens = False
        if opens:
            self.open()

    # -- calls ---------------------------------------------------------------------------------

    @rule(
        limits=_limits,
        priority=st.integers(-1, 1),
        retries=st.sampled_from([0, 0, 1, 2]),
        affinity=st.sampled_from([None, None, "a", "b"]),
        n=st.integers(1, 4),
    )
    def submit(
        self, limits: Limits, priority: int, retries: int, affinity: str | None, n: int
    ) -> None:
        """Make some calls at once."""
        for _ in range(n):
            call = f"c{len(self.pool.calls) + 1}"
            self.pool.tell(ev.CallSubmitted(call, limits, priority, retries, affinity))

    @rule(n=st.integers(1, 6), retries=st.sampled_from([0, 1]), limits=_limits)
    def be_busy(self, n: int, retries: int, limits: Limits) -> None:
        """Make some calls, and let all boots be through, so that there is work to be lost."""
        limits = limits._replace(run=None, total=None)
        self.submit(limits=limits, priority=0, retries=retries, affinity=None, n=n)
        self.ready(n=6)

    @_has("ready")
    @rule(keys=st.sampled_from(["ab", "ba", "abc"]))
    def come_back(self, keys: str) -> None:
        """Let calls with keys come and go, and come again in another order."""
        for order in (keys, keys[::-1]):
            for key in order:
                self.submit(limits=Limits(), priority=0, retries=0, affinity=key, n=1)
            self._end_all_work()

    @_has_call(*_WORKING)
    @rule()
    def rest(self) -> None:
        """End all work, and come to the end of an idle time."""
        self._end_all_work()
        self.ring(late=0.0, times=2)

    @_has_call("running")
    @rule(n=st.integers(1, 3))
    def keep(self, n: int) -> None:
        """Let calls begin something that lives on."""
        for call in self.pool.calls_in("running")[:n]:
            # What comes up at once may have ended it.
            if self.pool.calls[call].state == "running":
                self.pool.tell(ev.CallKept(call))

    @_has_call("running", "kept")
    @rule(data=st.data(), late=st.sampled_from([0.0, 0.25]))
    def stick(self, data: st.DataObject, late: float) -> None:
        """Let a caller go, and the grace pass."""
        self.pool.tell(ev.CallReleased(self._call(data, "running", "kept")))
        self.pool.now += self.pool.core.options.grace + late
        self.pool.tell(ev.Tick())

    @_has_call("waiting", *_WORKING)
    @rule(data=st.data())
    def submit_again(self, data: st.DataObject) -> None:
        """Submit a call that is there."""
        if not self.pool.core.closing:
            call = self._call(data, "waiting", *_WORKING)
            self.pool.refuses(ev.CallSubmitted(call))

    @_has_call(*_WORKING)
    @rule(data=st.data(), how=st.sampled_from(["", "SIGKILL to its processes"]))
    def end(self, data: st.DataObject, how: str) -> None:
        """End the work of a call."""
        self.pool.tell(ev.CallEnded(self._call(data, *_WORKING), how))

    @_has_call("ending", "stuck")
    @rule(data=st.data())
    def end_what_was_terminated(self, data: st.DataObject) -> None:
        """End the work of an answered call, in time or not."""
        self.pool.tell(ev.CallEnded(self._call(data, "ending", "stuck"), "an exception"))

    @_has_call(*_WORKING)
    @rule(data=st.data(), cause=st.sampled_from(["oom", "signal"]))
    def lose_call(self, data: st.DataObject, cause: str) -> None:
        """Let the work of one call be gone."""
        self.pool.tell(ev.CallLost(self._call(data, *_WORKING), cause))

    @_has_call("waiting")
    @rule(data=st.data())
    def end_a_waiter(self, data: st.DataObject) -> None:
        """End the work of a call that has not started."""
        call = self._call(data, "waiting")
        self.pool.refuses(ev.CallEnded(call))
        self.pool.refuses(ev.CallKept(call))
        self.pool.refuses(ev.CallLost(call, "oom"))

    @_has_call("waiting", "running", "kept")
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """Let a caller go."""
        self.pool.tell(ev.CallReleased(self._call(data, "waiting", "running", "kept")))

    # -- runners -------------------------------------------------------------------------------

    @_has("booting")
    @rule(n=st.integers(1, 3))
    def ready(self, n: int) -> None:
        """Let boots be through."""
        for runner in self.pool.runners_in("booting")[:n]:
            if self.pool.runners[runner].state == "booting":  # the one before may have changed that
                self.pool.tell(ev.RunnerReady(runner))

    @_has("booting")
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        """Let a boot fail."""
        self.pool.tell(ev.BootFailed(self._runner(data, "booting"), _REFUSED))

    @_has("booting")
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """Let a runner say that it can't get ready."""
        self.pool.tell(ev.BootRefused(self._runner(data, "booting"), _REFUSED))

    @_has("booting", "ready", "draining")
    @rule(data=st.data(), cause=st.sampled_from(["exited", "signal"]))
    def lose(self, data: st.DataObject, cause: str) -> None:
        """Let a runner die."""
        runner = self._runner(data, "booting", "ready", "draining")
        self.pool.tell(ev.RunnerLost(runner, cause))

    @precondition(lambda self: bool(self._stayers()))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Let somebody else tell a runner to go."""
        runner = data.draw(st.sampled_from(self._stayers()))
        self.pool.tell(ev.RunnerLeaving(runner, "SIGTERM"))

    @precondition(lambda self: bool(self.pool.asks()))
    @rule(data=st.data(), go=st.booleans())
    def answer(self, data: st.DataObject, go: bool) -> None:
        """Let an idle check say whether its runner may go."""
        runner, number = data.draw(st.sampled_from(sorted(self.pool.asks().items())))
        self.pool.tell(ev.IdleAnswer(runner, number, go))

    @_has("ready", "draining")
    @rule(data=st.data())
    def fail_late(self, data: st.DataObject) -> None:
        """Let the backend say that a boot failed, after the runner has said that it is ready."""
        self.pool.tell(ev.BootFailed(self._runner(data, "ready", "draining"), _REFUSED))

    @_has("stopping")
    @rule(data=st.data(), fails=st.booleans())
    def stopped(self, data: st.DataObject, fails: bool) -> None:
        """Let nothing of a runner be left; the backend may call it a failed boot."""
        runner = self._runner(data, "stopping")
        stopped = ev.RunnerStopped(runner, ("bye",), "its process was ended by signal 9")
        self.pool.tell(ev.BootFailed(runner, _REFUSED) if fails else stopped)

    # -- what must not matter --------------------------------------------------------------------

    @rule(data=st.data())
    def hear_old_news(self, data: st.DataObject) -> None:
        """Hear of those that are gone."""
        news: list[Event] = [ev.RunnerReady("nobody"), ev.CallEnded("nothing")]
        news += [ev.IdleAnswer(runner, no, True) for runner, no in self.pool.old_asks[-3:]]
        for runner in self.pool.runners_in("gone")[-3:]:
            news += [ev.RunnerReady(runner), ev.RunnerStopped(runner)]
            news += [ev.RunnerLost(runner, "exited"), ev.BootFailed(runner, _REFUSED)]
            news.append(ev.BootRefused(runner, _REFUSED))
            news.append(ev.RunnerLeaving(runner, "SIGTERM"))
        for call in self.pool.calls_in("over")[-3:]:
            news += [ev.CallEnded(call), ev.CallReleased(call), ev.CallLost(call, "oom")]
            news.append(ev.CallKept(call))
        for call in self.pool.calls_in("ending", "stuck"):
            news += [ev.CallReleased(call), ev.CallKept(call)]
        news += [ev.CallKept(call) for call in self.pool.calls_in("kept")]
        for runner in self.pool.runners_in("stopping"):
            news += [ev.RunnerLost(runner, "exited"), ev.RunnerReady(runner)]
            news.append(ev.RunnerLeaving(runner, "SIGTERM"))
        for runner in self.pool.runners_in("draining"):
            news.append(ev.RunnerReady(runner))
            if self.pool.runners[runner].leaving:
                news.append(ev.RunnerLeaving(runner, "SIGTERM"))
        if self.pool.core.closing:
            news += [ev.Close(), ev.Open()]
        self.pool.ignores(data.draw(st.sampled_from(news)))

    @_has("booting", "ready", "draining")
    @rule(data=st.data())
    def hear_the_impossible(self, data: st.DataObject) -> None:
        """Hear that a runner has stopped that nobody told to, or gets ready for the second time."""
        runner = self._runner(data, "booting", "ready", "draining")
        self.pool.refuses(ev.RunnerStopped(runner))
        if self.pool.runners[runner].state == "ready":
            self.pool.refuses(ev.RunnerReady(runner))

    # -- the pool and its clock ------------------------------------------------------------------

    @precondition(lambda self: not self.opens)
    @rule()
    def open(self) -> None:
        """Open the pool; it may have calls already."""
        self.opens = True
        self.pool.tell(ev.Open())

    @rule(options=options())
    def configure(self, options: PoolOptionsView) -> None:
        """Change all options."""
        self.pool.tell(ev.Configure(options))
        staying = len(self.pool.runners_in("booting", "ready"))
        assert self.pool.core.closing or staying <= options.max, "C8"

    @rule(
        change=st.sampled_from(
            [
                {"max": 1, "min": 0},
                {"max": 8},
                {"min": 0},
                {"buffer": 0},
                {"buffer": 1},
                {"max_concurrency": 1},
                {"idle_shutdown_after": 0.0},
                {"idle_shutdown_after": 2.0, "min_idle_shutdown_after": 2.0},
                {"boot_timeout": 1.0},
                {"single_use": True},
                {"single_use": False},
                {"idle_check": True},
                {"idle_check": False},
                {"grace": 0.0, "shutdown_timeout": None},
            ]
        )
    )
    def configure_some(self, change: dict[str, Any]) -> None:
        """Change one or two options."""
        self.configure(self.pool.core.options._replace(**change))

    @precondition(lambda self: len(self.pool.calls) > 3)
    @rule()
    def close(self) -> None:
        """Close the pool, perhaps again."""
        self.pool.tell(ev.Close())

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 7.0, 31.0, 100.0]))
    def forget_time(self, seconds: float) -> None:
        """Let time pass, and do not look at the clock until the next step."""
        self.pool.now += seconds

    @rule()
    def tick(self) -> None:
        """Let nothing happen."""
        self.pool.tell(ev.Tick())

    @rule(late=st.sampled_from([0.0, 0.0, 0.0, 0.25, 5.0]), times=st.integers(1, 3))
    def ring(self, late: float, times: int) -> None:
        """Come to the next deadlines, or past them."""
        for _ in range(times):
            due = self.pool.core.next_deadline()
            if due is not None:
                self.pool.now = max(self.pool.now, due) + late
                self.pool.tell(ev.Tick())

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def no_alarm_rings_for_ever(self) -> None:
        """Check that a host that rings at each deadline is not kept at one instant."""
        due = self.pool.core.next_deadline()
        if due is None or due > self.pool.now:
            return
        twin: PoolState = pickle.loads(pickle.dumps(self.pool.core))
        for _ in range(10):
            twin.handle(self.pool.now, ev.Tick())
            due = twin.next_deadline()
            if due is None or due > self.pool.now:
                return
        raise AssertionError(f"the deadline at {due} does not go away")

    # -- the end -------------------------------------------------------------------------------

    def teardown(self) -> None:
        """Let everything go well from now on: nobody waits, and nothing is missing (C3, F3)."""
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        if pool.sound:
            self._go_on_until_nothing_is_missing()
        for line in pool.log:
            note(line)
        if not pool.sound:
            return  # what is wrong has been said
        missing = self._missing()
        assert not missing, f"what is left when all goes well: {missing}"
        assert pool.opened == int(self.opens) or (pool.core.closing and not pool.opened), "A5"
        assert pool.closed == int(pool.core.closing), "A6"
        assert not pool.closed or pool.core.next_deadline() is None, "A6"

    def _go_on_until_nothing_is_missing(self) -> None:
        pool = self.pool
        pool.tell(ev.Configure(pool.core.options._replace(boot_timeout=None)))
        for _ in range(50 + 2 * len(pool.calls)):  # one runner may have to do it all
            self._let_all_go_well()
            if not self._missing():
                break
            due = pool.core.next_deadline()
            if due is not None:
                pool.now = max(pool.now, due)
            pool.tell(ev.Tick())

    def _let_all_go_well(self) -> None:
        for runner in self.pool.runners_in("stopping"):
            self.pool.tell(ev.RunnerStopped(runner))
        for runner in self.pool.runners_in("booting"):
            if self.pool.runners[runner].state == "booting":
                self.pool.tell(ev.RunnerReady(runner))
        for runner, number in self.pool.asks().items():
            self.pool.tell(ev.IdleAnswer(runner, number, True))
        self._end_all_work()

    def _end_all_work(self) -> None:
        for call in self.pool.calls_in(*_WORKING):
            # The end of the one before may have put an end to this one, or have made it wait.
            if self.pool.calls[call].state in _WORKING:
                self.pool.tell(ev.CallEnded(call))

    def _missing(self) -> list[str]:
        pool = self.pool
        missing = pool.runners_in("booting", "draining", "stopping")
        missing += pool.calls_in("waiting", *_WORKING)
        wanted = pool.core.snapshot(pool.now).wanted
        return missing + ["wanted"] * max(0, wanted - len(pool.runners_in("ready")))

    def _stayers(self) -> list[str]:
        """Return the runners that nobody else has told to go."""
        runners = self.pool.runners_in("booting", "ready", "draining")
        return [runner for runner in runners if not self.pool.runners[runner].leaving]

    def _runner(self, data: st.DataObject, *states: str) -> str:
        runner: str = data.draw(st.sampled_from(self.pool.runners_in(*states)))
        return runner

    def _call(self, data: st.DataObject, *states: str) -> str:
        call: str = data.draw(st.sampled_from(self.pool.calls_in(*states)))
        return call

"""The core of a pool in virtual time, with a backend that is played.

It does what the hosts of the core do: it tells the core what happens, carries out what the core
instructs, and wakes it at its deadlines. Only the clock jumps from one event to the next.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Final, NamedTuple

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.backoff import Backoff
from flame_dask.core.events import BootProblem, Event, Limits, PoolOptionsView
from flame_dask.core.instructions import Instruction
from flame_dask.core.pool import PoolState


class Up(NamedTuple):
    """A boot that succeeds, ``after`` so many seconds."""

    after: float = 0.0


class Fails(NamedTuple):
    """A boot that fails ``after`` so many seconds, and leaves nothing behind."""

    after: float = 0.0
    cause: str = "no capacity"
    phase: str = "start"
    log_tail: tuple[str, ...] = ()


class Dies(NamedTuple):
    """A boot whose machine is gone ``after`` so many seconds."""

    after: float = 0.0
    cause: str = "exited"


class Hangs(NamedTuple):
    """A boot of which nothing is ever heard."""


HANGS: Final = Hangs()

BootOutcome = Up | Fails | Dies | Hangs
Boots = float | BootOutcome | Iterable[float | BootOutcome] | Callable[[do.Boot], "BootOutcome"]
"""How boots go: seconds or one outcome for all, one each (the last goes on), or a function."""


class Arrival(NamedTuple):
    """A call to come."""

    at: float
    """When, in seconds of the simulated clock."""
    work: float | None
    """For how many seconds it runs; ``None`` is until it is told to end."""
    limits: Limits = Limits()
    priority: int = 0
    retries: int = 0
    affinity: Hashable | None = None


class Simulator:
    """A pool core, a played backend, and a clock that jumps.

    Parameters
    ----------
    options
        The options of the pool.
    boots
        How boots go: see ``Boots``. By default each takes half a second.
    stop
        Seconds from the order to stop a runner until nothing of it is left; ``None`` is until
        :meth:`tell` is given its ``RunnerStopped``.
    ending
        Seconds from the order to terminate a call until its slot is free; ``None`` is never.
    check
        What idle checks say, for all runners or by their ids; ``None`` is no answer.
    lifetime
        Returns for each runner that gets ready after how many seconds it dies; ``None`` is never.
    backoff, seed, name
        As for :class:`~flame_dask.core.pool.PoolState`.

    Attributes
    ----------
    core : PoolState
    now : float
        Seconds.
    events : int
        How many the core has been told.
    peak : int
        The most runners that existed at the same time.

    Examples
    --------
    >>> pool = Simulator(PoolOptionsView(max=2, idle_shutdown_after=5))
    >>> pool.run(arrivals=[Arrival(0.0, work=3.0), Arrival(1.0, work=3.0)])
    >>> pool.now, pool.peak, pool.core.counters["ended"]
    (9.5, 2, 2)
    """

    def __init__(
        self,
        options: PoolOptionsView,
        *,
        boots: Boots = 0.5,
        stop: float | None = 0.0,
        ending: float | None = 0.0,
        check: bool | Callable[[str], bool | None] | None = True,
        lifetime: Callable[[], float | None] | None = None,
        backoff: Backoff = Backoff(),  # noqa: B008  # immutable
        seed: int | None = 0,
        name: str = "pool",
    ) -> None:
        self.core = PoolState(options, name=name, backoff=backoff, seed=seed)
        self.now = 0.0
        self.events = 0
        self.peak = 0
        self._boots = _planner(boots)
        self._stop = stop
        self._ending = ending
        self._check = check
        self._lifetime = lifetime
        self._agenda: list[tuple[float, int, Event]] = []
        self._seq = 0
        self._calls = 0
        self._work: dict[str, float] = {}
        # Of calls with retries: their work, and the last thing planned for it when it was lost.
        self._again: dict[str, float] = {}
        self._void: dict[str, int] = {}
        self._booted: dict[str, float] = {}
        self._past_seconds = 0.0

    @property
    def runner_seconds(self) -> float:
        """What has been paid for: seconds from the boot to the end of each runner, summed."""
        return self._past_seconds + sum(self.now - since for since in self._booted.values())

    def tell(self, event: Event) -> list[Instruction]:
        """Tell the core what happens now, carry out what it instructs, and return that.

        Parameters
        ----------
        event
            What happens.

        Raises
        ------
        IllegalTransition
            If it contradicts what the core knows.
        """
        self.events += 1
        instructions = self.core.handle(self.now, event)
        for instruction in instructions:
            self._carry_out(instruction)
        self.peak = max(self.peak, len(self.core.runners))
        if isinstance(event, ev.RunnerStopped | ev.BootFailed):
            since = self._booted.pop(event.runner, None)
            self._past_seconds += 0.0 if since is None else self.now - since
        return instructions

    def later(self, delay: float, event: Event) -> None:
        """Let something happen in ``delay`` seconds."""
        self._seq += 1
        heapq.heappush(self._agenda, (self.now + delay, self._seq, event))

    def arrive(self, arrival: Arrival) -> str:
        """Let a call come now, whatever its ``at``, and return its id."""
        self._calls += 1
        call = f"call-{self._calls}"
        if arrival.work is not None:
            self._work[call] = arrival.work
            if arrival.retries:
                self._again[call] = arrival.work
        _, _, limits, priority, retries, affinity = arrival
        self.tell(ev.CallSubmitted(call, limits, priority, retries, affinity))
        return call

    def run(
        self,
        until: float = math.inf,
        arrivals: Iterable[Arrival] = (),
        *,
        while_calls: bool = False,
    ) -> None:
        """Let time pass.

        Parameters
        ----------
        until
            When to stop, in seconds of the clock. By default the run ends when nothing is left to
            happen, which may be never: a boot that always fails is tried again for ever.
        arrivals
            Calls to come, in the order of their time.
        while_calls
            Stop as soon as no call is there or to come.
        """
        coming = iter(arrivals)
        arrival = next(coming, None)
        agenda = self._agenda
        while not while_calls or arrival is not None or self.core.calls:
            planned = agenda[0][0] if agenda else math.inf
            arriving = math.inf if arrival is None else arrival.at
            due = self.core.next_deadline()
            at = min(planned, arriving, math.inf if due is None else due)
            if at > until or at == math.inf:
                break
            self.now = max(self.now, at)
            # What happens at the instant of a deadline is in time.
            if planned <= at:
                _, no, event = heapq.heappop(agenda)
                if not (self._void and self._is_void(no, event)):
                    self.tell(event)
            elif arrival is not None and arriving <= at:
                self.arrive(arrival)
                arrival = next(coming, None)
            else:
                self.tell(ev.Tick())
        if until != math.inf and not while_calls:
            self.now = max(self.now, until)

    def _is_void(self, no: int, event: Event) -> bool:
        """Say whether this was planned for work that has been lost since then."""
        return isinstance(event, ev.CallEnded) and no <= self._void.get(event.call, 0)

    def _carry_out(self, instruction: Instruction) -> None:
        if isinstance(instruction, do.Start):
            work = self._work.pop(instruction.call, None)
            if work is not None:
                self.later(work, ev.CallEnded(instruction.call))
        elif isinstance(instruction, do.Boot):
            self._boot(instruction)
        elif isinstance(instruction, do.Stop):
            if self._stop is not None:
                self.later(self._stop, ev.RunnerStopped(instruction.runner))
        elif isinstance(instruction, do.Terminate):
            if self._ending is not None:
                self.later(self._ending, ev.CallEnded(instruction.call))
        elif isinstance(instruction, do.Requeued):
            self._void[instruction.call] = self._seq
            if instruction.call in self._again:
                self._work[instruction.call] = self._again[instruction.call]
        elif isinstance(instruction, do.AskIdle):
            runner, number = instruction
            go = self._check(runner) if callable(self._check) else self._check
            if go is not None:
                self.later(0.0, ev.IdleAnswer(runner, number, go))
        elif isinstance(instruction, do.Expired | do.Refused | do.Lost):
            self._work.pop(instruction.call, None)

    def _boot(self, boot: do.Boot) -> None:
        runner = boot.runner
        self._booted[runner] = self.now
        match self._boots(boot):
            case Up(after):
                self.later(after, ev.RunnerReady(runner))
                life = None if self._lifetime is None else self._lifetime()
                if life is not None:
                    self.later(after + life, ev.RunnerLost(runner, "exited"))
            case Fails(after, cause, phase, log_tail):
                self.later(after, ev.BootFailed(runner, BootProblem(phase, cause, log_tail)))
            case Dies(after, cause):
                self.later(after, ev.RunnerLost(runner, cause))
            case Hangs():
                pass


def _planner(boots: Boots) -> Callable[[do.Boot], BootOutcome]:
    if callable(boots):
        return boots
    if isinstance(boots, int | float):
        boots = Up(boots)
    if isinstance(boots, Up | Fails | Dies | Hangs):
        always = boots
        return lambda boot: always
    plan = iter(boots)
    last: BootOutcome = Up()

    def take(boot: do.Boot) -> BootOutcome:
        nonlocal last
        outcome = next(plan, last)
        last = Up(outcome) if isinstance(outcome, int | float) else outcome
        return last

    return take


def fail_every(nth: int, boots: float, fails: Fails = Fails()) -> Iterator[BootOutcome]:  # noqa: B008  # immutable
    """Return endless boots of which each ``nth`` fails.

    Parameters
    ----------
    nth
        3 lets the third, sixth, ... boot fail.
    boots
        Seconds of the others.
    fails
        How it fails.

    Examples
    --------
    >>> boots = fail_every(2, boots=0.5)
    >>> next(boots), next(boots).cause
    (Up(after=0.5), 'no capacity')
    """
    count = 0
    while True:
        count += 1
        yield fails if count % nth == 0 else Up(boots)

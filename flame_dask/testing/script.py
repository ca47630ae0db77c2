"""A driver for tests that read like a story: who calls, what fails, and what the pool does then."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.backoff import Backoff
from flame_dask.core.events import Event, Limits, PoolOptionsView
from flame_dask.core.instructions import Instruction
from flame_dask.core.invariants import check
from flame_dask.core.transitions import RunnerState
from flame_dask.testing.simulator import Arrival, Boots, Simulator

_I = TypeVar("_I", bound=tuple[Any, ...])


class Entry(NamedTuple):
    """One instruction of the core, and when it was given."""

    at: float
    instruction: Instruction


class Script(Simulator):
    """A pool in virtual time, for tests.

    All invariants of the pool are checked after each event.

    Parameters
    ----------
    boots, stop, ending, check, lifetime, backoff, seed, name
        As for :class:`Simulator`. By default a boot takes half a second, and a stop none.
    options
        The options of the pool that the core decides by, such as ``min``, ``max`` and
        ``max_concurrency``; durations are seconds. See
        :class:`~flame_dask.core.events.PoolOptionsView`.

    Attributes
    ----------
    log : list of Entry
        All that the core has instructed.
    answers : dict
        How each call that is over ended: ``"ended"``, ``"released"``, or the instruction
        (``Expired``, ``Refused``, ``Lost``) that told its caller.

    Examples
    --------
    >>> pool = Script(max=1).open()
    >>> call = pool.submit(work=10)
    >>> pool.booting, pool.waiting
    (['pool-1'], ['call-1'])
    >>> _ = pool.run_for(0.5)
    >>> pool.runner_of(call)
    'pool-1'
    >>> _ = pool.run_for(10)
    >>> pool.answers[call], pool.ready
    ('ended', ['pool-1'])
    >>> _ = pool.run_for(30)  # idle_shutdown_after
    >>> pool.alive
    []
    """

    def __init__(
        self,
        *,
        boots: Boots = 0.5,
        stop: float | None = 0.0,
        ending: float | None = 0.0,
        check: bool | Callable[[str], bool | None] | None = True,
        lifetime: Callable[[], float | None] | None = None,
        backoff: Backoff = Backoff(),  # noqa: B008  # immutable
        seed: int | None = 0,
        name: str = "pool",
        **options: Any,
    ) -> None:
        super().__init__(
            PoolOptionsView(**options),
            boots=boots,
            stop=stop,
            ending=ending,
            check=check,
            lifetime=lifetime,
            backoff=backoff,
            seed=seed,
            name=name,
        )
        self.log: list[Entry] = []
        self.answers: dict[str, str | do.Expired | do.Refused | do.Lost] = {}

    # -- what happens --------------------------------------------------------------------------

    def tell(self, event: Event) -> list[Instruction]:
        """Tell the core what happens now, and check all invariants.

        Parameters
        ----------
        event
            What happens.

        Raises
        ------
        IllegalTransition
            If it contradicts what the core knows.
        AssertionError
            If an invariant is broken.
        """
        if isinstance(event, ev.CallEnded | ev.CallReleased):
            call = self.core.calls.get(event.call)
            if call is not None and not call.answered:
                ended = isinstance(event, ev.CallEnded)
                self._answer(event.call, "ended" if ended else "released")
        instructions = super().tell(event)
        check(self.core)
        return instructions

    def _carry_out(self, instruction: Instruction) -> None:
        self.log.append(Entry(self.now, instruction))
        if isinstance(instruction, do.Expired | do.Refused | do.Lost):
            self._answer(instruction.call, instruction)
        super()._carry_out(instruction)

    def _answer(self, call: str, answer: str | do.Expired | do.Refused | do.Lost) -> None:
        before = self.answers.setdefault(call, answer)
        assert before is answer, f"{call} has two answers: {before} and {answer}"

    def open(self) -> Script:
        """Open the pool."""
        self.tell(ev.Open())
        return self

    def close(self) -> Script:
        """Close the pool."""
        self.tell(ev.Close())
        return self

    def configure(self, **changes: Any) -> Script:
        """Change options."""
        self.tell(ev.Configure(self.core.options._replace(**changes)))
        return self

    def submit(
        self,
        work: float | None = None,
        *,
        priority: int = 0,
        queue: float | None = None,
        run: float | None = None,
        total: float | None = None,
        retries: int = 0,
        affinity: Hashable | None = None,
    ) -> str:
        """Make a call.

        Parameters
        ----------
        work
            For how many seconds it runs; ``None`` is until :meth:`end`.
        priority
            Waiting calls of a higher one are served earlier.
        queue, run, total
            Its limits in seconds: see :class:`~flame_dask.core.events.Limits`.
        retries
            How often it may be started anew after its work was lost.
        affinity
            It prefers the runner that got the last call with this key.

        Returns
        -------
        str
            Its id: ``call-1`` is the first.
        """
        limits = Limits(queue, run, total)
        return self.arrive(Arrival(self.now, work, limits, priority, retries, affinity))

    def keep(self, call: str) -> Script:
        """Let the work of a call begin something that lives on."""
        self.tell(ev.CallKept(call))
        return self

    def end(self, call: str, how: str = "") -> Script:
        """Let the work of a call be over."""
        self.tell(ev.CallEnded(call, how))
        return self

    def release(self, call: str) -> Script:
        """Let the caller of a call be gone."""
        self.tell(ev.CallReleased(call))
        return self

    def lose(self, runner: str, cause: str = "exited") -> Script:
        """Let a runner die."""
        self.tell(ev.RunnerLost(runner, cause))
        return self

    def lose_call(self, call: str, cause: str = "exited") -> Script:
        """Let the work of one call be gone."""
        self.tell(ev.CallLost(call, cause))
        return self

    def leave(self, runner: str, reason: str = "SIGTERM") -> Script:
        """Let somebody else tell a runner to go."""
        self.tell(ev.RunnerLeaving(runner, reason))
        return self

    def answer_idle(self, ask: do.AskIdle, go: bool) -> Script:
        """Let an idle check come to its end."""
        self.tell(ev.IdleAnswer(ask.runner, ask.number, go))
        return self

    def run_for(self, seconds: float) -> Script:
        """Let so many seconds pass."""
        self.run(self.now + seconds)
        return self

    # -- what is there -------------------------------------------------------------------------

    def _in(self, state: RunnerState) -> list[str]:
        return [runner.id for runner in self.core.runners.values() if runner.state == state]

    @property
    def alive(self) -> list[str]:
        """The runners that count towards ``max``, by age."""
        return list(self.core.runners)

    @property
    def booting(self) -> list[str]:
        """The runners that boot, by age."""
        return self._in("booting")

    @property
    def ready(self) -> list[str]:
        """The runners that take calls, by age."""
        return self._in("ready")

    @property
    def draining(self) -> list[str]:
        """The runners that finish their calls and take no more, by age."""
        return self._in("draining")

    @property
    def stopping(self) -> list[str]:
        """The runners that have been told to stop and are not gone, by age."""
        return self._in("stopping")

    @property
    def waiting(self) -> list[str]:
        """The calls that wait for a slot, by age."""
        return [call.id for call in self.core.calls.values() if call.state == "waiting"]

    def leases(self, runner: str) -> int:
        """Return how many slots of a runner are taken."""
        return len(self.core.runners[runner].leases)

    def runner_of(self, call: str) -> str | None:
        """Return where a call was started, ``None`` if it was not."""
        starts = self.told(do.Start)
        return next((start.runner for start in starts if start.call == call), None)

    def started_at(self, call: str) -> float | None:
        """Return when a call was started, ``None`` if it was not."""
        for at, instruction in self.log:
            if isinstance(instruction, do.Start) and instruction.call == call:
                return at
        return None

    def told(self, kind: type[_I], since: float = 0.0) -> list[_I]:
        """Return the instructions of one kind, in order.

        Parameters
        ----------
        kind
            A class of :mod:`flame_dask.core.instructions`.
        since
            Leave out what was instructed earlier than this, in seconds of the clock.
        """
        return [
            instruction
            for at, instruction in self.log
            if at >= since and isinstance(instruction, kind)
        ]

    def news(self, kind: str) -> list[do.Scaled]:
        """Return what the hooks are told (C9): ``grow_start``, ``grow_end`` or ``shrink``."""
        return [news for news in self.told(do.Scaled) if news.kind == kind]

    def decided(self, action: str) -> list[str]:
        """Return the reasons of the pool's last decisions of one kind (C10)."""
        return [line.reason for line in self.core.decisions() if line.action == action]

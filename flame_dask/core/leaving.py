"""Runners that have to go although calls of theirs are not over (E3, E5)."""

from __future__ import annotations

from flame_dask.core.records import Runner
from flame_dask.core.waiting import Deadlines


class Evictions(Deadlines[Runner]):
    """Until when draining runners may finish, and which of their calls never will.

    A runner that drains because it is not needed takes as long as its calls do (C8, D3). One that
    somebody else has told to go (E5), or that has a *stuck* call, whose work can't be ended (E3),
    gets ``shutdown_timeout``, and less if nothing but stuck calls is left on it.

    Parameters
    ----------
    alarm
        Is told of each deadline.
    """

    __slots__ = ()

    def limit(self, now: float, runner: Runner, seconds: float | None) -> None:
        """Let a runner have so many seconds from now on, unless it has a limit already."""
        if seconds is not None and runner not in self:
            self.set(runner, now + seconds)

    def stick(self, now: float, runner: Runner, call: str, seconds: float | None) -> None:
        """Note that the work of a call can't be ended; the others have so many seconds."""
        runner.stuck.add(call)
        self.limit(now, runner, seconds)

    def free(self, runner: Runner, call: str) -> None:
        """Note that the slot of a call is free on a draining runner, stuck or not.

        A runner without stuck calls need not be killed: the others may take their time again.
        """
        if call in runner.stuck:
            runner.stuck.discard(call)
            if not runner.stuck and not runner.leaving:
                self.discard(runner)

    def hopeless(self, runner: Runner) -> bool:
        """Say whether a draining runner has nothing to wait for: all its calls are stuck."""
        return len(runner.stuck) == len(runner.leases)

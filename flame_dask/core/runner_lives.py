"""The lives of runners: from a boot to the end of the last thing that is left of it."""

from __future__ import annotations

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.call_lives import CallLives
from flame_dask.core.events import BootProblem
from flame_dask.core.records import Call, Runner


class RunnerLives(CallLives):
    """What happens to runners, and what the end of a call means for its runner."""

    # -- booting -------------------------------------------------------------------------------

    def _boot(self, now: float, reason: str) -> None:
        self._no += 1
        planned = len(self._fleet.ready) + self._boots.under_way + 1
        extra = planned > self.options.min
        ident = f"{self.name}-{self._no}"
        limit = self.options.boot_timeout
        runner = Runner(self._no, ident, self._boots.next_attempt(), extra, limit)
        self.runners[ident] = runner
        self.story.begin(now, ident, "boot", runner.state)
        self._boots.begin(now, runner)
        self.counters["boots"] += 1
        self._out.append(do.Boot(ident, runner.attempt, reason))
        if extra:
            self._out.append(do.Scaled("grow_start", ident, planned, reason))

    def _on_ready(self, now: float, event: ev.RunnerReady) -> None:
        runner = self.runners.get(event.runner)
        if runner is None or runner.state in ("draining", "stopping"):
            return  # an earlier life, or it has just been given up
        runner.state = self.story.runner(now, runner.id, runner.state, "ready")
        self._boots.over(runner)
        self._fleet.join(now, runner)
        if runner.extra:
            self._out.append(do.Scaled("grow_end", runner.id, len(self._fleet.ready), "ready"))

    def _on_boot_failed(self, now: float, event: ev.BootFailed) -> None:
        runner = self.runners.get(event.runner)
        if runner is None:
            return
        if runner.state in ("ready", "draining"):
            # The backend's word and the worker's own crossed: the machine is gone all the same.
            self._on_lost(now, ev.RunnerLost(runner.id, "exited"))
        if runner.state == "stopping":  # given up already; now nothing of it is left
            self._gone(now, runner, "stopped", event.problem.log_tail)
            return
        self._boots.over(runner)
        self._gone(now, runner, "failed", ())
        self._boot_problem(now, runner, event.problem)

    def _on_boot_refused(self, now: float, event: ev.BootRefused) -> None:
        runner = self.runners.get(event.runner)
        if runner is not None and runner.state == "booting":
            self._stop(now, runner, "refused", f"boot: {event.problem.cause}")
            self._boot_problem(now, runner, event.problem)

    def _boot_timed_out(self, now: float, runner: Runner) -> None:
        cause = f"not ready within boot_timeout={runner.boot_timeout:g} s"
        self._stop(now, runner, "timed out", f"boot: {cause}")
        self._boot_problem(now, runner, BootProblem("connect", cause))

    def _boot_problem(self, now: float, runner: Runner, problem: BootProblem) -> None:
        problem = problem._replace(attempts=runner.attempt)
        self._boots.note(now, runner, problem)
        self.counters["boot_failures"] += 1
        self._decide(now, "retire", f"boot {runner.id} failed ({problem.phase}): {problem.cause}")
        self._boot_abandoned(runner, "failed", problem)
        if self.opening and self._boots.gave_up(runner.attempt):
            self._out.append(do.OpenFailed(problem))
            self._on_close(now, ev.Close())
        elif not self.closing:
            self._boots.owe(now, runner)

    def _boot_abandoned(self, runner: Runner, reason: str, problem: BootProblem) -> None:
        """Say that a boot has come to nothing: who heard of its start hears of its end (C9)."""
        if runner.extra:
            news = do.Scaled("grow_end", runner.id, len(self._fleet.ready), reason, problem)
            self._out.append(news)

    # -- the work of a call on it is over ------------------------------------------------------

    def _on_ended(self, now: float, event: ev.CallEnded) -> None:
        call = self.calls.get(event.call)
        if call is not None:
            answered = call.answered
            self._end(now, call, "done")
            self.counters["ended"] += not answered  # each call is counted once
            if event.how:
                self._decide(now, "retire", f"call {call.id} ended by {event.how}")
            runner = call.runner
            if self.options.single_use or (runner and runner.state == "draining"):
                self._work_over(now, runner)

    def _on_call_lost(self, now: float, event: ev.CallLost) -> None:
        call = self.calls.get(event.call)
        if call is not None:
            runner = call.runner
            again = self._lose(now, call, "work lost", event)
            self._work_over(now, runner)
            self._readmit(now, again)

    def _work_over(self, now: float, runner: Runner | None) -> None:
        """See what it means for a runner that the work of one of its calls is over."""
        assert runner is not None, "a call that has work has a runner"
        if runner.state == "draining":
            self._go_if_done(now, runner)
        elif self.options.single_use:
            self._drain(now, runner, "single use")

    def _stick(self, now: float, call: Call) -> None:
        """Give up on a runner with work that has not gone within the grace (E3)."""
        self._book.stick(now, call)
        runner = call.runner
        assert runner is not None, "a call that has work has a runner"
        reason = f"call {call.id} can't be ended"
        if runner.state == "ready":
            self._drain(now, runner, reason)
        else:
            self._decide(now, "retire", f"{runner.id}: {reason}")
        self._evictions.stick(now, runner, call.id, self.options.shutdown_timeout)
        self._go_if_done(now, runner)

    # -- going ---------------------------------------------------------------------------------

    def _on_idle_answer(self, now: float, event: ev.IdleAnswer) -> None:
        runner = self.runners.get(event.runner)
        if runner is None or not self._fleet.answered(now, runner, event.number, event.go):
            return
        needed = self._needed()
        self._fleet.aim(now, needed)
        # It may be needed by now. Then it is asked again as soon as it is not.
        if not self.opening and self._fleet.spares(runner.kind, needed, self.options.buffer):
            self._dismiss(now, runner)

    def _dismiss(self, now: float, runner: Runner) -> None:
        assert runner.idle_since is not None, "only an idle runner is dismissed"
        self._fleet.dismiss(runner)
        self._drain(now, runner, f"idle for {round(now - runner.idle_since, 1):g} s")

    def _on_leaving(self, now: float, event: ev.RunnerLeaving) -> None:
        runner = self.runners.get(event.runner)
        if runner is None or runner.state == "stopping" or runner.leaving:
            return
        if runner.state == "booting":  # it will not get ready
            self._on_lost(now, ev.RunnerLost(runner.id, event.reason))
            return
        runner.leaving = True
        self._evictions.limit(now, runner, self.options.shutdown_timeout)
        if runner.state == "ready":
            self._drain(now, runner, event.reason)

    def _drain(self, now: float, runner: Runner, reason: str) -> None:
        self._out.append(do.Drain(runner.id, reason))
        runner.state = self.story.runner(now, runner.id, runner.state, "drain")
        self._fleet.leave(runner)
        self._decide(now, "shrink", f"{runner.id}: {reason}")
        self._out.append(do.Scaled("shrink", runner.id, len(self._fleet.ready), reason))
        if not runner.leases:
            self._stop(now, runner, "drained", reason)

    def _go_if_done(self, now: float, runner: Runner) -> None:
        """Stop a draining runner that has nothing to wait for."""
        if not runner.leases:
            self._stop(now, runner, "drained", "drained")
        elif self._evictions.hopeless(runner):
            self._evict(now, runner, "only calls that can't be ended are left")

    def _evict(self, now: float, runner: Runner, reason: str) -> None:
        """Stop a draining runner, whatever is left on it (E3, E5)."""
        again = self._lose_all(now, runner, "runner evicted", ev.RunnerLost("", "preempted"))
        self._stop(now, runner, "evicted", reason, force=True)
        self._readmit(now, again)

    # -- being gone ----------------------------------------------------------------------------

    def _on_lost(self, now: float, event: ev.RunnerLost) -> None:
        runner = self.runners.get(event.runner)
        if runner is None or runner.state == "stopping":
            return
        booting = runner.state == "booting"
        runner.lost = True
        again = self._lose_all(now, runner, "runner lost", event)
        cause = "preempted" if runner.leaving else event.cause
        self._stop(now, runner, "lost", f"lost: {cause}")
        self.counters["runners_lost"] += 1
        self._readmit(now, again)
        if booting:
            cause = f"the worker went away while booting ({cause})"
            self._boot_problem(now, runner, BootProblem("setup", cause))

    def _stop(
        self, now: float, runner: Runner, event: str, reason: str, *, force: bool = False
    ) -> None:
        before = runner.state
        runner.state = self.story.runner(now, runner.id, before, event)
        if before == "ready":
            self._fleet.leave(runner)
        elif before == "booting":
            self._boots.over(runner)
        else:
            self._evictions.discard(runner)
        if event == "not needed":
            self._boot_abandoned(runner, reason, BootProblem("cancelled", reason))
        elif event != "drained":
            self._decide(now, "retire", f"{runner.id}: {reason}")
        self._out.append(do.Stop(runner.id, reason, force))

    def _on_stopped(self, now: float, event: ev.RunnerStopped) -> None:
        runner = self.runners.get(event.runner)
        if runner is not None:
            self._gone(now, runner, "stopped", event.log_tail)
            if event.cause and runner.lost:
                self._decide(now, "retire", f"{runner.id}: {event.cause}")

    def _gone(self, now: float, runner: Runner, event: str, log_tail: tuple[str, ...]) -> None:
        runner.state = self.story.runner(now, runner.id, runner.state, event)
        del self.runners[runner.id]
        self.counters["runners_stopped"] += 1
        self._boots.add_log(runner.id, log_tail)
        if len(self.runners) < self.ceiling:
            self.ceiling = max(len(self.runners), self.options.max)

    # -- all of them, with the pool ------------------------------------------------------------

    def _on_close(self, now: float, event: ev.Close) -> None:
        if self.closing:
            return
        self.closing = True
        self.opening = False
        for call_id in list(self.queue):
            self._refuse(now, self.calls[call_id])
        self._boots.forgive()
        for runner in list(self.runners.values()):
            if runner.state == "booting":
                self._stop(now, runner, "not needed", "the pool closes")
            elif runner.state == "ready":
                self._drain(now, runner, "the pool closes")
        if self.options.shutdown_timeout is not None:
            self._close_at = now + self.options.shutdown_timeout
            self._alarm.at = min(self._alarm.at, self._close_at)

    def _shut_down(self, now: float) -> None:
        """End what has not ended within ``shutdown_timeout`` (A6)."""
        for runner in list(self.runners.values()):
            if runner.state == "draining":
                for call_id in list(runner.leases):
                    call = self.calls[call_id]
                    if call.answered:
                        self._end(now, call, "pool closes")
                    else:
                        self._refuse(now, call)
                self._stop(now, runner, "pool closes", "shutdown_timeout is over", force=True)

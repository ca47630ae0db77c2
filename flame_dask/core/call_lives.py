"""The lives of calls: from the queue to a slot, and to an end of one kind or another."""

from __future__ import annotations

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.books import PoolBooks
from flame_dask.core.records import Call, Runner


class CallLives(PoolBooks):
    """What happens to calls. What that means for their runners is for the layer above to say."""

    # -- coming in -----------------------------------------------------------------------------

    def _on_submitted(self, now: float, event: ev.CallSubmitted) -> None:
        if self.closing:
            self.counters["submitted"] += 1
            self.counters["refused"] += 1
            self._decide(now, "refuse", "the pool closes")
            self._out.append(do.Refused(event.call))
            return
        call = self._book.add(now, event)
        self.counters["submitted"] += 1
        self._admit(now, call)

    def _admit(self, now: float, call: Call) -> None:
        """Give a call a slot, or let it wait for one."""
        if not self.queue:
            # The short way: a free slot and nobody before it.
            self._fleet.aim(now, self._needed(1))
            runner = self._fleet.pick()
            if runner is not None:
                self._start(now, call, runner)
                return
        self._fleet.wake_min()
        self._book.wait(call)

    def _start(self, now: float, call: Call, runner: Runner) -> None:
        if call.affinity is not None:
            runner = self._fleet.prefer(call.affinity, runner)
        self._book.start(now, call, runner)
        self._fleet.lease(runner, call.id)
        self.counters["started"] += 1
        self._out.append(do.Start(call.id, runner.id))

    def _on_kept(self, now: float, event: ev.CallKept) -> None:
        call = self.calls.get(event.call)
        if call is not None and not call.answered and call.state != "kept":
            self._book.keep(now, call)

    # -- being answered ------------------------------------------------------------------------

    def _on_released(self, now: float, event: ev.CallReleased) -> None:
        call = self.calls.get(event.call)
        if call is None or call.answered:
            return
        self.counters["released"] += 1
        if call.state == "waiting":
            self._end(now, call, "released")
        else:
            self._terminate(now, call, "released", "its caller is gone")

    def _expire(self, now: float, call: Call) -> None:
        news = self._book.expired(now, call)
        self.counters["expired"] += 1
        self._out.append(news)
        if news.phase == "running":
            self._terminate(now, call, "expired", "its time is up")
        else:
            self._end(now, call, "expired")
            self._decide(now, "refuse", f"no slot within {news.limit:g} s ({news.phase})")

    def _terminate(self, now: float, call: Call, event: str, reason: str) -> None:
        self._book.answer(now, call, event, self.options.grace)
        assert call.runner is not None, "a call that has work has a runner"
        self._out.append(do.Terminate(call.id, call.runner.id, reason))

    def _refuse(self, now: float, call: Call) -> None:
        self._end(now, call, "pool closes")
        self.counters["refused"] += 1
        self._out.append(do.Refused(call.id))

    # -- being over, or lost -------------------------------------------------------------------

    def _end(self, now: float, call: Call, event: str) -> None:
        self._book.end(now, call, event)
        self._free(now, call)

    def _free(self, now: float, call: Call) -> None:
        runner = call.runner
        if runner is None:
            return
        if runner.state == "ready":
            self._fleet.give_back(now, runner, call.id)
        else:
            del runner.leases[call.id]
            self._evictions.free(runner, call.id)

    def _lose(
        self, now: float, call: Call, step: str, loss: ev.CallLost | ev.RunnerLost
    ) -> list[Call]:
        """Take note that the work of a call is gone; return the call if it is to run again (F1)."""
        runner = call.runner
        if runner is None or call.answered:
            self._end(now, call, step)
        elif call.retries and not self.closing:
            self._free(now, call)
            self._book.requeue(now, call)
            self.counters["retried"] += 1
            self._out.append(do.Requeued(call.id))
            return [call]
        else:
            self._end(now, call, step)
            self.counters["lost"] += 1
            cause = "preempted" if runner.leaving else loss.cause
            self._out.append(do.Lost(call.id, runner.id, cause, loss.exit_code, loss.signal))
        return []

    def _lose_all(self, now: float, runner: Runner, step: str, loss: ev.RunnerLost) -> list[Call]:
        calls = [self.calls[call_id] for call_id in runner.leases]
        return [again for call in calls for again in self._lose(now, call, step, loss)]

    def _readmit(self, now: float, calls: list[Call]) -> None:
        # Not before their runner has been struck off: it could be picked.
        for call in sorted(calls, key=lambda call: -call.priority):
            if self._book.overdue(now, call):
                self._book.wait(call)  # settling tells its caller
            else:
                self._admit(now, call)

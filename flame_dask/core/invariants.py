"""What is true of a pool after every event, whatever has happened to it.

For tests: :func:`check` looks at everything, which costs O(n log n).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import get_args

from flame_dask.core.pool import PoolState
from flame_dask.core.records import Runner
from flame_dask.core.transitions import CallState, RunnerState

_CALL_STATES = frozenset(get_args(CallState)) - {"ended"}
_RUNNER_STATES = frozenset(get_args(RunnerState)) - {"gone"}


def check(state: PoolState) -> None:
    """Check all invariants of a pool.

    Parameters
    ----------
    state
        A pool, between two events.

    Raises
    ------
    AssertionError
        With a line for each thing that is wrong.
    """
    wrong = [
        problem
        for look in (
            *(_runners, _leaving, _calls, _counts, _policy),
            *(_affinity, _work, _growth, _idleness, _asking, _deadlines),
        )
        for problem in look(state)
    ]
    if wrong:
        raise AssertionError("\n".join(wrong))


def _in(state: PoolState, *states: RunnerState) -> list[Runner]:
    return [runner for runner in state.runners.values() if runner.state in states]


def _runners(state: PoolState) -> Iterator[str]:
    if len(state.runners) > state.ceiling:
        yield f"C1: {len(state.runners)} runners, at most {state.ceiling} may exist"
    if state.ceiling > max(state.options.max, len(state.runners)):
        yield f"C8: the ceiling {state.ceiling} has not come down to max={state.options.max}"
    for ident, runner in state.runners.items():
        if ident != runner.id:
            yield f"{runner.id} is kept as {ident}"
        if runner.state not in _RUNNER_STATES:
            yield f"{ident} is {runner.state}"
        if len(runner.leases) > state.most_leases:
            yield f"{ident} has {len(runner.leases)} leases, at most {state.most_leases} may be"
        if runner.leases and runner.state not in ("ready", "draining"):
            yield f"{ident} is {runner.state} and has leases"
        if not runner.leases and runner.state == "draining":
            yield f"D3: {ident} has nothing to drain and has not been stopped"
        for call_id in runner.leases:
            call = state.calls.get(call_id)
            if call is None or call.runner is not runner:
                yield f"{ident} has a lease of {call_id}, which knows nothing of it"


def _leaving(state: PoolState) -> Iterator[str]:
    """E3, E5, D5: who may not take calls any more, and until when those that go may take."""
    for ident, runner in state.runners.items():
        leases = {call for call in runner.leases if call in state.calls}
        stuck = {call for call in leases if state.calls[call].state == "stuck"}
        if runner.stuck != stuck:
            yield f"E3: {stuck} of {ident} are stuck, {runner.stuck} by the books"
        if runner.state == "draining" and runner.leases and len(stuck) == len(runner.leases):
            yield f"E3: {ident} waits for nothing but stuck calls"
        if runner.state == "ready" and (stuck or runner.leaving):
            yield f"E3, E5: {ident} is ready, leaving: {runner.leaving}, stuck: {stuck}"
        if runner.state == "ready" and runner.used and state.options.single_use:
            yield f"D5: {ident} is ready, and the work of a call has ended on it"
    for runner in state._evictions:
        if runner.state != "draining" or not (runner.leaving or runner.stuck):
            yield f"E3, E5: {runner.id} is to be evicted for no reason"


def _calls(state: PoolState) -> Iterator[str]:
    for ident, call in state.calls.items():
        if ident != call.id:
            yield f"{call.id} is kept as {ident}"
        if call.state not in _CALL_STATES:
            yield f"{ident} is {call.state}"
        if (call.state == "waiting") != (ident in state.queue):
            yield f"{ident} is {call.state}; in the queue: {ident in state.queue}"
        if (call.state == "waiting") != (call.runner is None):
            yield f"{ident} is {call.state} on {call.runner and call.runner.id}"
        if call.state == "kept" and (
            any(limit is not None for limit in call.limits) or call.retries
        ):
            yield f"H1, I1: {ident} is kept, with {call.limits} and {call.retries} retries"
        if call.runner is not None:
            if state.runners.get(call.runner.id) is not call.runner:
                yield f"{ident} runs on {call.runner.id}, which is gone"
            if ident not in call.runner.leases:
                yield f"{ident} runs on {call.runner.id} without a lease"
    for ident in state.queue:
        if ident not in state.calls:
            yield f"{ident} waits and is over"
    counters = state.counters
    unanswered = sum(1 for call in state.calls.values() if not call.answered)
    answers = sum(counters[name] for name in ("ended", "expired", "released", "refused", "lost"))
    if counters["submitted"] != unanswered + answers:
        yield f"F3: {unanswered} calls wait for an answer, counted: {counters}"
    if counters["started"] + len(state.queue) > counters["submitted"] + counters["retried"]:
        yield f"F1: {len(state.queue)} calls wait, so too many were started: {counters}"


def _counts(state: PoolState) -> Iterator[str]:
    """Compare what is counted along the way with a count of the records."""
    fleet, boots = state._fleet, state._boots
    ready = _in(state, "ready")
    members = {runner for runner in ready if runner.kind == "min"}
    for what, counted, real in (
        ("the ready runners", set(fleet.ready.values()), set(ready)),
        ("leases", fleet.leases, sum(len(runner.leases) for runner in ready)),
        ("boots", boots.under_way, len(_in(state, "booting"))),
        ("the min group", set(fleet._group._members), members),
        ("the elastic runners", set(fleet._group._elastic), set(ready) - members),
        ("the size of the min group", len(members), min(fleet.floor, len(ready))),
        (
            "boots",
            state.counters["boots"],
            state.counters["runners_stopped"] + len(state.runners),
        ),
    ):
        if counted != real:
            yield f"{what}: {counted} by the books, {real} by count"
    if not 0 <= fleet._group.rested <= fleet._group.size == state.options.min:
        yield f"{fleet._group.rested} of a min group of {fleet._group.size} rest"


def _policy(state: PoolState) -> Iterator[str]:
    """C5: who is favoured, and whom the next call would get."""
    placement = state._fleet._placement
    ready = set(_in(state, "ready"))
    favoured, surplus = set(placement._age["favoured"]), set(placement._age["surplus"])
    if favoured | surplus != ready or favoured & surplus:
        yield f"C5: {len(favoured)} favoured, {len(surplus)} surplus, {len(ready)} ready runners"
    if len(favoured) != min(placement._target, len(ready)):
        yield f"C5: {len(favoured)} of {len(ready)} are favoured, not {placement._target}"
    for name, group in (("favoured", favoured), ("surplus", surplus)):
        for runner in group:
            if runner.group != name:
                yield f"C5: {runner.id} is in {name} and believes to be in {runner.group}"
            room = len(runner.leases) < state.options.max_concurrency
            if room != (runner in placement._load[runner.group]):
                yield f"C5: {runner.id} has {len(runner.leases)} leases; can be picked: {not room}"
    if favoured and surplus:
        youngest = max((runner.kind != "min", runner.no) for runner in favoured)
        oldest = min((runner.kind != "min", runner.no) for runner in surplus)
        if youngest > oldest:
            yield f"C5: runner {youngest} is favoured before {oldest}"


def _affinity(state: PoolState) -> Iterator[str]:
    """C7: only runners that can get calls are remembered, and not too many keys."""
    affinities = state._fleet._affinities
    if len(affinities) > affinities._limit:
        yield f"C7: {len(affinities)} keys are remembered, at most {affinities._limit} may be"
    known: dict[Runner, list[Hashable]] = {}
    for key, runner in affinities:
        known.setdefault(runner, []).append(key)
        if runner.state != "ready":
            yield f"C7: {runner.id} is {runner.state}, and {key!r} would prefer it"
    if {runner: set(keys) for runner, keys in known.items()} != {
        runner: set(keys) for runner, keys in affinities._keys.items()
    }:
        yield "C7: keys and their runners are not the same from both sides"


def _work(state: PoolState) -> Iterator[str]:
    """C3: nobody waits while there is room."""
    if state.queue:
        for runner in _in(state, "ready"):
            if len(runner.leases) < state.options.max_concurrency:
                yield f"C3: {len(state.queue)} calls wait, {runner.id} has room"
    if state.closing and (state.queue or _in(state, "booting", "ready")):
        yield "A6: a closing pool has waiters, boots or ready runners"
    if state.closing and (state.opening or state._boots.owed):
        yield "A6: a closing pool opens, or means to boot"


def _growth(state: PoolState) -> Iterator[str]:
    """C2, C3: what is wanted is there, under way or owed, unless there is no room."""
    if state.closing:
        return
    options, boots = state.options, state._boots
    ready = _in(state, "ready")
    demand = sum(len(runner.leases) for runner in ready) + len(state.queue)
    wanted = -(-demand // options.max_concurrency) + options.buffer
    wanted = min(options.max, max(wanted, options.min - state._fleet._group.rested))
    if state.snapshot(state._now).wanted != wanted:
        yield f"C2: {wanted} wanted, {state.snapshot(state._now).wanted} by the books"
    short = wanted - len(ready) - boots.under_way
    room = options.max - len(state.runners)
    if short > boots.cooling and room > 0:
        yield f"C3: {short} short of {wanted}, {boots.cooling} owed, and room for {room}"
    if boots._due and (room > 0 or len(boots._due) > max(0, short)):
        yield f"C6: {len(boots._due)} boots are due, {short} wanted, room for {room}"
    if boots.busy != (boots.under_way > 0 or (short > 0 and boots.owed > 0)):
        yield f"E2: the boot clock runs: {boots.busy}; {boots.under_way} boots, {boots.owed} owed"


def _idleness(state: PoolState) -> Iterator[str]:
    """D1: who is idle, since when, and who ought to be gone."""
    fleet, options = state._fleet, state.options
    for runner in state.runners.values():
        if (runner.idle_since is not None) != (runner.state == "ready" and not runner.leases):
            yield f"{runner.id} is {runner.state}, idle since {runner.idle_since}"
    if state.opening or state.closing:
        return
    ready = _in(state, "ready")
    recent = max(state._needed(), fleet._peak if options.buffer else 0)
    for runner in ready:
        of_min = runner.kind == "min"
        span = options.min_idle_shutdown_after if of_min else options.idle_shutdown_after
        if span is None or runner.idle_since is None or state._now < runner.idle_clock + span:
            continue
        if runner in fleet._idle.asked:
            continue
        if len(ready) > max(recent, 0 if of_min else fleet.floor):
            yield f"D1: {runner.id} is idle since {runner.idle_since}, now is {state._now}"


def _asking(state: PoolState) -> Iterator[str]:
    """D2: who is asked whether it may go."""
    idle = state._fleet._idle
    for runner in state.runners.values():
        if runner.idle_since is not None and runner.idle_clock < runner.idle_since:
            yield f"D2: the idle clock of {runner.id} was set before it fell idle"
    for runner in idle.asked:
        if not state.options.idle_check or runner.idle_since is None:
            yield f"D2: {runner.id} is asked, is {runner.state}, idle since {runner.idle_since}"
        if any(runner in over for over in idle.over.values()):
            yield f"D2: {runner.id} is asked and could be asked again"


def _deadlines(state: PoolState) -> Iterator[str]:
    """Deadlines belong to what is alive, all of them, and wake the pool in time."""
    book, boots, fleet = state._book._due, state._boots, state._fleet
    dues = [*book.entries().values(), *boots._limits.entries().values()]
    dues += [*boots._cooling.entries().values(), *fleet._idle._due.entries().values()]
    dues += [*state._evictions.entries().values(), state._close_at]
    if state._alarm.at > min(dues):
        yield f"the alarm is at {state._alarm.at}, {min(dues)} is due"
    if state._alarm.at < state._now:
        yield f"now is {state._now}, the alarm at {state._alarm.at} rings with each event"
    if any(due < state._now for due in dues):  # what came up in this very instant has its tick yet
        yield f"now is {state._now}, {min(dues)} was due"
    for ident, due in book.entries().items():
        call = state.calls.get(ident)
        if call is None or call.state in ("kept", "stuck"):
            yield f"E1: {ident} has a deadline and needs none"
        elif call.state != "ending" and due != _limit_of(state, ident):
            yield f"E1: {ident} is due at {due}, not at {_limit_of(state, ident)}"
    for ident, call in state.calls.items():
        if call.state == "ending" and ident not in book:
            yield f"E3: {ident} has a grace and no deadline"
        if not call.answered and _limit_of(state, ident) is not None and ident not in book:
            yield f"E1: {ident} has a limit and no deadline"
    booting = {runner.id for runner in _in(state, "booting")}
    for ident in boots._limits:
        if ident not in booting:
            yield f"{ident} has a boot deadline and does not boot"
    for runner in fleet._idle._due:
        if runner.idle_since is None:
            yield f"D1: {runner.id} has an idle clock and is not idle"


def _limit_of(state: PoolState, ident: str) -> float | None:
    call = state.calls[ident]
    limits = call.limits
    if limits.total is not None:
        return call.submitted + limits.total
    limit = limits.queue if call.state == "waiting" else limits.run
    since = call.since if call.state == "waiting" else call.started
    return None if limit is None else since + limit

"""The core's ordered collections against sorted lists, its window against brute force."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame_dask.core.policy import DemandWindow
from flame_dask.core.waiting import NEVER, Alarm, Deadlines, Ranked, WaitQueue

keys = st.integers(0, 12)
ranks = st.integers(-3, 3)
ranked_steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), keys, ranks),
        st.tuples(st.just("discard"), keys, st.just(0)),
        st.tuples(st.just("first"), st.just(0), st.just(0)),
        st.tuples(st.just("pop"), st.just(0), st.just(0)),
    ),
    max_size=300,
)


@given(ranked_steps)
def test_ranked_against_a_sorted_list(steps):
    ranked: Ranked[int] = Ranked()
    model: list[tuple[int, int, int]] = []  # rank, number of the step, key
    for number, (step, key, rank) in enumerate(steps):
        if step in ("set", "discard"):
            model = [entry for entry in model if entry[2] != key]
        if step == "set":
            ranked.set(key, rank)
            model = sorted([*model, (rank, number, key)])
        elif step == "discard":
            ranked.discard(key)
        elif step == "first":
            assert ranked.first() == (model[0][2] if model else None)
        elif model:
            assert ranked.pop() == model.pop(0)[2]
        else:
            with pytest.raises(IndexError):
                ranked.pop()
        assert len(ranked) == len(model)
        assert set(ranked) == {entry[2] for entry in model}
        assert all((key in ranked) == (key in set(ranked)) for key in range(13))
        assert len(ranked._heap) <= 2 * (len(model) + 1) + 2 * 64


@given(st.lists(st.tuples(ranks, st.booleans()), max_size=60))
def test_c4_wait_queue_against_a_sorted_list(waiters):
    queue = WaitQueue()
    for number, (priority, _) in enumerate(waiters):
        queue.push(f"c{number}", priority)
    for number, (_, leaves) in enumerate(waiters):
        if leaves:
            queue.discard(f"c{number}")
            queue.discard(f"c{number}")
    stay = [(-priority, number) for number, (priority, leaves) in enumerate(waiters) if not leaves]
    assert [queue.pop() for _ in range(len(queue))] == [f"c{number}" for _, number in sorted(stay)]


def test_c4_a_waiter_that_left_and_comes_again_is_the_last():
    queue = WaitQueue()
    for call in "abc":
        queue.push(call, 0)
    queue.discard("a")
    queue.push("a", 0)
    assert [queue.pop() for _ in range(3)] == ["b", "c", "a"]


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("set"), keys, st.floats(0, 100)),
            st.tuples(st.just("discard"), keys, st.just(0.0)),
            st.tuples(st.just("due"), st.just(0), st.floats(0, 100)),
        ),
        max_size=200,
    )
)
def test_deadlines_against_a_dict(steps):
    alarm = Alarm()
    deadlines: Deadlines[int] = Deadlines(alarm)
    model: dict[int, float] = {}
    for step, key, at in steps:
        if step == "set":
            deadlines.set(key, at)
            model[key] = at
        elif step == "discard":
            deadlines.discard(key)
            model.pop(key, None)
        else:
            due = []
            while (found := deadlines.pop_due(at)) is not None:
                due.append(model.pop(found))
            assert due == sorted(due)
            assert all(rest > at for rest in model.values())
        assert deadlines.next() == min(model.values(), default=NEVER)
        assert deadlines.entries() == model
        assert alarm.at <= deadlines.next()


def test_a_million_entries_that_are_replaced_do_not_pile_up():
    deadlines: Deadlines[str] = Deadlines(Alarm())
    for number in range(100_000):
        deadlines.set("runner", float(number))
    assert len(deadlines._heap) <= 2 + 64
    for number in range(100_000):
        deadlines.set(f"call-{number}", float(number))
        deadlines.discard(f"call-{number}")
    assert len(deadlines._heap) <= 2 + 64


def brute_force(notes: list[tuple[float, int]], now: float, span: float | None) -> int:
    """The most that was needed at any time in (now - span, now], by its definition."""
    ends = [at for at, _ in notes[1:]] + [float("inf")]
    return max(
        needed
        for (_, needed), end in zip(notes, ends, strict=True)
        if span is None or end + span > now
    )


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.1, 1.0, 2.5, 7.0]), st.integers(0, 5)), max_size=60),
    st.none() | st.sampled_from([0.0, 1.0, 5.0]),
)
def test_c5_demand_window_against_brute_force(steps, span):
    window = DemandWindow(span)
    notes = [(float("-inf"), 0)]
    now = 0.0
    for passed, needed in steps:
        now += passed
        notes.append((now, needed))
        maximum = window.note(now, needed)
        assert maximum == brute_force(notes, now, span)
        falls = window.next_fall()
        if falls == NEVER:
            assert maximum == needed or span is None
        else:
            assert falls > now
            assert brute_force(notes, falls, span) < maximum
            assert brute_force(notes, falls - 1e-6, span) == maximum
        assert len(window._past) <= 6


def test_c5_a_demand_that_comes_and_goes_does_not_renew_an_older_larger_one():
    window = DemandWindow(10.0)
    window.note(0.0, 8)
    window.note(1.0, 0)
    assert window.note(2.0, 1) == 8
    for second in range(3, 11):
        window.note(float(second), second % 2)
    assert window.note(11.0, 0) == 1


def test_c5_the_window_ends_at_its_very_fall():
    """Sums of floats: a fall that is announced for a time has to have happened then."""
    for span in (0.1, 0.3, 30.0):
        for start in (0.1, 0.7, 12345.678, 1.7e9 + 0.123):
            window = DemandWindow(span)
            window.note(start, 5)
            window.note(start + 0.2, 1)
            assert window.note(window.next_fall(), 1) == 1

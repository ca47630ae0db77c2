"""What has changed since when (J3)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flame_dask.code_sync.manifest import Difference, Entry, Revisions, difference

entries = st.builds(Entry, st.integers(0, 3), st.just(0o644), st.sampled_from("ab"))
manifests = st.dictionaries(st.sampled_from(["a", "b", "c/d", "c/e"]), entries)


@given(manifests, manifests)
def test_j3_a_difference_leads_from_one_to_the_other(old, new):
    found = difference(old, new)
    made = {path: entry for path, entry in old.items() if path not in found.deleted}
    assert made | {path: new[path] for path in found.changed} == new
    # And there is nothing in it that need not be.
    assert all(old.get(path) != new[path] for path in found.changed)
    assert all(path in old for path in found.deleted)


@given(st.lists(manifests, max_size=8), st.data())
def test_j3_whatever_a_runner_has_it_gets_what_is_there_now(steps, data):
    revisions = Revisions()
    history = {0: {}}
    for step in steps:
        before = revisions.number
        number = revisions.advance(step)
        assert number == before + (step != history[before])
        history[number] = step
    old = data.draw(st.sampled_from(sorted(history)))
    found = revisions.since(old)
    made = {path: entry for path, entry in history[old].items() if path not in found.deleted}
    assert made | {path: revisions.entries[path] for path in found.changed} == revisions.entries


def test_j3_nothing_is_sent_for_nothing():
    revisions = Revisions()
    revisions.advance({"a": Entry(1, 0o644, "x")})
    assert revisions.since(1) == Difference()
    assert revisions.advance({"a": Entry(1, 0o644, "x")}) == 1
    assert revisions.advance({"a": Entry(1, 0o755, "x")}) == 2  # its mode alone

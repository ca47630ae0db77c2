"""How many restarts are too many: as in Erlang, but in time that pools are up (K1)."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from flame_dask import Crash
from flame_dask.parent.restarts import Restarts


def crash(name: str = "web", cause: str = "") -> Crash:
    return Crash(name, datetime(2027, 1, 31, tzinfo=UTC), cause)


def crashes_at(restarts: Restarts, *times: float) -> list[bool]:
    """Let a pool die at each of these times, and be up again at once."""
    allowed = []
    for time in times:
        restarts.fell("web", time)
        allowed.append(restarts.allows(crash(), time))
        restarts.rose("web", time)
    return allowed


@pytest.mark.parametrize(
    ("times", "allowed"),
    [
        ([0, 1, 2, 3], [True, True, True, False]),
        ([0, 0, 0, 0], [True, True, True, False]),
        ([0, 1, 2, 5], [True, True, True, False]),  # both ends are within
        ([0, 1, 2, 5.1], [True, True, True, True]),
        ([0, 1, 2, 5.1, 5.9], [True, True, True, True, False]),
        ([0, 4, 8, 12, 16, 20], [True] * 6),
    ],
)
def test_k1_more_than_max_restarts_within_max_seconds(
    times: list[float], allowed: list[bool]
) -> None:
    assert crashes_at(Restarts(3, 5.0), *times) == allowed


def test_k1_none_at_all() -> None:
    assert crashes_at(Restarts(0, 5.0), 0) == [False]


def test_k1_without_a_limit_of_time_all_count() -> None:
    assert crashes_at(Restarts(2, None), 0, 1e6, 2e6) == [True, True, False]


def test_k1_those_that_count_are_the_causes() -> None:
    restarts = Restarts(1, 5.0)
    story = [crash(cause=str(n)) for n in range(3)]
    for time, each in zip([0, 10, 15], story, strict=True):
        restarts.fell("web", time)
        last = restarts.allows(each, time)
        restarts.rose("web", time)
    assert not last
    assert restarts.crashes == tuple(story[1:])


def test_k1_a_pool_that_dies_after_each_slow_start() -> None:
    restarts = Restarts(2, 5.0)
    now, allowed = 0.0, []
    for _ in range(3):
        restarts.fell("web", now)
        allowed.append(restarts.allows(crash(), now))
        restarts.rose("web", now + 100)
        now += 101
    assert allowed == [True, True, False]


def test_k1_a_pool_that_never_starts() -> None:
    restarts = Restarts(2, 5.0)
    restarts.fell("web", 0)
    assert [restarts.allows(crash(), now) for now in (0, 100, 200)] == [True, True, False]


def test_k1_time_counts_again_when_all_are_up() -> None:
    restarts = Restarts(1, 5.0)
    restarts.fell("a", 0)
    assert restarts.allows(crash("a"), 0)
    restarts.fell("b", 10)
    restarts.rose("a", 20)
    restarts.rose("a", 21)  # once more is nothing new
    assert restarts.down == {"b"}
    restarts.rose("b", 30)
    restarts.fell("a", 35.5)
    assert restarts.allows(crash("a"), 35.5)


def test_k1_those_of_all_pools_count_together() -> None:
    restarts = Restarts(1, 5.0)
    restarts.fell("a", 0)
    restarts.fell("b", 0)
    assert [restarts.allows(crash(name), 0) for name in "ab"] == [True, False]

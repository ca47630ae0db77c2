"""Calls with a key, and the runners that they prefer (C7)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame_dask import FlamePool, PoolOptionsError
from support import on_local, wait_for_file

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]


class Opaque:
    """A key that can't be pickled, and is equal to others of its number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and other.number == self.number

    def __hash__(self) -> int:
        return hash(self.number)

    def __reduce__(self) -> Any:
        raise TypeError("not to be pickled")


def pid_when(path: str) -> int:
    wait_for_file(path)
    return os.getpid()


def load(name: str) -> bool:
    """Say whether this runner has loaded a thing before, and load it."""
    from distributed import get_worker

    worker: Any = get_worker()
    loaded = worker.__dict__.setdefault("loaded", set())
    before = name in loaded
    loaded.add(name)
    return before


@pytest.mark.parametrize(
    ("one", "two", "one_again"),
    [
        ("ada", "grace", "ada"),
        (("user", 1), ("user", 2), ("user", 1.0)),
        (*map(Opaque, (1, 2, 1)),),
    ],
)
def test_c7_calls_go_where_their_key_went_before(
    two_runners: FlamePool, tmp_path: Path, until: Until, one: Any, two: Any, one_again: Any
) -> None:
    pool, gate = two_runners, tmp_path / "gate"
    futures = [pool.submit(pid_when, str(gate), affinity=key) for key in (one, two)]
    until(lambda: pool.status().leases == 2)
    gate.touch()
    first, second = (future.result(10) for future in futures)
    assert first != second
    until(lambda: pool.status().leases == 0)
    for key, pid in [(two, second), (one_again, first), (one, first), (two, second)]:
        assert pool.call(os.getpid, affinity=key) == pid
        until(lambda: pool.status().leases == 0)


def test_c7_what_a_runner_has_in_memory_is_found_again(
    two_runners: FlamePool, until: Until
) -> None:
    pool = two_runners
    near = pool.function(affinity="model")(load)
    assert near("model") is False
    for _ in range(3):
        until(lambda: pool.status().leases == 0)
        assert near("model") is True
    until(lambda: pool.status().leases == 0)
    assert list(near.map(["model"])) == [True]


def test_c7_c4_no_call_waits_while_another_runner_has_a_slot(
    two_runners: FlamePool, tmp_path: Path, until: Until
) -> None:
    pool, gate = two_runners, tmp_path / "gate"
    future = pool.submit(pid_when, str(gate), affinity="busy")
    until(lambda: pool.status().leases == 1)
    elsewhere = pool.call(os.getpid, affinity="busy")
    gate.touch()
    assert future.result(10) != elsewhere
    until(lambda: pool.status().leases == 0)
    assert pool.call(os.getpid, affinity="busy") == elsewhere  # it has moved


@on_local
def test_c7_its_runner_is_lost(
    make_pool: MakePool, backend: Any, until: Until, kills_runners: None
) -> None:
    pool = make_pool(min=1, max=1, max_concurrency=1)
    first = pool.call(os.getpid, affinity="key")
    [runner] = pool.status().runners
    pool.cluster.workers[runner.id].process.kill()
    until(lambda: pool.status().counters["runners_lost"] == 1)
    second = pool.call(os.getpid, affinity="key")
    assert second != first
    until(lambda: pool.status().leases == 0)
    assert pool.call(os.getpid, affinity="key") == second


def test_c7_a2_a_key_that_is_none(two_runners: FlamePool) -> None:
    with pytest.raises(PoolOptionsError, match=r"affinity=\['user', 1\] is not valid: give somet"):
        two_runners.submit(os.getpid, affinity=["user", 1])
    assert isinstance(two_runners.call(os.getpid, affinity=None), int)


def test_c7_texts_of_keys_are_bounded(two_runners: FlamePool) -> None:
    keys = two_runners._desk._keys
    first = keys.text_of("a key")
    assert keys.text_of("a key") == first
    assert len({keys.text_of(number) for number in range(10_001)}) == 10_001
    assert len(keys._texts) == 10_000
    assert keys.text_of("a key") != first


@pytest.fixture(scope="module")
def two_runners(backend: Any, fast: dict[str, Any]) -> Any:
    """Two runners of one slot each, for all tests that leave them as they were."""
    options = {**fast, "min": 2, "max": 2, "max_concurrency": 1, "backend": backend}
    with FlamePool("two", **options) as pool:
        pool.call(int)
        yield pool

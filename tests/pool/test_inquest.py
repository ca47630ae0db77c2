"""F2: what a runner died of is told as soon as it is known, and without it after a while."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from flame_dask.scheduler.inquest import Inquest, Verdict


def run(scene: Callable[[Inquest[str], list[Any]], Any], patience: float = 1.0) -> list[Any]:
    """Play a scene on an event loop, and return what was told."""

    async def main() -> list[Any]:
        told: list[Any] = []
        loop = asyncio.get_running_loop()
        await scene(Inquest(loop, lambda *news: told.append(news), patience), told)
        return told

    return asyncio.run(main())


KILLED = Verdict("signal", None, 9)


@pytest.mark.parametrize(
    ("loss", "exit_code", "verdict"),
    [
        ("signal", -9, KILLED),
        ("exited", 3, Verdict("exited", 3, None)),
        ("oom", 86, Verdict("oom", 86, None)),
        ("oom", -9, Verdict("oom", None, 9)),
        (None, -9, Verdict("unreachable", None, None)),  # it was the pool that killed it
        (None, None, Verdict("unreachable", None, None)),
    ],
)
def test_f2_what_a_backend_says(loss: str | None, exit_code: int | None, verdict: Verdict) -> None:
    assert Verdict.of(loss, exit_code) == verdict


def test_f2_the_loss_comes_first() -> None:
    async def scene(inquest: Inquest[str], told: list[Any]) -> None:
        inquest.lost("r1", "a")
        inquest.lost("r1", "b")
        inquest.lost("r2", "c")
        assert told == []
        inquest.found("r1", KILLED)
        assert told == [("a", "r1", KILLED), ("b", "r1", KILLED)]
        inquest.close()

    assert run(scene)[2:] == [("c", "r2", Verdict())]


def test_f2_the_cause_comes_first() -> None:
    async def scene(inquest: Inquest[str], told: list[Any]) -> None:
        inquest.found("r1", KILLED)
        inquest.found("r1", Verdict())  # it was stopped afterwards: that is not what it died of
        inquest.lost("r1", "a")

    assert run(scene) == [("a", "r1", KILLED)]


def test_f2_nobody_knows_the_cause() -> None:
    async def scene(inquest: Inquest[str], told: list[Any]) -> None:
        loop = asyncio.get_running_loop()
        inquest.lost("r1", "a")
        end = loop.time() + 5
        while not told and loop.time() < end:
            await asyncio.sleep(0.005)
        inquest.found("r1", KILLED)  # too late
        inquest.lost("r1", "b")

    unknown = Verdict("unreachable")
    assert run(scene, 0.05) == [("a", "r1", unknown), ("b", "r1", unknown)]


def test_f2_old_verdicts_are_forgotten() -> None:
    async def scene(inquest: Inquest[str], told: list[Any]) -> None:
        for number in range(1000):
            inquest.found(f"r{number}", KILLED)
        assert len(inquest._verdicts) == 100

    run(scene)

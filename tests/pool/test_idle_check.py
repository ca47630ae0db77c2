"""Runners that are asked before they go (D2)."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame_dask import FlamePool
from support import LOCAL

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]


INTERVAL = 0.2


class Asked:
    """The idle check of a test, which answers what the test has put into a file.

    Parameters
    ----------
    folder
        Where the answer is, and where each question leaves a line.
    """

    def __init__(self, folder: Path) -> None:
        self.answer = str(folder / "answer")
        self.log = str(folder / "asked")

    def __call__(self) -> object:
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()} {time.monotonic()}\n")
        with open(self.answer) as file:
            answer = file.read()
        if answer == "raise":
            raise RuntimeError("the check does not know")
        end = time.monotonic() + 20
        while answer == "wait" and time.monotonic() < end:
            time.sleep(0.005)
            with open(self.answer) as file:
                answer = file.read()
        return {"yes": True, "no": False, "none": None, "some": [1]}[answer]

    def set(self, answer: str) -> None:
        """Give another answer from now on, in one step."""
        new = Path(f"{self.answer}.new")
        new.write_text(answer)
        new.replace(self.answer)

    def lines(self) -> list[tuple[int, float]]:
        path = Path(self.log)
        text = path.read_text() if path.exists() else ""
        return [(int(pid), float(at)) for pid, at in (line.split() for line in text.splitlines())]


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_d2_false_and_raising_keep_the_runner_true_lets_it_go(
    make_pool: MakePool, asked: Asked, until: Until, isolation: str
) -> None:
    asked.set("no")
    options = {"isolation": isolation, "backend": LOCAL}
    pool = make_pool(max=1, idle_shutdown_after=(INTERVAL, asked), **options)
    pool.call(int)
    runner = pool.cluster.workers[pool.status().runners[0].id].process.pid
    for answer in ("no", "none", "raise"):
        asked.set(answer)
        before = len(asked.lines())
        # One question may have been asked before the answer was changed.
        until(lambda before=before: len(asked.lines()) >= before + 3, 20)
        assert [r.state for r in pool.status().runners] == ["ready"]
    assert pool.call(int) == 0
    asked.set("some")
    until(lambda: pool.status().runners == (), 10)
    assert {pid for pid, _ in asked.lines()} == {runner}
    times = [at for _, at in asked.lines()]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert min(gaps) >= INTERVAL * 0.9
    counters = pool.status().counters
    assert (counters["runners_lost"], counters["boots"]) == (0, 1)


def test_d2_the_host_is_elsewhere(
    make_pool: MakePool, backend: Any, asked: Asked, until: Until
) -> None:
    asked.set("no")
    pool = make_pool(max=1, idle_shutdown_after=(INTERVAL, asked))
    pool.call(int)
    until(lambda: len(asked.lines()) >= 2)
    assert [r.state for r in pool.status().runners] == ["ready"]
    asked.set("yes")
    until(lambda: pool.status().runners == (), 10)


def test_d2_the_idle_clock_restarts_with_each_call(
    make_pool: MakePool, asked: Asked, tmp_path: Path, until: Until
) -> None:
    """A runner that has something to do is not asked."""
    asked.set("no")
    pool = make_pool(max=1, idle_shutdown_after=(INTERVAL, asked), backend=LOCAL)
    gate = tmp_path / "gate"

    def work(path: str) -> None:
        end = time.monotonic() + 20
        while not os.path.exists(path) and time.monotonic() < end:
            time.sleep(0.005)

    pool.call(int)
    until(asked.lines)
    future = pool.submit(work, str(gate))
    until(lambda: pool.status().leases == 1)
    number, begun = len(asked.lines()), time.monotonic()
    until(lambda: time.monotonic() > begun + 3 * INTERVAL)
    assert len(asked.lines()) <= number + 1  # one question was on its way, perhaps
    gate.touch()
    future.result(10)
    ended, number = time.monotonic(), len(asked.lines())
    until(lambda: len(asked.lines()) > number)
    assert asked.lines()[-1][1] > ended + INTERVAL * 0.8


def test_d2_d3_a_runner_that_is_being_asked_takes_calls(
    make_pool: MakePool, asked: Asked, until: Until
) -> None:
    """The answer comes too late then: it is asked again when it is idle again."""
    asked.set("wait")
    pool = make_pool(max=1, idle_shutdown_after=(INTERVAL, asked), backend=LOCAL)
    runner = pool.call(os.getpid)
    until(lambda: len(asked.lines()) == 1)
    assert pool.call(os.getpid) == runner

    def answer_meanwhile(check: Asked) -> int:
        check.set("yes")
        time.sleep(2 * INTERVAL)
        return os.getpid()

    assert pool.call(answer_meanwhile, asked) == runner
    assert [r.state for r in pool.status().runners] == ["ready"]
    until(lambda: pool.status().runners == (), 10)
    assert len(asked.lines()) == 2
    counters = pool.status().counters
    assert (counters["lost"], counters["runners_lost"], counters["boots"]) == (0, 0, 1)


def test_d2_each_of_several_runners_is_asked(
    make_pool: MakePool, asked: Asked, tmp_path: Path, until: Until
) -> None:
    """Those beyond ``min``; the others by a time of their own, which is none by default."""
    asked.set("no")
    pool = make_pool(
        min=1, max=2, max_concurrency=1, idle_shutdown_after=(INTERVAL, asked), backend=LOCAL
    )
    both = tmp_path / "both"

    def meet(folder: str) -> int:
        Path(folder).mkdir(exist_ok=True)
        Path(folder, str(os.getpid())).touch()
        end = time.monotonic() + 20
        while len(os.listdir(folder)) < 2 and time.monotonic() < end:
            time.sleep(0.005)
        return os.getpid()

    futures = [pool.submit(meet, str(both)) for _ in range(2)]
    assert len({future.result(20) for future in futures}) == 2
    until(lambda: len(asked.lines()) >= 2)
    assert len(pool.status().runners) == 2
    asked.set("yes")
    until(lambda: len(pool.status().runners) == 1, 10)
    assert pool.call(int) == 0


def test_d2_closing_a_pool_asks_nobody(make_pool: MakePool, asked: Asked, until: Until) -> None:
    """Nor does it wait for an answer."""
    asked.set("wait")
    pool = make_pool(max=1, idle_shutdown_after=(INTERVAL, asked), backend=LOCAL)
    pool.call(int)
    until(lambda: len(asked.lines()) == 1)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 4
    assert len(asked.lines()) == 1

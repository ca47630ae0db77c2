"""Runners that somebody else tells to go, with SIGTERM (E5)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed.deploy.subprocess import SubprocessCluster

from flame_dask import FlamePool, RunnerLost
from support import LOCAL, QUIET, alive, pids, runner_pid, states, work

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("kills_runners")

REMOTE = (SubprocessCluster, QUIET)


def sleep(log: str) -> None:
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(60)


def run(log: str) -> None:
    import subprocess

    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    script = 'sleep 60 & echo "$!" >> "$0"; echo "$$" >> "$0"; wait'
    subprocess.run(["sh", "-c", script, log], check=False)


def test_e5_calls_finish_and_no_new_ones_come(
    make_pool: MakePool, backend: Any, tmp_path: Path, until: Until
) -> None:
    pool = make_pool(min=1, max=2, max_concurrency=4, shutdown_timeout=20)
    log, gate = tmp_path / "log", tmp_path / "gate"
    futures = [pool.submit(work, str(log), str(gate)) for _ in range(2)]
    until(lambda: len(pids(log)) == 2)
    [old] = set(pids(log))
    os.kill(old, signal.SIGTERM)
    until(lambda: "draining" in states(pool), 2)
    new = pool.call(os.getpid)
    assert new != old
    os.kill(old, signal.SIGTERM)  # once more: it knows
    assert pool.call(os.getpid) == new
    assert alive(old) == [old]
    assert not any(future.done() for future in futures)
    gate.touch()
    assert [future.result(10) for future in futures] == [old, old]
    until(lambda: not alive(old), 5)
    until(lambda: states(pool) == ["ready"], 20)
    counters = pool.status().counters
    assert (counters["lost"], counters["ended"]) == (0, 4)
    assert any("SIGTERM" in event.reason for event in pool.events())


@pytest.mark.parametrize(
    ("isolation", "where"), [("thread", REMOTE), ("process", LOCAL)], ids=["thread", "process"]
)
def test_e5_what_does_not_finish_is_preempted(
    make_pool: MakePool, tmp_path: Path, until: Until, isolation: str, where: Any
) -> None:
    """It had ``shutdown_timeout``; a call that was faster has its result."""
    options = {"isolation": isolation, "backend": where}
    pool = make_pool(max=1, max_concurrency=4, shutdown_timeout=1, **options)
    logs = [tmp_path / f"log{i}" for i in range(3)]
    gate = tmp_path / "gate"
    slow = [pool.submit(sleep, str(logs[0])), pool.submit(run, str(logs[1]))]
    quick = pool.submit(work, str(logs[2]), str(gate))
    until(lambda: [len(pids(log)) for log in logs] == [1, 3, 1], 20)
    [runner] = pool.status().runners
    old = runner_pid(pool)
    os.kill(old, signal.SIGTERM)
    told = time.monotonic()
    until(lambda: states(pool) == ["draining"], 1)
    gate.touch()
    quick.result(0.9)
    for future in slow:
        with pytest.raises(RunnerLost) as caught:
            future.result(5)
        assert caught.value.cause == "preempted"
        assert caught.value.runner == runner.id
        assert caught.value.call == future.key
    assert 0.8 < time.monotonic() - told < 3
    until(lambda: not alive(old, *(pid for log in logs for pid in pids(log))), 5)
    # C3: a new one takes over.
    assert pool.call(int) == 0
    assert runner_pid(pool) != old
    assert [len(pids(log)) for log in logs] == [1, 3, 1]
    counters = pool.status().counters
    assert counters["lost"] == 2


def test_e5_preempted_calls_with_retries_start_anew(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """F1: elsewhere, when their time on the old runner is over."""
    pool = make_pool(max=2, max_concurrency=4, shutdown_timeout=0.5, backend=LOCAL)
    log, gate = tmp_path / "log", tmp_path / "gate"
    future = pool.submit(work, str(log), str(gate), retries=1)
    until(lambda: pids(log), 20)
    [old] = pids(log)
    os.kill(old, signal.SIGTERM)
    until(lambda: len(pids(log)) == 2, 20)
    until(lambda: not alive(old), 5)
    gate.touch()
    assert future.result(10) == pids(log)[1]
    assert len(set(pids(log))) == 2
    assert pool.status().counters["retried"] == 1


def test_e5_c3_an_idle_runner_goes_at_once_and_min_is_refilled(
    make_pool: MakePool, until: Until
) -> None:
    pool = make_pool(min=1, max=1, backend=LOCAL)
    old = pool.call(os.getpid)
    os.kill(old, signal.SIGTERM)
    until(lambda: not alive(old), 3)
    until(lambda: states(pool) == ["ready"], 20)
    assert pool.call(os.getpid) != old
    assert pool.status().counters["lost"] == 0


def test_e5_during_the_closing_of_the_pool(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """As when a whole machine goes down: each process of it gets SIGTERM."""
    import threading

    pool = make_pool(max=1, max_concurrency=2, shutdown_timeout=10, backend=LOCAL)
    log, gate = tmp_path / "log", tmp_path / "gate"
    future = pool.submit(work, str(log), str(gate))
    until(lambda: pids(log), 20)
    closing = threading.Thread(target=pool.close)
    closing.start()
    until(lambda: "closing" in repr(pool))
    os.kill(pids(log)[0], signal.SIGTERM)
    gate.touch()
    closing.join(10)
    assert not closing.is_alive()
    assert future.result(0) == pids(log)[0]

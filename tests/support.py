"""What tests of pools ask of the world around them; for the process of the tests only.

Runners can't import this module: what a call needs stands in the module of its test.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from flame_dask import FlamePool


def lines(log: Path) -> list[str]:
    """Return what calls have left in a file; nothing if there is no file yet."""
    return log.read_text().split() if log.exists() else []


def pids(log: Path) -> list[int]:
    """Return the processes that calls have left in a file, among other lines."""
    return [int(line) for line in lines(log) if line.isdigit()]


def alive(*candidates: int) -> list[int]:
    """Return which of the processes run: a zombie does not."""
    running = []
    for pid in candidates:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                running.append(pid)
    return running


def new_children(before: set[psutil.Process]) -> list[int]:
    """Return the processes below this one that run and did not before."""
    now = psutil.Process().children(recursive=True)
    return alive(*(process.pid for process in now if process not in before))


def states(pool: FlamePool) -> list[str]:
    """Return the states of a pool's runners."""
    return sorted(runner.state for runner in pool.status().runners)


def runner_pid(pool: FlamePool) -> int:
    """Return the process of the one runner that is ready."""
    [ready] = [runner for runner in pool.status().runners if runner.state == "ready"]
    pid: int = pool.cluster.workers[ready.id].process.pid
    return pid

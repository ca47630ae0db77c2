"""What the benchmarks share: clusters that are alike, order of turns, tables."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from distributed import LocalCluster
from distributed.deploy.subprocess import SubprocessCluster

T = TypeVar("T")

BACKENDS: Final[dict[str, Any]] = {"local": LocalCluster, "subprocess": SubprocessCluster}
"""Where the workers live, for a pool and for the plain Dask that it is compared with."""

# A scheduler in a process of its own tells all that it does, unless its configuration says not to.
os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")

# A free port for each dashboard: several clusters are up at the same time.
CLUSTER_OPTIONS: Final = {"dashboard_address": "127.0.0.1:0"}


def plain_cluster(backend: str, workers: int, threads: int) -> Any:
    """Start a cluster as anybody would, with so many workers of so many threads."""
    factory = BACKENDS[backend]
    return factory(n_workers=workers, threads_per_worker=threads, **CLUSTER_OPTIONS)


def pool_backend(backend: str) -> tuple[Any, dict[str, Any]]:
    """Return what to give a pool as ``backend`` so that it uses the same kind of cluster."""
    return BACKENDS[backend], dict(CLUSTER_OPTIONS)


def turns(contestants: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield who is measured next: all in turn, every second round the other way about.

    What disturbs the machine for a while then disturbs all of them, and none always comes first.
    """
    for number in range(rounds):
        yield from contestants if number % 2 == 0 else reversed(contestants)


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
    """Wait between two measurements until ``condition`` holds.

    Raises
    ------
    TimeoutError
        If it doesn't within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout:g} s still waiting for {what}")
        time.sleep(0.02)


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return the smallest sample that ``percent`` of all are not above."""
    ordered = sorted(samples)
    return ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1]


def verdict(ratio: float, at_most: float | None = None, at_least: float | None = None) -> list[str]:
    """Return the last cells of a line: the ratio, what is wanted, and whether that is met."""
    if at_most is not None:
        return [f"{ratio:.2f}", f"<= {at_most:.2f}", "yes" if ratio <= at_most else "NO"]
    if at_least is not None:
        return [f"{ratio:.2f}", f">= {at_least:.2f}", "yes" if ratio >= at_least else "NO"]
    return [f"{ratio:.2f}", "", ""]


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Lay out a table: the first column to the left, the others to the right."""
    rows = [list(head), *map(list, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    text.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(text)

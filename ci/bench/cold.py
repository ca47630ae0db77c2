"""What a call costs when no worker is there: on an empty pool, and with plain Dask.

Cluster and client are up. The pool boots a runner because a call has come. Plain Dask is told to
start a worker (``scale(1)``, then one task), or is left to find out by itself (``adapt``, with
Dask's defaults). The three take turns within one run.

    python ci/bench/cold.py
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from common import BACKENDS, plain_cluster, pool_backend, table, turns, verdict, wait_for
from distributed import Client
from toolz import identity
from tqdm import tqdm  # type: ignore[import-untyped]

from flame_dask import FlamePool

ADAPT_INTERVAL = 1.0
"""Seconds between two looks of Dask's ``Adaptive``, by default."""


class Contestant:
    """A cluster without workers, and a way to get a call done on it.

    Parameters
    ----------
    name
        For the table.
    call
        Gets a call done, and returns what it was given.
    leave
        Sees to it that the workers go.
    count
        Says how many workers there are.
    """

    def __init__(
        self,
        name: str,
        call: Callable[[int], int],
        count: Callable[[], int],
        leave: Callable[[], object] = lambda: None,
    ) -> None:
        self.name = name
        self.call = call
        self.count = count
        self.leave = leave

    def cold_call(self, value: int) -> float:
        """Return the seconds of one call, and let the workers go."""
        start = time.perf_counter()
        result = self.call(value)
        seconds = time.perf_counter() - start
        assert result == value
        self.leave()
        wait_for(lambda: self.count() == 0, f"{self.name} to be empty")
        return seconds


def pool(options: argparse.Namespace, stack: ExitStack) -> Contestant:
    """Set up an empty pool."""
    flame = stack.enter_context(
        FlamePool(
            "bench",
            min=0,
            max=1,
            max_concurrency=1,
            idle_shutdown_after=0.2,
            backend=pool_backend(options.backend),
        )
    )
    return Contestant(
        "flame_dask",
        call=lambda value: int(flame.call(identity, value)),
        count=lambda: len(flame.status().runners),
    )


def empty_cluster(options: argparse.Namespace, stack: ExitStack) -> tuple[Any, Client]:
    """Start a plain cluster without workers, and a client."""
    cluster = stack.enter_context(plain_cluster(options.backend, workers=0, threads=1))
    return cluster, stack.enter_context(Client(cluster))


def count_workers(client: Client) -> int:
    """Ask a scheduler how many workers it has."""
    return len(client.scheduler_info()["workers"])


def scale(options: argparse.Namespace, stack: ExitStack) -> Contestant:
    """Set up plain Dask, which is told when to start a worker."""
    cluster, client = empty_cluster(options, stack)

    def call(value: int) -> int:
        cluster.scale(1)
        return int(client.submit(identity, value, pure=False).result())

    return Contestant(
        "scale(1), one task", call, lambda: count_workers(client), lambda: cluster.scale(0)
    )


def adapt(options: argparse.Namespace, stack: ExitStack) -> Contestant:
    """Set up plain Dask, which finds out by itself when to start a worker."""
    cluster, client = empty_cluster(options, stack)
    cluster.adapt(minimum=0, maximum=1)
    chance = random.Random(0)

    def leave() -> None:
        wait_for(lambda: count_workers(client) == 0, "adapt to be empty")
        # It is empty right after a look of Adaptive, so the next call would always wait for nearly
        # a whole interval. Calls come at any time.
        time.sleep(chance.uniform(0, ADAPT_INTERVAL))

    def call(value: int) -> int:
        return int(client.submit(identity, value, pure=False).result())

    return Contestant("adapt(0, 1)", call, lambda: count_workers(client), leave)


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backend", choices=BACKENDS, default="local", help="(default: local)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each (default: 10)")
    parser.add_argument(
        "--quick", action="store_true", help="see whether it works; the figures are rough"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = 1
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print the table."""
    options = read_arguments(argv)
    with ExitStack() as stack:
        contestants = [setup(options, stack) for setup in (pool, scale, adapt)]
        if not options.quick:
            for contestant in contestants:  # the first one ever loads what later ones find loaded
                contestant.cold_call(0)
        samples: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
        order = list(enumerate(turns(contestants, options.rounds)))
        for number, contestant in tqdm(order, "cold calls", disable=None, leave=False):
            samples[contestant.name].append(contestant.cold_call(number))

    ours = statistics.median(samples["flame_dask"])
    lines = []
    for contestant in contestants:
        wanted = {"scale(1), one task": 1.15, "adapt(0, 1)": 0.5}.get(contestant.name)
        median = statistics.median(samples[contestant.name])
        least, most = min(samples[contestant.name]), max(samples[contestant.name])
        cells = [f"{median:.3f} s", f"{least:.3f} s", f"{most:.3f} s"]
        verdicts = ["", "", ""] if wanted is None else verdict(ours / median, at_most=wanted)
        lines.append([contestant.name, *cells, *verdicts])
    print(f"{options.rounds} cold calls each, {options.backend} cluster; ratio is flame_dask / it")
    print(table(["", "median", "least", "most", "ratio", "wanted", "met"], lines))


if __name__ == "__main__":
    main()

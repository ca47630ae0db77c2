"""What an open pool costs its parent while nothing is called.

Compared are a pool with one runner, and a plain cluster with one worker and a client: each in a
process of its own, one after the other, in turns. Measured is the CPU time of that process alone.

    python ci/bench/idle.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

from common import BACKENDS, plain_cluster, pool_backend, table, turns
from distributed import Client
from toolz import identity
from tqdm import tqdm  # type: ignore[import-untyped]

from flame_dask import FlamePool

CONTESTANTS = ("flame_dask", "plain Dask")
SETTLE = 2.0
"""Seconds for what goes on after a start to be over."""


def idle_share(contestant: str, backend: str, seconds: float) -> float:
    """Be the parent: return the percentage of a core that this process takes while idle."""
    with ExitStack() as stack:
        if contestant == "flame_dask":
            pool = FlamePool(
                "bench", min=1, max=1, max_concurrency=1, backend=pool_backend(backend)
            )
            stack.enter_context(pool)
            pool.call(identity, 1)
        else:
            cluster = stack.enter_context(plain_cluster(backend, workers=1, threads=1))
            client = stack.enter_context(Client(cluster))
            client.submit(identity, 1).result()
        time.sleep(SETTLE)
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(seconds)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return 100 * cpu / wall


def measure(contestant: str, options: argparse.Namespace) -> float:
    """Start a parent, and return the percentage that it prints."""
    command = [sys.executable, __file__, "--be", contestant, "--seconds", str(options.seconds)]
    run = subprocess.run(
        [*command, "--backend", options.backend], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(run.stdout)


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backend", choices=BACKENDS, default="local", help="(default: local)")
    parser.add_argument("--seconds", type=float, default=20, help="of idleness (default: 20)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument(
        "--quick", action="store_true", help="see whether it works; the figures are rough"
    )
    parser.add_argument("--be", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds, options.rounds = 1.0, 1
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print the table."""
    options = read_arguments(argv)
    if options.be:
        print(idle_share(options.be, options.backend, options.seconds))
        return
    samples: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    order = list(turns(CONTESTANTS, options.rounds))
    for contestant in tqdm(order, "idle parents", disable=None, leave=False):
        samples[contestant].append(measure(contestant, options))

    ours, plain = (statistics.median(samples[name]) for name in CONTESTANTS)
    more = ours - plain
    print(
        f"CPU use of an idle parent in % of one core, {options.rounds} x {options.seconds:g} s"
        f" each, {options.backend} cluster"
    )
    cells = [f"{ours:.2f} %", f"{plain:.2f} %", f"{more:+.2f} %", "< 1 %"]
    head = ["", *CONTESTANTS, "more", "wanted", "met"]
    print(table(head, [["one runner, no calls", *cells, "yes" if more < 1 else "NO"]]))


if __name__ == "__main__":
    main()

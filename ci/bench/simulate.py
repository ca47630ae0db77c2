"""Runs a workload through a pool's core in virtual time: what it would cost, and who would wait.

No cluster and no waiting: the core is the one that a real pool runs on, its backend is played (see
flame_dask/testing/simulator.py). Hours of work on thousands of runners take seconds.

    python ci/bench/simulate.py --runners 100 --calls 20000 --workload diurnal
    python ci/bench/simulate.py --trace calls.csv --runners 8 --idle 60
    python ci/bench/simulate.py --runners 10000 --calls 1000000
    python ci/bench/simulate.py --scaling
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import random
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from flame_dask.core import events as ev
from flame_dask.core import instructions as do
from flame_dask.core.events import Limits, PoolOptionsView
from flame_dask.core.instructions import Instruction
from flame_dask.testing import Arrival, Fails, Simulator, Up
from flame_dask.testing.simulator import BootOutcome

PERCENTILES: Final = (50, 90, 99, 100)


class Bench(Simulator):
    """A simulator that keeps the waiting times."""

    waits: array[float]
    last_end = 0.0

    def _carry_out(self, instruction: Instruction) -> None:
        if isinstance(instruction, do.Start):
            call = instruction.call
            self.waits.append(self.core.calls[call].queued)
            self.last_end = max(self.last_end, self.now + self._work[call])
        super()._carry_out(instruction)


# -- workloads ------------------------------------------------------------------------------------


def poisson(rng: random.Random, args: argparse.Namespace) -> Iterator[float]:
    """Yield the times of calls that come at a steady rate, independently of each other."""
    now = 0.0
    while True:
        now += rng.expovariate(args.rate)
        yield now


def spike(rng: random.Random, args: argparse.Namespace) -> Iterator[float]:
    """Yield half of the calls at once, then a trickle of a tenth of the rate."""
    at_once = args.calls // 2
    yield from itertools.repeat(0.0, at_once)
    now = 0.0
    while True:
        now += rng.expovariate(args.rate / 10)
        yield now


def diurnal(rng: random.Random, args: argparse.Namespace) -> Iterator[float]:
    """Yield calls at a rate that rises from nothing at midnight to its peak at noon, and falls."""
    now = 0.0
    while True:
        # By thinning: candidates at the peak rate, each kept as often as the hour says.
        now += rng.expovariate(args.rate)
        if rng.random() < 0.5 - 0.5 * math.cos(2 * math.pi * now / args.day):
            yield now


WORKLOADS: Final = {"poisson": poisson, "spike": spike, "diurnal": diurnal}


def generated(args: argparse.Namespace) -> Iterator[Arrival]:
    """Yield the calls of a workload, each with an exponentially distributed duration."""
    rng = random.Random(args.seed)
    limits = Limits(queue=args.queue_timeout)
    for at in itertools.islice(WORKLOADS[args.workload](rng, args), args.calls):
        yield Arrival(at, rng.expovariate(1 / args.duration), limits)


def traced(path: Path, limits: Limits) -> list[Arrival]:
    """Read the calls of a CSV file: arrival and duration in seconds; a header is skipped."""
    arrivals = []
    with path.open(newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if not row:
                continue
            try:
                arrivals.append(Arrival(float(row[0]), float(row[1]), limits))
            except (ValueError, IndexError):
                if number > 1:
                    raise SystemExit(
                        f"{path}:{number}: {row} is not arrival,duration in seconds"
                    ) from None
    return sorted(arrivals)


def boots(args: argparse.Namespace) -> Callable[[do.Boot], BootOutcome]:
    """Return how boots go: around ``--boot`` seconds each, some of them failing."""
    rng = random.Random(args.seed + 1)

    def boot(_: do.Boot) -> BootOutcome:
        seconds = args.boot * rng.uniform(0.8, 1.2)
        return Fails(seconds) if rng.random() < args.boot_failures else Up(seconds)

    return boot


# -- a run ----------------------------------------------------------------------------------------


def simulate(args: argparse.Namespace, arrivals: Iterable[Arrival]) -> tuple[Bench, float]:
    """Open a pool, run a workload, close it; return the pool, and the seconds that this took."""
    deaths = random.Random(args.seed + 2)
    bench = Bench(
        PoolOptionsView(
            min=args.min,
            max=args.runners,
            max_concurrency=args.max_concurrency,
            buffer=args.buffer,
            placement=args.placement,
            boot_timeout=args.boot_timeout,
            idle_shutdown_after=args.idle,
        ),
        boots=boots(args),
        stop=args.stop,
        lifetime=(lambda: deaths.expovariate(1 / args.mtbf)) if args.mtbf else None,
        seed=args.seed,
    )
    bench.waits = array("d")
    start = time.perf_counter()
    calls = iter(arrivals)
    first = next(calls, None)
    bench.now = 0.0 if first is None else first.at
    bench.tell(ev.Open())
    bench.run(
        arrivals=calls if first is None else itertools.chain([first], calls), while_calls=True
    )
    bench.tell(ev.Close())
    bench.run(until=bench.now + args.stop)
    return bench, time.perf_counter() - start


def report(bench: Bench, wall: float, first: float) -> dict[str, str]:
    """Return what came out, by name."""
    counters = bench.core.counters
    waits = sorted(bench.waits)
    rows = {
        "calls": f"{counters['submitted']:,}",
        "ended": f"{counters['ended']:,}",
        "expired": f"{counters['expired']:,}",
        "lost": f"{counters['lost']:,}",
        "makespan": f"{bench.last_end - first:,.1f} s",
        "runner-seconds": f"{bench.runner_seconds:,.0f}",
        "most runners": f"{bench.peak:,}",
    }
    for percent in PERCENTILES:
        name = "longest wait" if percent == 100 else f"wait p{percent}"
        index = min(len(waits) - 1, len(waits) * percent // 100)
        rows[name] = f"{waits[index]:.3f} s" if waits else "-"
    return rows | {
        "boots": f"{counters['boots']:,}",
        "boots that failed": f"{counters['boot_failures']:,}",
        "events": f"{bench.events:,}",
        "time per event": f"{wall / max(1, bench.events) * 1e6:.1f} µs",
        "wall time": f"{wall:.2f} s",
    }


# -- scaling --------------------------------------------------------------------------------------


def scaling(args: argparse.Namespace) -> Iterator[str]:
    """Yield two tables: time per event by the number of runners, and by the number of waiters."""
    sizes = [10**power for power in range(1, 8)]
    yield from table(
        f"{args.scaling_calls:,} calls on so many runners, busy four fifths of the time",
        "runners",
        [size for size in sizes if size <= args.scaling_runners],
        lambda size: list(generated(parse([], runners=size, calls=args.scaling_calls))),
        lambda size: size,
        args.scaling_seconds,
    )
    yield ""
    yield from table(
        "so many calls submitted at once to a pool of 10 runners",
        "waiters",
        [size for size in sizes if size <= args.scaling_waiters],
        lambda size: [Arrival(0.0, 1.0, Limits(queue=1e9))] * size,
        lambda size: 10,
        args.scaling_seconds,
    )


def table(
    title: str,
    what: str,
    sizes: list[int],
    arrivals: Callable[[int], list[Arrival]],
    runners: Callable[[int], int],
    seconds: float,
) -> Iterator[str]:
    """Yield the lines of a table of runs of different sizes."""
    yield title
    yield f"{what:>12} {'events':>12} {'µs/event':>10} {'growth':>8} {'log growth':>11}"
    smallest = 0.0
    for size in sizes:
        args = parse(["--boot", "0", "--boot-timeout", "1e9"], runners=runners(size))
        calls = arrivals(size)
        spent, events = 0.0, 0
        while spent <= seconds:  # a small run is repeated: a few events are too short to time
            bench, wall = simulate(args, calls)
            spent += wall
            events += bench.events
        each = spent / events * 1e6
        smallest = smallest or each
        allowed = math.log(size) / math.log(sizes[0])
        yield f"{size:>12,} {events:>12,} {each:>10.2f} {each / smallest:>8.2f} {allowed:>11.2f}"


# -- the command line -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    lines = (__doc__ or "").split("\n\n")
    result = argparse.ArgumentParser(
        description=lines[0],
        epilog=lines[-1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add("--workload", choices=WORKLOADS, default="poisson", help="how calls come (%(default)s)")
    add("--trace", type=Path, help="CSV file of arrival,duration, instead of a made-up workload")
    add("--calls", type=int, default=100_000, help="number of calls (%(default)s)")
    add("--duration", type=float, default=10.0, help="mean seconds of a call (%(default)s)")
    add("--rate", type=float, help="calls a second, at the peak; overrides --load")
    add("--load", type=float, default=0.8, help="the share of all slots in use (%(default)s)")
    add("--day", type=float, default=86_400.0, help="seconds of a diurnal day (%(default)s)")
    add("--queue-timeout", type=float, help="the most seconds that a call waits (no limit)")
    add("--runners", type=int, default=100, help="max of the pool (%(default)s)")
    add("--min", type=int, default=0, help="(%(default)s)")
    add("--max-concurrency", type=int, default=1, help="slots of a runner (%(default)s)")
    add("--buffer", type=int, default=0, help="runners beyond the need (%(default)s)")
    add("--placement", choices=["spread", "pack"], default="spread", help="(%(default)s)")
    add("--idle", type=float, default=30.0, help="idle_shutdown_after (%(default)s)")
    add("--boot", type=float, default=20.0, help="seconds of a boot, about (%(default)s)")
    add("--boot-timeout", type=float, default=300.0, help="(%(default)s)")
    add("--boot-failures", type=float, default=0.0, help="share of boots that fail (%(default)s)")
    add("--stop", type=float, default=2.0, help="seconds until a runner is gone (%(default)s)")
    add("--mtbf", type=float, help="mean seconds between the deaths of a runner (none dies)")
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")
    add("--scaling", action="store_true", help="print how the time per event grows with size")
    add("--scaling-calls", type=int, default=200_000, help=argparse.SUPPRESS)
    add("--scaling-runners", type=int, default=10_000, help=argparse.SUPPRESS)
    add("--scaling-seconds", type=float, default=1.0, help=argparse.SUPPRESS)
    add("--scaling-waiters", type=int, default=1_000_000, help=argparse.SUPPRESS)
    return result


def parse(argv: list[str], **changes: object) -> argparse.Namespace:
    """Read a command line, and fill in what follows from it."""
    args = parser().parse_args(argv)
    vars(args).update(changes)
    if not 0 <= args.boot_failures < 1:
        raise SystemExit("--boot-failures is a share of at least 0 and less than 1")
    if args.rate is None:
        args.rate = args.load * args.runners * args.max_concurrency / args.duration
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.scaling:
        for line in scaling(args):
            print(line, flush=True)
        return
    arrivals: Iterable[Arrival] = generated(args)
    first = 0.0
    if args.trace is not None:
        arrivals = traced(args.trace, Limits(queue=args.queue_timeout))
        first = arrivals[0].at if arrivals else 0.0
    bench, wall = simulate(args, arrivals)
    for name, value in report(bench, wall, first).items():
        print(f"{name:<18} {value:>16}")


if __name__ == "__main__":
    main(sys.argv[1:])

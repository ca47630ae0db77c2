"""What a call costs, on a pool and with plain Dask, on clusters that are alike.

Measured are one call after the other, many at once, and large arguments and results. The
contestants take turns within one run, so that ratios hold on a busy machine too.

    python ci/bench/calls.py
    python ci/bench/calls.py --backend subprocess --ray --parsl
"""

# ruff: noqa: D102  # what a contestant's methods do is said once, in the class Contestant

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from common import (
    BACKENDS,
    percentile,
    plain_cluster,
    pool_backend,
    table,
    turns,
    verdict,
    wait_for,
)
from distributed import Client
from toolz import identity
from tqdm import tqdm  # type: ignore[import-untyped]

from flame_dask import FlamePool

Function = Callable[[Any], Any]


class Contestant(ABC):
    """Something that runs a function elsewhere.

    Parameters
    ----------
    function
        What is called.
    options
        How many workers and threads, and so on.
    """

    name: str

    @abstractmethod
    def __init__(self, function: Function, options: argparse.Namespace) -> None: ...

    @abstractmethod
    def call(self, value: Any) -> Any:
        """Send ``value`` there and back."""

    @abstractmethod
    def many(self, values: Sequence[Any]) -> list[Any]:
        """Send them all there, each with a call of its own, then wait for all to be back."""

    def rest(self) -> None:  # noqa: B027  # most need none
        """Wait until nothing is left of what came before."""

    @abstractmethod
    def close(self) -> None:
        """Take everything down."""


class Pool(Contestant):
    """A pool of the present library."""

    name = "flame_dask"

    def __init__(self, function: Function, options: argparse.Namespace) -> None:
        self.function = function
        self.pool = FlamePool(
            "bench",
            min=options.workers,
            max=options.workers,
            max_concurrency=options.threads,
            queue_timeout="10m",  # thousands wait for a few slots, maybe on a slow machine
            backend=pool_backend(options.backend),
        )

    def call(self, value: Any) -> Any:
        return self.pool.call(self.function, value)

    def many(self, values: Sequence[Any]) -> list[Any]:
        futures = [self.pool.submit(self.function, value) for value in values]
        return list(self.pool.client.gather(futures))

    def rest(self) -> None:
        wait_for(lambda: count_tasks(self.pool.client) == 0, "the pool to forget its tasks")

    def close(self) -> None:
        self.pool.close()


class Plain(Contestant):
    """Dask as it is."""

    name = "plain Dask"

    def __init__(self, function: Function, options: argparse.Namespace) -> None:
        self.function = function
        self.cluster = plain_cluster(options.backend, options.workers, options.threads)
        self.client = Client(self.cluster)
        self.client.wait_for_workers(options.workers)

    def call(self, value: Any) -> Any:
        return self.client.submit(self.function, value, pure=False).result()

    def many(self, values: Sequence[Any]) -> list[Any]:
        futures = [self.client.submit(self.function, value, pure=False) for value in values]
        return list(self.client.gather(futures))

    def rest(self) -> None:
        wait_for(lambda: count_tasks(self.client) == 0, "Dask to forget its tasks")

    def close(self) -> None:
        self.client.close()
        self.cluster.close()


class Ray(Contestant):
    """Ray's tasks, with a worker process for each thread of the others."""

    name = "Ray"

    def __init__(self, function: Function, options: argparse.Namespace) -> None:
        # By name, as below: whether it is installed or not, the types are checked alike.
        self.ray: Any = import_module("ray")
        self.ray.init(
            num_cpus=options.workers * options.threads,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="warning",
        )

        # A function of its own: Ray takes no built-in ones.
        def run(value: Any) -> Any:
            return function(value)

        self.function = self.ray.remote(run)

    def call(self, value: Any) -> Any:
        return self.ray.get(self.function.remote(value))

    def many(self, values: Sequence[Any]) -> list[Any]:
        return list(self.ray.get([self.function.remote(value) for value in values]))

    def close(self) -> None:
        self.ray.shutdown()


class Parsl(Contestant):
    """Parsl's HighThroughputExecutor, with a worker process for each thread of the others."""

    name = "Parsl"

    def __init__(self, function: Function, options: argparse.Namespace) -> None:
        self.parsl: Any = import_module("parsl")
        executor = import_module("parsl.executors").HighThroughputExecutor(
            address="127.0.0.1",
            max_workers_per_node=options.workers * options.threads,
            provider=import_module("parsl.providers").LocalProvider(init_blocks=1, max_blocks=1),
        )
        self.folder = TemporaryDirectory()  # it would write to the current one
        config = self.parsl.Config(executors=[executor], run_dir=self.folder.name)
        self.parsl.load(config)

        def run(value: Any) -> Any:
            return function(value)

        self.function = self.parsl.python_app(run)

    def call(self, value: Any) -> Any:
        return self.function(value).result()

    def many(self, values: Sequence[Any]) -> list[Any]:
        futures = [self.function(value) for value in values]
        return [future.result() for future in futures]

    def close(self) -> None:
        self.parsl.dfk().cleanup()
        self.folder.cleanup()


def count_tasks(client: Client) -> int:
    """Ask a scheduler how many tasks it knows."""

    def count(dask_scheduler: Any) -> int:
        return len(dask_scheduler.tasks)

    return int(client.run_on_scheduler(count))


def here(value: Any) -> Any:
    """Return the value; a function of ``__main__``, so it is sent by value, not by name."""
    return value


# -- measurements ----------------------------------------------------------------------------------

Samples = dict[str, list[float]]


def measure(
    contestants: Sequence[Contestant],
    rounds: int,
    what: str,
    block: Callable[[Contestant], list[float]],
) -> Samples:
    """Let all take turns, and collect what ``block`` measures."""
    samples: Samples = {contestant.name: [] for contestant in contestants}
    order = list(turns(contestants, rounds))
    for contestant in tqdm(order, what, unit="block", disable=None, leave=False):
        contestant.rest()
        gc.collect()  # now, or it would come in the middle of somebody's turn
        samples[contestant.name] += block(contestant)
    return samples


def one_by_one(calls: int) -> Callable[[Contestant], list[float]]:
    """Return a block that measures the seconds of single calls in sequence."""

    def block(contestant: Contestant) -> list[float]:
        samples = []
        for number in range(calls):
            start = time.perf_counter()
            value = contestant.call(number)
            samples.append(time.perf_counter() - start)
            assert value == number
        return samples

    return block


def all_at_once(calls: int) -> Callable[[Contestant], list[float]]:
    """Return a block that measures the calls per second when all are sent at once."""

    def block(contestant: Contestant) -> list[float]:
        values = list(range(calls))
        start = time.perf_counter()
        results = contestant.many(values)
        seconds = time.perf_counter() - start
        assert results == values
        return [calls / seconds]

    return block


def there_and_back(value: Any) -> Callable[[Contestant], list[float]]:
    """Return a block that measures the seconds of a call with a large argument and result."""

    def block(contestant: Contestant) -> list[float]:
        start = time.perf_counter()
        result = contestant.call(value)
        seconds = time.perf_counter() - start
        assert type(result) is type(value)
        assert np.array_equal(np.frombuffer(result, "u1"), np.frombuffer(value, "u1"))
        return [seconds]

    return block


def benchmark(contestants: Sequence[Contestant], options: argparse.Namespace) -> str:
    """Measure everything, and return the table."""
    for contestant in contestants:  # warm up
        for number in range(20):
            contestant.call(number)
        contestant.many(range(100))

    lines: list[list[str]] = []

    def line(
        what: str, figures: Sequence[float], show: Callable[[float], str], **wanted: Any
    ) -> None:
        ours, plain, *others = figures
        shown = [show(ours), show(plain), *verdict(ours / plain, **wanted)]
        for other in others:
            shown += [show(other), f"{ours / other:.2f}"]
        lines.append([what, *shown])

    def milliseconds(value: float) -> str:
        return f"{1000 * value:.2f} ms"

    def rate(value: float) -> str:
        return f"{value:,.0f} /s"

    rounds = options.rounds
    sequence = measure(contestants, rounds, "one by one", one_by_one(options.sequential))
    for percent, wanted in ((50, 0.30), (99, None)):
        figures = [percentile(samples, percent) for samples in sequence.values()]
        line(f"one call after the other, p{percent}", figures, milliseconds, at_most=wanted)

    # Fewer rounds: each takes seconds.
    burst = measure(contestants, -(-rounds // 2), "all at once", all_at_once(options.burst))
    figures = [statistics.median(samples) for samples in burst.values()]
    line(f"{options.burst:,} calls at once", figures, rate, at_least=1.5)

    size = options.megabytes * 1_000_000
    random = np.random.default_rng(0)  # what is compressible would be cheaper for some
    for kind, value in (("bytes", random.bytes(size)), ("array", random.random(size // 8))):
        for contestant in contestants:  # their buffers grow at the first one
            contestant.call(value)
        large = measure(contestants, rounds, kind, there_and_back(value))
        figures = [statistics.median(samples) for samples in large.values()]
        line(
            f"{options.megabytes} MB of {kind}, there and back", figures, milliseconds, at_most=1.1
        )

    head = ["", *(contestant.name for contestant in contestants[:2]), "ratio", "wanted", "met"]
    for contestant in contestants[2:]:
        head += [contestant.name, "ratio"]
    return table(head, lines)


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, default="local", help="for pool and plain Dask"
    )
    parser.add_argument("--workers", type=int, default=2, help="of each contestant (default: 2)")
    parser.add_argument("--threads", type=int, default=2, help="of each worker (default: 2)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each (default: 10)")
    parser.add_argument("--sequential", type=int, default=200, help="single calls in a turn")
    parser.add_argument("--burst", type=int, default=5000, help="calls that are sent at once")
    parser.add_argument("--megabytes", type=int, default=50, help="size of a large value")
    parser.add_argument("--by-value", action="store_true", help="call a function of __main__")
    parser.add_argument("--ray", action="store_true", help="Ray too, if it is installed")
    parser.add_argument("--parsl", action="store_true", help="Parsl too, if it is installed")
    parser.add_argument(
        "--quick", action="store_true", help="see whether it works; the figures are rough"
    )
    options = parser.parse_args(arguments)
    for name in ("ray", "parsl"):
        if getattr(options, name) and find_spec(name) is None:
            parser.error(f"--{name}: {name} is not installed (python -m pip install {name})")
    if options.quick:
        options.rounds, options.sequential, options.burst, options.megabytes = 2, 20, 200, 2
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print the table."""
    options = read_arguments(argv)
    # Plain Dask warns of 50 MB in a graph. They are meant to be there.
    warnings.filterwarnings("ignore", "Sending large graph")
    function = here if options.by_value else identity
    kinds: list[type] = [Pool, Plain]
    kinds += [Ray] if options.ray else []
    kinds += [Parsl] if options.parsl else []
    with ExitStack() as stack:
        contestants: list[Contestant] = []
        for kind in kinds:
            contestants.append(kind(function, options))
            stack.callback(contestants[-1].close)
        print(
            f"{options.workers} workers of {options.threads} threads each, {options.backend}"
            f" cluster; ratios are {contestants[0].name} / the other",
            flush=True,
        )
        print(benchmark(contestants, options))


if __name__ == "__main__":
    main()

"""What watched code costs the calls of a pool: when nothing has changed, and when a file has.

Compared are two pools that are alike, one of which watches 1,000 files. They take turns.

    python ci/bench/code_sync.py
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from common import BACKENDS, percentile, pool_backend, table, turns
from toolz import identity
from tqdm import tqdm  # type: ignore[import-untyped]

from flame_dask import FlamePool

CONTESTANTS = ("watched", "without")


def write_package(folder: Path, files: int) -> Path:
    """Write a package of so many modules; return one in the middle."""
    for number in range(files):
        module = folder / "benched" / f"part{number // 50}" / f"m{number}.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        (module.parent / "__init__.py").touch()
        module.write_text(f"NUMBER = {number}\n" + "# so that it has some size\n" * 40)
    (folder / "benched" / "__init__.py").touch()
    return folder / "benched" / f"part{files // 100}" / f"m{files // 2}.py"


def one_after_the_other(pool: FlamePool, calls: int) -> list[float]:
    """Return the seconds that each call takes."""
    samples = []
    for number in range(calls):
        begun = time.perf_counter()
        assert pool.call(identity, number) == number
        samples.append(time.perf_counter() - begun)
    return samples


def after_edits(pool: FlamePool, module: Path, edits: int) -> list[float]:
    """Return the seconds that the first call after each edit takes."""
    samples = []
    for number in range(edits):
        lines = module.read_text().splitlines(keepends=True)
        module.write_text("".join([f"NUMBER = {-number}\n", *lines[1:]]))
        samples += one_after_the_other(pool, 1)
    return samples


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backend", choices=BACKENDS, default="local", help="(default: local)")
    parser.add_argument("--files", type=int, default=1000, help="watched (default: 1000)")
    parser.add_argument("--calls", type=int, default=200, help="in each turn (default: 200)")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each (default: 10)")
    parser.add_argument(
        "--quick", action="store_true", help="see whether it works; the figures are rough"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.files, options.calls, options.rounds = 100, 20, 2
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print the table."""
    options = read_arguments(argv)
    samples: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        module = write_package(folder, options.files)
        pools = {}
        for name in CONTESTANTS:
            sync = {"sync_modules": [str(folder)]} if name == "watched" else None
            pools[name] = stack.enter_context(
                FlamePool(
                    name,
                    min=1,
                    max=1,
                    max_concurrency=2,
                    backend=pool_backend(options.backend),
                    code_sync=sync,
                )
            )
            one_after_the_other(pools[name], 20)
        order = list(turns(CONTESTANTS, options.rounds))
        for name in tqdm(order, "calls", disable=None, leave=False):
            samples[name] += one_after_the_other(pools[name], options.calls)
        edits = after_edits(pools["watched"], module, options.rounds * 5)

    print(
        f"calls one after the other, {options.rounds} x {options.calls} each,"
        f" {options.files} watched files, {options.backend} cluster"
    )
    lines = []
    for title, figure in (
        ("p50", statistics.median),
        ("p90", lambda them: percentile(them, 90)),
    ):
        watched, without = (1000 * figure(samples[name]) for name in CONTESTANTS)
        more = watched - without
        cells = [f"{watched:.2f} ms", f"{without:.2f} ms", f"{watched / without:.2f}"]
        wanted = ["<= 0.3 ms", "yes" if more <= 0.3 else "NO"] if title == "p50" else ["", ""]
        lines.append([title, *cells, f"{more:+.2f} ms", *wanted])
    late = 1000 * statistics.median(edits) - 1000 * statistics.median(samples["watched"])
    cells = [f"{1000 * statistics.median(edits):.2f} ms", "", "", f"{late:+.2f} ms", "< 100 ms"]
    lines.append(["p50 after an edit", *cells, "yes" if late < 100 else "NO"])
    print(table(["", *CONTESTANTS, "ratio", "more", "wanted", "met"], lines))


if __name__ == "__main__":
    sys.exit(main())

"""The benchmarks run to their end and print their tables. What the figures are is not tested."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import flame_dask

# As a user starts it: without measurement of coverage, but with the package that is tested.
ENVIRONMENT = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
ENVIRONMENT["PYTHONPATH"] = str(Path(flame_dask.__file__).parents[1])
ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(find_spec("tqdm") is None, reason="not installed: tqdm (extra: demo)"),
]


@pytest.fixture
def run_bench(tmp_path, without_cut_heartbeats):
    """Run a benchmark; return the lines that it printed."""

    def start(name, *arguments):
        bench = ROOT / "ci" / "bench" / name
        run = subprocess.run(
            [sys.executable, "-W", "error", bench, "--quick", *arguments],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=170,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert "Traceback" not in without_cut_heartbeats(run.stderr), run.stderr
        assert list(tmp_path.iterdir()) == []
        return run.stdout.splitlines()

    return start


@pytest.mark.parametrize("backend", ["local", "subprocess"])
def test_calls(backend, run_bench):
    what, head, rule, *lines = run_bench("calls.py", "--backend", backend)
    assert backend in what
    assert head.split() == ["flame_dask", "plain", "Dask", "ratio", "wanted", "met"]
    assert set(rule) == {"-"}
    assert [line[: line.index("  ")] for line in lines] == [
        "one call after the other, p50",
        "one call after the other, p99",
        "200 calls at once",
        "2 MB of bytes, there and back",
        "2 MB of array, there and back",
    ]
    for line in lines:
        assert line.count(" ms") + line.count(" /s") == 2


def test_calls_of_a_function_of_main(run_bench):
    lines = run_bench("calls.py", "--by-value", "--workers", "1")
    assert lines[0].startswith("1 workers of 2 threads each")
    assert len(lines) == 8


def test_cold(run_bench):
    what, head, _, *lines = run_bench("cold.py")
    assert what.startswith("1 cold calls each")
    assert head.split() == ["median", "least", "most", "ratio", "wanted", "met"]
    names = ["flame_dask", "scale(1), one task", "adapt(0, 1)"]
    assert [line[: line.index("  ")] for line in lines] == names
    assert all(line.count(" s") >= 3 for line in lines)


def test_idle(run_bench):
    what, head, _, line = run_bench("idle.py")
    assert "1 x 1 s each" in what
    assert head.split() == ["flame_dask", "plain", "Dask", "more", "wanted", "met"]
    assert line.startswith("one runner, no calls")
    assert line.count(" %") == 4

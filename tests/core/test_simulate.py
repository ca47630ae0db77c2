"""ci/bench/simulate.py on small numbers: it runs, and its figures are right."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "ci" / "bench" / "simulate.py"
# The checkout that is tested, whether it is installed or not.
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def simulate(*args: str) -> dict[str, str]:
    """Return what it prints, by name."""
    lines = output(*args).splitlines()
    return {line[:18].strip(): line[18:].strip() for line in lines}


def output(*args: str) -> str:
    command = [sys.executable, str(PROGRAM), *args]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENV)
    return done.stdout


def test_a_trace(tmp_path):
    trace = tmp_path / "calls.csv"
    trace.write_text("arrival,duration\n100,10\n\n101,10\n100,5\n")
    figures = simulate(
        *("--trace", str(trace), "--runners", "2", "--idle", "5", "--boot", "0", "--stop", "0")
    )
    assert figures["calls"] == figures["ended"] == "3"
    assert figures["makespan"] == "15.0 s"  # the third waits until 105
    assert figures["runner-seconds"] == "30"  # from 100 to 115, both
    assert figures["most runners"] == figures["boots"] == "2"
    assert figures["wait p50"] == "0.000 s"
    assert figures["longest wait"] == "4.000 s"
    assert figures["events"] == "12"  # opening, and closing; a call each, its end; two boots, stops


def test_a_trace_that_can_not_be_read(tmp_path):
    trace = tmp_path / "calls.csv"
    trace.write_text("1,2\nsoon,3\n")
    command = [sys.executable, str(PROGRAM), "--trace", str(trace)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=ENV)
    assert done.returncode == 1
    assert "calls.csv:2" in done.stderr
    assert "Traceback" not in done.stderr


# Whatever can happen, on a small scale.
EVENTFUL = ["--calls", "2000", "--runners", "20", "--day", "3600", "--duration", "5"]
EVENTFUL += ["--max-concurrency", "4", "--buffer", "1", "--placement", "pack", "--min", "2"]
EVENTFUL += ["--boot-failures", "0.2", "--mtbf", "600", "--queue-timeout", "60"]


@pytest.mark.parametrize("workload", ["poisson", "spike", "diurnal"])
def test_a_workload_that_everything_happens_to(workload):
    figures = simulate(*EVENTFUL, "--workload", workload, "--seed", "4")
    number = {name: int(figures[name].replace(",", "")) for name in ("ended", "expired", "lost")}
    assert figures["calls"] == "2,000"
    assert sum(number.values()) == 2000
    assert number["lost"] > 0
    assert int(figures["boots that failed"]) > 0
    assert int(figures["most runners"]) <= 20


def test_equal_seeds_give_equal_figures():
    first, again, other = (simulate(*EVENTFUL, "--seed", seed) for seed in "334")
    for figures in (first, again, other):
        del figures["time per event"], figures["wall time"]
    assert first == again
    assert first != other


def test_scaling():
    args = ["--scaling-calls", "500", "--scaling-runners", "100", "--scaling-waiters", "1000"]
    args += ["--scaling-seconds", "0"]
    lines = output("--scaling", *args).splitlines()
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows if row] == [
        *("500", "runners", "10", "100"),
        *("so", "waiters", "10", "100", "1,000"),
    ]
    assert [row[3] for row in rows if row and row[0] == "10"] == ["1.00", "1.00"]

"""The chaos harness: a short run of it holds all rules, and its accounting would notice if not."""

import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import flame_dask

ROOT = Path(__file__).parents[2]
BENCH = ROOT / "ci" / "bench"

# As a user starts it: without measurement of coverage, but with the package that is tested.
ENVIRONMENT = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
ENVIRONMENT["PYTHONPATH"] = str(Path(flame_dask.__file__).parents[1])

pytestmark = pytest.mark.skipif(
    find_spec("tqdm") is None, reason="not installed: tqdm (extra: demo)"
)

FIGURES = [
    "calls",
    "a value",
    "what their function raised",
    "starts of functions",
    "most of one call, without retries",
    "calls over after their deadline",
    "calls without an end that had started",
    "of them ended by the pool",
    "longest that one went on after its end",
    "runners by status",
    "runners by processes",
    "signals sent to runners",
    "boots",
    "parents",
    "processes left behind",
    "files left behind",
    "sockets left behind",
]


def run_chaos(*arguments, cwd):
    return subprocess.run(
        [sys.executable, BENCH / "chaos.py", *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def names_of(output):
    return [re.split(r"\s{2,}", line.strip())[0] for line in output.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_e3_f1_f3_g3_a_short_chaos_holds_all_rules(tmp_path):
    run = run_chaos("--seed", "62", "--minutes", "0.25", "--blows", "40", cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "All rules held." in run.stdout
    assert set(FIGURES) <= set(names_of(run.stdout)), run.stdout
    # How far it comes depends on what else the machine has to do.
    calls = re.search(r"^calls +([\d,]+) ", run.stdout, re.MULTILINE)
    assert calls is not None
    assert calls[1] != "0", run.stdout
    assert list(tmp_path.iterdir()) == []


# -- the accounting, with forged records ----------------------------------------------------------


class Forger:
    """Writes the records of a run in which all went well, but for what a test adds."""

    def __init__(self, folder, append):
        self.folder, self._append = folder, append
        options = {"max": 2, "max_concurrency": 1, "single_use": False, "shutdown_timeout": 3.0}
        self.options = options
        self.world("life", life="0-1", options=options, at=0.0)
        self.world("ending", life="0-1", how="closed", at=100.0)
        self.parent("status", most=2, max=2, samples=9, at=50.0)
        self.call("fine")
        self.start("fine", at=10.5)
        self.over("fine")

    def world(self, what, **fields):
        self._append(self.folder / "world.jsonl", what, **fields)

    def parent(self, what, **fields):
        self._append(self.folder / "calls-0-1.jsonl", what, **{"life": "0-1", **fields})

    def call(self, call, **fields):
        made = {"kind": "work", "how": "call", "limit": 5.0, "retries": 0, "link": True, "at": 10.0}
        self.parent("made", call=call, **{**made, **fields})

    def over(self, call, **fields):
        over = {"outcome": "value", "due": 15.0, "at": 11.0}
        self.parent("over", call=call, **{**over, **fields})

    def start(self, call, what="start", **fields):
        there = {"pid": 7, "runner": 7, "at": 10.5}
        self._append(self.folder / "starts.jsonl", what, call=call, **{**there, **fields})

    def finish(self, most=2, **fields):
        gone = {"after": 1.0, "exit_code": 0, "processes": [], "files": [], "sockets": []}
        self.world("runners", life="0-1", most=most, looks=9)
        self.world("gone", life="0-1", **{**gone, **fields})
        self.world("run", seconds=60.0)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def forger(bench, tmp_path):
    return Forger(tmp_path, bench("chaos_calls").append)


@pytest.fixture
def broken(bench, tmp_path):
    """Close the books, and return the sentences about broken rules."""
    return lambda: bench("chaos_account").account(tmp_path).broken


def test_books_of_a_run_without_faults(forger, broken):
    forger.finish()
    assert broken() == []


def test_f1_a_double_start_is_noticed(forger, broken):
    forger.call("twice")
    forger.start("twice")
    forger.start("twice", runner=8)
    forger.over("twice")
    forger.finish()
    [sentence] = broken()
    assert sentence.startswith("F1: call twice (work, call) with retries=0 started 2 times")


def test_f1_retries_allow_as_many_starts_more(forger, broken):
    forger.call("often", retries=1)
    for runner in (7, 8):
        forger.start("often", runner=runner)
    forger.over("often")
    forger.finish()
    assert broken() == []
    forger.start("often", runner=9)
    [sentence] = broken()
    assert "retries=1 started 3 times" in sentence


def test_f1_a_start_of_a_call_that_nobody_made_is_noticed(forger, broken):
    forger.start("unheard of")
    forger.finish()
    assert broken() == ["F1: unheard of started, but nobody has made that call"]


@pytest.mark.parametrize("end", ["late", "hung", "never"])
def test_f3_a_hanging_call_is_noticed(forger, broken, end):
    forger.call("slow")
    if end == "late":
        forger.over("slow", at=21.0, outcome="error", error="CallTimeout", detail="running")
    elif end == "hung":
        forger.over("slow", at=30.0, outcome="hung")
    forger.finish()
    words = {"late": "6.0 s after its deadline", "hung": "hung", "never": "had no outcome"}
    assert any(s.startswith("F3: call slow") and words[end] in s for s in broken())


def test_f3_a_killed_parent_owes_no_outcome_before_the_deadline(forger, broken):
    forger.world("ending", life="0-1", how="killed", at=100.0)
    forger.call("cut off", at=94.0)
    forger.finish(exit_code=-9)
    assert broken() == []
    forger.call("overdue", at=80.0)
    [sentence] = broken()
    assert sentence == ("F3: call overdue (work, call) had no outcome 15.0 s after its deadline")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"outcome": "untyped", "text": "OSError: pipe"}, "ended badly (untyped): OSError: pipe"),
        ({"outcome": "wrong"}, "another value"),
        ({"outcome": "value"}, "its function has never started"),
        ({"outcome": "error", "error": "PoolClosed"}, "raised PoolClosed for no reason"),
        ({"outcome": "error", "error": "CallCancelled"}, "raised CallCancelled for no reason"),
        ({"outcome": "error", "error": "PoolOptionsError"}, "PoolOptionsError for no reason"),
    ],
)
def test_f4_a_bad_outcome_is_noticed(forger, broken, fields, words):
    forger.call("odd")
    forger.over("odd", **fields)
    forger.finish()
    [sentence] = broken()
    assert words in sentence


def test_f3_two_outcomes_are_noticed(forger, broken):
    forger.over("fine", outcome="error", error="RunnerLost")
    forger.finish()
    assert broken() == ["F3/F4: call fine (work, call) had 2 outcomes"]


def test_d3_a_loss_without_a_cause_is_noticed(forger, broken):
    forger.call("lost")
    forger.start("lost")
    forger.over("lost", outcome="error", error="RunnerLost", detail="exited")
    forger.finish()
    assert any(s.startswith("D3/F2: call lost") for s in broken())
    forger.world("hit", life="0-1", pid=7, signal="SIGKILL")
    assert broken() == []


def test_c1_too_many_runners_are_noticed(forger, broken):
    forger.parent("status", most=3, max=2, samples=1)
    forger.finish(most=4)
    assert broken() == [
        "C1: parent 0-1 had 3 runners in its status, with max=2",
        "C1: parent 0-1 had 4 runner processes, with max=2",
    ]


def test_c1_a_run_in_which_nobody_looked_is_noticed(forger, broken):
    for number in range(20):
        forger.call(f"c{number}")
        forger.start(f"c{number}")
        forger.over(f"c{number}")
    forger.parent("no-status", text="OSError: pipe")
    forger.finish(most=0)
    assert broken() == [
        "C10: the status of parent 0-1 raised OSError: pipe",
        "C1: nobody has seen the runners of parent 0-1",
    ]


def test_e3_work_that_goes_on_is_noticed(forger, broken):
    for call in ("loops", "ends", "runs"):
        forger.call(call, kind="spins", limit=1.0)
        forger.start(call)
        error = {"error": "CallTimeout", "detail": "running"}
        forger.over(call, outcome="error", due=11.0, at=11.5, **error)
    forger.start("loops", "beat", at=20.0)
    forger.start("ends", "end", at=12.0)
    forger._append(forger.folder / "work.jsonl", "work", call="runs", seen=30.0)
    forger.finish()
    assert broken() == [
        "E3: call loops (spins, call): its function went on for 8.5 s after its end",
        "E3: call ends (spins, call) was not ended: its function came to its end",
        "E3: call runs (spins, call): its program went on for 18.5 s after its end",
    ]


def test_d5_a_second_call_of_a_single_use_runner_is_noticed(forger, broken):
    forger.options["single_use"] = True
    forger.world("life", life="0-1", options=forger.options, at=0.0)
    forger.world("ending", life="0-1", how="closed", at=100.0)
    forger.call("second")
    forger.start("second", at=12.0)
    forger.over("second")
    forger.finish()
    assert broken() == ["D5: runner 7 of parent 0-1 ran 2 calls: fine, second"]


@pytest.mark.parametrize("what", ["processes", "files", "sockets"])
def test_a6_what_is_left_is_noticed(forger, broken, what):
    forger.finish(**{what: ["something"]})
    [sentence] = broken()
    assert sentence.startswith("A6/G3: ")
    assert "something" in sentence


def test_a6_a_parent_that_fails_is_noticed(forger, broken):
    forger.finish(exit_code=1)
    assert broken() == ["A6: parent 0-1 was closed, and ended with exit code 1"]


def test_a_broken_rule_is_told_with_the_seed(forger, tmp_path):
    forger.start("fine", runner=8)
    forger.finish()
    run = run_chaos("--check", str(tmp_path), "--seed", "17", cwd=tmp_path)
    assert run.returncode == 1, run.stderr
    assert "BROKEN, with seed 17:\n  F1: call fine (work, call)" in run.stdout

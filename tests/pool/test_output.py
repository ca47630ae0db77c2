"""What calls print and log reaches the parent (B8)."""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed.deploy.subprocess import SubprocessCluster

from flame_dask import FlamePool
from support import wait_for_file

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]


class Heard(logging.Handler):
    """Keeps the records of one pool."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def lines(self, source: str | None = None) -> list[str]:
        found = [r for r in self.records if source in (None, vars(r)["flame_source"])]
        return [str(r.args[2]) for r in found if r.args]


@pytest.fixture
def heard() -> Iterator[Heard]:
    logger, handler = logging.getLogger("flame.loud"), Heard()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture
def loud(make_pool: MakePool, request: pytest.FixtureRequest) -> FlamePool:
    isolation = getattr(request, "param", "thread")
    return make_pool(
        name="loud", max=1, max_concurrency=4, log=True, isolation=isolation,
        backend=SubprocessCluster, boot_timeout=30,
    )  # fmt: skip


both = pytest.mark.parametrize("loud", ["thread", "process"], indirect=True)


def say(gate: str) -> str:
    print("one\ntwo")
    print("three", "four", sep=", ", end="")
    print(" and five")
    print("to the other", file=sys.stderr)
    logging.getLogger("mine").warning("logged %d", 6)
    logging.getLogger("mine").debug("not this")
    warnings.warn("careful", stacklevel=1)
    wait_for_file(gate)
    print("unfinished", end="")
    return "value"


@both
def test_b8_line_by_line_while_the_call_runs(
    loud: FlamePool, heard: Heard, tmp_path: Path, until: Until
) -> None:
    gate = tmp_path / "gate"
    future = loud.submit(say, str(gate))
    until(lambda: any("careful" in line for line in heard.lines("stderr")), 20)
    assert heard.lines("stdout") == ["one", "two", "three, four and five"]
    assert heard.lines("mine") == ["logged 6"]
    assert heard.lines("stderr")[0] == "to the other"
    assert not future.done()
    gate.touch()
    assert future.result(10) == "value"
    until(lambda: heard.lines("stdout")[-1] == "unfinished", 5)
    [runner] = loud.status().runners
    for record in heard.records:
        known = vars(record)
        assert known["flame_pool"] == "loud"
        assert known["flame_runner"] == runner.id
        assert known["flame_call"] == future.key
        assert record.getMessage().startswith(f"{runner.id} {future.key}: ")
    levels = {vars(r)["flame_source"]: r.levelno for r in heard.records}
    assert levels == {"stdout": logging.INFO, "stderr": logging.WARNING, "mine": logging.WARNING}


def whisper(word: str) -> None:
    for _ in range(50):
        print(word)


@both
def test_b8_lines_of_calls_at_the_same_time_are_told_apart(
    loud: FlamePool, heard: Heard, until: Until
) -> None:
    futures = {word: loud.submit(whisper, word) for word in ("a", "b", "c")}
    for future in futures.values():
        future.result(30)
    until(lambda: len(heard.records) == 150, 10)
    for word, future in futures.items():
        lines = [r.args[2] for r in heard.records if vars(r)["flame_call"] == future.key and r.args]
        assert lines == [word] * 50


async def murmur() -> None:
    print("from a coroutine")


@both
def test_b8_coroutines_casts_children_and_streams(
    loud: FlamePool, heard: Heard, until: Until
) -> None:
    loud.call(murmur)
    loud.cast(print, "from a cast")
    assert list(loud.stream(chatter)) == [1]
    child = loud.place_child(Talker)
    child.talk("from a child")
    child.stop()
    expected = {
        "from a coroutine", "from a cast", "from a stream", "made", "from a child", "stopped",
    }  # fmt: skip
    until(lambda: set(heard.lines("stdout")) == expected, 10)


def chatter() -> Iterator[int]:
    print("from a stream")
    yield 1


class Talker:
    def __init__(self) -> None:
        print("made")

    def talk(self, text: str) -> None:
        print(text)

    def stop(self) -> None:
        print("stopped")


def elsewhere() -> None:
    thread = threading.Thread(target=print, args=("from a thread of its own",))
    thread.start()
    thread.join()
    sys.stdout.write("x" * 40_000)


def test_b8_what_is_long_is_cut_and_what_is_not_its_own_is_left(
    loud: FlamePool, heard: Heard, until: Until
) -> None:
    loud.call(elsewhere)
    until(heard.lines, 5)
    [line] = heard.lines()
    assert set(line) == {"x"}
    assert len(line) <= 16 * 1024


def test_b8_nothing_comes_without_it(
    make_pool: MakePool, heard: Heard, capfd: pytest.CaptureFixture[str], until: Until
) -> None:
    pool = make_pool(name="loud", max=1, backend=SubprocessCluster, boot_timeout=30)
    pool.call(print, "hello there", flush=True)
    until(lambda: "hello there" in capfd.readouterr().out, 5)
    assert heard.records == []

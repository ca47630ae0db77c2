"""A runner ends with its parent, and nothing of it is left however it dies (G1-G3)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame_dask.runner import guard as guards
from flame_dask.runner.guard import Guard
from support import doze, run, sleep

Until = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("kills_runners")


def hold_everything(path: str, seconds: float) -> None:
    """Don't let any other thread of Python run."""
    import ctypes

    Path(path).write_text(str(os.getpid()))
    ctypes.PyDLL(None).usleep(int(seconds * 1e6))


def gone(runner: Any) -> bool:
    return not runner.relatives() and not os.path.exists(runner.folder)


def test_g3_a_runner_has_a_guard_and_no_input(bench: Any) -> None:
    runner = bench.process()
    line = bench.value(bench.submit(runner.address, lambda: (os.read(0, 1), sorted(os.environ))))
    assert line[0] == b""
    assert not [name for name in line[1] if name.startswith("FLAME_RUNNER")]
    extra = set(runner.relatives()) - set(runner.members())
    assert len(extra) >= 1


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_g1_g3_the_parent_dies(bench: Any, tmp_path: Path, until: Until, isolation: str) -> None:
    """Linked work goes at once, with what it has started, and then the runner."""
    runner = bench.process(isolation=isolation)
    paths = [tmp_path / str(n) for n in range(3)]
    bench.submit(runner.address, doze, str(paths[0]))
    bench.submit(runner.address, run, str(paths[1]), "sh", "-c", "sleep 60 & wait")
    bench.submit(runner.address, sleep, str(paths[2]), 60)  # can't be ended in a thread
    until(lambda: all(path.exists() for path in paths))
    begun = time.monotonic()
    runner.parent_dies()
    until(lambda: gone(runner), 8)
    assert time.monotonic() - begun < 6


def test_g2_unlinked_work_outlives_the_parent(bench: Any, path: Path, until: Until) -> None:
    runner = bench.process(shutdown_timeout=10)
    linked = path.with_name("linked")
    bench.submit(runner.address, doze, str(linked))
    bench.submit(runner.address, sleep, str(path), 2, link=False)
    until(lambda: path.exists() and linked.exists())
    assert Path(runner.folder, guards.UNLINKED).read_text() == "10\n"
    runner.parent_dies()
    until(path.with_suffix(".done").exists, 5)
    until(lambda: gone(runner), 5)


def test_g2_unlinked_work_has_to_end_at_last(bench: Any, path: Path, until: Until) -> None:
    runner = bench.process(shutdown_timeout=0.5)
    bench.submit(runner.address, sleep, str(path), 60, link=False)
    until(path.exists)
    begun = time.monotonic()
    runner.parent_dies()
    until(lambda: gone(runner), 8)
    assert 0.5 <= time.monotonic() - begun < 4


@pytest.mark.slow
def test_g3_a_runner_that_is_stopped_goes_with_its_parent(bench: Any, until: Until) -> None:
    runner = bench.process()
    os.kill(runner.pid, signal.SIGSTOP)
    begun = time.monotonic()
    runner.parent_dies()
    until(lambda: gone(runner), 12)
    assert time.monotonic() - begun < 10


@pytest.mark.slow
def test_g3_a_runner_that_hangs_in_c_code_goes_with_its_parent(
    bench: Any, path: Path, until: Until
) -> None:
    runner = bench.process()
    bench.submit(runner.address, hold_everything, str(path), 60)
    until(path.exists)
    runner.parent_dies()
    until(lambda: gone(runner), 12)


def test_g3_a_blocked_event_loop_does_not_save_a_runner(
    bench: Any, path: Path, until: Until
) -> None:
    async def block(path: str) -> None:
        Path(path).write_text("begun")
        time.sleep(60)

    runner = bench.process()
    bench.submit(runner.address, block, str(path), asynchronous=True)
    until(path.exists)
    runner.parent_dies()
    until(lambda: gone(runner), 8)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_g3_nothing_is_left_of_a_runner_that_is_killed(
    bench: Any, tmp_path: Path, until: Until, isolation: str, number: int
) -> None:
    runner = bench.process(isolation=isolation)
    paths = [tmp_path / str(n) for n in range(2)]
    bench.submit(runner.address, doze, str(paths[0]))
    bench.submit(runner.address, run, str(paths[1]), "sh", "-c", "trap '' TERM; sleep 60 & wait")
    until(lambda: all(path.exists() for path in paths))
    until(lambda: len(runner.members()) >= 3)
    os.kill(runner.pid, number)
    until(lambda: gone(runner), 3)


def test_g3_a_parent_that_dies_before_its_runner_is_up(bench: Any, until: Until) -> None:
    process = bench.start("tcp://127.0.0.1:9")
    until(lambda: len(process.relatives()) > len(process.members()) > 0, 20)  # its guard is there
    process.parent_dies()
    process.process.wait(5)
    until(lambda: gone(process))


def test_g3_a_runner_that_never_reaches_its_scheduler_ends(bench: Any, until: Until) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        process = bench.start(f"tcp://127.0.0.1:{deaf.getsockname()[1]}", boot_timeout=2)
        assert process.process.wait(10) == 1
    until(lambda: gone(process))


def test_g3_a_worker_that_nobody_makes_a_runner_ends(bench: Any, until: Until) -> None:
    """Its scheduler has no pool."""
    process = bench.start(bench.scheduler.address, boot_timeout=2)
    assert process.process.wait(10) == 1
    until(lambda: gone(process))


def test_g3_a_preload_elsewhere_does_nothing(tmp_path: Path) -> None:
    code = (
        "import os, threading, flame_dask.runner.boot, flame_dask.runner.lifeline as lifeline;"
        "print(lifeline.watch, threading.active_count(), os.read(0, 3))"
    )
    # Neither with a pipe as standard input, nor in a child of a runner without one.
    for env, given in ((None, b"abc"), ({"FLAME_RUNNER_FOLDER": str(tmp_path)}, None)):
        stdin = {"input": given} if given else {"stdin": subprocess.DEVNULL}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **(env or {})},
            stdout=subprocess.PIPE,
            check=True,
            **stdin,  # type: ignore[arg-type]
        )
        assert done.stdout.split() == [b"None", b"1", b"b'abc'" if given else b"b''"]
    assert tmp_path.exists()


# -- the guard by itself -------------------------------------------------------------------------


@pytest.fixture
def sleeper() -> Any:
    made = []

    def make() -> subprocess.Popen[bytes]:
        made.append(subprocess.Popen(["sleep", "60"], process_group=0))
        return made[-1]

    yield make
    for process in made:
        process.kill()
        process.wait()


def guard_processes(folder: Path) -> list[Any]:
    import psutil

    return [p for p in psutil.process_iter(["cmdline"]) if str(folder) in (p.info["cmdline"] or [])]


def test_g3_the_guard_kills_the_groups_that_are_left(
    tmp_path: Path, until: Until, sleeper: Any
) -> None:
    folder = tmp_path / "a folder; with 'odd' $name"
    folder.mkdir()
    (folder / "file").touch()
    groups = [sleeper() for _ in range(4)]
    own = sleeper()
    guard = Guard(own.pid, str(folder))
    for process in groups:
        guard.add(process.pid)
    guard.remove(groups[1].pid)
    guard.remove(groups[2].pid)
    guard.add(groups[2].pid)
    assert len(guard_processes(folder)) == 1
    guard.close()
    until(lambda: not folder.exists())
    # Each has its signal by now, but nothing is said of the order in which they die of it.
    until(lambda: [p.poll() for p in (own, *groups[:1], *groups[2:])] == [-9] * 4)
    assert groups[1].poll() is None
    until(lambda: not guard_processes(folder))


def test_g3_a_forked_child_does_not_keep_the_guard(tmp_path: Path, until: Until) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    code = (
        "import os, sys, time; from flame_dask.runner.guard import Guard;"
        "guard = Guard(None, sys.argv[1]);"
        "child = os.fork() or (time.sleep(3), os._exit(0));"
        "os.kill(os.getpid(), 9)"
    )
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", code, str(folder)], check=False)
    until(lambda: not folder.exists(), 2)
    assert time.monotonic() - begun < 3


def test_g3_the_guard_has_a_clock_for_a_runner_that_hangs(
    tmp_path: Path, until: Until, sleeper: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "HUNG", 1)
    read, write = os.pipe()
    hung = sleeper()
    guard = Guard(hung.pid, str(tmp_path / "none"), read)
    os.close(read)
    assert hung.poll() is None
    os.close(write)
    begun = time.monotonic()
    until(lambda: hung.poll() is not None, 4)
    assert time.monotonic() - begun >= 0.9
    guard.close()
    until(lambda: not guard_processes(tmp_path / "none"))


@pytest.mark.parametrize(("limit", "seconds"), [(1.0, 2), (None, None)])
def test_g2_the_guard_lets_unlinked_work_go_on(
    tmp_path: Path,
    until: Until,
    sleeper: Any,
    monkeypatch: pytest.MonkeyPatch,
    limit: float | None,
    seconds: float | None,
) -> None:
    monkeypatch.setattr(guards, "HUNG", 1)
    read, write = os.pipe()
    hung = sleeper()
    folder = tmp_path / "folder"
    folder.mkdir()
    guard = Guard(hung.pid, str(folder), read)
    os.close(read)
    guard.limit = limit
    for by in (+1, +1, -1):
        guard.count_unlinked(by)
    os.close(write)
    begun = time.monotonic()
    if seconds is None:
        until(lambda: time.monotonic() - begun > 1.5)
        assert hung.poll() is None
    else:
        until(lambda: hung.poll() is not None, 5)
        assert time.monotonic() - begun >= seconds - 0.1
    guard.count_unlinked(-1)
    assert not Path(folder, guards.UNLINKED).exists()
    guard.close()
    until(lambda: not guard_processes(folder))


def test_g3_no_guard_can_be_had(caplog: pytest.LogCaptureFixture, sleeper: Any) -> None:
    """It is no reason not to run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "SHELL", "/no/such/shell")
        guard = Guard()
    assert "no guard" in caplog.text
    guard.add(1)
    guard.close()

"""Who may go on without whom: callers, parents, runners, schedulers (E4, G1-G3)."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import LocalCluster
from distributed.deploy.subprocess import SubprocessCluster

from flame_dask import FlamePool
from support import QUIET, alive, lines, pids

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("kills_runners")

BACKENDS = {"local": (LocalCluster, QUIET), "subprocess": (SubprocessCluster, QUIET)}
LOCAL = BACKENDS["local"]

#: Seconds within which all is gone that a dead parent has left, and that may not go on.
SOON = 3.0


def loop(log: str) -> None:
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    try:
        while True:
            time.sleep(0.005)
    finally:
        with open(log, "a") as file:
            file.write("over\n")


def finish(log: str, seconds: float) -> int:
    """Say when it starts, and leave a file if it comes to its end."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)  # in small pieces: it can be ended
    Path(f"{log}.finished").touch()
    return os.getpid()


# -- the caller and its future ---------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_g1_the_last_reference_to_a_future_goes(
    make_pool: MakePool, tmp_path: Path, until: Until, isolation: str
) -> None:
    backend = LOCAL if isolation == "thread" else BACKENDS["subprocess"]
    pool = make_pool(max=1, max_concurrency=4, isolation=isolation, backend=backend)
    log, kept_log = tmp_path / "log", tmp_path / "kept"
    future = pool.submit(loop, str(log))
    kept = pool.submit(finish, str(kept_log), 1)
    also = kept
    until(lambda: lines(log) and lines(kept_log), 20)
    del future, also
    gc.collect()
    if isolation == "thread":
        until(lambda: lines(log)[-1] == "over", 2)
    else:
        until(lambda: not alive(*pids(log)), 2)
    until(lambda: pool.status().leases <= 1, 2)
    # That of which there is a reference yet has gone on.
    assert kept.result(10) == pids(kept_log)[0]
    counters = pool.status().counters
    assert (counters["released"], counters["lost"]) == (1, 0)


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_g2_an_unlinked_call_needs_no_future(
    make_pool: MakePool, tmp_path: Path, until: Until, isolation: str
) -> None:
    pool = make_pool(max=1, max_concurrency=4, isolation=isolation, backend=LOCAL)
    log = tmp_path / "log"
    pool.submit(finish, str(log), 0.7, link=False)
    gc.collect()
    until(Path(f"{log}.finished").exists, 20)
    until(lambda: pool.status().leases == 0)
    assert len(pids(log)) == 1
    assert pool.status().counters["released"] == 0


def test_g2_an_unlinked_call_is_like_others_for_a_caller_who_is_there(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    def fail() -> None:
        raise ValueError("still heard of")

    pool = make_pool(max=1, max_concurrency=4, backend=LOCAL)
    assert pool.call(pow, 2, 3, link=False) == 8
    with pytest.raises(ValueError, match="still heard of"):
        pool.call(fail, link=False)
    with pytest.raises(TimeoutError):
        pool.call(loop, str(tmp_path / "late"), link=False, timeout=0.3)
    until(lambda: lines(tmp_path / "late")[-1] == "over")
    cancelled = pool.submit(loop, str(tmp_path / "cancelled"), link=False)
    until(lambda: lines(tmp_path / "cancelled"))
    cancelled.cancel()
    until(lambda: lines(tmp_path / "cancelled")[-1] == "over")


def test_g2_an_unlinked_call_and_the_closing_of_its_pool(
    make_pool: MakePool, backend: Any, tmp_path: Path, until: Until
) -> None:
    """It has ``shutdown_timeout`` (A6), and no more."""
    pool = make_pool(max=1, max_concurrency=4, shutdown_timeout=1.5)
    short, long = tmp_path / "short", tmp_path / "long"
    pool.submit(finish, str(short), 1, link=False)
    pool.submit(finish, str(long), 20, link=False)
    until(lambda: lines(short) and lines(long), 20)
    gc.collect()
    began = time.monotonic()
    pool.close()
    assert 0.5 < time.monotonic() - began < 5
    assert Path(f"{short}.finished").exists()
    assert not Path(f"{long}.finished").exists()
    assert not alive(*pids(short), *pids(long))


# -- the parent ------------------------------------------------------------------------------------

HEAD = """
import os, signal, subprocess, sys, time
from pathlib import Path
from flame_dask import FlamePool
from distributed import LocalCluster
from distributed.deploy.subprocess import SubprocessCluster

def note(log):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")

def stay(log):
    note(log)
    while True:
        time.sleep(0.01)

def run(log):
    note(log)
    script = 'sleep 60 & echo "$!" >> "$0"; echo "$$" >> "$0"; wait'
    subprocess.run(["sh", "-c", script, log])

def hang(log):
    note(log)
    time.sleep(60)

def finish(log, seconds):
    note(log)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)  # in small pieces: it can be ended
    Path(f"{log}.finished").touch()

async def nap(log):
    import asyncio
    note(log)
    await asyncio.sleep(60)

"""


class Program:
    """A script with a pool, which is to die; all that it starts carries a mark."""

    def __init__(self, folder: Path, backend: str, body: str, *args: str) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        main = textwrap.indent(textwrap.dedent(body), "    ")
        cls, options = BACKENDS[backend]
        path = folder / "program.py"
        path.write_text(
            f"{HEAD}BACKEND = ({cls.__name__}, {options!r})\n\nif __name__ == '__main__':\n{main}"
        )
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, str(path), *args],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root), "FLAME_TEST_MARK": self.mark},
        )

    def kill(self) -> None:
        """SIGKILL: it has no time for anything."""
        self.process.kill()
        self.process.wait()

    def left(self) -> list[str]:
        """All that runs of what it has started, wherever in the tree of processes that is now."""
        found = []
        for process in psutil.process_iter():
            # Another one's environment can't be read; one that has just ended has none.
            with contextlib.suppress(psutil.Error, OSError):
                marked = process.environ().get("FLAME_TEST_MARK") == self.mark
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
        return found

    def sweep(self) -> None:
        """End all of it, whatever the test has come to."""
        self.process.kill()
        self.process.communicate()
        for line in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)


Run = Callable[..., Program]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Run]:
    started: list[Program] = []

    def start(backend: str, body: str, *args: str) -> Program:
        started.append(Program(tmp_path, backend, body, *args))
        return started[-1]

    yield start
    for one in started:
        one.sweep()


both = pytest.mark.parametrize("where", list(BACKENDS))


@both
@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_g1_g3_the_parent_is_killed(
    program: Run, tmp_path: Path, until: Until, where: str, isolation: str
) -> None:
    """Calls of all kinds, what they have started, runners, and a scheduler: all gone."""
    logs = {name: tmp_path / name for name in ("stay", "run", "hang", "nap")}
    running = program(
        where,
        """
        pool = FlamePool("doomed", min=2, max=2, max_concurrency=2, backend=BACKEND,
                         isolation=sys.argv[2])
        calls = {"stay": stay, "run": run, "hang": hang, "nap": nap}
        futures = [pool.submit(fn, os.path.join(sys.argv[1], name)) for name, fn in calls.items()]
        queued = [pool.submit(stay, os.path.join(sys.argv[1], "queued")) for _ in range(3)]
        time.sleep(60)
        """,
        str(tmp_path),
        isolation,
    )
    until(lambda: all(map(lines, logs.values())) and len(lines(logs["run"])) == 3, 30)
    assert len(running.left()) >= 5  # the program, two runners, sh, sleep, perhaps a scheduler
    running.kill()
    until(lambda: running.left() == [], SOON + 1, about="a dead parent's processes")
    assert not alive(*(pid for log in logs.values() for pid in pids(log)))
    assert not (tmp_path / "queued").exists()


@both
def test_g2_g3_unlinked_calls_outlive_a_killed_parent(
    program: Run, tmp_path: Path, until: Until, where: str
) -> None:
    """They come to their end, linked ones beside them do not, and then all of it goes."""
    log, linked = tmp_path / "log", tmp_path / "linked"
    running = program(
        where,
        """
        pool = FlamePool("doomed", max=1, max_concurrency=4, backend=BACKEND, shutdown_timeout=10)
        pool.submit(finish, sys.argv[1], 2, link=False)
        kept = pool.submit(finish, sys.argv[2], 1.5)
        time.sleep(60)
        """,
        str(log),
        str(linked),
    )
    until(lambda: lines(log) and lines(linked), 30)
    running.kill()
    until(Path(f"{log}.finished").exists, 5)
    until(lambda: running.left() == [], SOON, about="a dead parent's processes")
    assert not Path(f"{linked}.finished").exists()
    assert len(pids(log)) == 1


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_g2_h4_i3_the_parent_of_children_is_killed(
    program: Run, tmp_path: Path, until: Until, isolation: str
) -> None:
    """Linked ones go at once, and what is kept; one that is not linked has ``shutdown_timeout``."""
    logs = {name: tmp_path / name for name in ("linked", "unlinked", "object", "kept")}
    running = program(
        "local" if isolation == "process" else "subprocess",
        """
        from flame_dask import keep

        class Object:
            def __init__(self, log):
                self.log = log
                note(log)
            def stop(self):
                with open(self.log, "a") as file:
                    file.write("stopped")

        def leave(log):
            note(log)
            return keep(Object(log)), subprocess.Popen(["sleep", "60"])

        def path(name):
            return os.path.join(sys.argv[1], name)

        pool = FlamePool("doomed", max=1, max_concurrency=5, backend=BACKEND,
                         isolation=sys.argv[2], shutdown_timeout=2)
        children = [
            pool.place_child(stay, path("linked")),
            pool.place_child(Object, path("object")),
            pool.place_child(stay, path("unlinked"), link=False),
        ]
        kept = pool.call(leave, path("kept"), track_resources=True)
        time.sleep(60)
        """,
        str(tmp_path),
        isolation,
    )
    until(lambda: all(map(lines, logs.values())), 30)
    [going_on] = pids(logs["unlinked"])
    running.kill()
    killed = time.monotonic()
    if isolation == "process":
        until(lambda: not alive(*pids(logs["linked"])), 1.8)
    until(lambda: lines(logs["object"])[1:] == ["stopped"], 1.8)
    until(lambda: time.monotonic() > killed + 1.2)
    assert alive(going_on)
    until(lambda: running.left() == [], 2 + SOON, about="a dead parent's processes")


@both
def test_g2_g3_unlinked_calls_have_shutdown_timeout(
    program: Run, tmp_path: Path, until: Until, where: str
) -> None:
    log = tmp_path / "log"
    running = program(
        where,
        """
        pool = FlamePool("doomed", max=1, max_concurrency=4, backend=BACKEND, shutdown_timeout=1)
        pool.submit(finish, sys.argv[1], 40, link=False)
        time.sleep(60)
        """,
        str(log),
    )
    until(lambda: lines(log), 30)
    running.kill()
    killed = time.monotonic()
    until(lambda: time.monotonic() > killed + 0.7)
    assert alive(*pids(log))
    until(lambda: running.left() == [], 0.3 + SOON, about="a dead parent's processes")
    assert not Path(f"{log}.finished").exists()


@pytest.mark.slow
def test_g3_a_frozen_runner_of_a_killed_parent(program: Run, tmp_path: Path, until: Until) -> None:
    """It can't see to its own end any more: its guard does, after the last resort's time."""
    log = tmp_path / "log"
    running = program(
        "local",
        """
        pool = FlamePool("doomed", max=1, backend=BACKEND, shutdown_timeout=0)
        future = pool.submit(hang, sys.argv[1])
        time.sleep(60)
        """,
        str(log),
    )
    until(lambda: lines(log), 30)
    [runner] = pids(log)
    os.kill(runner, signal.SIGSTOP)
    running.kill()
    until(lambda: running.left() == [], 20, about="a frozen runner of a dead parent")


@pytest.mark.slow
@both
def test_g3_the_parent_is_killed_in_the_middle_of_boots(
    program: Run, tmp_path: Path, until: Until, where: str
) -> None:
    """Five times, at any moment between its first step and its last runner's call."""
    dice = random.Random(where)
    for _ in range(5):
        log = tmp_path / "log"
        running = program(
            where,
            """
            pool = FlamePool("doomed", max=3, max_concurrency=1, backend=BACKEND)
            futures = [pool.submit(run, sys.argv[1]) for _ in range(3)]
            time.sleep(60)
            """,
            str(log),
        )
        # The first second is that of the imports.
        moment = time.monotonic() + dice.uniform(0.8, 3.5)
        until(lambda moment=moment: time.monotonic() > moment)
        running.kill()
        until(lambda running=running: running.left() == [], SOON + 2, about="what was booting")
        assert not alive(*pids(log))


def test_g3_the_parent_is_killed_before_it_has_opened_the_pool(program: Run, until: Until) -> None:
    """The scheduler has the pool's plugin, which has not heard of a parent yet."""
    running = program(
        "subprocess",
        """
        from flame_dask.parent import life

        life.CallDesk = lambda *args: os.kill(os.getpid(), 9)
        FlamePool("doomed", max=1, backend=BACKEND)
        """,
    )
    assert running.process.wait(30) == -signal.SIGKILL
    until(lambda: running.left() == [], SOON + 1, about="a scheduler without a parent")


def test_g3_a_runner_that_never_gets_through_to_its_scheduler(
    program: Run, tmp_path: Path, until: Until
) -> None:
    """It ends by itself after ``boot_timeout``: its parent, which would end it, is frozen."""
    mark, slow = tmp_path / "mark", tmp_path / "slow.py"
    slow.write_text(f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid()))\n")
    with slow.open("a") as file:
        file.write("time.sleep(60)\n")
    running = program(
        "local",
        """
        cls, options = BACKEND
        backend = (cls, {**options, "preload": [sys.argv[1]]})
        FlamePool("doomed", min=1, max=1, backend=backend, boot_timeout=8)
        """,
        str(slow),
    )
    until(lambda: mark.exists() and mark.read_text(), 30)
    running.process.send_signal(signal.SIGSTOP)
    until(lambda: not alive(int(mark.read_text())), 8 + SOON)
    assert alive(running.process.pid)


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_e4_ctrl_c_during_call(program: Run, tmp_path: Path, until: Until, isolation: str) -> None:
    """The remote work is gone within two seconds, and the pool goes on."""
    log, after = tmp_path / "log", tmp_path / "after"
    running = program(
        "local",
        """
        with FlamePool("open", max=1, backend=BACKEND, isolation=sys.argv[3]) as pool:
            try:
                pool.call(run, sys.argv[1])
            except KeyboardInterrupt:
                pool.call(finish, sys.argv[2], 0)
                time.sleep(60)
        """,
        str(log),
        str(after),
        isolation,
    )
    until(lambda: len(lines(log)) == 3, 30)
    children = pids(log)[1:]
    running.process.send_signal(signal.SIGINT)
    until(lambda: not alive(*children), 2)
    until(Path(f"{after}.finished").exists, 5)
    assert alive(running.process.pid)
    if isolation == "process":
        until(lambda: not alive(*pids(log)), 2)
    running.kill()
    until(lambda: running.left() == [], SOON + 1, about="a dead parent's processes")


def test_g1_the_parent_ends_with_an_error(program: Run, tmp_path: Path, until: Until) -> None:
    """``os._exit`` runs no handlers of the interpreter's end: it is a death like others."""
    log = tmp_path / "log"
    running = program(
        "subprocess",
        """
        pool = FlamePool("doomed", max=1, backend=BACKEND)
        future = pool.submit(run, sys.argv[1])
        while not (os.path.exists(sys.argv[1]) and len(open(sys.argv[1]).readlines()) == 3):
            time.sleep(0.01)
        os._exit(1)
        """,
        str(log),
    )
    assert running.process.wait(30) == 1
    until(lambda: running.left() == [], SOON + 1, about="a dead parent's processes")
    assert not alive(*pids(log))

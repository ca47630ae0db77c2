"""Whole programs: the end of the interpreter, Ctrl-C, ``__main__`` (A6, B1, E4)."""

from __future__ import annotations

import os
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

from support import on_both, on_local

Until = Callable[..., Any]

HEAD = """
import os, signal, sys, time
import psutil
from flame_dask import FlamePool
from flame_dask.backends import process
from distributed import LocalCluster
from distributed.deploy.subprocess import SubprocessCluster

process.TERMINATE_WAIT = 0.5

def inc(x):
    return x + 1

def stay(path, seconds=30):
    open(path, "a").write(str(os.getpid()) + "\\n")
    time.sleep(seconds)

"""


class Program:
    """A script that is run in an interpreter of its own, with a pool on one of the backends."""

    def __init__(self, folder: Path, backend: Any, body: str, *args: str) -> None:
        name = "LocalCluster" if backend[0] is LocalCluster else "SubprocessCluster"
        main = textwrap.indent(textwrap.dedent(body), "    ")
        path = folder / "program.py"
        path.write_text(
            f"{HEAD}BACKEND = ({name}, {backend[1]!r})\n\nif __name__ == '__main__':\n{main}"
        )
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", str(path), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(root)},
        )
        self.below: set[psutil.Process] = set()

    def look(self) -> None:
        """Remember all processes below it, those of sessions of their own too."""
        try:
            self.below |= set(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return

    def end(self, timeout: float = 30) -> tuple[int, str, str]:
        """Wait for its end; say with which code, and what it wrote."""
        out, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, out, err

    def left(self) -> list[psutil.Process]:
        """The processes that are still there though it has ended."""
        return [p for p in self.below if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


Run = Callable[..., Program]


@pytest.fixture
def program(tmp_path: Path, backend: Any) -> Iterator[Run]:
    started: list[Program] = []

    def start(body: str, *args: str) -> Program:
        started.append(Program(tmp_path, backend, body, *args))
        return started[-1]

    yield start
    for program in started:
        for process in [*program.left(), program.process]:
            process.kill()
        program.process.communicate()


def follow(program: Program, until: Until, deadline: float = 30) -> None:
    """Go with a program to its end, and remember what it started."""

    def over() -> bool:
        program.look()
        return program.process.poll() is not None

    until(over, deadline)


@on_both("way", ["return", "thread"], local=["sys.exit", "raise"])
def test_a6_the_end_of_the_interpreter_closes_open_pools(
    program: Run, until: Until, way: str
) -> None:
    """Exit code as without a pool, no process left, nothing on stderr."""
    last = {
        "return": "print('end')",
        "sys.exit": "print('end'); sys.exit(3)",
        "raise": "print('end'); raise SystemExit('bye')",
        "thread": "import threading; threading.Timer(0.3, lambda: print('end')).start()",
    }[way]
    running = program(
        f"""
        pool = FlamePool("open", min=1, max=2, max_concurrency=1, backend=BACKEND)
        print(pool.call(inc, 1), flush=True)
        future = pool.submit(inc, 2)
        {last}
        """
    )
    follow(running, until)
    code, out, err = running.end()
    assert out.split() == ["2", "end"]
    assert err.strip() == ("bye" if way == "raise" else "")
    assert code == {"return": 0, "sys.exit": 3, "raise": 1, "thread": 0}[way]
    assert len(running.below) >= 1
    until(lambda: running.left() == [])


def test_a6_exit_with_a_running_and_a_queued_call(
    program: Run, until: Until, tmp_path: Path
) -> None:
    running = program(
        """
        pool = FlamePool("open", max=1, max_concurrency=1, backend=BACKEND, shutdown_timeout=0.2)
        futures = [pool.submit(stay, sys.argv[1]) for _ in range(2)]
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.01)
        """,
        str(tmp_path / "started"),
    )
    follow(running, until)
    code, out, err = running.end()
    assert (code, out) == (0, "")
    assert "Traceback" not in err
    until(lambda: running.left() == [])


@pytest.mark.usefixtures("kills_runners")
def test_a6_an_asynchronous_pool_that_is_left_open(program: Run, until: Until) -> None:
    """The end of its event loop ends it, although not gently."""
    running = program(
        """
        import asyncio, warnings
        warnings.simplefilter("ignore")

        async def main():
            pool = await FlamePool("open", min=1, max=1, backend=BACKEND, asynchronous=True)
            print(await pool.call(inc, 1), flush=True)

        asyncio.run(main())
        """
    )
    follow(running, until)
    code, out, _ = running.end()
    assert out.split() == ["2"]
    assert code == 0
    until(lambda: running.left() == [])


def test_e4_ctrl_c_during_a_call(program: Run, until: Until, tmp_path: Path) -> None:
    """It ends the call, and the program at once; the runner is not hit by it."""
    started = tmp_path / "started"
    running = program(
        """
        with FlamePool("open", min=1, max=1, backend=BACKEND, shutdown_timeout=1) as pool:
            try:
                pool.call(stay, sys.argv[1], 3)
            except KeyboardInterrupt:
                # The pool is still there.
                deadline = time.monotonic() + 5
                while not pool.status().counters["released"] and time.monotonic() < deadline:
                    time.sleep(0.01)
                status = pool.status()
                print(status.counters["released"], status.counters["lost"], pool.call(inc, 1))
                raise
        """,
        str(started),
    )
    until(started.exists, 30)
    running.look()
    began = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    code, out, err = running.end(timeout=20)
    assert time.monotonic() - began < 15
    assert out.split() == ["1", "0", "2"]
    assert code in (-signal.SIGINT, 130, 1)
    assert "KeyboardInterrupt" in err
    until(lambda: running.left() == [])


def test_e4_ctrl_c_at_the_terminal_reaches_the_parent_alone(
    program: Run, backend: Any, until: Until, tmp_path: Path
) -> None:
    """It goes to the whole process group, of which runners and schedulers are no part."""
    started = tmp_path / "started"
    running = program(
        """
        os.setpgrp()
        with FlamePool("open", min=1, max=1, backend=BACKEND, shutdown_timeout=1) as pool:
            future = pool.submit(stay, sys.argv[1], 1)
            try:
                print("waiting", flush=True)
                future.result()
            except KeyboardInterrupt:
                try:
                    print("interrupted", future.result(10), pool.call(inc, 1))
                except RuntimeError as error:
                    print("interrupted", type(error).__name__)
        """,
        str(started),
    )
    until(started.exists, 30)
    assert running.process.stdout is not None
    assert running.process.stdout.readline() == "waiting\n"  # the call may start earlier
    running.look()
    os.killpg(running.process.pid, signal.SIGINT)
    code, out, err = running.end(timeout=20)
    assert out.split() == ["interrupted", "None", "2"]
    assert "Traceback" not in err
    assert code == 0
    until(lambda: running.left() == [])


@on_both("when", ["opening", "closing"], local=["map"])
def test_a6_ctrl_c_elsewhere(program: Run, until: Until, tmp_path: Path, when: str) -> None:
    """Whenever it comes: the program ends soon, and nothing is left."""
    body = {
        "opening": """
            cls, options = BACKEND
            preload = sys.argv[1] + ".py"
            open(preload, "w").write(f"import time; open({sys.argv[1]!r}, 'w'); time.sleep(60)")
            FlamePool("open", min=1, max=1, backend=(cls, {**options, "preload": [preload]}))
            """,
        "map": """
            pool = FlamePool("open", max=1, max_concurrency=2, backend=BACKEND, shutdown_timeout=1)
            list(pool.map(stay, [sys.argv[1]] * 5, seconds=2))
            """,
        "closing": """
            pool = FlamePool("open", max=1, backend=BACKEND, shutdown_timeout=20)
            future = pool.submit(stay, sys.argv[1], seconds=30)
            while not os.path.exists(sys.argv[1]):
                time.sleep(0.01)
            print("closing", flush=True)
            pool.close()
            """,
    }[when]
    started = tmp_path / "started"
    running = program(body, str(started))
    until(started.exists, 30)
    if when == "closing":
        assert running.process.stdout is not None
        assert running.process.stdout.readline() == "closing\n"
    running.look()
    time.sleep(0.2)  # into the middle of it
    began = time.monotonic()
    running.process.send_signal(signal.SIGINT)
    code, _, err = running.end(timeout=30)
    assert time.monotonic() - began < 28
    assert code != 0
    assert "KeyboardInterrupt" in err
    until(lambda: running.left() == [])


def test_b1_functions_and_classes_of_main(program: Run, until: Until) -> None:
    running = program(
        """
        class Point:
            def __init__(self, x):
                self.x = x

        class Refused(Exception):
            pass

        def double(p):
            return Point(helper(p.x))

        def helper(x):
            return 2 * x

        def refuse():
            raise Refused("no")

        with FlamePool("main", max=1, backend=BACKEND) as pool:
            print(pool.call(double, Point(21)).x)
            try:
                pool.call(refuse)
            except Refused as error:
                print("refused", error)
        """
    )
    code, out, err = running.end()
    assert out.split() == ["42", "refused", "no"]
    assert code == 0
    assert "Traceback" not in err.replace("Traceback: '", "")  # Dask logs the failed task


def test_a4_quick_start_without_a_main_guard(tmp_path: Path, backend: Any, until: Until) -> None:
    """Runners do not import the parent's script: a pool at top level does not start pools."""
    name = "LocalCluster" if backend[0] is LocalCluster else "SubprocessCluster"
    path = tmp_path / "script.py"
    path.write_text(
        f"{HEAD}with FlamePool('top', max=1, backend=({name}, {backend[1]!r})) as pool:\n"
        "    print(pool.call(inc, 1))\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(path)],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr


@on_local
@pytest.mark.usefixtures("kills_runners")
def test_k1_a6_the_end_of_the_interpreter_stops_supervised_pools(
    program: Run, backend: Any, until: Until
) -> None:
    """In reverse. No pool is restarted then, and a restart under way leaves nothing behind."""
    restarts = backend[0] is not LocalCluster  # where the scheduler can be killed
    running = program(
        f"""
        import logging
        from flame_dask import Supervisor
        logging.getLogger("flame_dask").setLevel(logging.ERROR)

        class Noted(FlamePool):
            def close(self):
                print("close", self.name, flush=True)
                super().close()

        specs = [Noted.child_spec(n, min=1, max=1, backend=BACKEND) for n in "ab"]
        supervisor = Supervisor(specs)
        print([pool.call(inc, 1) for pool in supervisor.pools.values()], flush=True)
        if {restarts}:
            first = supervisor["a"]
            first.cluster.scheduler.process.kill()
            while supervisor._pools["a"] is first:
                time.sleep(0.001)
        print("end", flush=True)
        """
    )
    follow(running, until)
    code, out, err = running.end()
    begin, _, end = out.partition("end\n")
    assert (code, begin) == (0, "[2, 2]\n" + restarts * "close a\n")
    assert end.endswith("close b\nclose a\n")
    if not restarts:
        assert err == ""
    assert running.left() == []

"""What becomes of copied code when something ends (J5, E2, G3)."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import LocalCluster

import flame_dask
from flame_dask import CallTimeout, FlamePool
from support import Program, runner_pid, states

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("copies_end")


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_e2_a_call_that_waits_for_code_can_be_ended(
    make_pool: MakePool,
    shop: Program,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
    isolation: str,
) -> None:
    """Its slot is free again at once, and the runner goes on, and so does what it waited for."""
    prices = shop.load("shop.prices")
    sync = {"sync_modules": ["shop"]}
    pool = make_pool(max=1, max_concurrency=1, isolation=isolation, code_sync=sync)
    pool.call(prices.price)
    pid = runner_pid(pool)
    gate = threading.Event()
    answer = pool._code.answer

    def late(*asked: Any) -> Any:
        gate.wait(20)
        return answer(*asked)

    monkeypatch.setattr(pool._code, "answer", late)
    shop.write("shop/prices.py", "LIMIT = 2\ndef price(): return LIMIT\n")
    with pytest.raises(CallTimeout) as caught:
        pool.call(prices.price, timeout=0.3)
    assert caught.value.phase == "running"
    until(lambda: pool.status().leases == 0, 5)
    gate.set()
    assert pool.call(prices.price) == 2
    assert runner_pid(pool) == pid


# -- its end --------------------------------------------------------------------------------------


def test_j5_a_killed_runners_files_go_with_the_next_start(
    make_pool: MakePool, shop: Program, tmp_path: Path, until: Until
) -> None:
    base = tmp_path / "base"
    prices = shop.load("shop.prices")
    pool = make_pool(max=1, code_sync={"sync_modules": ["shop"], "extract_dir": str(base)})
    assert pool.call(prices.price) == 1
    pid = runner_pid(pool)
    before = set(os.listdir(base))
    os.kill(pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(pid))
    until(lambda: "ready" not in states(pool))  # or the call would go there, and be lost
    assert pool.call(prices.price) == 1
    assert len(os.listdir(base)) == len(before)
    assert not before & set(os.listdir(base))
    pool.close()
    assert os.listdir(base) == []


def test_j5_a_runner_that_is_killed_as_it_copies(
    make_pool: MakePool, program: Program, tmp_path: Path, until: Until
) -> None:
    """The next one begins anew, and uses nothing of it."""
    base = tmp_path / "base"
    large = program.folder / "large.bin"
    large.write_bytes(os.urandom(40_000_000))
    sync = {"copy_paths": [str(large)], "extract_dir": str(base), "compress": False}
    pool = make_pool(max=1, code_sync=sync)

    def size() -> int:
        parent = flame_dask.parent()
        assert parent is not None
        assert parent.files is not None
        return (parent.files / "large.bin").stat().st_size

    future = pool.submit(size)
    [copy] = until(lambda: list(base.glob("*/tmp*/files/large.bin")))
    assert copy.stat().st_size < 40_000_000
    [booting] = pool.status().runners
    assert booting.state == "booting"
    os.kill(pool.cluster.workers[booting.id].process.pid, signal.SIGKILL)
    assert future.result(30) == 40_000_000
    assert pool.status().counters["boot_failures"] == 1
    assert len(os.listdir(base)) == 2  # a folder and its lock


PARENT = """
import sys, time
from distributed import LocalCluster
from flame_dask import FlamePool

if __name__ == "__main__":
    sync = {"sync_modules": ["shop"], "extract_dir": sys.argv[1]}
    quiet = {"scheduler_kwargs": {"dashboard": False}}
    pool = FlamePool("p", min=1, max=1, backend=(LocalCluster, quiet), code_sync=sync)
    print("open", flush=True)
    time.sleep(60)
"""


def test_j5_g3_a_killed_parents_runner_removes_its_files(
    shop: Program, tmp_path: Path, until: Until
) -> None:
    base = tmp_path / "base"
    script = shop.write("parent.py", PARENT)
    path = os.pathsep.join([str(shop.folder), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(script), str(base)]
    env = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"open\n"
        assert os.listdir(base)
        parent.kill()
    until(lambda: os.listdir(base) == [], 20)


COPYING = """
import sys
from distributed import LocalCluster
from distributed.deploy.subprocess import SubprocessCluster
from flame_dask import FlamePool

if __name__ == "__main__":
    backend, base, large = sys.argv[1:]
    quiet = {"scheduler_kwargs": {"dashboard": False}}
    sync = {"copy_paths": [large], "extract_dir": base, "compress": False, "chunk_size": 1024}
    with FlamePool("p", max=1, backend=(globals()[backend], quiet), code_sync=sync) as pool:
        pool.call(int)
        print("too late")
"""


@pytest.mark.parametrize("cluster", ["LocalCluster", "SubprocessCluster"])
def test_j5_g3_a_parent_that_is_killed_as_it_sends(
    program: Program, tmp_path: Path, until: Until, cluster: str
) -> None:
    base, large = tmp_path / "base", program.folder / "large.bin"
    large.write_bytes(os.urandom(100_000_000))
    script = program.write("parent.py", COPYING)
    command = [sys.executable, str(script), cluster, str(base), str(large)]
    root = str(Path(flame_dask.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": root}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env) as parent:
        until(lambda: list(base.glob("*/tmp*/files/large.bin")), 30)
        parent.kill()
        assert parent.stdout is not None
        assert parent.stdout.read() == b""
    until(lambda: os.listdir(base) == [], 30)


def test_j5_in_the_usual_place_a_killed_runner_leaves_nothing(
    make_pool: MakePool, shop: Program, backend: Any, until: Until
) -> None:
    prices = shop.load("shop.prices")
    pool = make_pool(max=1, code_sync={"sync_modules": ["shop"]})

    def where() -> str:
        import shop

        return str(shop.__file__)

    file, pid = pool.call(where), runner_pid(pool)
    assert os.path.exists(file)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(pid))
    until(lambda: "ready" not in states(pool))  # or the call would go there, and be lost
    assert pool.call(prices.price) == 1
    until(lambda: not os.path.exists(file))
    again = pool.call(where)
    pool.close()
    assert not os.path.exists(again)


def test_j5_a_runner_that_is_told_to_go_as_it_copies(
    make_pool: MakePool, program: Program, tmp_path: Path, until: Until, flame_log: Any
) -> None:
    """It is not waited for, and leaves nothing."""
    base = tmp_path / "base"
    large = program.folder / "large.bin"
    large.write_bytes(os.urandom(60_000_000))
    sync = {"copy_paths": [str(large)], "extract_dir": str(base), "compress": False}
    pool = make_pool(max=1, code_sync=sync)
    future = pool.submit(int)
    until(lambda: list(base.glob("*/tmp*/files/large.bin")))
    future.cancel()
    pool.close()
    assert os.listdir(base) == []


def test_j5_a_cluster_that_goes_on_without_the_pool(
    make_pool: MakePool, shop: Program, tmp_path: Path, until: Until
) -> None:
    base = tmp_path / "base"
    prices = shop.load("shop.prices")
    with LocalCluster(
        n_workers=0, threads_per_worker=1, scheduler_kwargs={"dashboard": False}
    ) as cluster:
        for limit in (1, 2):
            shop.write("shop/prices.py", f"LIMIT = {limit}\ndef price(): return LIMIT\n")
            sync = {"sync_modules": ["shop"], "extract_dir": str(base)}
            pool = make_pool(max=1, backend=cluster, code_sync=sync)
            assert pool.call(prices.price) == limit
            pool.close()
            until(lambda: os.listdir(base) == [])
        assert "flame_code" not in cluster.scheduler.handlers


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("compress", [True, False])
def test_j5_500_mb_with_bounded_memory(
    make_pool: MakePool, program: Program, compress: bool, until: Until, tmp_path: Path
) -> None:
    folder = program.folder / "large"
    folder.mkdir()
    block = os.urandom(1 << 20)
    for number in range(4):
        with open(folder / str(number), "wb") as file:
            for _ in range(125):
                file.write(block)
    pool = make_pool(
        max=1, boot_timeout=200, code_sync={"copy_paths": [str(folder)], "compress": compress}
    )
    parent, before = psutil.Process(), psutil.Process().memory_info().rss
    future = pool.submit(int, timeout=200)
    ours, theirs, first = before, 0, 0
    while not future.done():
        with contextlib.suppress(psutil.Error, KeyError, IndexError, AttributeError):
            [runner] = pool.status().runners
            process = psutil.Process(pool.cluster.workers[runner.id].process.pid)
            now = process.memory_info().rss
            if list(Path(process.environ()["FLAME_RUNNER_FOLDER"]).rglob("files")):
                first = first or now
                theirs = max(theirs, now)
        ours = max(ours, parent.memory_info().rss)
        time.sleep(0.02)
    assert future.result() == 0
    assert ours - before < 64_000_000
    assert first
    assert theirs - first < 64_000_000

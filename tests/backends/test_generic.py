"""Runners on a cluster class that flame_dask has never heard of (A3, A8, D4, G3)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client, Security, SpecCluster, Worker

from backends.my_clusters import MyCluster, MyDistantCluster
from doomed import Doomed
from flame_dask import BootError, FlamePool, PoolOptionsError, RunnerLost
from support import alive, lines, pids, states, work

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("kills_runners")]


@pytest.fixture(params=[MyCluster, MyDistantCluster], ids=["scheduler here", "scheduler there"])
def cluster_class(request: pytest.FixtureRequest) -> type:
    found: type = request.param
    return found


@pytest.fixture
def make_my_pool(make_pool: MakePool, tmp_path: Path) -> MakePool:
    def make(cluster_class: type = MyCluster, **options: Any) -> FlamePool:
        given = {"folder": str(tmp_path), **options.pop("cluster", {})}
        return make_pool(backend=(cluster_class, given), **options)

    return make


def test_c2_d1_d4_it_grows_and_shrinks(
    make_my_pool: MakePool, cluster_class: type, tmp_path: Path, until: Until
) -> None:
    pool = make_my_pool(cluster_class, max=2, max_concurrency=1, idle_shutdown_after=0.5)
    assert pool.status().runners == ()
    gate = tmp_path / "gate"
    futures = [pool.submit(work, str(tmp_path / "calls"), str(gate)) for _ in range(3)]
    until(lambda: states(pool) == ["ready"] * 2, 20)
    gate.touch()
    processes = {future.result(10) for future in futures}
    assert len(processes) == 2
    until(lambda: pool.status().runners == (), 20)
    assert alive(*processes) == []
    assert pool.cluster.worker_spec == {}


def test_a8_the_package_comes_along(make_my_pool: MakePool, cluster_class: type) -> None:
    """From an interpreter that has Dask and not flame_dask, with one thread."""
    pool = make_my_pool(
        cluster_class,
        max=1,
        max_concurrency=3,
        env={"MINE": "for calls"},
        cluster={"arguments": ("--nthreads", "1", "--no-nanny")},
    )

    def look() -> tuple[str, str, str]:
        import flame_dask

        parent = flame_dask.parent()
        assert parent is not None
        return flame_dask.__file__, os.environ["MINE"], parent.runner

    path, mine, runner = pool.call(look, queue_timeout=20)
    assert "flame_dask-package" in path
    assert mine == "for calls"
    assert [each.id for each in pool.status().runners] == [runner]


@pytest.mark.parametrize("nanny", ["--nanny", "--no-nanny"])
def test_e3_more_calls_than_the_worker_has_threads(
    make_my_pool: MakePool, tmp_path: Path, until: Until, nanny: str
) -> None:
    pool = make_my_pool(max=1, max_concurrency=3, cluster={"arguments": ("--nthreads", "1", nanny)})
    log, gate = tmp_path / "calls", tmp_path / "gate"
    futures = [pool.submit(work, str(log), str(gate), queue_timeout=20) for _ in range(3)]
    until(lambda: len(pids(log)) == 3, 20)
    gate.touch()
    assert len({future.result(10) for future in futures}) == 1


def test_a8_a_worker_that_does_not_fit(
    make_my_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANOTHER_DISTRIBUTED", "2020.1.0")
    with pytest.raises(BootError, match=r"the runner has distributed 2020\.1\.0"):
        make_my_pool(min=1, max=1)


@pytest.mark.parametrize("nanny", ["--nanny", "--no-nanny"])
def test_f2_a_runner_is_killed(
    make_my_pool: MakePool, nanny: str, tmp_path: Path, until: Until
) -> None:
    """A nanny would start it anew, under the same name: a runner lives once."""
    pool = make_my_pool(max=1, cluster={"arguments": (nanny,)})
    log = tmp_path / "calls"
    future = pool.submit(work, str(log), str(tmp_path / "gate"))
    until(lambda: pids(log), 20)
    os.kill(pids(log)[0], signal.SIGKILL)
    with pytest.raises(RunnerLost):
        future.result(10)
    assert pool.call(os.getpid, queue_timeout=20) not in pids(log)
    assert len(pool.client.scheduler_info()["workers"]) == 1


def run(log: str) -> None:
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    script = 'sleep 60 & echo "$!" >> "$0"; echo "$$" >> "$0"; wait'
    subprocess.run(["sh", "-c", script, log], check=False)


def test_a6_close_ends_what_runs(make_my_pool: MakePool, tmp_path: Path, until: Until) -> None:
    pool = make_my_pool(max=1, shutdown_timeout=0.5)
    log = tmp_path / "calls"
    future = pool.submit(run, str(log))
    until(lambda: len(lines(log)) == 3, 20)
    pool.close()
    assert future.status == "error"
    until(lambda: not alive(*pids(log)), 5)


def test_a3_a_running_cluster_is_left_as_it_was(
    make_pool: MakePool, cluster_class: Any, tmp_path: Path
) -> None:
    with cluster_class(str(tmp_path)) as cluster:
        for _ in range(2):
            pool = make_pool("given", backend=cluster, max=1)
            assert pool.cluster is cluster
            assert pool.call(int, queue_timeout=20) == 0
            pool.close()
            assert cluster.worker_spec == {}
        # Its workers are ordinary ones again.
        cluster.scale(1)
        with Client(cluster, set_as_default=False) as client:
            assert client.submit(os.getpid).result(20) > 0
        with pytest.raises(PoolOptionsError, match="has workers already"):
            make_pool(max=1, backend=cluster)
        cluster.scale(0)


def test_a4_asynchronous(tmp_path: Path) -> None:
    async def main() -> int:
        backend = (MyCluster, {"folder": str(tmp_path)})
        options = {"asynchronous": True, "boot_timeout": 20}
        async with FlamePool("a", max=1, backend=backend, **options) as pool:
            answer: int = await pool.call(int)
            return answer

    assert asyncio.run(main()) == 0


def test_g3_the_parent_is_killed(
    make_doomed: Callable[..., Doomed], cluster_class: type, tmp_path: Path, until: Until
) -> None:
    doomed = make_doomed(cluster_class, {"folder": str(tmp_path)}, {"boot_timeout": 20})
    until(doomed.at_work, 30)
    children = psutil.Process(doomed.process.pid).children(recursive=True)
    everything = [each.pid for each in children]
    assert set(doomed.runners()) <= set(everything)
    doomed.kill()
    until(lambda: not alive(*everything), 40)


class Here(SpecCluster):
    def __init__(self, **options: Any) -> None:
        super().__init__(worker={"cls": Worker, "options": {}}, **options)


class Nothing(SpecCluster):
    pass


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Here, "in the parent's own process"),
        (Nothing, "no specification of a new worker"),
    ],
)
def test_f4_clusters_that_do_not_do(make_pool: MakePool, given: Any, words: str) -> None:
    with pytest.raises(BootError, match=words):
        make_pool(max=1, backend=given)


def test_f4_a_class_that_starts_workers_of_its_own(make_my_pool: MakePool) -> None:
    with pytest.raises(BootError, match="starts workers of its own"):
        make_my_pool(max=1, cluster={"first": 1})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"security": Security(require_encryption=True)}, "is the cluster's to say"),
        ({"host": "127.0.0.1"}, "is the cluster's to say"),
        ({"scheduler": "remote"}, "is the cluster's to say"),
        ({"cluster": {"n_workers": 2}}, "`min` and `max`"),
        ({"cluster": {"asynchronous": True}}, "give it to the pool"),
    ],
)
def test_a2_options_are_checked(make_my_pool: MakePool, options: Any, words: str) -> None:
    with pytest.raises(PoolOptionsError, match=words):
        make_my_pool(max=1, **options)


def test_a2_the_base_class_alone_is_nothing(make_pool: MakePool) -> None:
    with pytest.raises(PoolOptionsError, match="backend="):
        make_pool(max=1, backend=SpecCluster)

"""The clusters of pools on Kubernetes, against an imitation of its API server."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from flame_dask import BootError, FlamePool, PoolOptionsError, RunnerLost
from flame_dask.backends import kube as kube_backend
from kube_support import open_cluster, own_cluster, refusing
from support import alive, lines, pids, work

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]
Resource = dict[str, Any]

pytestmark = [
    pytest.mark.backend,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("kills_runners"),
    # dask-kubernetes gives up reading its configuration half-way when the scheduler is there.
    pytest.mark.filterwarnings("ignore:unclosed file .*/config:ResourceWarning"),
]


def on_the_scheduler(dask_scheduler: Any) -> tuple[list[str], list[str], list[str], bool]:
    """Return its plugins, its workers' plugins, its handlers, and whether it is idle as usual."""
    usual = dask_scheduler.check_idle == type(dask_scheduler).check_idle.__get__(dask_scheduler)
    plugins = sorted(dask_scheduler.plugins), sorted(dask_scheduler.worker_plugins)
    return *plugins, sorted(dask_scheduler.handlers), usual


def test_a3_d3_a_running_cluster_is_left_as_it_was(
    kube: Any, make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """While the pool is open, its runners are not among those that the operator may take."""
    log, gate = tmp_path / "log", tmp_path / "gate"
    with open_cluster() as cluster:
        with Client(cluster, set_as_default=False) as client:
            before = client.run_on_scheduler(on_the_scheduler)
            pool = make_pool(backend=cluster, max=1)
            future = pool.submit(work, str(log), str(gate), queue_timeout=20)
            until(lambda: pids(log), 20)
            assert len(client.scheduler_info()["workers"]) == 1
            assert not client.sync(client.scheduler.workers_to_close, n=1, attribute="name")
            gate.touch()
            assert future.result(5) == pids(log)[0]
            pool.close()
            assert kube.names("daskworkergroups") == kube.pods() == []
            assert client.run_on_scheduler(on_the_scheduler) == before
        pool = make_pool(backend=cluster, max=1)
        assert pool.call(int, queue_timeout=20) == 0
        pool.close()
        assert kube.names("daskclusters") == [cluster.name]
        with pytest.raises(PoolOptionsError, match="takes no options"):
            make_pool(backend=(cluster, {"image": "mine"}), max=1)
    with pytest.raises(PoolOptionsError, match="is closed"):
        make_pool(backend=cluster, max=1)


def test_a4_asynchronous(kube: Any) -> None:
    from dask_kubernetes.operator import KubeCluster

    async def use() -> int:
        backend = (KubeCluster, {"scheduler_service_type": "LoadBalancer"})
        async with FlamePool("a", max=1, backend=backend, asynchronous=True, boot_timeout=40) as p:
            value: int = await p.call(int)
            return value

    assert asyncio.run(use()) == 0
    assert kube.everything() == []


PROGRAM = """
import os, subprocess, sys
from dask_kubernetes.operator import KubeCluster
from flame_dask import FlamePool

def run(log):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    script = 'sleep 60 & echo "$!" >> "$0"; echo "$$" >> "$0"; wait'
    subprocess.run(["sh", "-c", script, log])

if __name__ == "__main__":
    options = {"scheduler_service_type": "LoadBalancer", "idle_timeout": 4}
    pool = FlamePool("p", max=1, backend=(KubeCluster, options), boot_timeout=60)
    pool.submit(run, sys.argv[1], queue_timeout=60).result()
"""


def test_g3_the_parent_is_killed(kube: Any, tmp_path: Path, until: Until) -> None:
    """Its runners end themselves; the operator ends the rest, which Kubernetes would start anew."""
    log, program = tmp_path / "log", tmp_path / "program.py"
    program.write_text(PROGRAM)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, str(program), str(log)], env=env)
    try:
        until(lambda: len(lines(log)) == 3, 60)
        assert set(kube.idle[-1:]) <= {0.0}
        [pod] = kube.pods()
        process.kill()
        process.wait()
        until(lambda: not alive(*pids(log)), 10)
        until(lambda: pod.restarts > 0, 10)
        until(lambda: kube.everything() == [], 20)
        assert "this worker is no runner" in pod.log(previous=False) + pod.log(previous=True)
        assert kube.most == 1
    finally:
        process.kill()
        process.wait()


def test_g3_the_operator_spares_an_open_pool(
    make_kube_pool: MakePool, kube: Any, until: Until
) -> None:
    """Though it has no work for longer than the time after which idle clusters are deleted."""
    pool = make_kube_pool(max=1, cluster={"idle_timeout": 3})
    kube.idle.clear()
    until(lambda: len(kube.idle) > 4, 30)
    assert set(kube.idle) == {0.0}
    assert kube.names("daskclusters") == [pool.cluster.name]
    assert pool.call(int, queue_timeout=20) == 0


def test_g3_the_scheduler_is_killed(make_kube_pool: MakePool, kube: Any, until: Until) -> None:
    """Kubernetes starts another one, which knows nothing of the pool."""
    pool = make_kube_pool(min=1, max=1)
    future = pool.submit(signal.pause, timeout=None)
    until(lambda: pool.status().leases == 1, 5)
    [scheduler] = kube.pods("scheduler")
    scheduler.process.kill()
    with pytest.raises(RunnerLost):
        future.result(10)
    until(lambda: scheduler.restarts == 1, 10)
    pool.cluster.close()  # of no use: the pool has to see to it
    pool.close()
    assert kube.everything() == []


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"image": "example.org/large"}, r"within 2(\.0)? s \(ContainerCreating"),
        ({"image": "example.org/nothing"}, r"within 2(\.0)? s \(ImagePullBackOff"),
    ],
)
def test_a5_f4_a_scheduler_that_never_starts(
    make_kube_pool: MakePool, kube: Any, cluster: Resource, words: str
) -> None:
    with pytest.raises(BootError, match=words) as caught:
        make_kube_pool(max=1, cluster={**cluster, "resource_timeout": 1}, boot_timeout=1)
    assert caught.value.phase == "cluster"
    assert kube.everything() == []


def test_a5_f4_an_api_server_that_is_not_there(
    make_kube_pool: MakePool, kube: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = re.sub(r"127.0.0.1:\d+", "127.0.0.1:1", kube.config.read_text())
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "config"))
    with pytest.raises(BootError, match="connection attempts failed"):
        make_kube_pool(max=1)


def test_a5_anothers_cluster_is_left_alone(make_kube_pool: MakePool, kube: Any) -> None:
    kube.operator.clear()
    [resource] = own_cluster().values()
    kube.create("daskclusters", "pools", resource)
    with pytest.raises(BootError, match="there is a DaskCluster mine already"):
        make_kube_pool(max=1, cluster={"name": "mine"})
    assert kube.everything() == [("daskclusters", "mine")]
    kube.clear()


@pytest.mark.parametrize("what", ["API server", "operator"])
def test_a6_closing_ends_though_kubernetes_is_out_of_order(
    make_kube_pool: MakePool,
    kube: Any,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
    flame_log: Any,
    what: str,
) -> None:
    """Without its operator a cluster can't go, but what costs money does."""
    monkeypatch.setattr(kube_backend, "END_LIMIT", 2.0)
    monkeypatch.setattr(kube_backend, "LAST_RESORT", 0.5)
    pool = make_kube_pool(min=1, max=1, shutdown_timeout=1)
    name = pool.cluster.name
    if what == "operator":
        kube.operator.clear()
    else:
        kube.fault = refusing(500, "out of order", "GET", "DELETE", path="/")
    pool.close()
    [said] = flame_log.texts()
    assert f"DaskCluster {name} may go on: Kubernetes has not ended it within 2 s" in said
    if what == "operator":
        assert kube.everything() == [("daskclusters", name)]
    else:
        kube.fault = lambda *_: None
        kube.delete("daskclusters", name)

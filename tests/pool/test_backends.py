"""Options, where they come from, and what ``backend=`` takes (A1-A4, F4)."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.config
import distributed
import psutil
import pytest
from distributed import LocalCluster, SpecCluster
from distributed.deploy.subprocess import SubprocessCluster

from flame_dask import FlamePool, PoolNotFound, PoolOptionsError, get_pool
from flame_dask.backends.base import Backend, Ending

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]


def inc(x: int) -> int:
    return x + 1


@pytest.fixture
def quiet_cluster() -> Any:
    """A running LocalCluster without workers, which is there before the pool and after it."""
    with LocalCluster(
        n_workers=0, threads_per_worker=1, dashboard_address="127.0.0.1:0"
    ) as cluster:
        yield cluster


# -- options are checked before anything starts ----------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "max is missing"),
        ({"max": 0}, "max=0"),
        ({"max": 1, "min": 2}, "min=2"),
        ({"max": 1, "timeout": "soon"}, "timeout='soon'"),
        ({"max": 1, "min_concurrency": 2}, "max_concurrency"),
        ({"max": 1, "backend": 7}, "backend=7"),
        ({"max": 1, "backend": dict}, "backend="),
        ({"max": 1, "backend": "no.such.Cluster"}, "no.such.Cluster"),
        ({"max": 1, "backend": "distributed.NoSuchCluster"}, "NoSuchCluster"),
        ({"max": 1, "backend": "nothing"}, "nothing"),
        ({"max": 1, "backend": (LocalCluster, {"n_workers": 2})}, "min and max"),
        ({"max": 1, "backend": (LocalCluster, {"threads_per_worker": 2})}, "max_concurrency"),
        ({"max": 1, "backend": (LocalCluster, {"processes": False})}, "thread of the parent"),
        ({"max": 1, "backend": (LocalCluster, {"asynchronous": True})}, "to the pool"),
        ({"max": 1, "backend": (LocalCluster, {"worker_class": "x"})}, "worker_class"),
        ({"max": 1, "backend": (SubprocessCluster, {"n_workers": 2})}, "min and max"),
        ({"max": 1, "backend": (LocalCluster, {"memory_limt": "1GB"})}, "memory_limit"),
        ({"max": 1, "backend": (SubprocessCluster, {"memory_limt": "1GB"})}, "memory_limit"),
    ],
)
def test_a2_a3_refused_options_start_nothing(options: dict[str, Any], words: str) -> None:
    before = psutil.Process().num_fds(), len(psutil.Process().children())
    with pytest.raises(PoolOptionsError) as caught:
        FlamePool("refused", **options)
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(PoolNotFound):
        get_pool("refused")
    assert (psutil.Process().num_fds(), len(psutil.Process().children())) == before


def test_a3_a_cluster_with_workers_is_refused(quiet_cluster: Any) -> None:
    quiet_cluster.scale(1)
    with distributed.Client(quiet_cluster) as client:
        client.wait_for_workers(1)
        with pytest.raises(PoolOptionsError, match="has workers already"):
            FlamePool("refused", max=1, backend=quiet_cluster)
        assert client.submit(inc, 1).result(10) == 2


@pytest.mark.parametrize("kind", ["SpecCluster", "threads"])
def test_a3_a_cluster_of_another_kind_is_refused(kind: str) -> None:
    quiet = {"dashboard_address": "127.0.0.1:0"}
    if kind == "SpecCluster":
        scheduler = {"cls": distributed.Scheduler, "options": {**quiet, "host": "127.0.0.1"}}
        worker = {"cls": distributed.Worker, "options": {"nthreads": 1}}
        cluster = SpecCluster(scheduler=scheduler, worker=worker)
    else:
        cluster = LocalCluster(n_workers=0, processes=False, **quiet)
    with cluster, pytest.raises(PoolOptionsError, match="in the parent's own process"):
        FlamePool("refused", max=1, backend=cluster)


@pytest.mark.parametrize(
    ("module", "name", "remedy"),
    [
        (
            "dask_kubernetes.classic.kubecluster",
            "KubeCluster",
            "dask_kubernetes.operator.KubeCluster",
        ),
        ("coiled.cluster", "Cluster", "EC2Cluster"),
    ],
)
def test_a3_clusters_that_take_but_a_number_are_refused(
    module: str, name: str, remedy: str
) -> None:
    """They need not be installed for that."""
    kind = type(name, (distributed.deploy.Cluster,), {"__module__": module})
    with pytest.raises(PoolOptionsError, match=f"{name}, which is not supported.*{remedy}"):
        FlamePool("refused", max=1, backend=kind)


def test_a3_both_asynchronous_or_none(quiet_cluster: Any) -> None:
    with pytest.raises(PoolOptionsError, match="make both asynchronous, or none"):
        FlamePool("refused", max=1, backend=quiet_cluster, asynchronous=True)

    async def main() -> None:
        async with LocalCluster(
            n_workers=0, asynchronous=True, dashboard_address="127.0.0.1:0"
        ) as cluster:
            with pytest.raises(PoolOptionsError, match="make both asynchronous, or none"):
                FlamePool("refused", max=1, backend=cluster)

    asyncio.run(main())


# -- where they come from --------------------------------------------------------------------------


def test_a3_defaults_in_dask_config(backend: Any, make_pool: MakePool, until: Until) -> None:
    config = {
        "flame.max-concurrency": 3,
        "flame.idle-shutdown-after": "100ms",
        "flame.min": 1,
        "flame.timeout": "7s",
    }
    with dask.config.set(config):
        pool = make_pool(max=2)
    options = pool.options
    assert (options.min, options.max_concurrency) == (1, 3)
    assert (options.idle_shutdown_after, options.timeout) == (0.1, 7.0)
    assert len(pool.status().runners) == 1
    [worker] = pool.client.scheduler_info()["workers"].values()
    assert worker["nthreads"] == 3


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("distributed.LocalCluster", False),
        ("distributed:LocalCluster", False),
        ("distributed.deploy.subprocess.SubprocessCluster", True),
    ],
)
def test_a3_the_backend_in_dask_config_as_a_dotted_path(
    make_pool: MakePool, path: str, remote: bool
) -> None:
    with dask.config.set({"flame.backend": path}):
        pool = make_pool(max=1, backend=None)
    assert isinstance(pool.cluster.scheduler, distributed.Scheduler) != remote
    assert pool.call(inc, 1) == 2


def test_a3_left_out_it_is_a_local_cluster(make_pool: MakePool) -> None:
    pool = make_pool(max=1, backend=None)
    assert isinstance(pool.cluster, LocalCluster)
    assert pool.call(inc, 1) == 2


def test_a3_in_environment_variables(tmp_path: Path) -> None:
    code = (
        "from flame_dask import FlamePool\n"
        "if __name__ == '__main__':\n"
        "    with FlamePool('env', max=2) as pool:\n"
        "        print(pool.options.max_concurrency, pool.options.idle_shutdown_after)\n"
        "        print(type(pool.cluster.scheduler).__name__)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "DASK_FLAME__MAX_CONCURRENCY": "5",
        "DASK_FLAME__IDLE_SHUTDOWN_AFTER": "5m",
        "DASK_FLAME__BACKEND": "distributed.deploy.subprocess.SubprocessCluster",
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        env=env,
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )
    assert done.stdout.split() == ["5", "300.0", "SchedulerProcess"]


def test_a1_environment_of_the_runners(
    make_pool: MakePool, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FROM_THE_PARENT", "inherited")
    cls, options = backend
    pool = make_pool(
        max=1,
        env={"BOTH": "the pool's", "OF_THE_POOL": "yes"},
        backend=(cls, {**options, "env": {"BOTH": "the backend's", "OF_THE_BACKEND": "yes"}}),
    )

    def look() -> list[str | None]:
        names = ["FROM_THE_PARENT", "BOTH", "OF_THE_POOL", "OF_THE_BACKEND"]
        return [os.environ.get(name) for name in names]

    assert pool.call(look) == ["inherited", "the pool's", "yes", "yes"]
    assert "OF_THE_POOL" not in os.environ


def test_a3_options_of_the_cluster_and_of_its_workers(
    make_pool: MakePool, backend: Any, tmp_path: Path
) -> None:
    cls, options = backend
    preload = tmp_path / "loaded.py"
    preload.write_text("def dask_setup(worker):\n    worker.loaded = 'preloaded'\n")
    folder = tmp_path / "work"
    folder.mkdir()
    more = {
        "memory_limit": "3 GB",
        "local_directory": str(folder),
        "preload": [str(preload)],
        "resources": {"GPU": 2},
    }
    pool = make_pool(max=1, max_concurrency=3, backend=(cls, {**options, **more}))

    def look() -> tuple[Any, ...]:
        worker = distributed.get_worker()
        return (
            worker.loaded,
            worker.memory_manager.memory_limit,
            worker.local_directory,
            worker.state.nthreads,
            worker.state.total_resources,
        )

    loaded, limit, directory, threads, resources = pool.call(look)
    assert (loaded, limit, threads) == ("preloaded", 3_000_000_000, 3)
    assert directory.startswith(str(folder))
    assert resources == {"GPU": 2}


def test_a3_nothing_listens_to_the_network(make_pool: MakePool, backend: Any) -> None:
    here = psutil.Process()
    others = set(here.children(recursive=True))  # services that other tests have started
    pool = make_pool(min=1, max=1, backend=backend[0])
    addresses = [pool.cluster.scheduler_address, *pool.client.scheduler_info()["workers"]]
    assert all(address.startswith("tcp://127.0.0.1:") for address in addresses)
    for process in {here, *here.children(recursive=True)} - others:
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                assert connection.laddr.ip in ("127.0.0.1", "::1"), process.cmdline()


# -- running clusters ------------------------------------------------------------------------------


def test_a3_a_running_cluster_is_left_as_it_was(
    quiet_cluster: Any, make_pool: MakePool, until: Until
) -> None:
    scheduler = quiet_cluster.scheduler
    before = {
        "plugins": set(scheduler.plugins),
        "worker plugins": set(scheduler.worker_plugins),
        "handlers": set(scheduler.handlers),
        "stream handlers": set(scheduler.stream_handlers),
        "spec": dict(quiet_cluster.worker_spec),
    }

    def now() -> dict[str, Any]:
        return {
            "plugins": set(scheduler.plugins),
            "worker plugins": set(scheduler.worker_plugins),
            "handlers": set(scheduler.handlers),
            "stream handlers": set(scheduler.stream_handlers),
            "spec": dict(quiet_cluster.worker_spec),
        }

    for _ in range(2):  # one after the other, also under the same name
        pool = make_pool("given", min=1, max=2, max_concurrency=3, backend=quiet_cluster)
        assert pool.cluster is quiet_cluster
        assert pool.call(inc, 1) == 2
        [worker] = pool.client.scheduler_info()["workers"].values()
        assert (worker["nthreads"], worker["name"]) == (3, "given-1")
        assert now() != before
        pool.close()
        assert quiet_cluster.status == distributed.Status.running
        assert quiet_cluster.workers == {}
        assert now() == before
    # It is an ordinary cluster: with workers of its own kind, and an Adaptive of its own.
    quiet_cluster.scale(1)
    with distributed.Client(quiet_cluster) as client:
        assert client.submit(inc, 1).result(20) == 2
        [worker] = client.scheduler_info()["workers"].values()
        assert worker["nthreads"] == 1
        adaptive = quiet_cluster.adapt(minimum=0, maximum=1, interval="50ms", wait_count=1)
        until(lambda: quiet_cluster.workers == {}, 20)
        assert client.submit(inc, 2).result(20) == 3
        adaptive.stop()
        quiet_cluster.scale(0)


def test_a3_a_running_cluster_and_a_runner_that_dies(
    quiet_cluster: Any, make_pool: MakePool, until: Until, kills_runners: None
) -> None:
    """Its nanny would start it anew, with the same name: a runner lives once."""
    pool = make_pool(min=1, max=1, backend=quiet_cluster)
    pid = pool.call(os.getpid)
    psutil.Process(pid).kill()
    until(lambda: pool.status().counters["runners_lost"] == 1)
    assert pool.call(os.getpid) != pid
    until(lambda: pool.status().counters["runners_stopped"] == 1)
    assert pool.status().counters["boots"] == 2
    assert len(pool.client.scheduler_info()["workers"]) == 1


def test_a3_opening_on_a_running_cluster_fails_cleanly(
    quiet_cluster: Any, flame_log: Any, tmp_path: Path, fast: dict[str, Any]
) -> None:
    from flame_dask import BootError

    preload = tmp_path / "no_luck.py"
    preload.write_text("raise RuntimeError('no luck')\n")
    quiet_cluster.new_spec["options"]["preload"] = [str(preload)]
    with (
        dask.config.set({"flame.boot-retries": 0}),
        pytest.raises(BootError, match="exit code") as caught,
    ):
        FlamePool("given", min=1, max=1, backend=quiet_cluster, **fast)
    assert any("no luck" in line for line in caught.value.log_tail)
    assert quiet_cluster.workers == {}
    assert quiet_cluster.worker_spec == {}
    assert quiet_cluster.status == distributed.Status.running


def test_a3_a_running_asynchronous_cluster(fast: dict[str, Any]) -> None:
    async def main() -> None:
        async with LocalCluster(
            n_workers=0, asynchronous=True, dashboard_address="127.0.0.1:0"
        ) as cluster:
            options = {**fast, "backend": cluster, "asynchronous": True}
            async with FlamePool("given", min=1, max=1, **options) as pool:
                assert await pool.call(inc, 1) == 2
            assert cluster.status == distributed.Status.running
            assert cluster.workers == {}

    asyncio.run(main())


# -- objects with the protocol ---------------------------------------------------------------------


class Minimal:
    """A backend with just the five methods: workers as threads of this process."""

    def __init__(self) -> None:
        self.workers: dict[str, distributed.Worker] = {}
        self.calls: list[str] = []

    def open(self, *, asynchronous: bool) -> Any:
        self.calls.append("open")
        self.cluster = SpecCluster(
            scheduler={
                "cls": distributed.Scheduler,
                "options": {"dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"},
            },
            asynchronous=asynchronous,
        )
        return self.cluster

    async def boot(self, runner: str) -> None:
        self.calls.append("boot")
        self.workers[runner] = await distributed.Worker(
            self.cluster.scheduler_address, name=runner, nthreads=2, host="127.0.0.1",
            dashboard=False,
        )  # fmt: skip

    async def watch(self, runner: str) -> Ending:
        await self.workers[runner].finished()
        return Ending()

    async def stop(self, runner: str, *, force: bool = False) -> Ending:
        self.calls.append("stop")
        worker = self.workers.pop(runner, None)
        if worker is not None:
            await worker.close()
        return Ending()

    def close(self, cluster: Any) -> Any:
        self.calls.append("close")
        return cluster.close()


def test_a3_an_object_with_the_protocol(make_pool: MakePool, until: Until) -> None:
    minimal = Minimal()
    assert isinstance(minimal, Backend)
    pool = make_pool(backend=minimal, max=1, max_concurrency=2, idle_shutdown_after=0.1)
    assert pool.call(inc, 1) == 2
    assert pool.call(os.getpid) == os.getpid()
    until(lambda: pool.status().runners == ())
    assert pool.call(inc, 1) == 2
    pool.close()
    assert minimal.calls == ["open", "boot", "stop", "boot", "stop", "close"]
    assert minimal.workers == {}


def test_a3_an_object_with_the_protocol_in_an_asynchronous_pool(fast: dict[str, Any]) -> None:
    async def main() -> None:
        options = {**fast, "backend": Minimal(), "asynchronous": True}
        async with FlamePool("given", min=1, max=1, **options) as pool:
            assert await pool.call(inc, 1) == 2

    asyncio.run(main())


def test_a3_an_object_that_lacks_a_method_is_refused() -> None:
    class Half:
        def open(self, *, asynchronous: bool) -> Any: ...

    with pytest.raises(PoolOptionsError, match=r"backends\.base\.Backend"):
        FlamePool("refused", max=1, backend=Half())

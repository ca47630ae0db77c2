"""Runners of a real Dask Gateway server: what the conformance tests leave open."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client, get_worker

from flame_dask import (
    BootError,
    CallTimeout,
    FlamePool,
    PoolClosed,
    PoolOptionsError,
    RunnerLost,
    package,
)
from flame_dask.backends import gateway
from flame_dask.options import PoolOptions
from flame_dask.scheduler.arrivals import NOT_WANTED, Arrivals
from flame_dask.scheduler.gateway import heed_every_order
from services import start_gateway_server
from support import alive, lines, pids, wait_for_file, work

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = [
    pytest.mark.backend,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("kills_runners"),
]


def look_around() -> tuple[str, str | None, int, str]:
    import flame_dask

    parent: Any = flame_dask.parent()
    threads = get_worker().state.nthreads
    return flame_dask.__file__, os.environ.get("OF_THE_POOL"), threads, parent.runner


@pytest.fixture
def make_gateway_pool(make_pool: MakePool, gateway_server: Any) -> MakePool:
    from dask_gateway import GatewayCluster

    def make(*, cluster: dict[str, Any] | None = None, **options: Any) -> FlamePool:
        given = {"address": gateway_server.address, **(cluster or {})}
        return make_pool(backend=(GatewayCluster, given), **{"boot_timeout": 40, **options})

    return make


@pytest.fixture(autouse=True)
def no_cluster_is_left(request: pytest.FixtureRequest, until: Until) -> Iterator[None]:
    yield
    if "gateway_server" in request.fixturenames:
        server = request.getfixturevalue("gateway_server")
        assert server.clusters() == []
        until(lambda: server.processes() == [], 20)


@contextlib.contextmanager
def open_cluster(server: Any) -> Iterator[Any]:
    """Open a cluster that a pool can be given."""
    from dask_gateway import GatewayCluster

    cluster = GatewayCluster(server.address, nanny="no")
    try:
        yield cluster
    finally:
        cluster.close()
        del cluster.gateway._loop_runner  # or else it complains when it is collected


def test_a8_b1_c2_d4_f4_a_runner_with_all_that_the_pool_brings_along(
    make_gateway_pool: MakePool, gateway_server: Any, tmp_path: Path, until: Until
) -> None:
    """The server's processes know nothing of this folder; its workers have one thread each.

    There may be one worker: it does the work, and who waits for a second one is told why.
    """
    options = {"max": 2, "max_concurrency": 3, "idle_shutdown_after": 0.2}
    pool = make_gateway_pool(cluster={"most": 1}, env={"OF_THE_POOL": "yes"}, **options)
    gate = tmp_path / "gate"
    file, variable, threads, runner = pool.call(look_around)
    assert not Path(file).is_relative_to(Path(__file__).parents[2])
    assert (variable, threads) == ("yes", 3)
    assert runner.startswith(pool.name)
    busy = [pool.submit(wait_for_file, str(gate)) for _ in range(3)]
    with pytest.raises(CallTimeout) as caught:
        pool.call(int, queue_timeout=0.5)
    assert "exceed resource limit" in str(caught.value.boot_error)
    gate.touch()
    assert len({future.result(10) for future in busy}) == 1
    until(lambda: gateway_server.processes(kind="worker") == [], 20)
    assert pool.client.scheduler_info()["workers"] == {}


def test_c1_d5_never_more_than_max(make_gateway_pool: MakePool, until: Until) -> None:
    """While runners come and go: one call each, and more calls than runners."""
    pool = make_gateway_pool(max=2, max_concurrency=1, single_use=True)
    futures = [pool.submit(os.getpid, queue_timeout=40) for _ in range(3)]
    known, seen = set(), set()

    def all_done() -> bool:
        known.add(len(pool.status().runners))
        seen.add(len(pool.client.scheduler_info(n_workers=-1)["workers"]))
        return all(future.done() for future in futures)

    until(all_done, 60)
    assert len({future.result() for future in futures}) == 3
    assert max(known) == 2
    assert max(seen) <= 2


def test_e3_e5_f2_runners_without_a_nanny(
    make_gateway_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """They end by a signal in their own time, by SIGKILL, and by a call that can't be ended."""
    pool = make_gateway_pool(max=1, max_concurrency=1, cluster={"nanny": "no"})
    log, gate = tmp_path / "log", tmp_path / "gate"
    future = pool.submit(work, str(log), str(gate))
    until(lambda: pids(log), 40)
    [first] = pids(log)
    os.kill(first, signal.SIGTERM)
    until(lambda: pool.status().runners[0].state == "draining", 5)
    gate.touch()
    assert future.result(5) == first
    second = pool.call(os.getpid, queue_timeout=40)
    with pytest.raises(RunnerLost) as caught:
        pool.call(os.kill, second, signal.SIGKILL)
    assert caught.value.cause == "unreachable"
    third = pool.call(os.getpid, queue_timeout=40)
    with pytest.raises(CallTimeout):
        pool.call(time.sleep, 60, timeout=0.5)
    assert len({first, second, third, pool.call(os.getpid, queue_timeout=40)}) == 4
    until(lambda: not alive(first, second, third), 5)


def test_a3_a8_a_running_cluster_is_left_as_it_was(
    make_pool: MakePool, gateway_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_cluster(gateway_server) as cluster:
        for _ in range(2):
            pool = make_pool(backend=cluster, max=1, boot_timeout=40)
            assert pool.call(int) == 0
            pool.close()
        with monkeypatch.context() as patch:
            ours = {**package.versions(), "distributed": "2020.1.0"}
            patch.setattr(package, "versions", lambda: ours)
            words = r"scheduler has distributed 20.*parent has 2020\.1\.0"
            with pytest.raises(BootError, match=words):
                make_pool(backend=cluster, max=1)
        assert cluster.status == "running"
        assert cluster.scheduler_info["workers"] == {}
        # Its workers are ordinary ones again.
        cluster.scale(1)
        with Client(cluster, set_as_default=False) as client:
            assert client.submit(os.getpid).result(40) > 0
            with pytest.raises(PoolOptionsError, match="has workers already"):
                make_pool(backend=cluster, max=1)
    with pytest.raises(PoolOptionsError, match="is closed"):
        make_pool(backend=cluster, max=1)


def test_a4_asynchronous(gateway_server: Any) -> None:
    from dask_gateway import GatewayCluster

    async def use() -> int:
        backend = (GatewayCluster, {"address": gateway_server.address})
        async with FlamePool("a", max=1, backend=backend, asynchronous=True, boot_timeout=40) as p:
            value: int = await p.call(int)
            return value

    assert asyncio.run(use()) == 0


PROGRAM = """
import os, subprocess, sys
from dask_gateway import GatewayCluster
from flame_dask import FlamePool

def run(log):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    script = 'sleep 60 & echo "$!" >> "$0"; echo "$$" >> "$0"; wait'
    subprocess.run(["sh", "-c", script, log])

if __name__ == "__main__":
    address, *logs = sys.argv[1:]
    given = GatewayCluster(address, shutdown_on_close=False)
    print(given.name, flush=True)
    backends = [(GatewayCluster, {"address": address}), given]
    limits = {"boot_timeout": 60, "queue_timeout": 60}
    pools = [FlamePool(f"pool{n}", max=1, backend=b, **limits) for n, b in enumerate(backends)]
    futures = [pool.submit(run, log) for pool, log in zip(pools, logs)]
    futures[0].result()
"""


def test_g3_the_parent_is_killed(gateway_server: Any, tmp_path: Path, until: Until) -> None:
    """Its cluster ends; one that it was given stays, and has no workers."""
    logs = [tmp_path / "log1", tmp_path / "log2"]
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), gateway_server.address, *map(str, logs)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        given = process.stdout.readline().strip()
        until(lambda: [len(lines(log)) for log in logs] == [3, 3], 60)
        process.kill()
        process.wait()
        until(lambda: not alive(*pids(logs[0]), *pids(logs[1])), 10)
        until(lambda: gateway_server.clusters() == [given], 15)
        until(lambda: gateway_server.wanted(given) == 0, 10)  # they are not replaced
        until(lambda: gateway_server.processes(kind="worker") == [], 20)
        until(lambda: len(gateway_server.processes()) == 1, 10)
    finally:
        process.kill()
        process.communicate()
        for name in gateway_server.clusters():
            gateway_server.stop(name)


def remove_packages(folder: Path) -> None:
    """Remove what a scheduler has left that was killed."""
    for path in folder.glob("flame_dask-*"):
        shutil.rmtree(path)


def test_g3_the_scheduler_is_killed(
    make_gateway_pool: MakePool,
    gateway_server: Any,
    flame_log: Any,
    temporary_folder: Path,
    until: Until,
) -> None:
    pool = make_gateway_pool(max=1)
    assert pool.call(int) == 0
    future = pool.submit(time.sleep, 60)
    [scheduler] = gateway_server.processes(kind="scheduler")
    scheduler.kill()
    with pytest.raises(RunnerLost):
        future.result(10)
    pool.close()
    until(lambda: gateway_server.processes() == [], 10)
    remove_packages(temporary_folder)


# -- a gateway that is gone ----------------------------------------------------------------------


def test_a6_closing_ends_though_the_gateway_is_gone(
    make_pool: MakePool,
    tmp_path: Path,
    temporary_folder: Path,
    flame_log: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
) -> None:
    """It is killed while a pool has work, on a cluster of its own and on one that it was given."""
    from dask_gateway import GatewayCluster

    caplog.set_level(logging.CRITICAL, "distributed")  # connections are cut
    monkeypatch.setattr(gateway, "END_LIMIT", 1.0)
    with start_gateway_server(tmp_path / "server") as server, contextlib.ExitStack() as stack:
        stack.callback(lambda: [process.kill() for process in server.processes()])
        given = GatewayCluster(server.address, shutdown_on_close=False)
        options = {"max": 1, "boot_timeout": 40, "queue_timeout": 40, "shutdown_timeout": 1}
        own = make_pool(backend=(GatewayCluster, {"address": server.address}), **options)
        pools = [own, make_pool(backend=given, **options)]
        logs = [tmp_path / "log1", tmp_path / "log2"]
        futures = [
            pool.submit(work, str(log), str(tmp_path / "never"))
            for pool, log in zip(pools, logs, strict=True)
        ]
        until(lambda: all(pids(log) for log in logs), 40)
        server.process.kill()
        began = time.monotonic()
        for pool, future in zip(pools, futures, strict=True):
            pool.close()
            with pytest.raises((RunnerLost, PoolClosed)):
                future.result(1)
        assert time.monotonic() - began < 20
        said = sorted(flame_log.texts())
        assert len(said) == 2, said
        assert f"cluster {own.cluster.name} may go on: its gateway {server.address} has" in said[0]
        assert f"cluster {given.name} may go on to start workers" in said[1]
        # What the log warns of is the worst case: here the schedulers see to their ends.
        until(lambda: server.processes(own.cluster.name) == [], 15)
        until(lambda: server.processes(given.name, kind="worker") == [], 15)
        given.close()
        del given.gateway._loop_runner
    remove_packages(temporary_folder)


def test_a6_closing_ends_though_the_gateway_does_not_answer(
    make_gateway_pool: MakePool,
    gateway_server: Any,
    flame_log: Any,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
) -> None:
    """The way to the scheduler is open all the time: runners end, their number can't be lowered."""
    monkeypatch.setattr(gateway, "ANSWER_LIMIT", 0.5)
    monkeypatch.setattr(gateway, "END_LIMIT", 1.0)
    pool = make_gateway_pool(max=1, min=1, shutdown_timeout=1)
    name = pool.cluster.name
    gateway_server.process.suspend()
    try:
        began = time.monotonic()
        pool.close()
        assert time.monotonic() - began < 20
        [said] = flame_log.texts()
        assert f"cluster {name} may go on" in said
        assert "(it does not answer). Have it stopped there" in said
    finally:
        gateway_server.process.resume()
    # Its scheduler has noticed that the parent is gone, and tells the gateway when that is back.
    until(lambda: gateway_server.clusters() == [], 10)


# -- what does not go ------------------------------------------------------------------------------


def test_f4_a_server_that_is_not_there(make_gateway_pool: MakePool) -> None:
    with pytest.raises(BootError, match="Cannot connect to host"):
        make_gateway_pool(max=1, cluster={"address": "http://127.0.0.1:1"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"security": object()}, "certificates"),
        ({"host": "127.0.0.1"}, "the gateway's to set"),
        ({"contact_address": "a:1"}, "the gateway's to set"),
        ({"scheduler": "parent"}, "connect to its scheduler"),
        ({"cluster": {"shutdown_on_close": False}}, "left open"),
        ({"cluster": {"asynchronous": True}}, "give it to the pool"),
    ],
)
def test_a2_options_are_checked(make_pool: MakePool, options: dict[str, Any], words: str) -> None:
    pytest.importorskip("dask_gateway")
    from dask_gateway import GatewayCluster

    given = {"address": "http://127.0.0.1:1", **options.pop("cluster", {})}
    with pytest.raises(PoolOptionsError, match=words):
        make_pool(max=1, backend=(GatewayCluster, given), **options)


# -- the parts by themselves -----------------------------------------------------------------------


class Answering:
    """A gateway that allows for so many workers."""

    address = "http://gateway"

    def __init__(self, most: int) -> None:
        self.most = most
        self.asked: list[int] = []
        self.count = 0

    async def _request(self, method: str, url: str, json: dict[str, int]) -> Any:
        self.asked.append(json["count"])
        await asyncio.sleep(0)
        self.count = min(json["count"], self.most)
        said = {"ok": self.count == json["count"], "msg": "too many"}

        async def read() -> dict[str, Any]:
            return said

        return SimpleNamespace(content_type="application/json", json=read)


def backend_of(answering: Answering) -> gateway.GatewayBackend:
    cluster = SimpleNamespace(
        asynchronous=False, status="running", scheduler_info={}, name="c", gateway=answering
    )
    return gateway.GatewayBackend(PoolOptions.check("p", max=9), cluster, {})


def test_c2_boots_of_one_moment_are_one_order() -> None:
    answering = Answering(9)
    backend = backend_of(answering)

    async def boot() -> None:
        await asyncio.gather(*(backend.boot(f"r{n}") for n in range(5)))
        await backend.stop("r1")
        await backend.boot("r5")

    asyncio.run(boot())
    assert answering.asked == [5, 4, 5]


def test_c2_a_boot_that_is_refused_holds_up_no_other() -> None:
    answering = Answering(3)
    backend = backend_of(answering)
    names = [f"r{n}" for n in range(5)]

    async def boot() -> list[str]:
        results = await asyncio.gather(*map(backend.boot, names), return_exceptions=True)
        refused = [name for name, result in zip(names, results, strict=True) if result]
        for name in refused:
            await backend.stop(name)
        return refused

    assert asyncio.run(boot()) == ["r0", "r1"]
    assert answering.count == 3


@pytest.mark.parametrize("pools", [1, 2])
def test_c2_an_order_during_a_report_is_reported(pools: int) -> None:
    """The gateway's own object on the scheduler would wait for its next heartbeat."""
    told = []

    class Service:
        count = 1

        async def heartbeat(self) -> None:
            told.append(self.count)
            if self.count < 3:
                self.count += 1

    service = Service()
    for _ in range(pools):
        heed_every_order(SimpleNamespace(services={"gateway": service}))  # type: ignore[arg-type]
    asyncio.run(service.heartbeat())
    assert told == [1, 2, 3]


def test_a8_a_worker_that_does_not_fit_is_refused_by_the_parents_versions() -> None:
    ours = {**package.versions(), "dask": "2020.1.0", "distributed": "2020.1.0"}
    arrivals = Arrivals(ours, 7, {"tcp://a": "r1"}.get)

    def ask(address: str) -> dict[str, Any]:
        return asyncio.run(arrivals.answer(None, "uuid", package.versions(), address))

    refused = ask("tcp://a")["refused"]
    assert f"the runner has dask {package.versions()['dask']}, the parent has 2020.1.0" in refused
    assert arrivals.refused == {"r1": refused}
    assert ask("tcp://b")["refused"] == NOT_WANTED
    arrivals = Arrivals(package.versions(), 7, {"tcp://a": "r1"}.get)
    answer = ask("tcp://a")
    assert (answer["refused"], answer["runner"], answer["threads"]) == ("", "r1", 7)
    assert answer["package"] is None


def test_the_page_and_the_warning_name_the_same_rules() -> None:
    page = Path(__file__).parents[2].joinpath("docs/backends/gateway.md").read_text()
    table = page.partition("## What it can not keep")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| ([A-K]\d+) \|", table, re.MULTILINE)) == gateway.IN_PART

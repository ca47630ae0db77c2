"""Real backends on this machine; each test is skipped, with the reason, where one can't be had."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import pytest

from flame_dask import FlamePool
from support import make_site

if TYPE_CHECKING:
    from ecs_agent import ECS
    from kube_operator import Kube

MakePool = Callable[..., FlamePool]

ROOT = Path(__file__).parents[1]

#: Exit code of a program in ci/backends that can't do its work here.
NOT_HERE = 77


class Service:
    """A program in ci/backends that says ``ready`` and goes on until it is ended."""

    def __init__(self, name: str, *arguments: object) -> None:
        command = ["bash", str(ROOT / "ci" / "backends" / name), *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        if said.strip() != "ready":
            _, complaint = self.process.communicate(timeout=60)
            if self.process.returncode == NOT_HERE:
                pytest.skip(f"{name}: {complaint.strip()}")
            pytest.fail(f"{name}: {complaint.strip()}")

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class SSHHosts(NamedTuple):
    """Two servers for SSH on loopback."""

    options: dict[str, Any]
    """For ``SSHCluster``."""
    ports: list[int]


@pytest.fixture(scope="session")
def ssh_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SSHHosts]:
    pytest.importorskip("asyncssh")
    folder = tmp_path_factory.mktemp("ssh")
    ports = free_ports(2)
    service = Service("ssh", folder, *ports)
    connect = [
        {
            "port": port,
            "username": getpass.getuser(),
            "client_keys": [str(folder / "key")],
            "known_hosts": None,
        }
        for port in ports
    ]
    yield SSHHosts({"hosts": ["127.0.0.1"] * 2, "connect_options": connect}, ports)
    service.close()


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A SLURM of one node on loopback; where its configuration is."""
    pytest.importorskip("dask_jobqueue")
    folder = tmp_path_factory.mktemp("slurm")
    service = Service("slurm", folder, *free_ports(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield folder
    service.close()


@pytest.fixture(scope="session")
def ecs_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ECS]:
    """Amazon's ECS on this machine: its API by moto, what runs in its tasks is real."""
    pytest.importorskip("dask_cloudprovider.aws", reason="dask-cloudprovider[aws] is missing")
    pytest.importorskip("moto.server", reason="moto or flask-cors is missing")
    from ecs_agent import ECS

    with pytest.MonkeyPatch.context() as patch:
        # For botocore's clients in this process and in programs; read before the server starts,
        # which reads the last one.
        patch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
        service = ECS(tmp_path_factory.mktemp("ecs"))
        for name, value in service.environment.items():
            patch.setenv(name, value)
        with service.patched():
            service.start()
            yield service
            service.close()


@pytest.fixture(scope="session")
def fargate_options(ecs_service: ECS) -> dict[str, Any]:
    """What somebody has set up at Amazon once, for all pools: options of ``FargateCluster``."""
    client = ecs_service.client
    ec2, ecs = client("ec2"), client("ecs")
    [vpc] = [each["VpcId"] for each in ec2.describe_vpcs()["Vpcs"] if each["IsDefault"]]
    subnets = [each["SubnetId"] for each in ec2.describe_subnets()["Subnets"]][:2]
    group = ec2.create_security_group(GroupName="mine", Description="mine", VpcId=vpc)["GroupId"]
    client("logs").create_log_group(logGroupName="mine")
    log = {
        "logDriver": "awslogs",
        "options": {
            "awslogs-region": ec2.meta.region_name,
            "awslogs-group": "mine",
            "awslogs-stream-prefix": "pools",
        },
    }
    container = {"name": "dask-worker", "image": "dask", "memory": 2048, "logConfiguration": log}
    definition = ecs.register_task_definition(
        family="mine",
        networkMode="awsvpc",
        cpu="1024",
        memory="2048",
        containerDefinitions=[container],
    )
    return {
        "cluster_arn": ecs.create_cluster(clusterName="mine")["cluster"]["clusterArn"],
        "execution_role_arn": "arn:aws:iam::123456789012:role/mine",
        "task_role_arn": "arn:aws:iam::123456789012:role/mine",
        "cloudwatch_logs_group": "mine",
        "vpc": vpc,
        "subnets": subnets,
        "security_groups": [group],
        "worker_task_definition_arn": definition["taskDefinition"]["taskDefinitionArn"],
        "fargate_use_private_ip": True,
    }


@pytest.fixture
def ecs(ecs_service: ECS, monkeypatch: pytest.MonkeyPatch) -> Iterator[ECS]:
    """ECS without faults and with nothing in it, looked at often; fails if a task is left."""
    ecs_service.reset()
    monkeypatch.setattr("flame_dask.backends.ecs_tasks.QUICK", 0.1)
    monkeypatch.setattr("flame_dask.backends.ecs_tasks.CALM", 0.5)
    yield ecs_service
    left = ecs_service.unstopped()
    ecs_service.kill_all()  # for the tests that follow
    assert left == []


@pytest.fixture
def make_ecs_pool(make_pool: MakePool, fargate_options: dict[str, Any]) -> MakePool:
    """Open pools on Fargate; ``cluster`` are options for the class, beyond the ready-made ones."""
    from dask_cloudprovider.aws import FargateCluster

    def make(**options: Any) -> FlamePool:
        given = {**fargate_options, **options.pop("cluster", {})}
        return make_pool(backend=(FargateCluster, given), **{"host": "127.0.0.1", **options})

    return make


class GatewayServer(NamedTuple):
    """A server of Dask Gateway on loopback."""

    address: str
    folder: Path
    process: psutil.Process

    def clusters(self) -> list[str]:
        """Return the clusters that have not been ended."""
        from dask_gateway import Gateway

        async def ask() -> list[str]:
            async with Gateway(self.address, asynchronous=True) as gateway:
                return [report.name for report in await gateway.list_clusters()]

        return asyncio.run(ask())

    def stop(self, cluster: str) -> None:
        """End a cluster."""
        from dask_gateway import Gateway

        async def stop() -> None:
            async with Gateway(self.address, asynchronous=True) as gateway:
                await gateway.stop_cluster(cluster)

        asyncio.run(stop())

    def wanted(self, cluster: str) -> int:
        """Return how many workers the server has last been told to have."""
        log = (self.folder / "server.log").read_text()
        return int(re.findall(rf"{cluster} heartbeat \[count: (\d+)", log)[-1])

    def processes(self, cluster: str = "", *, kind: str = "") -> list[psutil.Process]:
        """Return what runs of a cluster, or of all: ``scheduler``, ``worker`` or either.

        It is told by its folder, which is one of the server's.
        """
        found = []
        program = f"distributed.cli.dask_{kind}"
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                here = process.cwd().startswith(f"{self.folder}/clusters/{cluster}")
                if here and (program in process.cmdline() or not kind):
                    found.append(process)
        return found


@contextlib.contextmanager
def start_gateway_server(folder: Path) -> Iterator[GatewayServer]:
    """Start a server of Dask Gateway, and end it in the end if it is still there."""
    pytest.importorskip("dask_gateway")
    from dask_gateway.comm import GatewayConnector

    [port] = free_ports(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHON", sys.executable)
        patch.setenv("CLUSTER_PYTHONPATH", make_site(folder / "site"))
        service = Service("gateway", folder, port)
    # dask-gateway has two threads for the process that look up host names; they stay.
    both = threading.Barrier(2)
    list(GatewayConnector._executor.map(lambda _: both.wait(10), range(2)))
    [process] = psutil.Process(service.process.pid).children()
    try:
        yield GatewayServer(f"http://127.0.0.1:{port}", folder, process)
    finally:
        service.close()


@pytest.fixture(scope="session")
def gateway_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayServer]:
    with start_gateway_server(tmp_path_factory.mktemp("gateway")) as server:
        yield server


@pytest.fixture(scope="session")
def kube_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kube]:
    """Kubernetes on this machine: its API is an imitation, what runs in its pods is real."""
    pytest.importorskip("dask_kubernetes", reason="dask-kubernetes is missing")
    from kube_api import start_kube

    with start_kube(tmp_path_factory.mktemp("kube")) as kube, pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(kube.config))
        yield kube


@pytest.fixture
def kube(kube_service: Kube, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kube]:
    """Kubernetes without faults and with nothing in it, looked at often; fails if a thing is left.

    That is so in this process alone, not in programs.
    """
    monkeypatch.setattr("flame_dask.backends.kube_api._PAUSES", (0.05, 0.1))
    monkeypatch.setattr("flame_dask.backends.kube.LOOK_PAUSES", (0.3, 1.0))
    kube_service.reset()
    yield kube_service
    kube_service.reset()
    kube_service.settle()
    left = kube_service.everything()
    kube_service.clear()  # for the tests that follow
    assert left == []


@pytest.fixture
def make_kube_pool(kube: Kube, make_pool: MakePool) -> MakePool:
    """Open pools on Kubernetes; ``cluster`` are options for the class, beyond the usual ones."""
    from dask_kubernetes.operator import KubeCluster

    def make(**options: Any) -> FlamePool:
        given = {"scheduler_service_type": "LoadBalancer", **options.pop("cluster", {})}
        return make_pool(backend=(KubeCluster, given), **options)

    return make

"""Real backends on this machine; each test is skipped, with the reason, where one can't be had."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

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

"""Encryption of all connections of a pool (A1, F4)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import psutil
import pytest
from distributed import LocalCluster, Security
from distributed.core import rpc
from distributed.deploy.subprocess import SubprocessCluster
from distributed.utils import get_ip

from flame_dask import FlamePool, PoolOptionsError
from flame_dask.backends import secure
from flame_dask.options import PoolOptions

MakePool = Callable[..., FlamePool]

pytest.importorskip("cryptography")


def refused(address: str, arguments: dict[str, Any]) -> bool:
    """Tell whether a server lets nobody in who has these arguments for a connection."""

    async def ask() -> None:
        async with rpc(address, timeout=2, connection_args=arguments) as server:
            await server.identity()

    try:
        asyncio.run(ask())
    except OSError:
        return True
    return False


def look() -> tuple[list[str], list[str], int]:
    """Look for keys in a runner, and open a cluster that has nothing to do with the pool."""
    arguments = [text for text in psutil.Process().cmdline() if "KEY" in text or "DASK_" in text]
    variables = [name for name, value in os.environ.items() if "PRIVATE KEY" in value]
    plain = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0")
    with plain as cluster, cluster.get_client() as client:
        return arguments, variables, client.submit(int, "7").result(20)


def check(pool: FlamePool) -> None:
    assert pool.call(look) == ([], [], 7)
    [runner] = pool.status().runners
    mine = pool.cluster.security.get_connection_args("client")
    others = Security.temporary().get_connection_args("client")
    for address in (pool.cluster.scheduler_address, runner.address):
        assert address is not None
        assert address.startswith("tls://")
        assert not refused(address, mine)
        assert refused(address, others)
        assert refused(address.replace("tls://", "tcp://"), {})
    assert "PRIVATE KEY" not in f"{pool!r} {pool.options!r} {pool.events()!r}"


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_f4_with_the_users_own_certificates(
    make_pool: MakePool, backend: Any, isolation: str
) -> None:
    security = Security.temporary()
    pool = make_pool(max=1, security=security, isolation=isolation, backend=backend)
    assert pool.cluster.security is security
    check(pool)


@pytest.mark.skipif(secure.is_loopback(get_ip()), reason="this machine has no network")
def test_f4_whatever_can_be_reached_from_elsewhere_is_encrypted(
    make_pool: MakePool, backend: Any
) -> None:
    check(make_pool(max=1, host=get_ip(), backend=backend))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [(None, True), ("localhost", True), ("127.0.0.5", True), ("::1", True)]
    + [(host, False) for host in ("", "0.0.0.0", "10.0.0.1", "example.org", "eth0", "::")],
)
def test_what_loopback_is(host: str | None, loopback: bool) -> None:
    assert secure.is_loopback(host) is loopback
    options = PoolOptions.check("name", max=1)
    assert (secure.security_of(options, host) is None) is loopback


@pytest.mark.parametrize("security", [Security(), "tls", True])
def test_a2_security_without_encryption(make_pool: MakePool, security: Any) -> None:
    with pytest.raises(PoolOptionsError, match="require_encryption"):
        make_pool(max=1, security=security)


@pytest.mark.parametrize(
    ("cluster", "options", "words"),
    [
        (LocalCluster, {"scheduler": "remote"}, "SubprocessCluster"),
        (SubprocessCluster, {"scheduler": "parent"}, "LocalCluster"),
        (LocalCluster, {"contact_address": "example.org"}, "on this machine"),
    ],
)
def test_a2_options_that_make_no_sense_here(
    make_pool: MakePool, cluster: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(PoolOptionsError, match=words):
        make_pool(max=1, backend=cluster, **options)

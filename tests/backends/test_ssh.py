"""Runners behind real SSH servers (A3, A8, D4, G3)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import distributed
import psutil
import pytest
from distributed import Security, SSHCluster
from distributed.core import rpc

from flame_dask import BootError, FlamePool, PoolOptionsError, RunnerLost
from support import alive, lines, pids, states, wait_for_file

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("kills_runners")]


def port_of_my_server() -> str:
    """The port of the server that this process has come by."""
    return os.environ["SSH_CONNECTION"].split()[3]


def wait_and_tell(path: str) -> str:
    wait_for_file(path)
    return port_of_my_server()


def run(log: str) -> None:
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    script = 'sleep 60 & echo "$!" >> "$0"; echo "$$" >> "$0"; wait'
    subprocess.run(["sh", "-c", script, log], check=False)


@pytest.fixture
def make_ssh_pool(make_pool: MakePool, ssh_hosts: Any) -> MakePool:
    def make(**options: Any) -> FlamePool:
        given = {**ssh_hosts.options, **options.pop("cluster", {})}
        return make_pool(backend=(SSHCluster, given), **options)

    return make


def test_c2_d1_d4_runners_on_both_hosts_and_then_none(
    make_ssh_pool: MakePool, ssh_hosts: Any, tmp_path: Path, until: Until
) -> None:
    pool = make_ssh_pool(max=2, max_concurrency=1, idle_shutdown_after=0.5)
    assert pool.status().runners == ()
    gate = tmp_path / "gate"
    futures = [pool.submit(wait_and_tell, str(gate)) for _ in range(2)]
    until(lambda: states(pool) == ["ready", "ready"], 20)
    gate.touch()
    assert {future.result(10) for future in futures} == {str(port) for port in ssh_hosts.ports}
    until(lambda: pool.status().runners == (), 20)


def test_a8_the_package_comes_along_and_no_secret_is_seen(
    make_ssh_pool: MakePool, python_without_flame: str
) -> None:
    """With TLS, since it was asked for."""
    there = {"remote_python": python_without_flame}
    pool = make_ssh_pool(max=1, security=Security.temporary(), cluster=there)
    assert pool.cluster.scheduler.address.startswith("tls://")

    def look() -> tuple[str, list[str], list[str]]:
        import flame_dask

        keys = [name for name, value in os.environ.items() if "PRIVATE KEY" in value]
        arguments = psutil.Process().cmdline()
        return flame_dask.__file__, keys, [a for a in arguments if "PRIVATE KEY" in a]

    path, keys, arguments = pool.call(look)
    assert "flame_dask-package" in path
    assert (keys, arguments) == ([], [])
    assert "PRIVATE KEY" not in repr(pool) + repr(pool.options)


def test_j2_j3_a_bare_python_gets_the_parents_code(
    make_ssh_pool: MakePool,
    python_without_flame: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another environment, in an empty folder: flame_dask comes along, and so does the program."""
    folder = tmp_path / "program"
    (folder / "carried").mkdir(parents=True)
    module = folder / "carried" / "__init__.py"
    module.write_text("def where(): return __file__, 1\n")
    (folder / "carried" / "data.txt").write_text("data")
    monkeypatch.syspath_prepend(folder)
    import carried  # type: ignore[import-not-found]

    there = {"remote_python": python_without_flame}
    pool = make_ssh_pool(max=1, cluster=there, code_sync={"sync_modules": ["carried"]})
    file, number = pool.call(carried.where)
    assert number == 1
    assert not file.startswith(str(folder))
    assert Path(file).with_name("data.txt").read_text() == "data"
    module.write_text("def where(): return __file__, 2\n")
    assert pool.call(carried.where)[1] == 2
    pool.close()
    assert not Path(file).exists()


def test_a_client_without_the_pools_certificates_is_refused(make_ssh_pool: MakePool) -> None:
    pool = make_ssh_pool(max=1, security=Security.temporary())
    assert pool.call(int) == 0
    address = pool.cluster.scheduler.address
    plain = address.replace("tls://", "tcp://")
    mine = pool.cluster.security.get_connection_args("client")
    others = Security.temporary().get_connection_args("client")

    async def ask(where: str, arguments: dict[str, Any]) -> Any:
        async with rpc(where, timeout=2, connection_args=arguments) as scheduler:
            return await scheduler.identity()

    assert asyncio.run(ask(address, mine))["type"] == "ParentScheduler"
    for where, arguments in ((plain, {}), (address, others)):
        with pytest.raises(OSError):
            asyncio.run(ask(where, arguments))


def test_f2_a_runner_is_killed(make_ssh_pool: MakePool, tmp_path: Path, until: Until) -> None:
    pool = make_ssh_pool(max=1)
    log = tmp_path / "log"
    future = pool.submit(run, str(log))
    until(lambda: len(lines(log)) == 3, 20)
    os.kill(pids(log)[0], signal.SIGKILL)
    with pytest.raises(RunnerLost) as caught:
        future.result(10)
    assert (caught.value.cause, caught.value.signal) == ("signal", signal.SIGKILL)
    until(lambda: not alive(*pids(log)), 5)
    assert pool.call(int, queue_timeout=20) == 0


def test_f4_a_host_that_is_not_there(make_ssh_pool: MakePool, ssh_hosts: Any) -> None:
    nobody = {**ssh_hosts.options["connect_options"][0], "port": 1}
    with pytest.raises(BootError, match="Connect call failed"):
        make_ssh_pool(min=1, max=1, cluster={"hosts": ["127.0.0.1"], "connect_options": nobody})


def test_f4_runners_that_can_not_reach_the_scheduler(make_ssh_pool: MakePool) -> None:
    """The error says what they were told."""
    with (
        dask.config.set({"flame.boot-retries": 0}),
        pytest.raises(BootError, match=r"told to connect to tcp://127\.0\.0\.1:1\b"),
    ):
        make_ssh_pool(min=1, max=1, contact_address="127.0.0.1:1", boot_timeout=3)


def test_a8_an_environment_that_does_not_fit(
    make_ssh_pool: MakePool, make_python: Callable[[str], str]
) -> None:
    """With another release of distributed there, as far as anybody can see."""
    python = make_python("versions['distributed'] = '2024.1.0'")
    with dask.config.set({"flame.boot-retries": 0}), pytest.raises(BootError) as caught:
        make_ssh_pool(min=1, max=1, cluster={"remote_python": python})
    assert "the runner has distributed 2024.1.0" in str(caught.value)
    assert f"the parent has {distributed.__version__}" in str(caught.value)


def test_f4_an_interpreter_that_is_not_there(make_ssh_pool: MakePool) -> None:
    with pytest.raises(BootError, match="no-python"):
        make_ssh_pool(min=1, max=1, cluster={"remote_python": "/no-python"})


def test_a2_what_is_not_installed_is_named(
    make_ssh_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "asyncssh", None)
    with pytest.raises(PoolOptionsError, match=r"flame-dask\[ssh\]"):
        make_ssh_pool(max=1)


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"hosts": []}, "list of host names"),
        ({"host": "a"}, "is no option of SSHCluster"),
        ({"connect_options": [{}]}, "2 of them"),
    ],
)
def test_a2_options_are_checked(
    make_ssh_pool: MakePool, cluster: dict[str, Any], words: str
) -> None:
    with pytest.raises(PoolOptionsError, match=words):
        make_ssh_pool(max=1, cluster=cluster)

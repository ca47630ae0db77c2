"""Runners as machines of EC2 and Hetzner: the clouds are simulated, what runs there is real.

Nothing here has been seen by a cloud (A3, A8, C1, D4, G3).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Security
from distributed.core import Status

from flame_dask import BootError, FlamePool, PoolOptionsError, RunnerLost
from flame_dask.backends import lease
from flame_dask.testing.conformance import Conformance, On
from support import alive, pids, states, work

pytest.importorskip("dask_cloudprovider.aws", reason="dask-cloudprovider[aws] is not installed")
pytest.importorskip("moto.server", reason="moto[server,ec2] is not installed")

from dask_cloudprovider.aws import EC2Cluster

from doomed import Doomed, check_reap
from moto_server import REGION
from vm_agent import EC2, IMAGE, Fault, Hetzner

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]
MakeDoomed = Callable[..., Doomed]

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("kills_runners")]


@pytest.fixture(scope="session")
def ec2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EC2]:
    """EC2 on this machine."""
    service = EC2(tmp_path_factory.mktemp("ec2"))
    with service.patched():
        service.start()
        yield service
        service.close()


@pytest.fixture
def service(ec2: EC2, monkeypatch: pytest.MonkeyPatch) -> Iterator[EC2]:
    """Begin without faults; fail the test if a machine is left."""
    for name, value in ec2.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("flame_dask.backends.vm_clouds.LATE", 0.2)
    monkeypatch.setattr("flame_dask.backends.vm.LOOK", 0.2)
    ec2.reset()
    yield ec2
    left = ec2.unended()
    ec2.end_all()  # for the tests that follow
    assert left == []


@pytest.fixture(scope="session")
def ready_made(ec2: EC2) -> dict[str, Any]:
    """What somebody has set up at Amazon once, for all pools."""
    client = ec2.client("ec2")
    [vpc] = [each["VpcId"] for each in client.describe_vpcs()["Vpcs"] if each["IsDefault"]]
    group = client.create_security_group(GroupName="machines", Description="mine", VpcId=vpc)
    return {
        "region": REGION,
        "ami": "ami-12c6146b",
        "bootstrap": False,
        "docker_image": IMAGE,
        "security_groups": [group["GroupId"]],
        "use_private_ip": True,
        "vpc": vpc,
    }


@pytest.fixture
def make_vm_pool(service: EC2, make_pool: MakePool, ready_made: dict[str, Any]) -> MakePool:
    def make(**options: Any) -> FlamePool:
        given = {**ready_made, **options.pop("cluster", {})}
        return make_pool(backend=(EC2Cluster, given), **{"host": "127.0.0.1", **options})

    return make


def test_d4_no_machine_of_any_kind_without_work(
    make_vm_pool: MakePool, service: EC2, until: Until
) -> None:
    pool = make_vm_pool(max=2, idle_shutdown_after=0.2)
    assert service.requests == 0
    assert pool.call(os.getpid) != os.getpid()
    until(lambda: pool.status().runners == (), 20)
    assert service.requests == 1
    assert service.unended() == []


def test_c2_b1_a_burst(make_vm_pool: MakePool, service: EC2, tmp_path: Path, until: Until) -> None:
    service.delay = 3.0
    pool = make_vm_pool(max=3, max_concurrency=1)
    gate = tmp_path / "gate"
    futures = [pool.submit(work, str(tmp_path / "log"), str(gate)) for _ in range(6)]
    # At once: none waits until another one has been started.
    until(lambda: service.under_way == 3, 10)
    assert service.unended() == []
    until(lambda: states(pool) == ["ready"] * 3, 40)
    gate.touch()
    assert len({future.result(30) for future in futures}) == 3
    assert service.most == 3


def test_a8_f4_the_package_comes_along_and_no_secret_is_seen(
    make_vm_pool: MakePool, service: EC2, capfd: pytest.CaptureFixture[str], flame_log: Any
) -> None:
    """From an interpreter that has Dask and not flame_dask; with TLS, as on any real network."""
    awkward = 'it\'s "quoted": $HOME `id` \\ # end\n- next'
    pool = make_vm_pool(
        max=1,
        max_concurrency=3,
        security=Security.temporary(),
        env={"MINE": awkward},
        cluster={"env_vars": {"THEIRS": awkward, "MINE": "overridden"}},
    )
    assert pool.cluster.scheduler.address.startswith("tls://")

    def look() -> tuple[str, list[str], list[str], list[str], int]:
        import flame_dask

        keys = [name for name, value in os.environ.items() if "PRIVATE KEY" in value]
        [worker] = [o for o in __import__("gc").get_objects() if type(o).__name__ == "Worker"]
        mine = [os.environ["MINE"], os.environ["THEIRS"]]
        return flame_dask.__file__, mine, keys, psutil.Process().cmdline(), worker.state.nthreads

    path, mine, keys, arguments, threads = pool.call(look)
    assert "flame_dask-package" in path
    assert mine == [awkward, awkward]
    assert keys == []
    assert threads == 3
    [instance] = service.unended()
    machine = service.machine_of(instance)
    told = (machine.folder / "flame-runner").read_text().strip()
    assert len(told) > 2000  # the certificates are in there
    assert told in machine.user_data
    assert (machine.folder / "flame-runner").stat().st_mode & 0o077 == 0
    member = next(iter(pool.cluster.workers.values()))
    shown = [repr(pool), repr(pool.options), repr(pool.cluster), repr(member), *arguments]
    shown += [machine.log(), (machine.folder / "docker").read_text(), *capfd.readouterr()]
    shown += flame_log.texts(0)
    for text in shown:
        assert "PRIVATE KEY" not in text
        assert told not in text
        assert told[500:600] not in text


def test_a8_another_distributed_there(make_vm_pool: MakePool, service: EC2) -> None:
    import distributed

    service.machines.extra = {"ANOTHER_DISTRIBUTED": "2020.1.0"}
    with pytest.raises(BootError) as caught:
        make_vm_pool(min=1, max=1)
    assert "2020.1.0" in str(caught.value)
    assert distributed.__version__ in str(caught.value)


def test_a5_f4_what_amazon_says_is_told(make_vm_pool: MakePool, service: EC2) -> None:
    fault = Fault(400, "InsufficientInstanceCapacity", "There is no capacity")
    service.faults = [fault] * 50
    with pytest.raises(BootError, match="There is no capacity"):
        make_vm_pool(min=1, max=1)


def test_c1_c6_some_starts_fail(make_vm_pool: MakePool, service: EC2) -> None:
    fault = Fault(400, "InsufficientInstanceCapacity", "There is no capacity")
    service.faults = [None, fault, None, fault]
    pool = make_vm_pool(max=2, max_concurrency=1, single_use=True)
    futures = [pool.submit(os.getpid, timeout=50) for _ in range(3)]
    assert len({future.result(50) for future in futures}) == 3
    assert service.most <= 2


def test_c1_an_answer_that_is_lost_leaves_no_machine(make_vm_pool: MakePool, service: EC2) -> None:
    """The machine has been started, and the answer to the request is an error."""
    service.faults = ["lost"]
    pool = make_vm_pool(max=1)
    assert pool.call(int, queue_timeout=30) == 0
    assert service.requests == 2
    assert service.most == 1


def test_c1_a_boot_that_is_given_up_leaves_no_machine(
    make_vm_pool: MakePool, service: EC2, until: Until
) -> None:
    """The pool closes while requests for machines are under way: nobody knows their ids yet."""
    service.delay = 1.0
    pool = make_vm_pool(max=2, max_concurrency=1)
    futures = [pool.submit(int) for _ in range(2)]
    until(lambda: service.under_way == 2, 5)
    pool.close()
    assert [future.status for future in futures] == ["error"] * 2
    assert service.requests == 2
    assert service.unended() == []


def test_c1_a_machine_that_can_not_be_ended_counts(
    make_vm_pool: MakePool, service: EC2, flame_log: Any, until: Until
) -> None:
    pool = make_vm_pool(max=1, max_concurrency=1, single_use=True)
    service.refuse_ends = 1
    pids = [pool.submit(os.getpid, queue_timeout=40) for _ in range(2)]
    assert len({future.result(50) for future in pids}) == 2
    assert service.most == 1
    assert any("Not now" in text for text in flame_log.texts())


def test_f2_a_machine_dies(
    make_vm_pool: MakePool, service: EC2, tmp_path: Path, until: Until
) -> None:
    pool = make_vm_pool(max=1)
    log = tmp_path / "log"
    future = pool.submit(work, str(log), str(tmp_path / "gate"))
    until(lambda: pids(log), 30)
    [instance] = service.unended()
    service.machine_of(instance).kill()
    with pytest.raises(RunnerLost):
        future.result(15)
    assert pool.call(int, queue_timeout=30) == 0
    assert service.most == 1


def test_c1_c6_a_machine_whose_runner_never_comes(
    make_vm_pool: MakePool, service: EC2, until: Until
) -> None:
    """It switches itself off, which the cloud tells when it is asked. Another one is started."""
    service.machines.extra = {"PYTHONHOME": "/nowhere"}
    pool = make_vm_pool(max=1, boot_timeout=50)
    future = pool.submit(int)
    until(lambda: service.requests == 2, 15)
    service.machines.extra = {}
    assert future.result(45) == 0
    assert service.most == 1


@pytest.fixture
def doom(make_doomed: MakeDoomed, ready_made: dict[str, Any]) -> Callable[..., Doomed]:
    """Start a parent in a program of its own, with work for two runners."""

    def start(**options: Any) -> Doomed:
        options = {"host": "127.0.0.1", "shutdown_timeout": 5, "boot_timeout": 30, **options}
        return make_doomed(EC2Cluster, ready_made, options)

    return start


def test_g3_the_parent_is_killed(doom: Callable[..., Doomed], service: EC2, until: Until) -> None:
    doomed = doom()
    until(doomed.at_work, 40)
    assert len(service.unended()) == 2
    doomed.kill()
    until(lambda: not alive(*doomed.runners()), 5 + 30)
    until(lambda: service.unended() == [], 5)


def test_g3_the_parent_is_killed_and_its_runners_have_never_reached_it(
    doom: Callable[..., Doomed], service: EC2, until: Until
) -> None:
    before = len(service.machines.all)
    doomed = doom(boot_timeout=8, contact_address="127.0.9.9:9")
    until(lambda: len(service.machines.all) == before + 2, 40)
    doomed.kill()
    assert len(service.unended()) == 2
    until(lambda: service.unended() == [], 8 + 15)


def test_g3_reap_finds_what_hangs(doom: Callable[..., Doomed], service: EC2, until: Until) -> None:
    doomed = doom()
    until(doomed.at_work, 40)
    client = service.client("ec2")
    others = client.run_instances(ImageId="ami-12c6146b", MinCount=1, MaxCount=1)
    other = others["Instances"][0]["InstanceId"]
    check_reap(doomed, (EC2Cluster, {"region": REGION}), service.unended, until)
    assert [each.id for each in service.unended()] == [other]
    client.terminate_instances(InstanceIds=[other])


def test_g3_a_living_parent_renews_its_lease(
    make_vm_pool: MakePool, service: EC2, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr(lease, "LEASE", 3.0)
    make_vm_pool(min=1, max=1)
    [instance] = service.unended()

    def tags() -> dict[str, str]:
        return {each["key"]: each["value"] for each in instance.get_tags()}

    first = tags()
    assert first[lease.POOL] == "pool1"
    until(lambda: tags()[lease.EXPIRES] > first[lease.EXPIRES], 10)


def test_a4_an_asynchronous_pool(service: EC2, ready_made: dict[str, Any]) -> None:
    async def main() -> int:
        options: dict[str, Any] = {"host": "127.0.0.1", "boot_timeout": 30}
        backend = (EC2Cluster, ready_made)
        async with FlamePool("async", max=1, asynchronous=True, backend=backend, **options) as pool:
            answer: int = await pool.call(int)
            return answer

    assert asyncio.run(main()) == 0
    assert service.unended() == []


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"n_workers": 2}, "options `min` and `max`"),
        ({"worker_class": "dask_cuda.CUDAWorker"}, "Dask's own workers"),
        ({"scheduler_instance_type": "t2.large"}, "scheduler is in the parent"),
        ({"debug": True}, "show the certificates"),
        ({"auto_shutdown": False}, "always ends with its runner"),
        ({"security": False}, "own option `security`"),
        ({"security_groups": []}, "open to the world"),
        ({"worker_options": {"nthreads": 2}}, "leave out nthreads"),
        ({"no_such": 1}, "is no option of EC2Cluster"),
    ],
)
def test_a2_options_are_checked(make_vm_pool: MakePool, cluster: Any, words: str) -> None:
    with pytest.raises(PoolOptionsError, match=words):
        make_vm_pool(max=1, cluster=cluster)


def test_a2_an_environment_that_is_too_large(make_vm_pool: MakePool) -> None:
    secret = "".join(f"{number:x}" for number in range(9999))
    with pytest.raises(PoolOptionsError, match="the cloud allows 16384") as caught:
        make_vm_pool(max=1, env={"MINE": secret})
    assert secret[:50] not in str(caught.value)


def test_a2_a_scheduler_elsewhere_is_refused(make_vm_pool: MakePool) -> None:
    with pytest.raises(PoolOptionsError, match="scheduler is in the parent"):
        make_vm_pool(max=1, scheduler="remote")


def test_a3_a_running_cluster_is_refused(make_pool: MakePool, service: EC2) -> None:
    """Its scheduler would be a machine."""
    cluster = object.__new__(EC2Cluster)
    cluster.status = Status.closed
    with pytest.raises(PoolOptionsError, match="give the class"):
        make_pool(max=1, backend=cluster)


class TestEC2(Conformance):
    """The conformance tests, which see what is left as well."""

    @pytest.fixture
    def on(self, service: EC2, ready_made: dict[str, Any]) -> On:
        options = {"host": "127.0.0.1"}
        return On((EC2Cluster, ready_made), slow=1.5, options=options, left=service.unended)


# -- Hetzner: no tags, and a machine costs the same until it is deleted ---------------------------

#: The vendor's class has no option for it.
ELSEWHERE = """
import hcloud
from functools import partial
hcloud.Client = partial(hcloud.Client, api_endpoint={address!r})
"""


@pytest.fixture(scope="session")
def hetzner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hetzner]:
    """Hetzner on this machine."""
    pytest.importorskip("hcloud", reason="hcloud is not installed")
    service = Hetzner(tmp_path_factory.mktemp("hetzner"))
    yield service
    service.close()


@pytest.fixture
def servers(hetzner: Hetzner, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hetzner]:
    import hcloud

    monkeypatch.setattr(hcloud, "Client", partial(hcloud.Client, api_endpoint=hetzner.address))
    monkeypatch.setattr("flame_dask.backends.vm.LOOK", 0.2)
    monkeypatch.setattr("flame_dask.backends.vm_clouds.PAUSE", 0.05)
    hetzner.reset()
    yield hetzner
    left = hetzner.unended()
    hetzner.end_all()
    assert left == []


HETZNER = {
    "image": "ubuntu-24.04",
    "location": "fsn1",
    "server_type": "cx22",
    "docker_image": IMAGE,
    "bootstrap": False,
}


@pytest.fixture
def make_hetzner_pool(servers: Hetzner, make_pool: MakePool) -> MakePool:
    from dask_cloudprovider.hetzner import HetznerCluster

    def make(**options: Any) -> FlamePool:
        return make_pool(backend=(HetznerCluster, HETZNER), host="127.0.0.1", **options)

    return make


def test_d4_a8_hetzner(make_hetzner_pool: MakePool, servers: Hetzner, until: Until) -> None:
    pool = make_hetzner_pool(name="My pool (big)", max=2, idle_shutdown_after=0.2)
    assert servers.created == 0
    assert pool.call(os.getpid, queue_timeout=30) != os.getpid()
    [name] = servers.machines.all
    assert name.startswith("flame-my-pool-big-1-")
    until(lambda: pool.status().runners == (), 20)
    assert servers.unended() == []


def test_c1_c6_hetzner_refuses(make_hetzner_pool: MakePool, servers: Hetzner) -> None:
    servers.faults = [Fault(403, "resource_limit_exceeded", "server limit exceeded")] * 50
    with pytest.raises(BootError, match="server limit exceeded"):
        make_hetzner_pool(min=1, max=1)


def test_c1_hetzners_answer_is_lost(make_hetzner_pool: MakePool, servers: Hetzner) -> None:
    """The vendor's object has never heard of the server: it is found by its name."""
    servers.faults = ["lost"]
    before = servers.created
    pool = make_hetzner_pool(max=1)
    assert pool.call(int, queue_timeout=30) == 0
    assert servers.created == before + 2
    assert servers.most == 1


def test_c1_a_server_counts_until_it_is_gone(make_hetzner_pool: MakePool, servers: Hetzner) -> None:
    servers.lag = 1.0
    pool = make_hetzner_pool(max=1, max_concurrency=1, single_use=True)
    futures = [pool.submit(os.getpid, queue_timeout=40) for _ in range(2)]
    assert len({future.result(50) for future in futures}) == 2
    assert servers.most == 1


def test_c1_a_start_at_hetzner_is_given_up(
    make_hetzner_pool: MakePool, servers: Hetzner, until: Until
) -> None:
    servers.delay = 1.0
    before = servers.created
    pool = make_hetzner_pool(max=2, max_concurrency=1)
    futures = [pool.submit(int) for _ in range(2)]
    until(lambda: servers.under_way == 2, 5)
    pool.close()
    assert [future.status for future in futures] == ["error"] * 2
    assert servers.created == before + 2
    assert servers.unended() == []


def test_g3_at_hetzner_the_runners_end_and_their_machines_stay(
    make_doomed: MakeDoomed,
    servers: Hetzner,
    flame_log: Any,
    make_hetzner_pool: MakePool,
    until: Until,
) -> None:
    """They are switched off, and go on costing money: a pool says so when it opens."""
    before = ELSEWHERE.format(address=servers.address)
    from dask_cloudprovider.hetzner import HetznerCluster

    options = {"host": "127.0.0.1", "shutdown_timeout": 5, "boot_timeout": 30}
    doomed = make_doomed(HetznerCluster, HETZNER, options, before)
    until(doomed.at_work, 40)
    names = [each["name"] for each in servers.unended()]
    doomed.kill()
    until(lambda: not alive(*doomed.runners()), 5 + 30)
    until(lambda: all(servers.machines.all[name].is_off() for name in names), 5)
    assert len(servers.unended()) == 2
    servers.end_all()
    make_hetzner_pool(max=1)
    [warning] = flame_log.texts(logging.WARNING)
    assert "rules F2 and G3 hold in part only" in warning

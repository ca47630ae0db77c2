"""How tasks of ECS end, and who sees to it (C1, E5, F2, G3); on what test_ecs.py runs on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame_dask import FlamePool, RunnerLost
from flame_dask.backends import lease
from flame_dask.backends.ecs_tasks import TaskRunner
from support import alive, doze, states, wait_for_file

pytest.importorskip("dask_cloudprovider.aws", reason="dask-cloudprovider[aws] is missing")
pytest.importorskip("moto.server", reason="moto or flask-cors is missing")

from dask_cloudprovider.aws import FargateCluster

from doomed import Doomed, check_reap
from ecs_agent import ECS

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]
MakeDoomed = Callable[..., Doomed]

pytestmark = [
    pytest.mark.backend,
    # The service comes first, so that it is looked at last: when all pools are closed.
    pytest.mark.usefixtures("ecs", "kills_runners"),
]


def test_f2_a_task_is_killed(
    make_ecs_pool: MakePool,
    ecs: ECS,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
) -> None:
    """The scheduler notices first. If the task was stopped then, nobody would know why it ended."""
    ecs.unaware = 0.5
    # As ECS takes its time, so may this machine.
    monkeypatch.setattr("flame_dask.backends.ecs.ECSBackend.patience", 20.0)
    monkeypatch.setattr("flame_dask.backends.ecs_tasks.LAST_BREATH", 20.0)
    pool = make_ecs_pool(max=1)
    file = tmp_path / "pid"
    future = pool.submit(doze, str(file))
    until(lambda: file.exists() and file.read_text(), 20)
    os.kill(int(file.read_text()), signal.SIGKILL)
    with pytest.raises(RunnerLost) as caught:
        future.result(20)
    assert (caught.value.cause, caught.value.signal) == ("signal", signal.SIGKILL)
    assert pool.call(int, queue_timeout=20) == 0


@pytest.mark.parametrize(
    ("code", "reason", "stop_code", "loss"),
    [
        (137, None, "EssentialContainerExited", "signal"),
        (137, "OutOfMemoryError: Container killed", "EssentialContainerExited", "oom"),
        (143, None, "SpotInterruption", "preempted"),
        (1, None, "EssentialContainerExited", "exited"),
        (None, "CannotPullContainerError", "TaskFailedToStart", None),
    ],
)
def test_f2_e5_what_a_task_died_of(
    code: int | None, reason: str | None, stop_code: str, loss: str | None
) -> None:
    never: Any = None
    runner = TaskRunner("tls://somewhere", "r-1", never, {}, never, {}, never)
    container = {"name": "dask-worker", "exitCode": code, "reason": reason}
    runner.task = {"stopCode": stop_code, "containers": [container]}
    runner.has_stopped()
    assert runner.ending().loss == loss


def test_f2_somebody_else_stops_a_task(
    make_ecs_pool: MakePool, ecs: ECS, tmp_path: Path, until: Until
) -> None:
    """Amazon does so when it wants a spot machine back: the runner gets SIGTERM (E5)."""
    ecs.grace = 30.0
    pool = make_ecs_pool(max=1, max_concurrency=1)
    gate = tmp_path / "gate"
    future = pool.submit(wait_for_file, str(gate))
    until(lambda: states(pool) == ["ready"], 20)
    [task] = ecs.unstopped()
    ecs.client("ecs").stop_task(cluster=task.cluster_arn, task=task.task_arn)
    until(lambda: task.last_status == "STOPPING", 5)
    gate.touch()
    assert future.result(10)
    assert pool.call(int, queue_timeout=20) == 0


def test_c1_a_boot_that_is_given_up_leaves_no_task(
    make_ecs_pool: MakePool, ecs: ECS, until: Until
) -> None:
    """The pool closes while requests for tasks are under way: nobody knows their ARNs yet."""
    ecs.delay = 1.0
    pool = make_ecs_pool(max=3, max_concurrency=1)
    futures = [pool.submit(int) for _ in range(3)]
    until(lambda: ecs.under_way == 3, 5)
    pool.close()
    assert [future.status for future in futures] == ["error"] * 3
    assert len(ecs.requests) == 3
    assert ecs.unstopped() == []


def test_c1_an_answer_that_is_lost_leaves_no_task(make_ecs_pool: MakePool, ecs: ECS) -> None:
    """The task has started, and the answer to the request is an error of the service's."""
    ecs.faults = ["lost"]
    pool = make_ecs_pool(max=1)
    assert pool.call(int, queue_timeout=20) == 0
    assert len(ecs.requests) == 2
    assert ecs.most == 1


@pytest.fixture
def doom(make_doomed: MakeDoomed, fargate_options: dict[str, Any]) -> Callable[..., Doomed]:
    """Start a parent in a program of its own, with work for two runners."""

    def start(**options: Any) -> Doomed:
        options = {"host": "127.0.0.1", "shutdown_timeout": 2, **options}
        return make_doomed(FargateCluster, fargate_options, options)

    return start


def test_g3_the_parent_is_killed(doom: Callable[..., Doomed], ecs: ECS, until: Until) -> None:
    doomed = doom()
    until(doomed.at_work, 40)
    assert len(ecs.unstopped()) == 2
    doomed.kill()
    until(lambda: not alive(*doomed.runners()), 2 + 30)
    until(lambda: ecs.unstopped() == [], 5)


def test_g3_the_parent_is_killed_and_its_runners_have_never_reached_it(
    doom: Callable[..., Doomed], ecs: ECS, until: Until
) -> None:
    doomed = doom(boot_timeout=4, contact_address="127.0.9.9:9")
    until(lambda: [task.last_status for task in ecs.unstopped()] == ["RUNNING"] * 2, 40)
    doomed.kill()
    assert len(ecs.unstopped()) == 2
    until(lambda: ecs.unstopped() == [], 4 + 10)
    assert all(task.stop_code == "EssentialContainerExited" for task in ecs.tasks()[-2:])


def test_g3_reap_finds_what_hangs(
    doom: Callable[..., Doomed],
    ecs: ECS,
    fargate_options: dict[str, Any],
    until: Until,
) -> None:
    doomed = doom()
    until(doomed.at_work, 40)
    client = ecs.client("ecs")
    [others] = client.run_task(
        cluster=fargate_options["cluster_arn"],
        taskDefinition=fargate_options["worker_task_definition_arn"],
        launchType="FARGATE",
        overrides={"containerOverrides": [{"name": "dask-worker", "command": ["sleep", "60"]}]},
        networkConfiguration={
            "awsvpcConfiguration": {
                "subnets": fargate_options["subnets"],
                "securityGroups": fargate_options["security_groups"],
            }
        },
        tags=[{"key": "mine", "value": "yes"}],
    )["tasks"]
    given = (FargateCluster, {"cluster_arn": fargate_options["cluster_arn"]})
    check_reap(doomed, given, ecs.unstopped, until)
    [rest] = ecs.unstopped()
    assert rest.task_arn == others["taskArn"]
    client.stop_task(cluster=fargate_options["cluster_arn"], task=others["taskArn"])
    until(lambda: ecs.unstopped() == [], 5)


def test_g3_a_living_parent_renews_its_lease(
    make_ecs_pool: MakePool, ecs: ECS, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr(lease, "LEASE", 3.0)
    make_ecs_pool(min=1, max=1)
    [task] = ecs.unstopped()

    def expires() -> str:
        found: str = {each["key"]: each["value"] for each in task.tags}[lease.EXPIRES]
        return found

    first = expires()
    until(lambda: expires() > first, 10)


def test_g3_a_lease_decides_on_another_machine() -> None:
    mine = lease.tags("a pool")
    assert lease.left_behind(mine) is None
    passed = {**mine, lease.EXPIRES: lease.expiry(-1)}
    assert lease.left_behind(passed) is None  # it lives, and this is its machine
    host, pid, started, _ = mine[lease.PARENT].split("/")
    elsewhere = {lease.PARENT: f"{host}/{pid}/{started}/another"}
    assert lease.left_behind({**mine, **elsewhere}) is None
    assert "has not renewed" in str(lease.left_behind({**passed, **elsewhere}))
    again = {lease.PARENT: mine[lease.PARENT].replace(f"/{started}/", "/1/")}
    assert "is gone" in str(lease.left_behind({**mine, **again}))  # its pid is used again
    for name in (lease.POOL, lease.PARENT, lease.EXPIRES):
        assert (
            lease.left_behind({**passed, **elsewhere, name: ""} if name != lease.POOL else {})
            is None
        )
    assert lease.left_behind({**passed, **elsewhere, lease.EXPIRES: "soon"}) is None


@pytest.mark.timeout(120)
def test_a6_all_that_is_made_at_amazon_is_deleted_and_nothing_is_open_to_the_world(
    make_pool: MakePool, ecs: ECS
) -> None:
    """With nothing but defaults: the vendor's class makes network, roles and definitions."""
    ec2, client, iam = (ecs.client(name) for name in ("ec2", "ecs", "iam"))

    def there() -> tuple[list[str], ...]:
        return (
            sorted(each["GroupId"] for each in ec2.describe_security_groups()["SecurityGroups"]),
            sorted(
                each["clusterArn"]
                for each in client.describe_clusters(
                    clusters=client.list_clusters()["clusterArns"]
                )["clusters"]
                if each["status"] == "ACTIVE"  # one that was deleted is still listed for a while
            ),
            sorted(each["RoleName"] for each in iam.list_roles()["Roles"]),
            sorted(client.list_task_definitions(status="ACTIVE")["taskDefinitionArns"]),
        )

    before = there()
    pool = make_pool(backend=FargateCluster, max=1, host="127.0.0.1")
    now = there()
    assert [len(new) - len(old) for new, old in zip(now, before, strict=True)] == [1, 1, 2, 1]
    [group] = set(now[0]) - set(before[0])
    [mine] = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    [rule] = mine["IpPermissions"]
    assert [each["CidrIp"] for each in rule["IpRanges"]] == ["172.31.0.0/16"]
    assert rule["Ipv6Ranges"] == []
    assert pool.call(int, queue_timeout=40) == 0
    pool.close()
    assert there() == before

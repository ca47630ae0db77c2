"""Options of a pool on Kubernetes, and what its parts make of what they are told."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import dask.config
import pytest

import flame_dask
from flame_dask import FlamePool, PoolOptionsError
from flame_dask.backends import kube as kube_backend
from flame_dask.backends import kube_api, kube_pods
from flame_dask.backends.base import Ending
from flame_dask.backends.kube_api import Group
from kube_support import own_cluster

MakePool = Callable[..., FlamePool]
Resource = dict[str, Any]

# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"security": object()}, "certificates"),
        ({"host": "127.0.0.1"}, "the operator's to set"),
        ({"contact_address": "a:1"}, "the operator's to set"),
        ({"scheduler": "parent"}, "connect to the cluster's scheduler"),
        ({"cluster": {"n_workers": 2}}, "`min` and `max`"),
        ({"cluster": {"create_mode": "CONNECT_ONLY"}}, "from_name"),
        ({"cluster": {"shutdown_on_close": False}}, "left open"),
        ({"cluster": {"asynchronous": True}}, "give it to the pool"),
        ({"cluster": {"loop": None}}, "the pool has one"),
        ({"cluster": {"imagge": "mine"}}, "give some of custom_cluster_spec, env, idle_timeout"),
        ({"cluster": {"idle_timeout": 0}}, "at least 1"),
        ({"cluster": {"idle_timeout": "1m"}}, "a whole number of seconds"),
    ],
)
def test_a2_options_are_checked(make_pool: MakePool, options: Resource, words: str) -> None:
    kind = pytest.importorskip("dask_kubernetes.operator").KubeCluster
    with pytest.raises(PoolOptionsError, match=words):
        make_pool(max=1, backend=(kind, options.pop("cluster", {})), **options)


def options_of(cluster: Resource, **config: Any) -> Resource:
    """Return what the class is given."""
    operator = pytest.importorskip("dask_kubernetes.operator")
    with dask.config.set({f"kubernetes.{name}": value for name, value in config.items()}):
        pool = flame_dask.options.PoolOptions.check("pool", max=1)
        backend = kube_backend.KubeBackend(pool, operator.KubeCluster, cluster)
        return backend._cluster_options()


def test_a3_g3_a_cluster_always_has_an_end(tmp_path: Path) -> None:
    """By itself, if nobody else is there; and no workers that are nobody's."""
    usual = kube_backend.IDLE_TIMEOUT
    assert options_of({})["idle_timeout"] == usual
    assert options_of({"idle_timeout": None})["idle_timeout"] == usual
    assert options_of({"idle_timeout": 7})["idle_timeout"] == 7
    assert options_of({}, **{"idle-timeout": 8})["idle_timeout"] == 8
    own = own_cluster(workers=2)
    (tmp_path / "mine.yaml").write_text(json.dumps(own["custom_cluster_spec"]))
    path = str(tmp_path / "mine.yaml")
    for options in (
        options_of(own),
        options_of({"custom_cluster_spec": path}),
        options_of({}, **{"custom-cluster-spec": path}),
    ):
        spec = options["custom_cluster_spec"]["spec"]
        assert (spec["idleTimeout"], spec["worker"]["replicas"]) == (usual, 0)
    assert own == own_cluster(workers=2)


# -- what is told, and what is read ----------------------------------------------------------------


class Scripted(kube_api.KubeAPI):
    """An API server that has answers for what it is asked; the last ones again and again."""

    def __init__(self, **answers: list[Any]) -> None:
        super().__init__()
        self.answers = answers
        self.asked: list[tuple[str, str, Any]] = []

    async def _ask(self, method: str, url: str, *args: Any, **more: Any) -> Any:
        self.asked.append((method, url, json.loads(more.get("content") or "null")))
        answers = self.answers.get(f"{method}_{url.partition('/')[0]}", [None])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def terminating(grace: int) -> Resource:
    return {"items": [{"metadata": {"name": "p", "deletionGracePeriodSeconds": grace}}]}


@pytest.mark.parametrize("force", [False, True])
def test_c1_e3_what_can_not_be_ended_gets_no_time(
    force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pod that has not been told to end is left alone: it would be replaced."""
    monkeypatch.setattr(kube_api, "_PAUSES", (0.01, 0.01))
    pods = [{"items": [{"metadata": {"name": "p"}}]}, terminating(40), terminating(1), {}]
    api = Scripted(GET_pods=pods, DELETE_pods=[RuntimeError("forbidden")])
    ending = asyncio.run(api.end_group(Group("g", "c", "r"), 5, wait=not force, force=force))
    assert ending == Ending()
    killed = [body for method, url, body in api.asked if (method, url) == ("DELETE", "pods/p")]
    assert killed == ([{"gracePeriodSeconds": 1}] if force else [])


def test_a6_c1_a_pod_that_stays_is_told() -> None:
    """So that it counts, and is tried again."""
    api = Scripted(GET_pods=[terminating(40)])
    with pytest.raises(TimeoutError, match="worker group g or its pod is still there"):
        asyncio.run(api.end_group(Group("g", "c", "r"), 0.0, wait=True, force=False))


def test_c1_a_group_that_comes_late_is_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order without an answer may be carried out after the order to delete it."""
    monkeypatch.setattr(kube_api, "UNCLEAR", 0.2)
    monkeypatch.setattr(kube_api, "_PAUSES", (0.01, 0.01))
    api, group = Scripted(POST_daskworkergroups=[kube_api.NoAnswerError()]), Group("g", "c", "r")

    async def live() -> float:
        with pytest.raises(kube_api.NoAnswerError):
            await api.create(group, {})
        await api.end_group(group, 5, wait=True, force=False)
        return asyncio.get_running_loop().time() - group.unclear_until

    assert 0 <= asyncio.run(live()) < 1
    assert [method for method, *_ in api.asked].count("DELETE") > 3


def test_f4_an_api_server_without_the_operators_kinds() -> None:
    with pytest.raises(RuntimeError, match="is the Dask operator installed there"):
        asyncio.run(Scripted().create(Group("g", "c", "r"), {}))


def test_f4_an_api_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kube_api, "ANSWER_LIMIT", 0.05)

    class Silent:
        @contextlib.asynccontextmanager
        async def call_api(self, *args: object, **more: object) -> AsyncIterator[None]:
            await asyncio.Event().wait()
            yield

    api = kube_api.KubeAPI()
    api._api = Silent()
    with pytest.raises(kube_api.NoAnswerError, match=r"does not answer within 0\.05 s"):
        asyncio.run(api.get("daskclusters", "mine"))


def cluster_with(args: tuple[str, ...], command: list[str], env: object = None) -> Resource:
    container = {"name": "worker", "command": command, "args": list(args), "env": env}
    other = {"name": "beside", "args": ["--name"]}
    worker = {"replicas": 0, "spec": {"containers": [other, container]}}
    return {"metadata": {"uid": "1"}, "spec": {"worker": worker}}


NAME = ("--name", "$(DASK_WORKER_NAME)")


@pytest.mark.parametrize(
    ("args", "command", "more"),
    [
        (("dask-worker", *NAME), [], ["--no-nanny", "--nthreads", "7"]),
        (("dask", "worker", *NAME), [], ["--no-nanny", "--nthreads", "7"]),
        (NAME, ["dask", "worker"], ["--no-nanny", "--nthreads", "7"]),
        (("dask-worker", *NAME, "--nanny"), [], ["--nthreads", "7"]),
        (("dask-worker", *NAME, "--nthreads", "1"), [], ["--no-nanny"]),
        (("dask-cuda-worker", *NAME), [], []),
    ],
)
def test_e5_what_a_pod_is_told(args: tuple[str, ...], command: list[str], more: list[str]) -> None:
    env = [{"name": "DASK_WORKER_NAME", "value": "x"}, {"name": "A", "value": "b"}]
    cluster = cluster_with(args, command, env=env)
    group = Group.of("c" * 39 + "-" * 14, "pool-1")
    resource = group.resource(cluster, "pool", 7, 20.5)
    assert re.fullmatch(r"c{39}-flame-[0-9a-f]{12}", resource["metadata"]["name"])
    worker = resource["spec"]["worker"]
    assert worker["replicas"] == 1
    assert worker["spec"]["terminationGracePeriodSeconds"] == 31
    container = worker["spec"]["containers"][1]
    assert container["args"] == [*args, *more]
    assert container["env"] == [env[1], {"name": "DASK_WORKER_NAME", "value": "pool-1"}]
    # The cluster's own are as they were.
    assert cluster == cluster_with(args, command, env=env)


def test_e5_calls_without_a_limit_have_an_hour() -> None:
    resource = Group.of("c", "r").resource(cluster_with(NAME, ["dask-worker"]), "pool", 1, None)
    assert resource["spec"]["worker"]["spec"]["terminationGracePeriodSeconds"] == 3600


def test_f4_a_worker_that_would_choose_its_name() -> None:
    with pytest.raises(RuntimeError, match=r"--name \$\(DASK_WORKER_NAME\)"):
        Group.of("c", "r").resource(cluster_with(("dask-worker",), []), "pool", 1, 30)


def pod_with(state: Resource, last: Resource | None = None, **status: Any) -> Resource:
    container = {"name": "worker", "state": state, "lastState": last or {}}
    other = {"name": "beside", "state": {"terminated": {"exitCode": 1}}}
    return {"status": {"containerStatuses": [other, container], **status}}


def ended(code: int, reason: str = "Error") -> Resource:
    return {"terminated": {"exitCode": code, "reason": reason}}


DISRUPTED = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}


@pytest.mark.parametrize(
    ("pod", "loss", "exit_code"),
    [
        (pod_with({"running": {}}), None, None),
        (pod_with({"running": {}}, ended(137, "OOMKilled")), "oom", None),
        (pod_with(ended(139)), "signal", -11),
        (pod_with({"waiting": {"reason": "CrashLoopBackOff"}}, ended(2)), "exited", 2),
        (pod_with(ended(0, "Completed")), "exited", 0),
        (pod_with({"running": {}}, conditions=[DISRUPTED]), "preempted", None),
        (pod_with({}, phase="Failed", reason="Evicted", message="disk"), "preempted", None),
        ({}, None, None),
    ],
)
def test_f2_how_a_container_ended(pod: Resource, loss: str | None, exit_code: int | None) -> None:
    found = kube_pods.how_it_ended(pod, "worker")
    assert (found.loss, found.exit_code) == (loss, exit_code)
    assert (kube_pods.trouble(pod, "worker") is None) == (loss is None or "conditions" in str(pod))


def test_f4_what_a_pod_waits_for() -> None:
    unfit = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "cpu"}
    assert (
        kube_pods.waits_for({"status": {"conditions": [unfit]}}, "worker") == "Unschedulable: cpu"
    )
    init = {"initContainerStatuses": [{"name": "i", "state": {"waiting": {"reason": "x"}}}]}
    assert kube_pods.trouble({"status": init}, "worker") is None
    init["initContainerStatuses"][0]["state"] = {"waiting": {"reason": "InvalidImageName"}}
    assert kube_pods.trouble({"status": init}, "worker") == Ending("start", "InvalidImageName")


def test_the_page_and_the_warning_name_the_same_rules() -> None:
    page = Path(__file__).parents[2].joinpath("docs/backends/kubernetes.md").read_text()
    table = page.partition("## What it can not keep")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| ([A-K]\d+) \|", table, re.MULTILINE)) == kube_backend.IN_PART

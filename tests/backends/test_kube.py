"""Runners on Kubernetes: KubeCluster of dask-kubernetes, against an imitation of its API server."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask.config
import pytest
from distributed import get_worker

import flame_dask
from flame_dask import BootError, CallTimeout, FlamePool, RunnerLost
from flame_dask.backends import kube as kube_backend
from flame_dask.backends import kube_api
from kube_support import GROUPS, open_cluster, own_cluster, refusing
from support import alive, pids, states, work

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


@pytest.fixture
def impatient() -> Iterator[None]:
    """Have a pool that can't open say so at once, and try other boots soon."""
    with dask.config.set({"flame.boot-retries": 0, "flame.boot-backoff.cap": "0.2s"}):
        yield


# -- runners ---------------------------------------------------------------------------------------


def test_a6_c1_c2_d1_d4_it_grows_and_shrinks(
    make_kube_pool: MakePool, kube: Any, tmp_path: Path, until: Until, flame_log: Any
) -> None:
    """With a group for each runner, all at once; each ends by itself, and none is left."""
    pool = make_kube_pool(max=2, max_concurrency=1, idle_shutdown_after=0.5)
    [said] = flame_log.texts(logging.WARNING)
    assert f"rules {', '.join(kube_backend.IN_PART)} hold in part only" in said
    assert "not encrypted" in said
    assert kube.pods() == []
    calls, gates = tmp_path / "calls", [tmp_path / "gate1", tmp_path / "gate2"]
    futures = [pool.submit(work, str(calls), str(gate), queue_timeout=20) for gate in gates]
    waiting = pool.submit(os.getpid, queue_timeout=20)
    until(lambda: len(pids(calls)) == 2, 20)
    assert len(kube.names("daskworkergroups")) == 2
    gates[0].touch()
    first = futures[0].result(10)
    assert waiting.result(10) == first
    # That one goes, and not the other, which works.
    until(lambda: len(pool.status().runners) == 1, 20)
    assert not alive(first)
    assert alive(*pids(calls))
    [group] = kube.names("daskworkergroups")
    [pod] = kube.pods()
    assert pod.resource["metadata"]["labels"]["dask.org/workergroup-name"] == group
    gates[1].touch()
    assert futures[1].result(10) != first
    # Each counts until nothing is left of it.
    until(lambda: pool.status().runners == (), 20)
    assert kube.pods() == kube.names("daskworkergroups") == []
    pool.close()
    assert kube.most == 2
    assert kube.everything() == []


def test_a8_f4_a_runner_with_all_that_the_pool_brings_along(
    make_kube_pool: MakePool, kube: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """In its pod there is no flame_dask. Secrets are nowhere that others look."""
    caplog.set_level(logging.DEBUG)
    pool = make_kube_pool(max=1, max_concurrency=3, env={"OF_THE_POOL": "its-secret-word"})

    def look() -> tuple[str, str | None, int, str, object]:

        worker, parent = get_worker(), flame_dask.parent()
        assert parent is not None
        names = parent.runner, worker.name
        return flame_dask.__file__, os.environ["OF_THE_POOL"], worker.state.nthreads, *names

    path, variable, threads, runner, name = pool.call(look, queue_timeout=20)
    assert "flame_dask-package" in path
    assert (variable, threads) == ("its-secret-word", 3)
    assert [each.id for each in pool.status().runners] == [runner] == [name]
    [pod] = kube.pods()
    assert pod.resource["metadata"]["annotations"]["flame-dask/runner"] == runner
    assert pod.resource["spec"]["terminationGracePeriodSeconds"] == 15
    text = f"{pool!r} {pool._backend!r} {caplog.text} {json.dumps(kube.all)}"
    assert "HTTP Request" in text
    assert "its-secret" not in text


def test_c1_e5_f1_f2_runners_that_end(
    make_kube_pool: MakePool,
    kube: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
    flame_log: Any,
) -> None:
    """By a signal in their own time; killed, and then started anew by Kubernetes."""
    # For a cause that does come, however busy this machine is; and for one that never comes.
    monkeypatch.setattr(kube_backend.KubeBackend, "patience", 8.0)
    pool = make_kube_pool(max=1, max_concurrency=1)
    log, gate = tmp_path / "log", tmp_path / "gate"
    future = pool.submit(work, str(log), str(gate), queue_timeout=20)
    until(lambda: pids(log), 20)
    os.kill(pids(log)[0], signal.SIGTERM)
    until(lambda: states(pool) == ["draining"], 5)
    gate.touch()
    assert future.result(5) == pids(log)[0]
    with pytest.raises(RunnerLost) as caught:
        pool.call(lambda: os.kill(os.getpid(), signal.SIGKILL), queue_timeout=20)
    assert (caught.value.cause, caught.value.signal) == ("signal", signal.SIGKILL)
    victim = pool.call(os.getpid, queue_timeout=20)
    # Its group can't be deleted: what comes again in its pod is no runner, and goes.
    kube.fault = refusing(500, "not now", "DELETE")
    [pod] = kube.pods()
    with pytest.raises(RunnerLost) as caught:
        pool.call(os.kill, victim, signal.SIGKILL)
    assert caught.value.cause == "unreachable"
    until(lambda: pod.restarts >= 2, 40)
    assert states(pool) == ["stopping"]
    assert "this worker is no runner" in pod.log(previous=True)
    kube.fault = lambda *_: None
    assert pool.call(os.getpid, queue_timeout=30) != victim
    assert len(kube.pods()) == kube.most == 1
    assert all("could not stop runner" in text for text in flame_log.texts())


# -- boots that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "phase", "words", "said"),
    [
        ("nothing", "start", "ImagePullBackOff: Back-off pulling example.org/nothing", ""),
        ("broken", "setup", "its container ended with exit code 3", "no such library: libmagic"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_c6_f4_a_pod_that_never_starts(
    make_kube_pool: MakePool, kube: Any, image: str, phase: str, words: str, said: str
) -> None:
    """If it is plain that it won't, that is noticed at once."""
    cluster = own_cluster(f"example.org/{image}", workers=2)
    with pytest.raises(BootError, match=words) as caught:
        make_kube_pool(min=1, max=1, cluster=cluster, boot_timeout=30)
    assert caught.value.phase == phase
    assert said in "".join(caught.value.log_tail)
    assert kube.most == 1


@pytest.mark.usefixtures("impatient")
def test_f4_a_pod_that_does_not_start_in_time(make_kube_pool: MakePool) -> None:
    """It is told what it was waiting for."""
    cluster = own_cluster("example.org/large")
    pool = make_kube_pool(max=1, cluster=cluster, boot_timeout=1.5)
    with pytest.raises(CallTimeout, match=r"not ready within boot_timeout=1\.5") as caught:
        pool.call(int, queue_timeout=3)
    assert caught.value.boot_error is not None
    assert caught.value.boot_error.log_tail == ("it was waiting for: ContainerCreating",)


@pytest.mark.usefixtures("impatient")
def test_c1_c6_f4_what_is_refused(make_kube_pool: MakePool, kube: Any, until: Until) -> None:
    """Who waits is told why; when there is room again, there are runners."""
    pool = make_kube_pool(max=2, max_concurrency=1)
    for status, message in [
        (403, "exceeded quota: groups"),
        (409, "the namespace is being terminated"),
        (422, "spec.worker.spec: Required value"),
    ]:
        kube.fault = refusing(status, message, "POST")
        with pytest.raises(CallTimeout) as caught:
            pool.call(int, queue_timeout=0.7)
        assert caught.value.boot_error is not None
        assert message in str(caught.value.boot_error)
        assert caught.value.boot_error.phase == "start"
    kube.fault = lambda *_: None
    assert kube.most == 0
    # A quota for pods lets groups be made, whose pods are not.
    kube.quota = 0
    with pytest.raises(CallTimeout, match="forbidden: exceeded quota: compute-resources"):
        pool.call(int, queue_timeout=3)
    kube.quota = None
    assert pool.call(int, queue_timeout=20) == 0


def test_c1_the_answer_to_a_start_is_lost(
    make_kube_pool: MakePool, kube: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group is there, and is looked for by its name."""
    monkeypatch.setattr(kube_api, "UNCLEAR", 1.0)
    pool = make_kube_pool(max=1)
    lost = []

    def lose_first(method: str, path: str, body: Any) -> bool:
        if method == "POST" and path == GROUPS and not lost:
            lost.append(body["metadata"]["name"])
            return True
        return False

    kube.fault = lose_first
    assert pool.call(int, queue_timeout=30) == 0
    assert len(lost) == kube.most == 1
    [group] = kube.names("daskworkergroups")
    assert group != lost[0]


@pytest.mark.parametrize("given", [False, True])
def test_a6_c1_a_pool_is_closed_during_a_boot(
    make_kube_pool: MakePool,
    make_pool: MakePool,
    kube: Any,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
    given: bool,
) -> None:
    """The order is carried out when the pool's cluster is gone, or when a given one is left."""
    monkeypatch.setattr(kube_api, "UNCLEAR", 2.0)
    asked, go = threading.Event(), threading.Event()
    deleted: list[str] = []

    def hold(method: str, path: str, body: object) -> None:
        if method == "POST" and path == GROUPS:
            asked.set()
            go.wait(30)
        elif method == "DELETE" and given:
            deleted.append(path)
            if len(deleted) == 2:  # it comes after the first attempt to delete it
                go.set()

    with contextlib.ExitStack() as stack:
        if given:
            pool = make_pool(backend=stack.enter_context(open_cluster()), max=1)
        else:
            pool = make_kube_pool(max=1)
        kube.fault = hold
        future = pool.submit(int)
        assert asked.wait(10)
        pool.close()
        assert future.done()
        assert go.is_set() == given
        go.set()
        until(lambda: ("POST", GROUPS) in kube.answered, 10)
        if given:
            assert kube.names("daskworkergroups") == kube.pods() == []
    until(lambda: kube.everything() == [], 10)

"""Pools that are kept alive: what dies is restarted, within limits (K1, K2)."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest
from distributed.deploy.subprocess import SubprocessCluster

import flame_dask
from flame_dask import (
    BootError,
    FlameError,
    FlamePool,
    PoolClosed,
    PoolNotFound,
    PoolOptionsError,
    PoolSpec,
    RunnerLost,
    Supervisor,
    SupervisorFailed,
    get_pool,
)
from flame_dask.parent.supervisor import _running as running
from support import alive, pids, work

Until = Callable[..., Any]
Supervise = Callable[..., Supervisor]

pytestmark = pytest.mark.usefixtures("kills_runners")

#: Seconds that a pool may take for its return beyond ``boot_timeout``.
RETURN = 5


def inc(x: int) -> int:
    return x + 1


@pytest.fixture(scope="session")
def remote() -> Any:
    """The backend whose scheduler can be killed."""
    return SubprocessCluster, {"scheduler_kwargs": {"dashboard": False}}


@pytest.fixture
def spec(fast: dict[str, Any], remote: Any) -> Callable[..., PoolSpec]:
    """Describe a pool, with a scheduler that can be killed unless it is given a backend."""

    def make(name: str, **options: Any) -> PoolSpec:
        cls = options.pop("cls", FlamePool)
        return cls.child_spec(name, **{"max": 1, "backend": remote, **fast, **options})  # type: ignore[no-any-return]

    return make


@pytest.fixture
def supervise() -> Iterator[Supervise]:
    """Start supervisors that are closed when the test ends."""
    started: list[Supervisor] = []

    def make(*specs: PoolSpec, **options: Any) -> Supervisor:
        started.append(Supervisor(specs, **options))
        return started[-1]

    yield make
    for supervisor in started:
        if supervisor.error is None:
            supervisor.close()


@pytest.fixture
def gate(tmp_path: Path, remote: Any) -> tuple[Path, Any]:
    """A file without which no runner gets ready, and a backend of which that is true."""
    file, code = tmp_path / "gate", tmp_path / "gatekeeper.py"
    file.touch()
    code.write_text(
        f"import os, time\nwhile not os.path.exists({str(file)!r}):\n    time.sleep(0.01)\n"
    )
    cls, options = remote
    return file, (cls, {**options, "preload": [str(code)]})


def kill_scheduler(pool: FlamePool) -> None:
    pool.cluster.scheduler.process.kill()


def works(name: str) -> bool:
    try:
        return bool(flame_dask.call(name, inc, 1) == 2)
    except (PoolNotFound, PoolClosed, RunnerLost):
        return False


# -- describing a pool ---------------------------------------------------------------------------


def test_k1_child_spec_starts_nothing(spec: Callable[..., PoolSpec]) -> None:
    before = set(threading.enumerate()), psutil.Process().children(recursive=True)
    web = spec("web", min=1, max=3, idle_shutdown_after="1m")
    assert (set(threading.enumerate()), psutil.Process().children(recursive=True)) == before
    assert (web.name, web.options.max, web.options.idle_shutdown_after) == ("web", 3, 60.0)
    with pytest.raises(PoolNotFound):
        get_pool("web")
    with pytest.raises(AttributeError):
        web.options = None  # type: ignore[misc]


@pytest.mark.parametrize(
    "options",
    [{"min": 3, "max": 2}, {"max": 0}, {}, {"maxx": 1, "max": 1}, {"max": 1, "backend": "a.b"}],
)
def test_k1_a2_child_spec_checks_everything(options: dict[str, Any]) -> None:
    with pytest.raises(PoolOptionsError) as described:
        FlamePool.child_spec("web", **options)
    with pytest.raises(PoolOptionsError) as opened:
        FlamePool("web", **options)
    assert str(described.value) == str(opened.value)


def test_k1_f4_a_spec_shows_no_secret(local_backend: Any) -> None:
    web = FlamePool.child_spec("web", max=1, env={"TOKEN": "hunter2"}, backend=local_backend)
    assert "hunter2" not in repr(web) + str(web.options)
    assert repr(web) == "<PoolSpec 'web': FlamePool, 0..1 runners>"


def test_k1_a_spec_does_not_change_with_the_configuration(
    supervise: Supervise, local_backend: Any
) -> None:
    with dask.config.set({"flame.timeout": "7s", "flame.queue-timeout": "8s"}):
        web = FlamePool.child_spec("web", max=1, backend=local_backend)
    options = supervise(web)["web"].options
    assert (options.timeout, options.queue_timeout) == (7.0, 8.0)


# -- what can't be supervised --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"max_restarts": -1}, {"max_restarts": 1.5}, {"max_seconds": "soon"}, {"on_failure": 1}],
)
def test_k1_a2_options_of_a_supervisor(options: dict[str, Any]) -> None:
    with pytest.raises(PoolOptionsError) as caught:
        Supervisor([], **options)
    assert [caught.value.option] == list(options)


def test_k1_a2_specs_of_a_supervisor(spec: Callable[..., PoolSpec]) -> None:
    web, asynchronous = spec("web"), spec("async", asynchronous=True)
    for specs, options, problem in [
        ([web, spec("web", max=2)], {}, "name of another"),
        ([web, asynchronous], {}, "is asynchronous"),
        ([asynchronous, web], {"asynchronous": True}, "is not asynchronous"),
        ([web, "web"], {}, "child_spec"),
    ]:
        with pytest.raises(PoolOptionsError, match=problem):
            Supervisor(specs, **options)  # type: ignore[arg-type]


# -- starting and stopping -----------------------------------------------------------------------


@pytest.fixture
def noted() -> Iterator[tuple[type[FlamePool], list[str]]]:
    """A kind of pool that notes when it opens and when it is closed."""
    notes: list[str] = []

    class Noted(FlamePool):
        def _open_sync(self) -> None:
            notes.append(f"open {self.name}")
            super()._open_sync()

        def close(self) -> None:
            super().close()
            notes.append(f"close {self.name}")

    yield Noted, notes
    del Noted


def test_k1_in_order_and_in_reverse(
    spec: Callable[..., PoolSpec], local_backend: Any, noted: tuple[type[FlamePool], list[str]]
) -> None:
    cls, notes = noted
    names = ["c", "a", "b"]
    specs = [spec(name, cls=cls, backend=local_backend) for name in names]
    with Supervisor(specs) as supervisor:
        assert notes == ["open c", "open a", "open b"]
        assert list(supervisor) == list(supervisor.pools) == names
        assert supervisor["a"] is supervisor.pools["a"] is get_pool("a")
        assert isinstance(supervisor["a"], cls)
        assert "a" in supervisor
        assert "d" not in supervisor
        with pytest.raises(PoolNotFound):
            supervisor["d"]
        assert repr(supervisor) == "<Supervisor: open, c, a, b>"
        assert supervisor.wait(0) is False
    assert notes[3:] == ["close b", "close a", "close c"]
    assert supervisor.wait() is True
    assert supervisor.error is None
    assert supervisor.pools == {}
    supervisor.close()
    with pytest.raises(PoolNotFound) as caught:
        supervisor["a"]
    assert not caught.value.restarting


def test_k1_one_does_not_start(
    spec: Callable[..., PoolSpec],
    local_backend: Any,
    noted: tuple[type[FlamePool], list[str]],
    tmp_path: Path,
) -> None:
    """Those before it are stopped in reverse, those after it are never started."""
    cls, notes = noted
    code = tmp_path / "broken.py"
    code.write_text("raise SystemExit(1)\n")
    kind, options = local_backend
    broken = (kind, {**options, "preload": [str(code)]})
    with dask.config.set({"flame.boot-retries": 0}), pytest.raises(BootError):
        Supervisor(
            [
                spec("a", cls=cls, backend=local_backend),
                spec("b", cls=cls, backend=local_backend),
                spec("broken", cls=cls, min=1, backend=broken),
                spec("never", cls=cls, backend=local_backend),
            ]
        )
    assert notes[:3] == ["open a", "open b", "open broken"]
    assert [note for note in notes if note[-1] in "ab"][2:] == ["close b", "close a"]
    assert not [note for note in notes if "never" in note]
    with pytest.raises(PoolNotFound):
        get_pool("a")


def test_k1_a6_closed_while_a_cluster_starts(
    spec: Callable[..., PoolSpec], remote: Any, tmp_path: Path, until: Until
) -> None:
    """Who closes it does not wait for that; who starts it does, and leaves nothing behind."""
    there, gate, code = tmp_path / "there", tmp_path / "gate", tmp_path / "preloaded.py"
    code.write_text(
        f"import os, time\nopen({str(there)!r}, 'w').close()\n"
        f"while not os.path.exists({str(gate)!r}):\n    time.sleep(0.01)\n"
    )
    cls, options = remote
    scheduler = {**options["scheduler_kwargs"], "preload": [str(code)]}
    specs = [spec("web", backend=(cls, {"scheduler_kwargs": scheduler})), spec("never")]
    errors: list[BaseException] = []

    def start() -> None:
        try:
            Supervisor(specs)
        except PoolClosed as error:
            errors.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    until(there.exists, 20)
    [supervisor] = running
    supervisor.close()
    assert thread.is_alive()
    gate.touch()
    thread.join(20)
    assert [error.name for error in errors] == ["web"]
    for name in ("web", "never"):
        with pytest.raises(PoolNotFound):
            get_pool(name)


def test_k1_a_name_that_is_taken(spec: Callable[..., PoolSpec], local_backend: Any) -> None:
    with FlamePool("b", max=1, backend=local_backend) as other:
        with pytest.raises(PoolOptionsError, match="open pool"):
            Supervisor([spec(name, backend=local_backend) for name in "ab"])
        assert get_pool("b") is other
        with pytest.raises(PoolNotFound):
            get_pool("a")


def test_k1_a_pool_that_is_closed_on_purpose_stays_closed(
    supervise: Supervise, spec: Callable[..., PoolSpec]
) -> None:
    supervisor = supervise(spec("web"))
    pool = supervisor["web"]
    pool.close()
    assert not supervisor._restarts
    assert supervisor["web"] is pool
    with pytest.raises(PoolClosed):
        supervisor["web"].call(inc, 1)
    with pytest.raises(PoolNotFound) as caught:
        get_pool("web")
    assert not caught.value.restarting


# -- restarting ----------------------------------------------------------------------------------


def test_k1_k2_its_scheduler_is_killed(
    supervise: Supervise,
    spec: Callable[..., PoolSpec],
    local_backend: Any,
    fast: dict[str, Any],
    tmp_path: Path,
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was under way fails, later calls work, and other pools don't notice."""
    supervisor = supervise(spec("web", min=1), spec("other", min=1, backend=local_backend))
    pool, other = supervisor["web"], supervisor["other"]
    neighbour = other.call(os.getpid)
    log, gate = tmp_path / "log", str(tmp_path / "gate")
    errors: list[BaseException] = []

    def call() -> None:
        try:
            pool.call(work, str(log), gate, timeout=None)
        except FlameError as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    submitted = pool.submit(work, str(log), gate, timeout=None)
    until(lambda: len(pids(log)) == 2)
    queued = pool.submit(inc, submitted)
    runners = set(pids(log))
    still_there: list[list[int]] = []
    make = PoolSpec.make
    monkeypatch.setattr(
        PoolSpec, "make", lambda self: (still_there.append(alive(*runners)), make(self))[1]
    )

    began = time.monotonic()
    kill_scheduler(pool)
    until(lambda: works("web"), fast["boot_timeout"] + RETURN)
    assert time.monotonic() - began < fast["boot_timeout"] + RETURN

    caller.join(5)
    assert [type(error) for error in errors] == [RunnerLost]
    for future in (submitted, queued):
        assert isinstance(future.exception(), RunnerLost)
        with pytest.raises(RunnerLost):
            future.result(1)
    again = supervisor["web"]
    assert get_pool("web") is again is not pool
    assert again.call(os.getpid) not in runners
    assert [runner.state for runner in again.status().runners] == ["ready"]
    assert len(pids(log)) == 2
    # The old runners were gone before the new ones could be there (C1).
    assert still_there == [[]]
    with pytest.raises(PoolClosed):
        pool.call(inc, 1)
    assert supervisor["other"] is other
    assert other.call(os.getpid) == neighbour
    assert supervisor.error is None


def test_k1_k2_its_cluster_is_closed_by_somebody(
    supervise: Supervise, spec: Callable[..., PoolSpec], local_backend: Any, tmp_path: Path,
    until: Until,
) -> None:  # fmt: skip
    supervisor = supervise(spec("web", min=1, backend=local_backend))
    pool = supervisor["web"]
    log, gate = tmp_path / "log", str(tmp_path / "gate")
    running = pool.submit(work, str(log), gate, timeout=None)
    until(lambda: pids(log))
    pool.cluster.close()
    assert isinstance(running.exception(10), RunnerLost)
    until(lambda: works("web"), 25)
    assert supervisor["web"] is not pool
    [crash] = supervisor._count.crashes
    assert crash.cause == "its cluster was closed"


def test_k1_while_it_is_restarted(
    supervise: Supervise, spec: Callable[..., PoolSpec], gate: tuple[Path, Any], until: Until
) -> None:
    """It can't be found, which is told from a pool that isn't there; another one doesn't wait."""
    opened, gated = gate
    supervisor = supervise(spec("slow", min=1, backend=gated), spec("web"))
    slow = supervisor["slow"]
    opened.unlink()
    kill_scheduler(slow)
    kill_scheduler(supervisor["web"])
    until(lambda: works("web"), 25)
    assert "slow" not in supervisor
    assert list(supervisor.pools) == ["web"]
    for find in (get_pool, supervisor.__getitem__):
        with pytest.raises(PoolNotFound) as caught:
            find("slow")
        assert caught.value.restarting
        assert "restarting" in str(caught.value)
    with pytest.raises(PoolClosed):
        slow.call(inc, 1)
    with pytest.raises(PoolNotFound) as caught:
        get_pool("none")
    assert not caught.value.restarting
    assert caught.value.known == ("web",)
    opened.touch()
    until(lambda: works("slow"), 25)


def test_k1_closed_while_it_restarts_a_pool(
    supervise: Supervise, spec: Callable[..., PoolSpec], gate: tuple[Path, Any], until: Until
) -> None:
    """The pool is not waited for: its start is broken off."""
    opened, gated = gate
    supervisor = supervise(spec("web"), spec("slow", min=1, backend=gated, boot_timeout=60))
    slow = supervisor["slow"]
    opened.unlink()
    kill_scheduler(slow)
    until(lambda: supervisor._pools["slow"] is not slow and supervisor._pools["slow"]._started)
    began = time.monotonic()
    supervisor.close()
    assert time.monotonic() - began < 15
    assert not supervisor._restarts
    with pytest.raises(PoolNotFound) as caught:
        get_pool("slow")
    assert not caught.value.restarting


def test_k1_it_dies_in_its_start(
    supervise: Supervise, spec: Callable[..., PoolSpec], gate: tuple[Path, Any], until: Until
) -> None:
    """A restart that fails is followed by another one."""
    opened, gated = gate
    supervisor = supervise(spec("slow", min=1, backend=gated), max_restarts=2, max_seconds=None)
    first = supervisor["slow"]
    opened.unlink()
    kill_scheduler(first)
    until(lambda: supervisor._pools["slow"] is not first and supervisor._pools["slow"]._started)
    second = supervisor._pools["slow"]
    opened.touch()
    kill_scheduler(second)
    until(lambda: works("slow"), 25)
    assert supervisor["slow"] not in (first, second)
    one, two = supervisor._count.crashes
    assert "signal 9" in str(one)
    assert isinstance(two.cause, BootError)


# -- giving up -----------------------------------------------------------------------------------


def test_k1_the_third_crash_in_a_row_ends_the_supervisor(
    supervise: Supervise,
    spec: Callable[..., PoolSpec],
    local_backend: Any,
    until: Until,
    flame_log: Any,
) -> None:
    """Its error tells all three causes, and nothing is left of its pools."""
    told: list[SupervisorFailed] = []
    supervisor = supervise(
        spec("other", min=1, backend=local_backend), spec("web"),
        max_restarts=2, max_seconds="1m", on_failure=told.append,
    )  # fmt: skip
    other = supervisor["other"]
    neighbour = other.call(os.getpid)
    began = datetime.now(UTC)
    for crash in range(3):
        until(lambda: works("web"), 25)
        pool = supervisor["web"]
        [partial(kill_scheduler, pool), pool.cluster.close, pool.client.close][crash]()
        until(lambda pool=pool: pool._died)

    with pytest.raises(SupervisorFailed) as caught:
        supervisor.wait(30)
    error = caught.value
    assert error is supervisor.error
    assert [crash.pool for crash in error.causes] == ["web"] * 3
    assert [crash.cause for crash in error.causes] == [
        "its scheduler is gone: its process was ended by signal 9",
        "its cluster was closed",
        "the connection to its scheduler was lost",
    ]
    times = [crash.time for crash in error.causes]
    assert began <= times[0] < times[1] < times[2] <= datetime.now(UTC)
    assert all(f"({n}) {crash}" in str(error) for n, crash in enumerate(error.causes, 1))
    assert (error.max_restarts, error.max_seconds) == (2, 60.0)

    until(supervisor._ended.is_set)
    assert alive(neighbour) == []
    for use in (
        supervisor.close,
        supervisor.wait,
        lambda: supervisor["web"],
        lambda: supervisor.pools,
        lambda: supervisor.__exit__(None, None, None),
        lambda: supervisor.__exit__(None, PoolClosed("web"), None),
    ):
        with pytest.raises(SupervisorFailed):
            use()
    supervisor.__exit__(None, KeyboardInterrupt(), None)  # which has to get through
    supervisor.__exit__(None, error, None)
    assert repr(supervisor) == "<Supervisor: failed, other, web>"
    with pytest.raises(PoolClosed):
        other.call(inc, 1)
    for name in ("web", "other"):
        with pytest.raises(PoolNotFound) as missing:
            get_pool(name)
        assert not missing.value.restarting
    until(lambda: told)
    assert told == [error]
    assert flame_log.texts() == [f"flame_dask: {error}"]
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.causes) == (str(error), error.causes)


def test_k1_a_restart_that_fails_counts(
    supervise: Supervise, remote: Any, spec: Callable[..., PoolSpec], tmp_path: Path, flame_log: Any
) -> None:
    """However long it takes: a pool that can't be started is not tried for ever."""
    code = tmp_path / "preloaded.py"
    code.write_text("")
    cls, options = remote
    scheduler = {**options["scheduler_kwargs"], "preload": [str(code)]}
    web = spec("web", backend=(cls, {**options, "scheduler_kwargs": scheduler}))
    supervisor = supervise(web, max_restarts=2, max_seconds=0.01)
    code.write_text("raise SystemExit('broken by now')\n")
    kill_scheduler(supervisor["web"])
    with pytest.raises(SupervisorFailed) as caught:
        supervisor.wait(30)
    first, *others = [crash.cause for crash in caught.value.causes]
    assert "signal 9" in str(first)
    assert [type(cause) for cause in others] == [BootError, BootError]
    assert caught.value.__cause__ is others[-1]
    assert "broken by now" in str(others[-1].log_tail)
    back = copy.copy(pickle.loads(pickle.dumps(caught.value)))
    assert [str(crash) for crash in back.causes] == [str(crash) for crash in caught.value.causes]


def test_k1_c9_a_hook_that_fails_is_logged(
    supervise: Supervise, spec: Callable[..., PoolSpec], local_backend: Any, flame_log: Any,
    until: Until,
) -> None:  # fmt: skip
    def fail(error: SupervisorFailed) -> None:
        raise ValueError("on purpose")

    supervisor = supervise(spec("web", backend=local_backend), max_restarts=0, on_failure=fail)
    pool = supervisor["web"]
    pool.cluster.close()
    with pytest.raises(SupervisorFailed, match="0 times within 5 s and they crashed once"):
        supervisor.wait(30)
    until(lambda: any("on purpose" in text for text in flame_log.texts()))

"""What happens when runners, schedulers and connections die (C3, F1-F3)."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import psutil
import pytest
from distributed import LocalCluster

from flame_dask import CallTimeout, FlamePool, PoolClosed, RunnerLost
from support import on_both, on_local

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("kills_runners")


def inc(x: int) -> int:
    return x + 1


def note(path: str, seconds: float = 0.0) -> int:
    """Leave a line at each start."""
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(seconds)
    return os.getpid()


def starts(path: Path) -> list[int]:
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@on_both("kind", [signal.SIGKILL], local=[signal.SIGTERM, signal.SIGSEGV])
def test_f1_f2_a_runner_is_killed_during_calls(
    make_pool: MakePool, backend: Any, tmp_path: Path, until: Until, kind: int
) -> None:
    """Each of its calls fails, and has been started once; the pool goes on."""
    pool = make_pool(max=1, max_concurrency=3, shutdown_timeout=0.5)
    log = tmp_path / "log"
    futures = [pool.submit(note, str(log), 20) for _ in range(2)]
    queued_dependent = pool.submit(inc, futures[0])
    until(lambda: len(starts(log)) == 2)
    os.kill(starts(log)[0], kind)
    for future in futures:
        with pytest.raises(RunnerLost) as caught:
            future.result(15)
        error = caught.value
        assert error.runner == f"{pool.name}-1"
        assert error.call == future.key
        assert pickle.loads(pickle.dumps(error)).runner == error.runner
    with pytest.raises(RunnerLost):
        queued_dependent.result(5)
    later = pool.call(note, str(log))
    assert later not in starts(log)[:2]
    assert len(starts(log)) == 3
    counters = pool.status().counters
    assert counters["lost"] == 2
    # With SIGTERM the runner goes by itself, or the core is the faster one to give it up (E5).
    assert counters["runners_lost"] == 1 or kind == signal.SIGTERM
    assert counters["boots"] == 2


@pytest.mark.slow
def test_f1_nothing_starts_twice_when_dask_would_try_again(
    make_pool: MakePool, backend: Any, tmp_path: Path, until: Until
) -> None:
    """Other runners have room, and the tasks were finished, running, or just sent."""
    pool = make_pool(min=2, max=2, max_concurrency=2, placement="pack")
    log = tmp_path / "log"
    done = pool.submit(bytes, 3_000_000)
    done.result(10)
    until(lambda: pool.status().leases == 0)
    long = [pool.submit(note, str(log), 20) for _ in range(2)]
    until(lambda: len(starts(log)) == 2)
    victim = starts(log)[0]
    other = pool.submit(note, str(log), 1)
    until(lambda: len(starts(log)) == 3)
    assert starts(log)[2] != victim
    psutil.Process(victim).kill()
    for future in long:
        with pytest.raises(RunnerLost):
            future.result(10)
    assert other.result(10) == starts(log)[2]
    assert len(done.result()) == 3_000_000
    assert len(starts(log)) == 3
    until(lambda: [r.state for r in pool.status().runners] == ["ready", "ready"], 20)


@on_local
def test_f2_a_call_that_ends_its_runner(make_pool: MakePool, backend: Any, tmp_path: Path) -> None:
    pool = make_pool(max=1)
    log = tmp_path / "log"

    def leave(path: str) -> None:
        note(path)
        os._exit(7)

    with pytest.raises(RunnerLost) as caught:
        pool.call(leave, str(log))
    assert caught.value.cause == "exited"
    assert len(starts(log)) == 1
    assert pool.call(inc, 1) == 2


def test_f2_a_poisonous_call_costs_one_runner_each_time(
    make_pool: MakePool, tmp_path: Path
) -> None:
    pool = make_pool(max=1)
    for _ in range(2):
        with pytest.raises(RunnerLost):
            pool.call(os._exit, 1)
    assert pool.call(inc, 1) == 2
    assert pool.status().counters["boot_failures"] == 0


def test_f2_a_stopped_runner_does_not_hang_its_callers(
    make_pool: MakePool, backend: Any, tmp_path: Path
) -> None:
    """Frozen, not dead: the deadline of the call holds (F3), and the pool can close (A6)."""
    pool = make_pool(max=1, shutdown_timeout=0.3)
    pid = pool.call(os.getpid)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(CallTimeout):
        pool.call(inc, 1, timeout=0.5)
    assert time.monotonic() - began < 3
    pool.close()
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - began < 12


def test_a6_what_a_call_has_started_ends_with_its_runner(make_pool: MakePool, until: Until) -> None:
    """Also when it holds the runner's stderr open: the pool does not wait for it."""

    def start_child() -> int:
        import subprocess

        return subprocess.Popen(["sleep", "60"]).pid

    pool = make_pool(max=1)
    child = pool.call(start_child)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    until(lambda: not psutil.pid_exists(child))


def test_f2_a_killed_runner_with_a_child_that_holds_its_stderr(
    make_pool: MakePool, until: Until
) -> None:
    def start_child() -> tuple[int, int]:
        import subprocess

        return os.getpid(), subprocess.Popen(["sleep", "60"], start_new_session=True).pid

    pool = make_pool(max=1)
    runner, child = pool.call(start_child)
    psutil.Process(runner).kill()
    until(lambda: pool.status().counters["runners_lost"] == 1)
    assert pool.call(os.getpid) != runner
    until(lambda: pool.status().counters["runners_stopped"] == 1)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    psutil.Process(child).kill()  # it has left the runner's session: nobody else can know of it


def test_f2_a_very_long_line_on_stderr(
    make_pool: MakePool, capfd: pytest.CaptureFixture[str], until: Until
) -> None:
    """The reader of a runner's log survives it, and still notices the runner's end."""

    def shout() -> None:
        import sys

        sys.stderr.write("x" * 300_000 + "\n")
        sys.stderr.write("after it\n")
        sys.stderr.flush()

    pool = make_pool(max=1)
    pool.call(shout)
    runner = pool.call(os.getpid)
    heard: list[str] = []

    def after_it() -> bool:
        heard.append(capfd.readouterr().err)
        return "after it" in "".join(heard)

    until(after_it)
    psutil.Process(runner).kill()
    until(lambda: pool.status().counters["runners_stopped"] == 1)


# -- the scheduler -------------------------------------------------------------------------------


@pytest.fixture
def remote(backend: Any) -> Any:
    """The backend whose scheduler can be killed."""
    if backend[0] is LocalCluster:
        pytest.skip("its scheduler is in this process")
    return backend


def kill_scheduler(pool: FlamePool) -> None:
    pool.cluster.scheduler.process.kill()


def test_f3_the_scheduler_is_killed(
    make_pool: MakePool, remote: Any, tmp_path: Path, until: Until
) -> None:
    """No caller waits, however it waits and whatever its limit; later ones are told."""
    pool = make_pool(min=1, max=1, max_concurrency=1)
    log = tmp_path / "log"
    running = pool.submit(note, str(log), 20, timeout=None)
    until(lambda: starts(log))
    queued = pool.submit(inc, 1, timeout=None)
    dependent = pool.submit(inc, running, timeout=None)
    plain = pool.client.submit(inc, 1, pure=False)
    executor = pool.get_executor().submit(inc, 1)
    results = pool.map(inc, range(3), timeout=None)
    seen: dict[str, BaseException] = {}

    def wait(name: str, how: Callable[[], Any]) -> threading.Thread:
        def run() -> None:
            try:
                how()
            except Exception as error:
                seen[name] = error

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    waiting = [
        wait("call", lambda: pool.call(inc, 1, timeout=None)),
        wait("map", lambda: next(results)),
        wait("result", running.result),
        wait("gather", lambda: pool.client.gather([queued])),
        wait("wait", lambda: distributed.wait([queued])),
        wait("executor", executor.result),
        wait("dependent", dependent.result),
        wait("plain", plain.result),
    ]
    until(lambda: pool.status().waiters == 4)
    kill_scheduler(pool)
    for thread in waiting:
        thread.join(10)
    assert not any(thread.is_alive() for thread in waiting)
    ours = {name: error for name, error in seen.items() if name not in ("plain", "wait")}
    assert {name: type(error) for name, error in ours.items()} == dict.fromkeys(
        ["call", "map", "result", "gather", "executor", "dependent"], RunnerLost
    )
    assert {getattr(error, "cause", None) for error in ours.values()} == {"unreachable"}
    began = time.monotonic()
    for use in (
        lambda: pool.call(inc, 1),
        lambda: pool.submit(inc, 1),
        lambda: pool.cast(inc, 1),
        pool.status,
    ):
        with pytest.raises(PoolClosed):
            use()
    assert time.monotonic() - began < 2
    pool.close()
    assert time.monotonic() - began < 10
    assert len(starts(log)) == 1


def test_f3_the_scheduler_is_killed_while_the_pool_closes(
    make_pool: MakePool, remote: Any, tmp_path: Path, until: Until
) -> None:
    pool = make_pool(min=1, max=1, shutdown_timeout=30)
    log = tmp_path / "log"
    running = pool.submit(note, str(log), 20, timeout=None)
    until(lambda: starts(log))
    closing = threading.Thread(target=pool.close)
    closing.start()
    until(lambda: repr(pool).find("closing") > 0)
    kill_scheduler(pool)
    with pytest.raises(RunnerLost):
        running.result(10)
    closing.join(15)
    assert not closing.is_alive()


def test_f3_the_scheduler_is_killed_while_the_pool_opens(
    remote: Any, fast: dict[str, Any], tmp_path: Path, until: Until
) -> None:
    from flame_dask import BootError, get_pool

    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(30)\n")
    cls, options = remote
    errors: list[BaseException] = []

    def open_it() -> None:
        try:
            FlamePool(
                "dead", min=1, max=1, backend=(cls, {**options, "preload": [str(slow)]}), **fast
            )
        except BootError as error:
            errors.append(error)

    thread = threading.Thread(target=open_it)
    thread.start()

    def booting() -> bool:
        try:
            return bool(get_pool("dead").status().booting == 1)
        except (LookupError, PoolClosed):
            return False

    until(booting)
    kill_scheduler(get_pool("dead"))
    thread.join(15)
    assert not thread.is_alive()
    assert "connection" in str(errors[0])


def test_f3_the_scheduler_of_an_asynchronous_pool_is_killed(
    remote: Any, fast: dict[str, Any]
) -> None:
    async def main() -> None:
        options = {**fast, "backend": remote, "asynchronous": True}
        async with FlamePool("async", min=1, max=1, max_concurrency=1, **options) as pool:
            call = asyncio.ensure_future(pool.call(time.sleep, 20, timeout=None))
            future = pool.submit(inc, 1, timeout=None)
            await asyncio.sleep(0.2)
            kill_scheduler(pool)
            with pytest.raises(RunnerLost):
                await asyncio.wait_for(call, 10)
            with pytest.raises(RunnerLost):
                await asyncio.wait_for(future.result(), 10)
            with pytest.raises(PoolClosed):
                await pool.call(inc, 1)

    asyncio.run(main())


def test_f3_an_answer_that_never_comes(
    make_pool: MakePool, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should host and network fail without a word, the parent looks after itself."""
    monkeypatch.setattr("flame_dask.parent.pool.GRACE", 0.2)
    pool = make_pool(min=1, max=1)
    monkeypatch.setattr(pool._port, "_emit", lambda message: None)
    began = time.monotonic()
    with pytest.raises(RunnerLost) as caught:
        pool.call(inc, 1, timeout=0.3)
    assert caught.value.cause == "unreachable"
    assert time.monotonic() - began < 3
    monkeypatch.undo()
    assert pool.call(inc, 1) == 2

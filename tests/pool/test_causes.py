"""What a call died of, and that it died alone (F2, F3)."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster
from distributed.deploy.subprocess import SubprocessCluster

from flame_dask import FlamePool, RunnerLost
from support import LOCAL, QUIET, alive, all_children_end, on_local, pids, runner_pid, work

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("processes_end")


#: What a runner may have, and far more than it has when nothing runs on it; with processes of their
#: own for calls, too.
MEMORY = "450MB"
MEMORY_OF_ALL = "1.2GB"


def note(log: str) -> None:
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")


def fill_memory(log: str) -> int:
    """Take more and more memory; give up at 3 GB, which the tests' machine is to survive."""
    note(log)
    taken = []
    for _ in range(150):
        taken.append(b"x" * 20_000_000)
        time.sleep(0.01)
    return len(taken)


def leave(log: str, code: int) -> None:
    note(log)
    os._exit(code)


def crash(log: str) -> None:
    import ctypes

    note(log)
    ctypes.string_at(0)


def kill(log: str) -> None:
    note(log)
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def lost(future: Any, within: float = 10) -> RunnerLost:
    """The error of a call whose runner is lost; it travels (F4)."""
    with pytest.raises(RunnerLost) as caught:
        future.result(within)
    error = caught.value
    assert error.call == future.key
    copy = pickle.loads(pickle.dumps(error))
    facts = ("cause", "exit_code", "signal", "runner", "call")
    assert [getattr(copy, name) for name in facts] == [getattr(error, name) for name in facts]
    return error


@on_local
def test_f2_a_runner_is_killed_with_3_of_10_calls(
    make_pool: MakePool, backend: Any, tmp_path: Path, until: Until
) -> None:
    """These three are lost, the seven on the other runner return, and the pool goes on."""
    pool = make_pool(min=2, max=2, max_concurrency=7, placement="pack")
    log, gate = tmp_path / "log", tmp_path / "gate"
    futures = [pool.submit(work, str(log), str(gate)) for _ in range(10)]
    until(lambda: len(pids(log)) == 10)
    [victim] = {pid for pid in pids(log) if pids(log).count(pid) == 3}
    [name] = [n for n, w in pool.cluster.workers.items() if w.process.pid == victim]
    os.kill(victim, signal.SIGKILL)
    until(lambda: sum(future.done() for future in futures) == 3)
    gate.touch()
    errors = [lost(future) for future in futures if future.status == "error"]
    assert [(e.cause, e.signal, e.exit_code, e.runner) for e in errors] == [
        ("signal", 9, None, name)
    ] * 3
    assert "SIGKILL" in str(errors[0])
    results = [future.result(10) for future in futures if future.status != "error"]
    assert len(results) == 7
    assert victim not in results
    assert pool.call(int) == 0
    assert len(pids(log)) == 10
    until(lambda: [r.state for r in pool.status().runners] == ["ready", "ready"], 20)
    counters = pool.status().counters
    assert (counters["lost"], counters["ended"], counters["runners_lost"]) == (3, 8, 1)


# -- threads: the runner goes with the call ------------------------------------------------------


@on_local
def test_f2_a_thread_ends_its_runner_by_exit(
    make_pool: MakePool, backend: Any, tmp_path: Path, until: Until
) -> None:
    pool = make_pool(max=1, max_concurrency=2)
    log, gate = tmp_path / "log", tmp_path / "gate"
    other = pool.submit(work, str(log), str(gate))
    until(lambda: pids(log), 20)
    guilty = pool.submit(leave, str(log), 3)
    for future in (guilty, other):
        error = lost(future)
        assert (error.cause, error.exit_code, error.signal) == ("exited", 3, None)
        assert error.runner == f"{pool.name}-1"
    assert pool.call(os.getpid) not in pids(log)
    assert len(pids(log)) == 2


def test_f2_a_thread_crashes_its_runner(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(max=1, backend=LOCAL)
    error = lost(pool.submit(crash, str(tmp_path / "log")), 20)
    assert (error.cause, error.signal) == ("signal", signal.SIGSEGV)
    assert pool.call(int) == 0


def test_f2_a_thread_fills_the_memory(make_pool: MakePool, tmp_path: Path, until: Until) -> None:
    pool = make_pool(max=1, backend=(SubprocessCluster, {**QUIET, "memory_limit": MEMORY}))
    log = tmp_path / "log"
    error = lost(pool.submit(fill_memory, str(log)), 20)
    assert error.cause == "oom"
    assert "memory" in str(error)
    assert len(pids(log)) == 1
    until(lambda: not alive(*pids(log)))
    assert pool.call(os.getpid) not in pids(log)


def test_f2_memory_within_the_limit_is_no_matter(make_pool: MakePool) -> None:
    def use(megabytes: int) -> int:
        data = b"x" * (megabytes * 1_000_000)
        time.sleep(0.3)  # for as long as somebody may look at it
        return len(data)

    pool = make_pool(max=1, backend=(LocalCluster, {**QUIET, "memory_limit": MEMORY}))
    assert pool.call(use, 50) == 50_000_000
    assert pool.call(use, 50) == 50_000_000
    assert pool.status().counters["boots"] == 1


# -- processes: the call goes alone --------------------------------------------------------------


@pytest.fixture(scope="module")
def lasting(fast: dict[str, Any], until: Until) -> Iterator[FlamePool]:
    """A pool with one runner that outlives all that its calls do to themselves."""
    backend = (LocalCluster, {**QUIET, "memory_limit": MEMORY_OF_ALL})
    options = {**fast, "backend": backend, "isolation": "process", "max_concurrency": 4}
    with all_children_end(until), FlamePool("lasting", min=1, max=1, **options) as pool:
        yield pool


@pytest.mark.parametrize(
    ("fn", "args", "facts"),
    [
        (leave, (3,), ("exited", 3, None)),
        (leave, (0,), ("exited", 0, None)),
        (crash, (), ("signal", None, signal.SIGSEGV)),
        (kill, (), ("signal", None, signal.SIGKILL)),
    ],
    ids=["exit", "exit-0", "segfault", "kill"],
)
def test_f2_a_process_of_a_call_dies_alone(
    lasting: FlamePool,
    tmp_path: Path,
    until: Until,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    facts: tuple[Any, ...],
) -> None:
    before = runner_pid(lasting)
    log, other_log, gate = tmp_path / "log", tmp_path / "other", tmp_path / "gate"
    other = lasting.submit(work, str(other_log), str(gate))
    until(lambda: pids(other_log))
    error = lost(lasting.submit(fn, str(log), *args))
    assert (error.cause, error.exit_code, error.signal) == facts
    assert error.runner == lasting.status().runners[0].id
    assert len(pids(log)) == 1
    assert not other.done()
    gate.touch()
    assert other.result(10) == pids(other_log)[0]
    assert lasting.call(int) == 0
    assert runner_pid(lasting) == before
    until(lambda: lasting.status().leases == 0)
    assert lasting.status().counters["runners_lost"] == 0


def test_f2_somebody_kills_the_process_of_a_call(
    lasting: FlamePool, tmp_path: Path, until: Until
) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    futures = [lasting.submit(work, str(log), str(gate)) for _ in range(3)]
    until(lambda: len(pids(log)) == 3)
    os.kill(pids(log)[0], signal.SIGKILL)
    until(lambda: any(future.done() for future in futures))
    gate.touch()
    [victim] = [future for future in futures if future.exception(10) is not None]
    error = lost(victim)
    assert (error.cause, error.signal) == ("signal", signal.SIGKILL)
    rest = {future.result(10) for future in futures if future is not victim}
    assert rest == set(pids(log)[1:])


def test_f2_the_process_of_a_call_fills_the_memory(
    lasting: FlamePool, tmp_path: Path, until: Until
) -> None:
    """Not the runner dies of it, nor another call."""
    before = runner_pid(lasting)
    log, other_log, gate = tmp_path / "log", tmp_path / "other", tmp_path / "gate"
    other = lasting.submit(work, str(other_log), str(gate))
    until(lambda: pids(other_log))
    error = lost(lasting.submit(fill_memory, str(log)), 20)
    assert error.cause == "oom"
    until(lambda: not alive(*pids(log)))
    gate.touch()
    assert other.result(10) == pids(other_log)[0]
    assert lasting.call(int) == 0
    assert runner_pid(lasting) == before


def test_f2_the_runner_of_processes_is_killed(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """All that its calls have started goes too, though the runner had no time to see to it."""

    def start(log: str) -> None:
        import subprocess

        note(log)
        script = 'sleep 60 & echo "$!" >> "$0"; echo "$$" >> "$0"; wait'
        subprocess.run(["sh", "-c", script, log], check=False)

    pool = make_pool(max=1, max_concurrency=2, isolation="process", backend=LOCAL)
    log = tmp_path / "log"
    futures = [pool.submit(start, str(log)) for _ in range(2)]
    until(lambda: len(pids(log)) == 6, 20)
    os.kill(runner_pid(pool), signal.SIGKILL)
    for future in futures:
        error = lost(future)
        assert (error.cause, error.signal) == ("signal", 9)
    until(lambda: not alive(*pids(log)), 3)
    assert pool.call(int) == 0


# -- cut off -------------------------------------------------------------------------------------


async def cut(dask_scheduler: Any, address: str) -> None:
    """Break the connection to a worker, as a network would."""
    dask_scheduler.stream_comms[address].abort()


def test_f2_f3_a_frozen_runner_whose_connection_is_cut(
    make_pool: MakePool, backend: Any, tmp_path: Path, until: Until
) -> None:
    """It lives, so nobody can say what it died of. It must not come back to life, either."""
    pool = make_pool(max=1, max_concurrency=2)
    log, gate = tmp_path / "log", tmp_path / "gate"
    futures = [pool.submit(work, str(log), str(gate), timeout=None) for _ in range(2)]
    until(lambda: len(pids(log)) == 2, 20)
    frozen = pids(log)[0]
    [runner] = pool.status().runners
    os.kill(frozen, signal.SIGSTOP)
    pool.client.run_on_scheduler(cut, address=runner.address)
    for future in futures:
        error = lost(future)
        assert error.cause == "unreachable"
        assert error.runner == runner.id
        assert (error.exit_code, error.signal) == (None, None)
    assert pool.call(os.getpid) != frozen
    until(lambda: not alive(frozen))
    assert len(pids(log)) == 2


def test_f2_a_living_runner_whose_connection_is_cut(
    make_pool: MakePool, tmp_path: Path, until: Until
) -> None:
    """Its calls are lost and end, though their runner could have gone on with them."""
    pool = make_pool(max=1, max_concurrency=2, backend=LOCAL)
    log, gate = tmp_path / "log", tmp_path / "gate"
    future = pool.submit(work, str(log), str(gate), timeout=None)
    until(lambda: pids(log), 20)
    [runner] = pool.status().runners
    pool.client.run_on_scheduler(cut, address=runner.address)
    lost(future)
    until(lambda: not alive(*pids(log)))
    assert pool.call(os.getpid) not in pids(log)
    assert len(pids(log)) == 1

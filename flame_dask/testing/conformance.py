"""What a pool promises, as tests that run on any backend.

To try them on a cluster of your own, put this into a file of tests::

    from flame_dask.testing.conformance import Conformance, On

    class TestMyCluster(Conformance):
        @pytest.fixture
        def on(self):
            return On((MyCluster, {"region": "eu-central-1"}), slow=10)

and run pytest. Each test opens pools of at most three runners and closes them. What they check is
seen from the parent and from within calls alone: runners may be anywhere.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

import flame_dask
from flame_dask import CallCancelled, CallTimeout, FlamePool, PoolClosed, RunnerLost

__all__ = ["Conformance", "On"]

MakePool = Callable[..., FlamePool]


@dataclass(frozen=True)
class On:
    """What the tests run on.

    Attributes
    ----------
    backend
        As for :class:`flame_dask.FlamePool`.
    slow
        By how much all limits of time are multiplied. 1 is for runners that are up in two seconds.
    options
        More options of the pools.
    skip
        Names of tests that can't pass there, each with the reason.
    left
        Returns what there is of runners, if that can be seen from outside; checked when a pool is
        empty or closed.

    Examples
    --------
    >>> from distributed import LocalCluster
    >>> On(LocalCluster).slow
    1.0
    """

    backend: Any
    slow: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    skip: Mapping[str, str] = field(default_factory=dict)
    left: Callable[[], object] | None = None


class Conformance:
    """Tests of the contract; a subclass says with the fixture ``on`` what they run on."""

    _on: On

    @pytest.fixture
    def on(self) -> On:
        """Say what the tests run on."""
        raise NotImplementedError("a subclass of Conformance has to define the fixture `on`")

    @pytest.fixture(autouse=True)
    def _begin(self, request: pytest.FixtureRequest, on: On) -> None:
        name = request.function.__name__
        if name in on.skip:
            pytest.skip(on.skip[name])
        self._on = on

    @pytest.fixture(autouse=True)
    def _by_value(self) -> Iterator[None]:
        # Runners get the package without its test kit.
        here = sys.modules[__name__]
        cloudpickle.register_pickle_by_value(here)
        yield
        cloudpickle.unregister_pickle_by_value(here)

    @pytest.fixture
    def open_pool(self) -> Iterator[MakePool]:
        """Open pools that are closed when the test ends."""
        slow = self._on.slow
        usual = {"boot_timeout": 20 * slow, "shutdown_timeout": 5 * slow, **self._on.options}
        with ExitStack() as stack:

            def make(**options: Any) -> FlamePool:
                name = f"conformance-{time.monotonic_ns()}"
                pool = FlamePool(name, backend=self._on.backend, **{**usual, **options})
                stack.callback(pool.close)
                return pool

            yield make
        self._nothing_left()

    def _nothing_left(self) -> None:
        left = self._on.left
        if left is not None:
            self._until(lambda: not left(), 10)

    def _until(self, holds: Callable[[], Any], seconds: float) -> None:
        end = time.monotonic() + seconds * self._on.slow
        while not holds():
            if time.monotonic() > end:
                pytest.fail(f"did not come about within {seconds * self._on.slow:g} s")
            time.sleep(0.02)

    # -- calling -------------------------------------------------------------------------------

    def test_a7_a8_b1_b2_b3_b4_b5_calls(self, open_pool: MakePool) -> None:
        """Values, errors, lambdas, coroutines, large results, futures, map and cast.

        Before them, the runner knows its parent, and has the versions that it has.
        """
        pool = open_pool(max=1, max_concurrency=4)
        parent, python = pool.call(lambda: (flame_dask.parent(), platform.python_version_tuple()))
        assert parent.pool == pool.name
        assert parent.runner in {runner.id for runner in pool.status().runners}
        assert python[:2] == platform.python_version_tuple()[:2]
        offset = 5
        assert pool.call(divmod, 7, 2) == (3, 1)
        assert pool.call(lambda x: x + offset, 3) == 8
        assert pool.call(_double_async, 4) == 8
        with pytest.raises(LookupError, match="not there") as caught:
            pool.call(_raise_lookup, 7)
        assert caught.value.args == ("not there", 7)
        large = bytes(range(256)) * 20_000
        assert pool.call(lambda data: data[::-1], large) == large[::-1]
        assert sorted(pool.map(abs, range(-20, 0))) == list(range(1, 21))
        futures = [pool.submit(time.monotonic_ns) for _ in range(10)]
        assert len({future.result(20 * self._on.slow) for future in futures}) == 10
        assert pool.submit(abs, pool.submit(int, "-3")).result(20 * self._on.slow) == 3
        pool.cast(int)

    def test_j2_j3_code_comes_along(self, open_pool: MakePool, tmp_path: Path) -> None:
        """And files; what is edited is what runs next."""
        module = tmp_path / "code" / "conformance_synced.py"
        module.parent.mkdir()
        module.write_text("NUMBER = 1\n")
        (tmp_path / "large.bin").write_bytes(bytes(range(256)) * 10_000)
        sync = {
            "sync_modules": [str(module.parent)],
            "copy_paths": [str(tmp_path / "large.bin")],
        }
        pool = open_pool(max=1, code_sync=sync)
        assert pool.call(_look_at_code) == (1, 2_560_000)
        module.write_text("NUMBER = 2\n")
        assert pool.call(_look_at_code) == (2, 2_560_000)

    def test_a5_d1_min_runners_stay(self, open_pool: MakePool) -> None:
        """They are there when the pool opens, and for as long as it is open."""
        pool = open_pool(min=1, max=2, max_concurrency=1, idle_shutdown_after=0.2)
        [first] = pool.status().runners
        assert first.state == "ready"
        where = pool.call(_where)
        time.sleep(1)
        assert pool.call(_where) == where

    # -- what lives on -------------------------------------------------------------------------

    def test_h1_h2_i1_i2_i3_children_and_kept_objects(self, open_pool: MakePool) -> None:
        """They keep what they know, and their slot and runner, until they are let go.

        Calls that have kept objects as arguments come to them.
        """
        pool = open_pool(max=1, max_concurrency=1, track_resources=True, idle_shutdown_after=0.5)
        counter = pool.place_child(_Counter, 10)
        assert [counter.add(5), counter.call("add", 1)] == [15, 16]
        with pytest.raises(LookupError, match="not there"):
            counter.fail()
        with pytest.raises(CallTimeout):
            pool.call(int, queue_timeout=1)
        assert counter.add(1) == 17
        counter.stop()
        assert counter.result(20 * self._on.slow) is None
        first, second = pool.call(_keep_two, queue_timeout=60 * self._on.slow)
        with first, second:
            assert pool.call(_where_and_id, first) == pool.call(_where_and_id, first)
            assert pool.call(lambda x, y: (x.add(1), y.add(1)), first, second) == (2, 3)
            assert second.call("add", 4) == 7
            with pytest.raises(CallTimeout):
                pool.call(int, queue_timeout=1)
        assert pool.call(int, queue_timeout=60 * self._on.slow) == 0

    def test_b7_a_stream(self, open_pool: MakePool) -> None:
        """Items in order, an error after them, and an end when nobody takes any more."""
        pool = open_pool(max=1, max_concurrency=2)
        assert list(pool.stream(_count, 3000)) == list(range(3000))
        stream = pool.stream(_count, 3, "not there")
        assert [next(stream) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(LookupError, match="not there"):
            next(stream)
        with pool.stream(_count, 10**9) as endless:
            assert [next(endless) for _ in range(2000)] == list(range(2000))
        self._until(lambda: pool.status().leases == 0, 5)

    # -- growing and shrinking -----------------------------------------------------------------

    def test_c1_c2_d1_d4_it_grows_and_shrinks(self, open_pool: MakePool) -> None:
        """As many runners as there is work for, never more than ``max``, and then none."""
        pool = open_pool(max=2, max_concurrency=1, idle_shutdown_after=1)
        assert pool.status().runners == ()
        seconds = 2 * self._on.slow
        limits = {"queue_timeout": 60 * self._on.slow, "timeout": 30 * self._on.slow}
        futures = [pool.submit(_stay, seconds, **limits) for _ in range(4)]
        most = 0
        while any(future.status == "pending" for future in futures):
            status = pool.status()
            most = max(most, len(status.runners))
            time.sleep(0.05)
        assert len({future.result() for future in futures}) == 2
        assert most == 2
        self._until(lambda: pool.status().runners == (), 20)
        self._nothing_left()

    def test_d5_single_use(self, open_pool: MakePool) -> None:
        """Each call has a runner of its own."""
        pool = open_pool(max=2, max_concurrency=1, single_use=True)
        limits = {"queue_timeout": 90 * self._on.slow, "timeout": 30}
        futures = [pool.submit(_where, **limits) for _ in range(3)]
        assert len({future.result(120 * self._on.slow) for future in futures}) == 3

    # -- ends ----------------------------------------------------------------------------------

    @pytest.mark.parametrize("isolation", ["thread", "process"])
    def test_e2_e3_e4_work_ends(self, open_pool: MakePool, isolation: str) -> None:
        """What is out of time or cancelled frees its slot, on the same runner.

        With a process of its own, what it has started goes with it.
        """
        pool = open_pool(max=1, max_concurrency=2, isolation=isolation)
        runner = pool.call(flame_dask.parent).runner
        with pytest.raises(CallTimeout) as caught:
            pool.call(_spin, timeout=1)
        assert caught.value.phase == "running"
        self._until(lambda: pool.status().leases == 0, 5)
        future = pool.submit(_spin)
        self._until(lambda: pool.status().leases == 1, 5)
        future.cancel()
        with pytest.raises(CallCancelled):
            future.result(5)
        self._until(lambda: pool.status().leases == 0, 5)
        if isolation == "process":
            folder = pool.call(tempfile.mkdtemp)
            with pytest.raises(CallTimeout):
                pool.call(_start_processes, folder, timeout=2)
            assert pool.call(_read_pids, folder)
            self._until(lambda: not any(pool.call(_alive, folder)), 5)
            pool.call(shutil.rmtree, folder)
        assert pool.call(flame_dask.parent).runner == runner

    def test_e3_what_can_not_be_ended_costs_its_runner(self, open_pool: MakePool) -> None:
        """The pool gets another one."""
        pool = open_pool(max=1, max_concurrency=1)
        first = pool.call(_where)
        with pytest.raises(CallTimeout):
            pool.call(time.sleep, 600, timeout=0.5)
        assert pool.call(_where, queue_timeout=60 * self._on.slow) != first

    def test_f1_f2_a_runner_dies(self, open_pool: MakePool) -> None:
        """Its calls are told, and not started anew; the next one has another runner."""
        pool = open_pool(max=1, max_concurrency=2)
        first = pool.call(_where)
        with pytest.raises(RunnerLost) as caught:
            pool.call(_die)
        assert caught.value.cause in ("signal", "exited", "oom", "unreachable", "preempted")
        limit = {"queue_timeout": 60 * self._on.slow}
        assert pool.call(_where, **limit) != first
        counters = pool.status().counters
        assert (counters["lost"], counters["retried"]) == (1, 0)

    def test_f1_retries_start_it_anew(self, open_pool: MakePool) -> None:
        """Not more often than it was said."""
        pool = open_pool(max=1, max_concurrency=1)
        with pytest.raises(RunnerLost):
            pool.call(_die, retries=1, timeout=120 * self._on.slow)
        assert pool.status().counters["retried"] == 1

    def test_a6_close_ends_what_runs(
        self, open_pool: MakePool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """After ``shutdown_timeout``; queued calls end at once."""
        caplog.set_level(logging.CRITICAL, "distributed")  # a runner is killed
        pool = open_pool(max=1, max_concurrency=1, shutdown_timeout=1)
        pool.call(int)
        limits = {"queue_timeout": None, "timeout": None}
        running, queued = (pool.submit(time.sleep, 600, **limits) for _ in range(2))
        self._until(lambda: pool.status().waiters == 1, 5)
        pool.close()
        with pytest.raises(PoolClosed):
            queued.result(1)
        with pytest.raises((PoolClosed, RunnerLost, CallCancelled)):
            running.result(1)

    def test_g3_the_parent_is_killed(self) -> None:
        """Its runners end by themselves, and the work on them."""
        left = self._on.left
        options = {"shutdown_timeout": 2, "boot_timeout": 20 * self._on.slow, **self._on.options}
        # It may import what this process can; what it is to do goes there by value.
        search = os.pathsep.join(path for path in sys.path if path)
        with subprocess.Popen(
            [sys.executable, "-c", _LOAD_AND_RUN],
            env={**os.environ, "PYTHONPATH": search},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as parent:
            try:
                order = cloudpickle.dumps((_be_a_parent, (self._on.backend, options)))
                assert parent.stdin is not None
                assert parent.stdout is not None
                parent.stdin.write(order)
                parent.stdin.close()
                host, *pids = parent.stdout.readline().decode().split()
            finally:
                parent.kill()
        here = host == socket.gethostname()
        if not here and left is None:
            pytest.skip("its runners can't be seen from here: `left` is not given")
        if here:
            self._until(lambda: not any(map(psutil.pid_exists, map(int, pids))), 10)
        self._nothing_left()


_LOAD_AND_RUN = "import sys, cloudpickle; f, args = cloudpickle.load(sys.stdin.buffer); f(*args)"


# Functions of calls. Runners may have no file of this package's test kit: they go by value.


async def _double_async(x: int) -> int:
    await asyncio.sleep(0)
    return 2 * x


def _raise_lookup(x: int) -> None:
    raise LookupError("not there", x)


def _where() -> tuple[str, int]:
    """Return the runner's machine and process."""
    return socket.gethostname(), os.getpid()


def _look_at_code() -> tuple[int, int]:
    parent = flame_dask.parent()
    assert parent is not None
    assert parent.files is not None
    number: int = importlib.import_module("conformance_synced").NUMBER
    return number, (parent.files / "large.bin").stat().st_size


class _Counter:
    def __init__(self, start: int) -> None:
        self.value = start
        self.lock = threading.Lock()  # it can't be sent

    def add(self, by: int) -> int:
        self.value += by
        return self.value

    def fail(self) -> None:
        raise LookupError("not there")


def _keep_two() -> tuple[Any, Any]:
    return flame_dask.keep(_Counter(1)), flame_dask.keep(_Counter(2))


def _where_and_id(kept: object) -> tuple[object, ...]:
    return *_where(), id(kept)


def _count(to: int, error: str = "") -> Iterator[int]:
    yield from range(to)
    if error:
        raise LookupError(error)


def _stay(seconds: float) -> tuple[str, int]:
    time.sleep(seconds)
    return _where()


def _spin() -> None:
    while True:
        time.sleep(0.01)


def _die() -> None:
    os.kill(os.getpid(), 9)
    time.sleep(60)


def _start_processes(folder: str) -> None:
    """Write down which processes run: this one, a shell and a program of that."""
    script = 'sleep 600 & echo $PPID $$ $! > "$0/new" && mv "$0/new" "$0/pids"; wait'
    subprocess.run(["sh", "-c", script, folder], check=False)


def _read_pids(folder: str) -> list[int]:
    """Return what they have written; nothing if they have not yet."""
    file = Path(folder) / "pids"
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def _alive(folder: str) -> list[bool]:
    """Say which of the processes run; one that waits for its parent's notice does not."""
    statuses = []
    for pid in _read_pids(folder):
        try:
            statuses.append(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            statuses.append(False)
    return statuses


def _be_a_parent(backend: Any, options: Mapping[str, Any]) -> None:
    """Have a pool of one runner at work, and say where that is."""
    with FlamePool("doomed", max=1, backend=backend, **options) as pool:
        folder = pool.call(tempfile.mkdtemp)
        future = pool.submit(_start_processes, folder, timeout=None)
        while not (pids := pool.call(_read_pids, folder)):
            time.sleep(0.05)
        pool.call(shutil.rmtree, folder)
        host, _ = pool.call(_where)
        sys.stdout.write(f"{host} {' '.join(map(str, pids))}\n")
        sys.stdout.flush()
        future.result()

"""Boots that fail, never end, or are given up (A5, C1, C3, C6, E2, F4)."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.config
import distributed
import psutil
import pytest

from flame_dask import BootError, CallTimeout, FlamePool, PoolClosed
from flame_dask.backends.base import Ending
from flame_dask.backends.processes import ProcessBackend
from flame_dask.options import PoolOptions
from support import on_both, on_local

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

QUICK = {
    "flame.boot-backoff.base": "20ms",
    "flame.boot-backoff.cap": "100ms",
    "flame.boot-retries": 1,
}

pytestmark = pytest.mark.usefixtures("kills_runners")


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


@pytest.fixture(autouse=True)
def quick_retries() -> Iterator[None]:
    with dask.config.set(QUICK):
        yield


@pytest.fixture
def raising(tmp_path: Path) -> str:
    """A preload that makes each worker fail as it starts."""
    path = tmp_path / "no_luck.py"
    path.write_text("raise RuntimeError('no luck with this preload')\n")
    return str(path)


@pytest.fixture
def exiting(tmp_path: Path) -> str:
    """A preload with which each worker process ends at once."""
    path = tmp_path / "leaving.py"
    path.write_text(
        "import os, sys\n"
        "print('last words: no GPU here', file=sys.stderr, flush=True)\n"
        "os._exit(42)\n"
    )
    return str(path)


@pytest.fixture
def hanging(tmp_path: Path) -> str:
    """A preload with which no worker gets ready."""
    path = tmp_path / "hanging.py"
    path.write_text("import time\ntime.sleep(60)\n")
    return str(path)


def with_preload(backend: Any, preload: str) -> Any:
    cls, options = backend
    return cls, {**options, "preload": [preload]}


class Flaky(ProcessBackend):
    """A backend whose boots may be made to fail, to take long, or to be refused.

    Parameters
    ----------
    fails
        Says of the n-th boot (from 1) whether it fails, and how.
    """

    def __init__(self, backend: Any, max: int, fails: Callable[[int], str | None]) -> None:
        super().__init__(PoolOptions.check("flaky", max=max), *backend)
        self._fails = fails
        self._numbers = itertools.count(1)
        self.started: list[float] = []
        self.there: set[str] = set()
        self.most = 0
        self.doomed: dict[str, str] = {}

    async def boot(self, runner: str) -> None:
        self.started.append(time.monotonic())
        self.there.add(runner)
        self.most = max(self.most, len(self.there))
        how = self._fails(next(self._numbers))
        if how is not None:
            self.doomed[runner] = how
        if how == "refused":
            raise ConnectionError("the cloud is full")
        if how == "slow":
            await asyncio.sleep(30)
        await super().boot(runner)

    async def watch(self, runner: str) -> Ending:
        if self.doomed.get(runner) == "dies":
            assert self.cluster is not None
            self.cluster.workers[runner].process.kill()
        return await super().watch(runner)

    async def stop(self, runner: str, *, force: bool = False) -> Ending:
        ending = await super().stop(runner, force=force)
        self.there.discard(runner)
        return ending


@contextmanager
def sampled(pool: FlamePool, backend: Flaky) -> Iterator[list[int]]:
    """Count the runners of a pool all the time: as the core, the backend and the system do."""
    counts: list[int] = []
    stop = threading.Event()
    here = psutil.Process()

    def look() -> None:
        while not stop.is_set():
            status = pool.status()
            counts.append(len(status.runners))
            counts.append(len(backend.there))
            runners = 0
            for child in here.children():
                try:
                    runners += "distributed.Worker" in " ".join(child.cmdline())
                except psutil.Error:
                    continue
            counts.append(runners)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield counts
    finally:
        stop.set()
        thread.join()


def meet(folder: str, count: int) -> int:
    """Wait for calls on other runners, so that none of them has time for two, for 50 s at most."""
    (Path(folder) / str(os.getpid())).touch()
    end = time.monotonic() + 50
    while len(os.listdir(folder)) < count and time.monotonic() < end:
        time.sleep(0.01)
    return os.getpid()


@on_local
@pytest.mark.slow
@pytest.mark.timeout(120)
def test_c1_c2_eight_boots_at_once_though_every_third_fails(
    make_pool: MakePool, backend: Any, flame_log: Any, tmp_path: Path
) -> None:
    def fails(n: int) -> str | None:
        return None if n % 3 else ("refused" if n % 2 else "dies")

    flaky = Flaky(backend, 8, fails)
    pool = make_pool(backend=flaky, max=8, max_concurrency=1, boot_timeout=60, timeout=60)
    with sampled(pool, flaky) as counts:
        futures = [pool.submit(meet, str(tmp_path), 5) for _ in range(8)]
        assert len({future.result(60) for future in futures}) >= 5
        # C2: all at the moment of the demand, not one after the other.
        assert len(flaky.started) >= 8
        assert flaky.started[7] - flaky.started[0] < 0.5
        distributed.wait([pool.submit(nap, 0.05) for _ in range(30)])
    # C1
    assert counts
    assert max(counts) <= 8
    assert flaky.most <= 8
    counters = pool.status().counters
    assert counters["boot_failures"] >= 2
    assert counters["ended"] == 38
    assert counters["lost"] == 0


@on_local
def test_c2_a_slow_boot_delays_no_other(make_pool: MakePool, backend: Any, until: Until) -> None:
    flaky = Flaky(backend, 2, lambda n: "slow" if n == 1 else None)
    pool = make_pool(backend=flaky, max=2, max_concurrency=1)
    futures = [pool.submit(nap, 0) for _ in range(2)]
    distributed.wait(futures, timeout=15)
    status = pool.status()
    assert sorted(runner.state for runner in status.runners) == ["booting", "ready"]
    # And closing does not wait for it.
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 5
    assert flaky.there == set()


@on_local
def test_c6_callers_wait_for_a_boot_that_works(
    make_pool: MakePool, backend: Any, flame_log: Any
) -> None:
    flaky = Flaky(backend, 1, lambda n: "refused" if n <= 3 else None)
    pool = make_pool(backend=flaky, max=1)
    assert pool.call(nap, 0)
    assert pool.status().counters["boot_failures"] == 3
    pauses = [b - a for a, b in itertools.pairwise(flaky.started)]
    assert all(pause >= 0.01 for pause in pauses)
    reasons = [event.reason for event in pool.events() if "failed" in event.reason]
    assert len(reasons) == 3
    assert "the cloud is full" in reasons[0]


def test_c6_the_last_boot_error_is_part_of_what_callers_get(
    make_pool: MakePool, backend: Any, flame_log: Any
) -> None:
    flaky = Flaky(backend, 2, lambda n: "refused")
    pool = make_pool(backend=flaky, max=2, max_concurrency=1)
    with pytest.raises(CallTimeout) as caught:
        pool.call(nap, 0, timeout=0.5)
    error = caught.value
    assert error.phase == "booting"
    assert error.boot_error is not None
    assert error.boot_error.phase == "start"
    assert "the cloud is full" in str(error.boot_error)
    assert "the cloud is full" in str(error)
    assert error.boot_error.attempts > 1
    assert any("boot" in line for line in error.boot_error.log_tail)
    future = pool.submit(nap, 0, timeout=0.3)
    assert isinstance(future.exception(timeout=5), CallTimeout)


@on_both("kind", ["exiting"], local=["raising"])
def test_c6_a_boot_that_always_fails(
    request: pytest.FixtureRequest,
    make_pool: MakePool,
    backend: Any,
    capfd: pytest.CaptureFixture[str],
    until: Until,
    kind: str,
) -> None:
    """Callers get the cause and the last lines of the worker's log."""
    preload = request.getfixturevalue(kind)
    words = "no luck with this preload" if kind == "raising" else "last words: no GPU here"
    with dask.config.set({"flame.boot-backoff.base": "30s", "flame.boot-backoff.cap": "30s"}):
        pool = make_pool(backend=with_preload(backend, preload), max=1)
    waiting = pool.submit(nap, 0)
    until(lambda: pool.status().counters["boot_failures"] == 1)
    with pytest.raises(CallTimeout) as caught:
        pool.call(nap, 0, timeout=0.3)
    boot = caught.value.boot_error
    assert boot is not None
    assert words in "\n".join(boot.log_tail)
    if kind == "exiting":
        assert "42" in str(boot)
    assert not waiting.done()
    pool.close()


@on_both("kind", ["raising"], local=["exiting"])
def test_a5_opening_fails_cleanly(
    request: pytest.FixtureRequest,
    make_pool: MakePool,
    backend: Any,
    capfd: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """With ``BootError``, its cause and the log; nothing runs on (see ``nothing_is_left``)."""
    preload = request.getfixturevalue(kind)
    words = "no luck with this preload" if kind == "raising" else "last words: no GPU here"
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(BootError) as caught:
        make_pool("fails", backend=with_preload(backend, preload), min=1, max=2)
    assert caught.value.attempts == 2  # QUICK allows one retry
    assert words in "\n".join(caught.value.log_tail)
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before
    # The name is free again.
    pool = make_pool("fails", backend=backend, min=1, max=1)
    assert pool.call(nap, 0)


@on_local
def test_a5_one_of_several_fails(make_pool: MakePool, backend: Any, flame_log: Any) -> None:
    """All that has been started is taken down."""
    flaky = Flaky(backend, 3, lambda n: "refused" if n >= 3 else None)
    with pytest.raises(BootError, match="the cloud is full"):
        make_pool(backend=flaky, min=3, max=3)
    assert flaky.there == set()
    assert psutil.Process().children() == [] or not any(
        "distributed.Worker" in " ".join(child.cmdline()) for child in psutil.Process().children()
    )


@on_local
def test_a5_a_retry_may_help(make_pool: MakePool, backend: Any) -> None:
    flaky = Flaky(backend, 2, lambda n: "refused" if n == 1 else None)
    pool = make_pool(backend=flaky, min=2, max=2)
    assert [runner.state for runner in pool.status().runners] == ["ready", "ready"]


def test_c3_a_boot_that_hangs_is_given_up(
    make_pool: MakePool, backend: Any, hanging: str, until: Until
) -> None:
    pool = make_pool(backend=with_preload(backend, hanging), max=1, boot_timeout=1.0)
    with pytest.raises(CallTimeout) as caught:
        pool.call(nap, 0, timeout=2.5)
    assert caught.value.boot_error is not None
    assert "boot_timeout" in str(caught.value.boot_error)
    assert caught.value.boot_error.phase == "connect"
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 8


@on_local
def test_a5_opening_with_a_boot_that_hangs(make_pool: MakePool, backend: Any, hanging: str) -> None:
    began = time.monotonic()
    with pytest.raises(BootError, match="boot_timeout"):
        make_pool(backend=with_preload(backend, hanging), min=1, max=1, boot_timeout=0.5)
    assert time.monotonic() - began < 15


def test_c3_after_a_runner_has_died_there_are_min_again(
    make_pool: MakePool, backend: Any, until: Until
) -> None:
    pool = make_pool(min=1, max=1)
    first = pool.call(nap, 0)
    psutil.Process(first).kill()
    until(lambda: pool.status().counters["runners_lost"] == 1)
    until(lambda: [runner.state for runner in pool.status().runners] == ["ready"])
    assert pool.call(nap, 0) != first


def test_a6_closing_while_runners_boot(make_pool: MakePool, backend: Any, until: Until) -> None:
    for delay in (0.0, 0.1, 0.3, 0.5):
        pool = make_pool(f"boot{delay}", max=2, max_concurrency=1)
        futures = [pool.submit(nap, 0) for _ in range(2)]
        until(lambda pool=pool: pool.status().booting == 2)
        threading.Event().wait(delay)  # at different points of the boot
        began = time.monotonic()
        pool.close()
        assert time.monotonic() - began < 8
        for future in futures:
            try:
                assert future.result(5)
            except PoolClosed:
                continue


def test_c2_a_boot_nobody_waits_for_any_more_goes_on_and_idles_out(
    make_pool: MakePool, until: Until
) -> None:
    pool = make_pool(max=1, idle_shutdown_after=0.2)
    with pytest.raises(CallTimeout):
        pool.call(nap, 0, timeout=0.01)
    until(lambda: pool.status().counters["runners_stopped"] == 1)
    assert pool.status().runners == ()


def test_f4_a_cluster_that_does_not_start(backend: Any) -> None:
    """``BootError(phase="cluster")``, and nothing is left."""
    cls, options = backend

    class Broken(ProcessBackend):
        def open(self, *, asynchronous: bool) -> Any:
            raise OSError("no network")

    with pytest.raises(BootError, match="no network") as caught:
        FlamePool("broken", max=1, backend=Broken(PoolOptions.check("x", max=1), cls, options))
    assert caught.value.phase == "cluster"
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(BootError) as caught:
        FlamePool("broken", max=1, backend=(cls, {"scheduler_kwargs": {"no_such": 1}}))
    assert caught.value.phase == "cluster"


@on_local
def test_a6_a_runner_that_can_not_be_stopped_is_tried_again(
    make_pool: MakePool, backend: Any, flame_log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flame_dask.parent.adaptive.STOP_RETRY", (0.05,))
    tries = itertools.count(1)

    class Stubborn(Flaky):
        async def stop(self, runner: str, *, force: bool = False) -> Ending:
            if next(tries) < 3:
                raise ConnectionError("the cloud does not answer")
            return await super().stop(runner, force=force)

    pool = make_pool(backend=Stubborn(backend, 1, lambda n: None), max=1)
    assert pool.call(nap, 0)
    pool.close()
    assert sum("could not stop runner" in text for text in flame_log.texts()) == 2


@on_local
def test_a6_a_runner_that_can_not_be_stopped_does_not_hold_up_the_end(
    make_pool: MakePool, backend: Any, flame_log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named. This backend's cluster takes it along; others see to their own end (G3)."""
    monkeypatch.setattr("flame_dask.parent.adaptive.STOP_RETRY", (0.05,))
    monkeypatch.setattr("flame_dask.parent.adaptive.LAST_TRIES", 0.3)

    class Stubborn(Flaky):
        async def stop(self, runner: str, *, force: bool = False) -> Ending:
            if not said():
                raise ConnectionError("the cloud does not answer")
            return await super().stop(runner, force=force)

    def said() -> list[str]:
        return [text for text in flame_log.texts() if "the pool is closed" in text]

    pool = make_pool(backend=Stubborn(backend, 1, lambda n: None), max=1)
    assert pool.call(nap, 0)
    [runner] = pool.status().runners
    pool.close()
    [line] = said()
    assert runner.id in line
    assert "the cloud does not answer" in line

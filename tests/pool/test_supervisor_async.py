"""Asynchronous pools that are kept alive, in the caller's own event loop (K1, K2, A4)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed.deploy.subprocess import SubprocessCluster

import flame_dask
from flame_dask import (
    FlamePool,
    PoolClosed,
    PoolNotFound,
    PoolSpec,
    RunnerLost,
    Supervisor,
    SupervisorFailed,
    get_pool,
)
from support import QUIET, pids, wait_for_file, work

pytestmark = pytest.mark.usefixtures("kills_runners")


def inc(x: int) -> int:
    return x + 1


async def until(condition: Callable[[], object], deadline: float = 30.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "not in time"
        await asyncio.sleep(0.005)


async def until_it_works(name: str) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            assert await flame_dask.call(name, inc, 1) == 2
            return
        except (PoolNotFound, PoolClosed, RunnerLost):
            assert time.monotonic() < end, "not in time"
            await asyncio.sleep(0.005)


@pytest.fixture
def spec(fast: dict[str, Any]) -> Callable[..., PoolSpec]:
    def make(name: str, cls: type[FlamePool] = FlamePool, **options: Any) -> PoolSpec:
        usual = {"max": 1, "backend": (SubprocessCluster, QUIET), "asynchronous": True}
        return cls.child_spec(name, **{**usual, **fast, **options})

    return make


def kill_scheduler(pool: FlamePool) -> None:
    pool.cluster.scheduler.process.kill()


def test_k1_k2_a4_its_scheduler_is_killed(spec: Callable[..., PoolSpec], tmp_path: Path) -> None:
    notes: list[str] = []

    class Noted(FlamePool):
        async def _close_async(self) -> None:
            notes.append(f"close {self.name}")
            await super()._close_async()

    async def main() -> None:
        log, gate = tmp_path / "log", str(tmp_path / "gate")
        supervisor = Supervisor([spec("web", Noted), spec("other", Noted)], asynchronous=True)
        assert supervisor.asynchronous
        assert supervisor.pools == {}
        async with supervisor:
            pool, other = supervisor["web"], supervisor["other"]
            assert list(supervisor) == ["web", "other"]
            call = asyncio.ensure_future(pool.call(work, str(log), gate, timeout=None))
            future = pool.submit(work, str(log), gate, timeout=None)
            await until(lambda: len(pids(log)) == 2)
            kill_scheduler(pool)
            await until_it_works("web")
            with pytest.raises(RunnerLost):
                await call
            with pytest.raises(RunnerLost):
                await future
            assert supervisor["web"] is get_pool("web") is not pool
            assert supervisor["other"] is other
            with pytest.raises(PoolClosed):
                await pool.call(inc, 1)
            assert await supervisor.wait("10ms") is False
            assert notes == ["close web"]
        assert notes[1:] == ["close other", "close web"]
        assert await supervisor.wait() is True
        await supervisor.close()

    asyncio.run(main())


def test_k1_a4_it_gives_up(spec: Callable[..., PoolSpec], flame_log: Any) -> None:
    async def main() -> None:
        told: list[SupervisorFailed] = []
        supervisor = await Supervisor(
            [spec("web"), spec("other")], max_restarts=0, on_failure=told.append, asynchronous=True
        )
        waiting = asyncio.ensure_future(supervisor.wait())
        kill_scheduler(supervisor["web"])
        with pytest.raises(SupervisorFailed) as caught:
            await asyncio.wait_for(waiting, 30)
        [crash] = caught.value.causes
        assert crash.cause == "its scheduler is gone: its process was ended by signal 9"
        await until(lambda: told == [caught.value])
        with pytest.raises(PoolNotFound):
            get_pool("other")
        with pytest.raises(SupervisorFailed):
            await supervisor.close()
        with pytest.raises(SupervisorFailed):
            async with supervisor:
                raise PoolClosed("web")
        with pytest.raises(KeyError):
            async with supervisor:
                raise KeyError("of the program's own")

    asyncio.run(main())


@pytest.mark.parametrize("phase", ["end", "cluster", "runner"])
def test_k1_a4_closed_while_it_restarts_a_pool(
    spec: Callable[..., PoolSpec], tmp_path: Path, phase: str
) -> None:
    """Neither the end of the dead pool nor the start of the new one is left to itself."""
    gate, code = tmp_path / "gate", tmp_path / "gatekeeper.py"
    gate.touch()
    code.write_text(
        f"import os, time\nwhile not os.path.exists({str(gate)!r}):\n    time.sleep(0.01)\n"
    )
    backend = (SubprocessCluster, {**QUIET, "preload": [str(code)]})

    async def main(phase: str) -> None:
        gate.touch()
        slow = spec("slow", min=1, backend=backend, boot_timeout=60)
        async with Supervisor([slow], asynchronous=True) as supervisor:
            first = supervisor["slow"]
            call = asyncio.ensure_future(first.call(wait_for_file, str(tmp_path / "never")))
            gate.unlink()
            kill_scheduler(first)
            await until(lambda: "slow" not in supervisor)
            if phase != "end":
                await until(lambda: supervisor._pools["slow"] is not first)
            if phase == "runner":
                await until(lambda: supervisor._pools["slow"]._started)
            began = time.monotonic()
            await asyncio.gather(supervisor.close(), supervisor.close())
            assert time.monotonic() - began < 15
            assert not supervisor._restarts
            assert {pool._state for pool in (first, supervisor._pools["slow"])} == {"closed"}
            with pytest.raises((RunnerLost, PoolClosed)):
                await call
            with pytest.raises(PoolNotFound) as caught:
                get_pool("slow")
            assert not caught.value.restarting

    asyncio.run(main(phase))


def test_k1_a4_the_wrong_kind_of_with(spec: Callable[..., PoolSpec]) -> None:
    async def main() -> None:
        supervisor = Supervisor([spec("web")], asynchronous=True)
        with pytest.raises(TypeError, match="async with"), supervisor:
            pass
        await supervisor.close()
        assert await supervisor.wait(0) is True
        with pytest.raises(TypeError, match="without `await`"):
            await Supervisor([])

    asyncio.run(main())

"""How code learns that it runs in a runner, and what a pool does there (A7)."""

from __future__ import annotations

import asyncio
import dataclasses
import platform
import threading
from collections.abc import Callable
from typing import Any

import dask
import distributed
import pytest
from distributed import LocalCluster

import flame_dask
from flame_dask import FlamePool

MakePool = Callable[..., FlamePool]

QUIET: dict[str, Any] = {"scheduler_kwargs": {"dashboard": False}}
LOCAL = (LocalCluster, QUIET)


def look() -> Any:
    return flame_dask.parent()


async def look_async() -> Any:
    await asyncio.sleep(0)
    return flame_dask.parent()


def look_in_a_thread() -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(flame_dask.parent()))
    thread.start()
    thread.join()
    return found[0]


def test_a7_there_is_no_parent_outside() -> None:
    assert flame_dask.parent() is None


def test_a7_in_a_runner(shared: FlamePool, backend: Any) -> None:
    [runner] = shared.status().runners
    for fn in (look, look_async, look_in_a_thread):
        parent = shared.call(fn)
        assert isinstance(parent, flame_dask.Parent)
        assert parent.pool == "shared"
        assert parent.runner == runner.id
        assert parent.backend
        if backend[0] is LocalCluster:
            assert parent.backend == "LocalCluster"
        assert parent.versions == {
            "python": platform.python_version(),
            "dask": dask.__version__,
            "distributed": distributed.__version__,
            "flame_dask": flame_dask.__version__,
        }
    assert flame_dask.parent() is None


def test_a7_it_can_not_be_changed(shared: FlamePool) -> None:
    parent = shared.call(look)
    with pytest.raises(dataclasses.FrozenInstanceError):
        parent.pool = "another"


def test_a7_in_a_process_for_calls(make_pool: MakePool) -> None:
    pool = make_pool("own", max=1, isolation="process", backend=LOCAL)
    for fn in (look, look_async, look_in_a_thread):
        parent = pool.call(fn)
        assert parent is not None
        assert parent.pool == "own"
        assert parent.runner == pool.status().runners[0].id
    assert flame_dask.parent() is None


def test_a7_a_pool_in_a_runner_has_no_min(make_pool: MakePool) -> None:
    """A program that opens its pools when it is imported does not grow for ever."""

    def open_another() -> tuple[Any, ...]:
        from distributed import LocalCluster

        import flame_dask

        backend = (LocalCluster, {"scheduler_kwargs": {"dashboard": False}})
        with flame_dask.FlamePool("inner", min=1, max=1, backend=backend) as inner:
            at_first = len(inner.status().runners)
            boots = inner.status().counters["boots"]
            there = inner.call(flame_dask.parent)
            here = flame_dask.parent()
            return inner.options.min, at_first, boots, there.pool, here.pool, inner.options.max

    pool = make_pool("outer", min=1, max=1, backend=LOCAL)
    assert pool.options.min == 1
    assert pool.call(open_another) == (0, 0, 0, "inner", "outer", 1)

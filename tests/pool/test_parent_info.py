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
from flame_dask import FlamePool, PoolOptionsError
from support import LOCAL

MakePool = Callable[..., FlamePool]


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
        assert parent.backend == backend[0].__name__
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


def open_another(isolation: str, supervised: bool) -> dict[str, Any]:
    """Open a pool, in the way that a program does that opens its pools when it is imported."""

    import flame_dask

    options: dict[str, Any] = {
        "min": 1,
        "max": 1,
        "isolation": isolation,
        "backend": (LocalCluster, {"scheduler_kwargs": {"dashboard": False}}),
    }
    if supervised:
        supervisor = flame_dask.Supervisor([flame_dask.FlamePool.child_spec("inner", **options)])
        inner, opened = supervisor["inner"], supervisor
    else:
        inner = opened = flame_dask.FlamePool("inner", **options)
    with opened:
        status = inner.status()
        found = {
            "options": (inner.options.min, inner.options.max),
            "at first": (len(status.runners), status.counters["boots"]),
            "inner": inner.call(flame_dask.parent),
            "runners": [runner.id for runner in inner.status().runners],
            "outer": flame_dask.parent(),
        }
    return {**found, "afterwards": flame_dask.parent()}


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize("supervised", [False, True])
def test_a7_a_pool_in_a_runner_has_no_min(
    make_pool: MakePool, isolation: str, supervised: bool
) -> None:
    """A program that opens its pools when it is imported does not grow for ever."""
    pool = make_pool("outer", min=1, max=1, backend=LOCAL, isolation=isolation)
    assert pool.options.min == 1

    found = pool.call(open_another, isolation, supervised)

    assert found["options"] == (0, 1)
    assert found["at first"] == (0, 0)
    [runner] = pool.status().runners
    outer, inner = found["outer"], found["inner"]
    assert (outer.pool, outer.runner, outer.backend) == ("outer", runner.id, "LocalCluster")
    assert found["afterwards"] == outer
    # A runner of the inner pool knows of that one alone.
    assert (inner.pool, [inner.runner], inner.backend) == (
        "inner",
        found["runners"],
        "LocalCluster",
    )
    assert inner.versions == outer.versions
    assert inner.versions["flame_dask"] == flame_dask.__version__
    assert flame_dask.parent() is None


def test_a7_min_is_checked_all_the_same(make_pool: MakePool) -> None:
    def open_a_wrong_one() -> None:
        import flame_dask

        flame_dask.FlamePool("inner", min=2, max=1)

    with pytest.raises(PoolOptionsError, match="min=2"):
        make_pool("outer", max=1, backend=LOCAL).call(open_a_wrong_one)

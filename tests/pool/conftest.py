"""A pool for tests of what lives on after its call has answered."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster
from distributed.deploy.subprocess import SubprocessCluster

from flame_dask import Child, FlamePool
from support import QUIET, Program, all_children_end

#: Fixtures with pools that outlive a test.
LASTING = frozenset({"lasting", "isolated", "pools"})

#: Calls in threads with the scheduler in the parent, and in processes with one of its own: how a
#: call is run and how messages get to it have nothing to do with each other.
KINDS: dict[str, tuple[str, Any]] = {
    "thread-local": ("thread", (LocalCluster, QUIET)),
    "process-subprocess": ("process", (SubprocessCluster, QUIET)),
}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a pool of each of the two kinds in turn."""
    isolation, backend = KINDS[request.param]
    return {"isolation": isolation, "backend": backend}


@pytest.fixture(params=["thread", "process"])
def own(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a test's own pool, of each isolation in turn, where that is quickly there."""
    return {"isolation": request.param, "backend": (LocalCluster, QUIET)}


@pytest.fixture(scope="module")
def lasting_pool(
    kind: dict[str, Any], fast: dict[str, Any], until: Callable[..., Any]
) -> Iterator[FlamePool]:
    """One runner of eight slots; see ``lasting``."""
    options = {**fast, **kind, "max_concurrency": 8}
    with all_children_end(until), FlamePool("lasting", min=1, max=1, **options) as pool:
        yield pool


@pytest.fixture
def lasting(lasting_pool: FlamePool, until: Callable[..., Any]) -> Iterator[FlamePool]:
    """The same pool for all tests of a module; each test gives back all slots that it takes."""
    yield lasting_pool
    until(lambda: lasting_pool.status().leases == 0, 5, about="a slot is still taken")
    assert lasting_pool.status().counters["lost"] == 0


@pytest.fixture
def processes_end(request: pytest.FixtureRequest, until: Callable[..., Any]) -> Iterator[None]:
    """See that processes end, in a test whose pool has new ones; one that lasts is not looked at.

    It takes the place of the ordinary check, by ``usefixtures``.
    """
    lasts = LASTING.intersection(request.fixturenames)
    with contextlib.nullcontext() if lasts else all_children_end(until):
        yield


@pytest.fixture
def copies_end(temporary_folder: Path, until: Callable[..., Any]) -> Iterator[None]:
    """See that processes end, and that what runners have copied is gone then; likewise."""
    before = set(os.listdir(temporary_folder))
    with all_children_end(until):
        yield
    until(lambda: set(os.listdir(temporary_folder)) <= before | {"dask-scratch-space"})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where calls leave lines."""
    return tmp_path / "log"


@pytest.fixture
def place(lasting: FlamePool, log: Path) -> Iterator[Callable[..., Child]]:
    """Place a child on the lasting pool that writes to ``log``, and kill it in the end."""
    with contextlib.ExitStack() as stack:

        def place(spec: Any, *args: Any, **kwargs: Any) -> Child:
            child: Child = lasting.place_child(spec, str(log), *args, **kwargs)
            stack.callback(child.kill)
            return child

        yield place


# -- code sync -----------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    folder = tmp_path / "program"
    folder.mkdir()
    # Runners start where their parent is, so that is an empty folder; and the tests are no part of
    # the program.
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    root = Path(__file__).parents[2]
    rest = [text for text in sys.path if not Path(text or ".").resolve().is_relative_to(root)]
    monkeypatch.setattr(sys, "path", [str(folder), *rest])
    before = set(sys.modules)
    yield Program(folder)
    for name in set(sys.modules) - before:
        if str(folder) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def shop(program: Program) -> Program:
    program.write("shop/__init__.py", "from shop.prices import LIMIT\n")
    program.write("shop/prices.py", "LIMIT = 1\ndef price(): return LIMIT\n")
    program.write("shop/basket.py", "from .prices import LIMIT as top\ndef total(): return top\n")
    return program

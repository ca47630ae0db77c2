"""Fixtures for all tests, and a check after each test that nothing of it is left."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

# For the interpreters that are started: numpy's library makes its threads when it is imported, and
# Dask imports numpy. That would be a tenth of what a runner takes to start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import cloudpickle
import psutil
import pytest
from distributed import LocalCluster
from distributed.deploy.subprocess import SubprocessCluster

import support
from flame_dask import FlamePool
from services import (
    ecs,
    ecs_service,
    fargate_options,
    gateway_server,
    kube,
    kube_service,
    make_ecs_pool,
    make_kube_pool,
    slurm,
    ssh_hosts,
)

#: Fixtures for tests in several folders: there can be only one of these services in a process.
__all__ = [
    "ecs",
    "ecs_service",
    "fargate_options",
    "gateway_server",
    "kube",
    "kube_service",
    "make_ecs_pool",
    "make_kube_pool",
    "slurm",
    "ssh_hosts",
]

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

#: Without a dashboard, which takes as long to start as the rest of a cluster. ``shared`` has one.
BACKENDS: dict[str, Any] = {
    "local": (LocalCluster, {"scheduler_kwargs": {"dashboard": False}}),
    "subprocess": (SubprocessCluster, {"scheduler_kwargs": {"dashboard": False}}),
}

#: Threads that outlive a test on purpose, by the start of their name.
THREADS_THAT_STAY = (
    "Dask-Callback-Thread",  # Future.add_done_callback: one for the process, made by Dask
    "Dask-Offload",  # Dask pickles large things there; one for the process
    "TCP-Executor",  # Dask resolves host names there; one for the process
    "pytest_timeout",  # the deadline of the test itself
)

#: Processes that outlive a test on purpose, by a part of their command line.
PROCESSES_THAT_STAY = (
    "multiprocessing.resource_tracker",  # Python's own; it ends with the interpreter
    "multiprocessing.forkserver",
)

#: Dask keeps its working folder for the next worker, with nothing but two locks in it.
SCRATCH = "dask-scratch-space"
SCRATCH_LOCKS = {"global.lock", "purge.lock"}

#: Where tests open pools, or run programs that do.
FOLDERS_WITH_POOLS = frozenset({"backends", "pool", "e2e", "conformance", "runner"})

#: Fixtures that look themselves for what a test leaves behind.
CHECKS_OF_THEIR_OWN = frozenset({"processes_end", "copies_end"})

#: Sockets that the kernel, and pools of connections that Dask closes lazily, may still hold.
DESCRIPTORS_SPARE = 4


def until(condition: Callable[..., Any], deadline: float = 10.0, *, about: str = "") -> Any:
    """Wait until a condition holds, and return its value. The only way of waiting in these tests.

    It fails the test when ``deadline`` seconds have passed.
    """
    end = time.monotonic() + deadline
    pause = 0.005
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= end:
            pytest.fail(f"not within {deadline:g} s: {about or _source(condition)}")
        time.sleep(pause)
        pause = min(1.2 * pause, 0.05)  # to look takes time from what is waited for


def _source(condition: Callable[[], Any]) -> str:
    code = condition.__code__
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}"


#: What a worker of Dask logs that closes while a heartbeat of its own is under way. Plain Dask does
#: it too.
CUT_HEARTBEAT = re.compile(
    r".* - ERROR - Failed to communicate with scheduler during heartbeat\.\n"
    r"(?:.*\n)*?distributed\.comm\.core\.CommClosedError: .*\n"
)


@pytest.fixture(scope="session")
def without_cut_heartbeats() -> Callable[[str], str]:
    """Take out of the stderr of a program what its workers say of a heartbeat that was cut off."""
    return partial(CUT_HEARTBEAT.sub, "")


@pytest.fixture(name="until", scope="session")
def until_fixture() -> Until:
    """Poll with a deadline: ``until(lambda: ..., 5)``."""
    return until


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``pytest -n 2``: keep tests that use one pool in one process, and in their order.

    That is a module's tests on one backend. As they are collected, the many quick ones come at
    the beginning and at the end, so that no process is left with a long module at the end.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByModuleAndBackend(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            module, _, test = nodeid.partition("::")
            parameters = test.partition("[")[2].rstrip("]").split("-")
            return " ".join([module, *(name for name in BACKENDS if name in parameters)])

    config.option.loadscopereorder = False
    return ByModuleAndBackend(config, log)


# -- nothing is left -----------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Have all temporary files of parent, scheduler and runners in a folder that can be checked."""
    folder = tmp_path_factory.mktemp("tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        patch.setattr(tempfile, "tempdir", None)
        yield folder


def children() -> dict[int, str]:
    """The processes below this one, by pid, with what they are."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline()) or process.name()
            if process.status() == psutil.STATUS_ZOMBIE:
                command = f"<zombie> {command}"
            if not any(part in command for part in PROCESSES_THAT_STAY):
                found[process.pid] = command
    return found


def threads() -> dict[threading.Thread, str]:
    """The threads of this process, with their names."""
    return {
        thread: thread.name
        for thread in threading.enumerate()
        if not thread.name.startswith(THREADS_THAT_STAY)
    }


def files(folder: Path) -> set[str]:
    """The temporary files of this process and those below it."""
    found = {path.name for path in folder.iterdir() if path.name != SCRATCH}
    scratch = folder / SCRATCH
    if scratch.is_dir():
        names = {path.name for path in scratch.iterdir()} - SCRATCH_LOCKS
        found |= {f"{SCRATCH}/{name}" for name in names}
    return found


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_works() -> Iterator[None]:
    """Have programs get Ctrl-C also where the tests run in the background of a shell script.

    There SIGINT is ignored, which programs inherit.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def impatience() -> Iterator[None]:
    """Kill soon what does not end by itself, such as a runner whose call goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flame_dask.backends.process.TERMINATE_WAIT", 0.5)
        yield


@pytest.fixture(scope="module", autouse=True)
def quick_garbage_collection() -> None:
    """Leave what is there by now out of it: after each test with pools garbage is collected.

    No pool is open between two modules, but all that was imported and all reports of tests are
    there: to go through them takes five times as long as to go through what a test makes.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def nothing_left_behind(folder: Path, *, spare: int, killing: bool = False) -> Iterator[None]:
    """Fail if a process, thread, temporary file or descriptor is left afterwards.

    ``spare`` is how many descriptors may be. With ``killing``, working folders of workers may be
    left: Dask removes that of a killed worker when the next one starts.
    """
    processes, running, there = children(), threads(), files(folder)
    descriptors = psutil.Process().num_fds()
    yield
    gc.collect()
    end = time.monotonic() + 5.0

    def left(now: dict[Any, str], before: dict[Any, str]) -> list[str]:
        return [name for key, name in now.items() if key not in before]

    while True:
        names = sorted(files(folder) - there)
        rest = {
            "processes": left(children(), processes),
            "threads": left(threads(), running),
            "temporary files": [n for n in names if not (killing and n.startswith(SCRATCH))],
        }
        more = psutil.Process().num_fds() - descriptors
        if more > spare:
            rest["descriptors"] = [f"{more} more than before"]
        if not any(rest.values()):
            return
        if time.monotonic() > end:
            pytest.fail(f"left behind: { {kind: what for kind, what in rest.items() if what} }")
        time.sleep(0.02)


@pytest.fixture
def kills_runners() -> None:
    """Say that the test kills runners or a scheduler, which then can't clean up."""


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest, temporary_folder: Path) -> Iterator[None]:
    """Fail a test that leaves a process, a thread, a temporary file or a descriptor (A6)."""
    if not FOLDERS_WITH_POOLS.intersection(request.path.parts):
        yield  # nothing is opened there, and looking costs a tenth of a second a test
        return
    if CHECKS_OF_THEIR_OWN.intersection(request.fixturenames):
        yield  # this one would take new runners, and processes for calls, for left over
        return
    spare = DESCRIPTORS_SPARE
    if "shared" in request.fixturenames:
        # It is there before the test and after it, and keeps connections to its runner for later.
        request.getfixturevalue("shared")
        spare += 40
    killing = "kills_runners" in request.fixturenames
    with nothing_left_behind(temporary_folder, spare=spare, killing=killing):
        yield


class FlameLog(logging.Handler):
    """Collects what flame_dask logs."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        self.records.append(record)

    def texts(self, level: int = logging.ERROR) -> list[str]:
        """Return the texts of what was logged at this level or above, with tracebacks."""
        form = logging.Formatter("%(name)s: %(message)s")
        return [form.format(record) for record in self.records if record.levelno >= level]


@pytest.fixture(autouse=True)
def nothing_goes_wrong_quietly(request: pytest.FixtureRequest) -> Iterator[FlameLog]:
    """Fail a test during which flame_dask logs an error, unless it asks for ``flame_log``.

    The host of a pool and the parent's receiver never raise, they log.
    """
    log = FlameLog()
    logger = logging.getLogger("flame_dask")
    logger.addHandler(log)
    yield log
    logger.removeHandler(log)
    if "flame_log" not in request.fixturenames:
        assert log.texts() == []


@pytest.fixture
def flame_log(nothing_goes_wrong_quietly: FlameLog) -> FlameLog:
    """What flame_dask logs during the test, which may be errors."""
    return nothing_goes_wrong_quietly


# -- pools ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def functions_by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """Send functions of the tests by value: runners need not be able to import their modules."""
    modules = (request.module, support)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="module", params=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Any:
    """Each of the two backends in turn: the scheduler in the parent, and in its own process."""
    return BACKENDS[request.param]


@pytest.fixture(scope="session")
def local_backend() -> Any:
    """The one with the scheduler in the parent."""
    return BACKENDS["local"]


@pytest.fixture(scope="session")
def fast() -> dict[str, Any]:
    """Options of a pool that is not to keep a test waiting at its end."""
    return {"shutdown_timeout": 5, "boot_timeout": 20}


@pytest.fixture
def make_pool(request: pytest.FixtureRequest, fast: dict[str, Any]) -> Iterator[MakePool]:
    """Open pools that are closed when the test ends: ``make_pool(max=2, ...)``.

    They are on ``backend`` if the test asks for it, and so is run on both. Without, they are on a
    ``LocalCluster``: that is for tests to which it is all one where the scheduler is.
    """
    usual = "backend" if "backend" in request.fixturenames else "local_backend"
    numbers = itertools.count(1)
    with contextlib.ExitStack() as stack:

        def make(name: str | None = None, **options: Any) -> FlamePool:
            if "backend" not in options:
                options["backend"] = request.getfixturevalue(usual)
            pool = FlamePool(name or f"pool{next(numbers)}", **{**fast, **options})
            stack.callback(pool.close)
            return pool

        yield make


@pytest.fixture(scope="module")
def shared(backend: Any, fast: dict[str, Any], temporary_folder: Path) -> Iterator[FlamePool]:
    """A pool with one runner of 20 slots, for all tests of a module that leave it as it was."""
    options = {**fast, "min": 1, "max": 1, "max_concurrency": 20, "backend": backend[0]}
    with nothing_left_behind(temporary_folder, spare=DESCRIPTORS_SPARE + 6):
        with FlamePool("shared", **options) as pool:
            pool.get_executor().submit(int).result(10)  # starts the thread of the executors
            yield pool
        del pool

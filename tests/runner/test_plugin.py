"""The runner's plugin, in a process as a backend starts it (D2, E2-E5, F2, G1)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flame_dask.constants import OOM_EXIT
from flame_dask.runner import here
from support import doze, run, sleep

Until = Callable[..., Any]

THREAD = "an exception in its thread"


def inc(x: int) -> int:
    return x + 1


def sleep_and_go_on(path: str, seconds: float) -> None:
    """Hang in a call of the system, and then be in the interpreter now and again."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(seconds)
    for _ in range(500):
        time.sleep(0.01)
    Path(path).with_suffix(".done").write_text("done")


async def sleep_async(path: str, seconds: float) -> str:
    Path(path).write_text(str(os.getpid()))
    await asyncio.sleep(seconds)
    Path(path).with_suffix(".done").write_text("done")
    return "slept"


def fill(megabytes: int) -> None:
    blocks = []
    for _ in range(megabytes):
        blocks.append(bytearray(os.urandom(1)) * 2**20)
        time.sleep(0.001)
    time.sleep(20)


@pytest.fixture(scope="module")
def common(make_bench: Any) -> Any:
    """A bench with a runner, for the tests that leave both as they were."""
    bench = make_bench()
    bench.runner = bench.process(worker_options={"nthreads": 6, "memory_limit": "2GB"})
    return bench


def gone(process: Any) -> bool:
    return not process.relatives()


# -- calls ---------------------------------------------------------------------------------------


def test_b1_calls_run(common: Any, path: Path) -> None:
    bench, runner = common, common.runner
    assert bench.value(bench.submit(runner.address, inc, 1)) == 2
    with pytest.raises(ZeroDivisionError):
        bench.value(bench.submit(runner.address, divmod, 1, 0))
    key = bench.submit(runner.address, sleep_async, str(path), 0.01, asynchronous=True)
    assert bench.value(key) == "slept"
    key = bench.submit(runner.address, bytes, 100_000)
    assert bench.end(key) == "memory"
    assert bench.value(key) is None  # too large: it waits on the runner
    assert not bench.heard("terminated", task=key)


def test_e3_work_is_ended_and_the_slot_is_free(common: Any, tmp_path: Path, until: Until) -> None:
    """A thread, a thread that waits for a process, and a coroutine, at the same time."""
    bench, runner = common, common.runner
    paths = [tmp_path / str(n) for n in range(4)]
    keys = [
        bench.submit(runner.address, doze, str(paths[0])),
        bench.submit(runner.address, run, str(paths[1]), "sh", "-c", "sleep 60 & wait"),
        bench.submit(runner.address, sleep_async, str(paths[2]), 60, asynchronous=True),
    ]
    until(lambda: all(path.exists() for path in paths[:3]))
    until(lambda: len(psutil.Process(runner.pid).children(recursive=True)) == 2)
    children = psutil.Process(runner.pid).children(recursive=True)
    for key in keys:
        bench.terminate(runner.address, key)
    assert [bench.end(key, 2) for key in keys] == ["memory"] * 3
    how = {news["task"]: news["how"] for news in bench.heard("terminated", reason="order")}
    assert [how[key] for key in keys] == [
        THREAD,
        f"{THREAD} and SIGTERM to its processes",
        "cancelling its coroutine",
    ]
    for key in keys:  # the host is told before the task is over
        assert [kind for kind, task in bench.host.order if task == key] == ["terminated", "memory"]
    until(lambda: not any(child.is_running() for child in children))
    again = [bench.submit(runner.address, inc, n) for n in range(3)]
    assert [bench.value(key) for key in again] == [1, 2, 3]


def test_e3_a_thread_that_waits_in_c_goes_on_and_the_others_too(
    common: Any, path: Path, until: Until
) -> None:
    bench, runner = common, common.runner
    key = bench.submit(runner.address, sleep_and_go_on, str(path), 1.5)
    until(path.exists)
    bench.terminate(runner.address, key)
    assert bench.value(bench.submit(runner.address, inc, 1)) == 2
    assert not bench.heard("terminated", task=key)
    assert bench.end(key) == "memory"
    assert not path.with_suffix(".done").exists()
    assert bench.heard("terminated", task=key)[0]["how"] == THREAD


def test_e3_a_coroutine_that_swallows_its_end_is_cancelled_again(
    common: Any, path: Path, until: Until
) -> None:
    async def stubborn(path: str) -> None:
        for _ in range(3):
            try:
                Path(path).write_text("begun")
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue

    bench, runner = common, common.runner
    key = bench.submit(runner.address, stubborn, str(path), asynchronous=True)
    until(path.exists)
    bench.terminate(runner.address, key)
    assert bench.end(key) == "memory"
    assert len(bench.heard("terminated", task=key)) == 1
    assert bench.value(bench.submit(runner.address, inc, 1)) == 2


def test_e3_a_coroutine_may_cancel_itself(common: Any) -> None:
    """That is an outcome like any other, not the end of the worker or of the call's work."""

    async def gives_up() -> None:
        raise asyncio.CancelledError

    bench, runner = common, common.runner
    key = bench.submit(runner.address, gives_up, asynchronous=True)
    with pytest.raises(asyncio.CancelledError):
        bench.value(key)
    assert not bench.heard("terminated", task=key)


def test_e2_the_runner_ends_a_call_by_its_own_clock(common: Any, path: Path) -> None:
    bench, runner = common, common.runner
    begun = time.monotonic()
    key = bench.submit(runner.address, doze, str(path), limit=0.3)
    other = bench.submit(
        runner.address, sleep_async, str(path) + "2", 60, limit=0.3, asynchronous=True
    )
    assert [bench.end(key), bench.end(other)] == ["memory"] * 2
    assert 0.8 <= time.monotonic() - begun < 2
    reasons = [bench.heard("terminated", task=task)[0]["reason"] for task in (key, other)]
    assert reasons == ["deadline"] * 2


# -- the idle check ------------------------------------------------------------------------------


@pytest.mark.parametrize(("check", "go"), [(lambda: True, True), (lambda: 0, False)])
def test_d2_the_idle_check_is_asked_on_the_runner(bench: Any, until: Until, check: Any, go: bool):  # type: ignore[no-untyped-def]
    runner = bench.process(idle_check=check)
    bench.tell(runner.address, what="ask-idle", number=7)
    (answer,) = until(lambda: bench.heard("idle-answer"))
    assert (answer["number"], answer["go"]) == (7, go)


def test_d2_an_idle_check_that_fails_or_takes_too_long_means_no(bench: Any, until: Until) -> None:
    def check() -> bool:
        if not Path(flag).exists():
            Path(flag).touch()
            raise OSError("not today")
        time.sleep(2)
        return True

    flag = os.path.join(os.environ["TMPDIR"], "flag")
    runner = bench.process(idle_check=check, idle_limit=0.3)
    for number in (1, 2):
        bench.tell(runner.address, what="ask-idle", number=number)
        (answer,) = until(lambda number=number: bench.heard("idle-answer", number=number), 1.5)
        assert answer["go"] is False
    # It is not waited for on the loop, and says nothing afterwards.
    assert bench.value(bench.submit(runner.address, inc, 1)) == 2
    os.unlink(flag)


# -- the runner's end ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("isolation", "asynchronous"), [("thread", False), ("thread", True), ("process", False)]
)
def test_e5_calls_finish_after_sigterm(
    bench: Any, path: Path, until: Until, isolation: str, asynchronous: bool
) -> None:
    runner = bench.process(shutdown_timeout=10, isolation=isolation)
    fn = sleep_async if asynchronous else sleep
    key = bench.submit(runner.address, fn, str(path), 1.0, asynchronous=asynchronous)
    until(path.exists)
    os.kill(runner.pid, signal.SIGTERM)
    (news,) = until(lambda: bench.heard("leaving"))
    assert news["reason"] == "SIGTERM"
    os.kill(runner.pid, signal.SIGTERM)  # changes nothing
    assert bench.value(key) == "slept"
    assert runner.process.wait(5) == 0
    assert not bench.heard("terminated", task=key)
    assert len(bench.heard("leaving")) == 1
    until(lambda: gone(runner))
    assert not os.path.exists(runner.folder)


def test_e5_a_result_that_is_to_be_fetched_is_waited_for(bench: Any, until: Until) -> None:
    runner = bench.process(shutdown_timeout=10)
    key = bench.submit(runner.address, bytes, 1000, inline=10)
    assert bench.end(key) == "memory"
    os.kill(runner.pid, signal.SIGTERM)
    until(lambda: bench.heard("leaving"))
    with pytest.raises(subprocess.TimeoutExpired):
        runner.process.wait(0.5)

    async def fetched() -> None:
        bench.scheduler.client_releases_keys(keys=[key], client="bench")

    bench.do(fetched())
    assert runner.process.wait(5) == 0


@pytest.mark.usefixtures("kills_runners")
def test_e5_what_can_not_be_ended_is_not_waited_for(bench: Any, path: Path, until: Until) -> None:
    runner = bench.process(shutdown_timeout=30)
    key = bench.submit(runner.address, sleep, str(path), 60)
    until(path.exists)
    bench.terminate(runner.address, key)
    begun = time.monotonic()
    os.kill(runner.pid, signal.SIGTERM)
    runner.process.wait(5)
    assert time.monotonic() - begun < 3


def test_e5_a_forked_child_has_its_own_signals(common: Any, path: Path, until: Until) -> None:
    """It shares the socket that wakes up the runner's event loop, but not its SIGTERM."""

    def fork(path: str) -> None:
        pid = os.fork()
        if not pid:
            Path(path).write_text(str(os.getpid()))
            time.sleep(60)
            os._exit(0)
        os.waitpid(pid, 0)

    bench, runner = common, common.runner
    key = bench.submit(runner.address, fork, str(path))
    until(path.exists)
    bench.terminate(runner.address, key)
    assert bench.end(key) == "memory"
    assert "SIGTERM" in bench.heard("terminated", task=key)[0]["how"]
    assert bench.value(bench.submit(runner.address, inc, 1)) == 2
    assert not bench.heard("leaving")


def test_a3_a_worker_may_go_on_without_the_pool(bench: Any, until: Until) -> None:
    def look() -> Any:
        from distributed import get_worker

        manager: Any = get_worker().memory_manager
        # As Dask's command line has it.
        handler = getattr(signal.getsignal(signal.SIGTERM), "__qualname__", "")
        return manager.memory_pause_fraction, handler, here.parent()

    runner = bench.process(worker_options={"memory_limit": "1GB"})
    fraction, handler, parent = bench.value(bench.submit(runner.address, look))
    assert (fraction, parent.pool) == (False, "pool")
    assert "handle_signal" not in handler
    bench.do(bench.scheduler.unregister_worker_plugin(comm=None, name="flame"))
    fraction, handler, parent = bench.value(bench.submit(runner.address, look))
    assert (fraction, parent) == (0.8, None)
    assert "handle_signal" in handler


def test_e5_without_work_sigterm_is_obeyed_at_once(bench: Any, until: Until) -> None:
    runner = bench.process(shutdown_timeout=None)
    begun = time.monotonic()
    os.kill(runner.pid, signal.SIGTERM)
    assert runner.process.wait(5) == 0
    assert time.monotonic() - begun < 2
    until(lambda: gone(runner))


@pytest.mark.usefixtures("kills_runners")
def test_e5_after_its_time_the_process_ends_although_threads_go_on(
    bench: Any, path: Path, until: Until
) -> None:
    runner = bench.process(shutdown_timeout=0.3)
    bench.submit(runner.address, sleep, str(path), 60)
    bench.submit(runner.address, run, str(path) + "2", "sleep", "60")
    until(lambda: path.exists() and Path(str(path) + "2").exists())
    begun = time.monotonic()
    os.kill(runner.pid, signal.SIGTERM)
    runner.process.wait(5)
    assert time.monotonic() - begun < 3
    until(lambda: gone(runner))


def test_e5_a_thread_that_was_left_behind_does_not_keep_the_process(
    bench: Any, until: Until
) -> None:
    def leave_a_thread() -> None:
        import threading

        from flame_dask.runner import plugin

        plugin.LAST_RESORT = 0.5  # type: ignore[misc]
        threading.Thread(target=time.sleep, args=(60,), daemon=False).start()

    runner = bench.process()
    bench.value(bench.submit(runner.address, leave_a_thread))
    os.kill(runner.pid, signal.SIGTERM)
    assert runner.process.wait(5) == -signal.SIGKILL
    until(lambda: gone(runner))


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.usefixtures("kills_runners")
def test_g1_g2_a_runner_whose_scheduler_is_gone(
    bench: Any, tmp_path: Path, until: Until, isolation: str
) -> None:
    """Linked calls are ended, the others go on for a while, and the runner ends."""
    runner = bench.process(isolation=isolation, shutdown_timeout=10, worker_options={"nthreads": 8})
    linked, free, coroutine = (tmp_path / name for name in ("linked", "free", "coroutine"))
    bench.submit(runner.address, sleep, str(linked), 0.3)
    for _ in range(3):
        bench.submit(runner.address, doze, str(linked))
    bench.submit(runner.address, sleep, str(free), 2, link=False)
    on_loop = isolation == "thread"
    bench.submit(
        runner.address,
        sleep_async,
        str(coroutine),
        2,
        link=False,
        asynchronous=True,
        on_loop=on_loop,
    )
    until(lambda: linked.exists() and free.exists() and coroutine.exists())
    bench.cut(runner.address)
    until(lambda: free.with_suffix(".done").exists(), 5)
    until(lambda: coroutine.with_suffix(".done").exists(), 5)
    runner.process.wait(5)
    until(lambda: gone(runner))


@pytest.mark.parametrize("force", [False, True])
def test_g3_the_host_sends_a_runner_away(bench: Any, path: Path, until: Until, force: bool) -> None:
    runner = bench.process(shutdown_timeout=10)
    key = bench.submit(runner.address, sleep, str(path), 0.7)
    until(path.exists)
    bench.tell(runner.address, what="go", force=force)
    if not force:
        assert bench.value(key) == "slept"
    runner.process.wait(5)
    assert path.with_suffix(".done").exists() is not force
    until(lambda: gone(runner))


def test_f2_a_runner_that_takes_too_much_memory_ends(bench: Any, until: Until) -> None:
    runner = bench.process(worker_options={"memory_limit": "300MB"})
    child = bench.submit(runner.address, subprocess.run, ["sleep", "60"])
    until(lambda: psutil.Process(runner.pid).children())
    bench.submit(runner.address, fill, 600)
    assert runner.process.wait(10) == OOM_EXIT
    until(lambda: gone(runner))
    assert child


def test_f2_a_process_of_a_call_counts_too(bench: Any, until: Until) -> None:
    """What it has started, in isolation by threads."""
    runner = bench.process(worker_options={"memory_limit": "400MB"})
    code = "import time; x = bytearray(b'x') * 500 * 2**20; time.sleep(60)"
    bench.submit(runner.address, subprocess.run, [sys.executable, "-c", code])
    assert runner.process.wait(10) == OOM_EXIT
    until(lambda: gone(runner))


def test_f2_dask_does_not_pause_a_runner(common: Any) -> None:
    """It would keep calls waiting that have a slot."""
    bench, runner = common, common.runner

    def settings() -> Any:
        from distributed import get_worker

        manager: Any = get_worker().memory_manager
        return manager.memory_pause_fraction, manager.memory_spill_fraction

    assert bench.value(bench.submit(runner.address, settings)) == (False, False)


# -- where a program is --------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a7_a_call_knows_its_parent(bench: Any, isolation: str) -> None:
    def ask() -> Any:
        import threading

        from flame_dask.runner import here

        found = []
        thread = threading.Thread(target=lambda: found.append(here.parent()))
        thread.start()
        thread.join()
        assert found == [here.parent()]
        return found[0]

    runner = bench.process(isolation=isolation)
    parent = bench.value(bench.submit(runner.address, ask))
    assert (parent.pool, parent.runner, parent.backend) == ("pool", "runner-1", "Bench")
    assert set(parent.versions) == {"python", "dask", "distributed", "flame_dask"}
    assert here.parent() is None


def test_a7_a_worker_in_the_parent_itself_makes_it_no_runner(bench: Any, path: Path) -> None:
    worker = bench.worker()
    assert here.parent() is None
    assert bench.value(bench.submit(worker.address, inc, 1)) == 2
    before = signal.getsignal(signal.SIGTERM)
    assert before is signal.SIG_DFL
    key = bench.submit(worker.address, doze, str(path))
    bench.until(path.exists)
    bench.terminate(worker.address, key)
    assert bench.end(key) == "memory"

"""What is taken for granted of the private API of distributed: an upgrade that moves it fails."""

from __future__ import annotations

import asyncio
import inspect
import time

import pytest
from dask._task_spec import Task
from distributed import Client, LocalCluster, Nanny, Scheduler, SpecCluster, Worker
from distributed.batched import BatchedSend
from distributed.client import Future, FutureState
from distributed.core import rpc
from distributed.diagnostics.plugin import SchedulerPlugin
from distributed.scheduler import SchedulerState
from distributed.worker_state_machine import TaskFinishedMsg, TaskState

from flame_dask import dask_internals as internals


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "needed"),
    [
        (SchedulerState.new_task, {"key", "spec", "state"}),
        (Scheduler.transitions, {"recommendations", "stimulus_id"}),
        (Scheduler.client_desires_keys, {"keys", "client"}),
        (Scheduler.client_releases_keys, {"keys", "client", "stimulus_id"}),
        (Scheduler.handle_worker_status_change, {"status", "worker", "stimulus_id"}),
        (Scheduler.register_worker_plugin, {"comm", "plugin", "name", "idempotent"}),
        (SchedulerPlugin.remove_worker, {"scheduler", "worker", "stimulus_id"}),
        (SchedulerPlugin.transition, {"key", "start", "finish", "stimulus_id"}),
        (Client._gather, {"futures", "errors", "direct", "local_worker"}),
        (Client._gather_remote, {"direct", "local_worker"}),
        (Client._release_key, {"key"}),
        (Client._dec_ref, {"key"}),
        (Client._send_to_scheduler_safe, {"msg"}),
        (Client._close, {"fast"}),
        (Future.__init__, {"key", "client", "state"}),
        (FutureState.set_error, {"exception", "traceback"}),
        (FutureState.finish, {"type"}),
        (Worker.batched_send, {"msg"}),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_private_functions_take_what_they_are_given(function: object, needed: set[str]) -> None:
    """B1, B3: the calls that dask_internals makes, and the methods that it overrides."""
    assert needed <= parameters(function)


def test_hooks_run_without_yielding() -> None:
    """F1: what a scheduler plugin does in a hook happens before anything else can."""
    assert not inspect.iscoroutinefunction(Scheduler._transition)
    assert not inspect.iscoroutinefunction(Scheduler.client_releases_keys)
    source = inspect.getsource(Scheduler.remove_worker)
    assert (
        "await " not in source[source.index("self.transitions") : source.index(".remove_worker(")]
    )


def test_metadata_travels_with_the_completion() -> None:
    """B1: a small result comes along with the news that its task is done."""
    assert "metadata" in TaskFinishedMsg.__annotations__
    assert "metadata" in TaskState.__annotations__
    assert "metadata=metadata" in inspect.getsource(Scheduler.stimulus_task_finished)


def test_streams_can_be_hastened() -> None:
    """The pause between two sends is an attribute that is read before each send."""
    source = inspect.getsource(BatchedSend._background_send)
    assert "self.interval" in source
    stream = type("Stream", (), {"interval": 0.01})()
    internals.hasten(stream)
    assert stream.interval == 0
    internals.hasten(None)


def test_tasks_take_their_arguments_as_they_are() -> None:
    """B1: a payload is handed on unopened, and a coroutine function is seen as one."""

    async def later(value: object) -> object:
        return value

    payload = object()
    task = internals.make_task("key", lambda value: value, payload)
    assert isinstance(task, Task)
    assert task() is payload
    assert not task.is_coro
    assert internals.make_task("key", later, payload).is_coro


def test_a_cluster_keeps_its_books_where_we_write() -> None:
    """C2: a worker in both books is left alone by the cluster, and closed with it."""
    source = inspect.getsource(SpecCluster._correct_state_internal)
    assert "set(self.workers) - set(self.worker_spec)" in source
    assert "set(self.worker_spec) - set(self.workers)" in source


def test_a_scheduler_can_be_told_to_let_a_worker_go() -> None:
    """D3: so that it closes, and ends what it has started, before its process is ended."""

    async def main() -> None:
        async with Scheduler(dashboard=False, port=0, host="127.0.0.1") as scheduler:
            assert scheduler.handlers["unregister"] == scheduler.remove_worker
            assert parameters(scheduler.remove_worker) >= {"address", "stimulus_id", "close"}

    asyncio.run(main())


def test_a_scheduler_can_be_kept_from_being_idle() -> None:
    """G3: somebody asks it, by RPC, and it asks itself; afterwards all is as ever."""
    busy = True

    async def main() -> tuple[float | None, float | None, str]:
        nonlocal busy
        async with Scheduler(port=0, dashboard=False, idle_timeout="50ms") as scheduler:
            assert scheduler.handlers["check_idle"] == scheduler.check_idle
            internals.keep_awake(scheduler, lambda: busy)
            async with rpc(scheduler.address) as asking, asyncio.timeout(10):
                while not scheduler.periodic_callbacks["idle-timeout"].is_running():
                    await asyncio.sleep(0.01)
                first = await asking.check_idle()
                # It would have ended by now.
                later = asyncio.get_running_loop().time() + 0.6
                while asyncio.get_running_loop().time() < later:
                    await asyncio.sleep(0.01)
                again, status = await asking.check_idle(), scheduler.status.name
                busy = False
            async with asyncio.timeout(10):
                await scheduler.finished()
            return first, again, status

    assert asyncio.run(main()) == (0.0, 0.0, "running")


def test_errors_are_opened() -> None:
    """B1: an exception arrives as it is, as bytes, or not at all."""
    error, trace = internals.open_error(ValueError("x"), None)
    assert isinstance(error, ValueError)
    assert trace is None
    assert isinstance(internals.open_error(None, None)[0], RuntimeError)


def test_a_worker_can_get_more_threads_than_it_was_started_with() -> None:
    """A3: where the cluster's server alone says how many threads its workers have."""

    async def use() -> tuple[int, int, set[str]]:
        async with (
            Scheduler(port=0, dashboard_address=":0") as scheduler,
            Worker(scheduler.address, nthreads=1) as worker,
            Client(scheduler.address, asynchronous=True) as client,
        ):
            internals.set_threads(worker, 2)
            internals.count_threads(scheduler, worker.address, 2)
            naps = client.map(time.sleep, [0.5, 0.501])
            async with asyncio.timeout(10):
                while len(worker.state.executing) < 2:
                    await asyncio.sleep(0.01)
            await client.gather(naps)
            threads = scheduler.total_nthreads
            internals.strike_off_worker(scheduler, worker.address, "test")
            async with asyncio.timeout(10):
                while scheduler.workers:
                    await asyncio.sleep(0.01)
            return threads, scheduler.total_nthreads, set(scheduler.workers)

    assert asyncio.run(use()) == (2, 0, set())


def test_a_nanny_is_told_not_to_start_its_worker_anew() -> None:
    """E3: the runner is about to be killed, for good."""
    assert "close_gracefully" in inspect.getsource(Nanny.__init__)
    assert "closing_gracefully" in inspect.getsource(Nanny.close_gracefully)
    assert "self.status == Status.closing_gracefully" in inspect.getsource(Nanny._on_worker_exit)


def test_a_worker_gives_its_place_to_a_plugin_from_text() -> None:
    """A8: what a plugin puts in its own place while it is set up is what the worker has then."""
    source = inspect.getsource(Worker.plugin_add)
    assert source.index("self.plugins[name] = plugin") < source.index("plugin.setup(worker=self)")
    assert "isawaitable(result)" in source


def test_a_loop_can_be_held() -> None:
    """K1: it goes on, though the cluster on it is closed, until it is let go."""
    cluster = internals.start_cluster(
        LocalCluster, n_workers=0, scheduler_kwargs={"dashboard": False}, dashboard_address=":0"
    )
    loop = cluster.loop.asyncio_loop
    with internals.loop_held(cluster.loop):
        cluster.close()
        assert loop.is_running()
    assert loop.is_closed()
    with internals.loop_held(cluster.loop):
        pass

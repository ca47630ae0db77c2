"""Everything that touches private API of dask and distributed, and nothing else.

Each function here has a test in ``tests/test_dask_internals.py`` that fails loudly when an upgrade
of distributed moves the ground. Written against distributed 2026.8.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from dask._task_spec import Task
from distributed import Client, get_worker
from distributed.client import Future, FutureState, _global_clients
from distributed.comm.core import CommClosedError
from distributed.core import Status, clean_exception
from distributed.protocol.pickle import dumps
from distributed.protocol.serialize import Serialize, Serialized, ToPickle, deserialize
from distributed.threadpoolexecutor import ThreadPoolExecutor
from distributed.utils import LoopRunner
from distributed.worker import get_data_from_worker

if TYPE_CHECKING:
    from types import TracebackType

    from distributed import Scheduler, Worker
    from distributed.batched import BatchedSend
    from distributed.deploy.spec import ProcessInterface, SpecCluster
    from distributed.scheduler import TaskGroup

__all__ = [
    "Future",
    "FutureState",
    "PoolClient",
    "Status",
    "ToPickle",
]

#: The one stream operation between the parts of a pool.
OP: Final = "flame"

#: What a worker asks before it registers; also written in ``flame_dask.runner.arrival``.
ARRIVE: Final = "flame_arrive"

#: What a runner asks for code of its parent.
CODE: Final = "flame_code"

#: Worker metadata key under which a small result travels with the completion of its task.
RESULT: Final = "flame-result"

#: Groups of tasks in a pool's span beyond which those that are over are forgotten.
SPAN_GROUPS: Final = 100

_order = itertools.count()


# -- scheduler -----------------------------------------------------------------------------------


def listen_to_streams(scheduler: Scheduler, handler: Callable[..., None]) -> None:
    """Let ``handler`` take the pool's messages from clients and workers.

    An exception in a stream handler would close the sender's connection (``Server.handle_stream``),
    so the handler must not raise.
    """
    scheduler.stream_handlers[OP] = handler


def send_to_client(scheduler: Scheduler, client: str, message: dict[str, Any]) -> bool:
    """Send to a client; say whether it was there."""
    comm = scheduler.client_comms.get(client)
    if comm is None:
        return False
    try:
        comm.send({"op": OP, **message})
    except CommClosedError:
        return False
    return True


def send_to_worker(scheduler: Scheduler, address: str, message: dict[str, Any]) -> bool:
    """Send to a worker over its stream; say whether it was there."""
    comm = scheduler.stream_comms.get(address)
    if comm is None:
        return False
    try:
        comm.send({"op": OP, **message})
    except CommClosedError:
        return False
    return True


def hasten_client(scheduler: Scheduler, client: str) -> None:
    """Send what is meant for a client at once, not in batches of 2 ms."""
    hasten(scheduler.client_comms.get(client))


def hasten_worker(scheduler: Scheduler, address: str) -> None:
    """Send what is meant for a worker at once, not in batches of 5 ms."""
    hasten(scheduler.stream_comms.get(address))


def hasten(stream: BatchedSend | None) -> None:
    """Take the pause between two sends out of a batched stream.

    What comes up while a send is under way still goes out as one batch. The log of what was sent
    goes too: it would hold the arguments and results of the last 1,000 calls, up to 1 MB each.
    """
    if stream is not None:
        stream.interval = 0
        stream.recent_message_log = deque(maxlen=0)


def place_task(
    scheduler: Scheduler,
    *,
    key: str,
    spec: Task,
    address: str,
    owner: str,
    priority: int,
    stimulus_id: str,
) -> None:
    """Create a task that runs on one worker, now.

    The task is wanted by ``owner``, a client that exists in name only: so no client is told about
    it by Dask itself, and it lives for exactly as long as the pool wants it.
    """
    ts = scheduler.new_task(key, spec, "released")
    ts.priority = (-priority, next(_order))
    ts.worker_restrictions = {address}
    scheduler.client_desires_keys(keys=[key], client=owner)
    _join_span(scheduler, ts.group, owner)
    scheduler.transitions({key: "waiting"}, stimulus_id)


def _join_span(scheduler: Scheduler, group: TaskGroup, owner: str) -> None:
    """Give tasks a span: worker metrics are booked on it.

    Left to itself, Dask opens a new span for each call that follows a pause, and keeps all spans
    and their groups for good. So all calls of a pool share one, which forgets groups in time.
    """
    spans: Any = scheduler.extensions.get("spans")
    if spans is None or group.span_id is not None:
        return
    span = spans._ensure_span((owner,), (owner,))
    if len(span.groups) >= SPAN_GROUPS:
        span.groups.intersection_update(scheduler.task_groups.values())
    span.groups.add(group)
    group.span_id = span.id


def forget_tasks(scheduler: Scheduler, keys: Collection[str], owner: str, stimulus_id: str) -> None:
    """Let the scheduler forget tasks, and their workers free what they hold of them."""
    if owner in scheduler.clients:
        scheduler.client_releases_keys(keys=list(keys), client=owner, stimulus_id=stimulus_id)


def cordon_worker(scheduler: Scheduler, address: str, stimulus_id: str) -> None:
    """Take a worker out of Dask's own scheduling at once; it goes on with what it has.

    A message to the worker first would leave a race: until it answers, the scheduler would go on
    placing plain Dask tasks there.
    """
    scheduler.handle_worker_status_change(
        status=Status.closing_gracefully, worker=address, stimulus_id=stimulus_id
    )


def count_threads(scheduler: Scheduler, address: str, threads: int) -> None:
    """Let a worker count as one of so many threads, which it is going to have."""
    worker = scheduler.workers[address]
    scheduler.total_nthreads += threads - worker.nthreads
    worker.nthreads = threads


def strike_off_worker(scheduler: Scheduler, address: str, stimulus_id: str) -> None:
    """Forget a worker that does not go, soon."""
    scheduler.loop.add_callback(scheduler.remove_worker, address, stimulus_id=stimulus_id)


def close_scheduler(scheduler: Scheduler) -> None:
    """Close a scheduler that nobody needs any more, soon; its process ends with it."""
    scheduler.loop.add_callback(scheduler.close)


def keep_awake(scheduler: Scheduler, busy: Callable[[], bool]) -> None:
    """Have a scheduler count as not idle as long as ``busy`` says so, though it has no tasks.

    It would end itself, or be ended by who asks it, such as the Dask operator on Kubernetes: that
    one takes 0 for "not idle", while ``None`` has it set a limit of its own on the scheduler.
    """

    def check_idle() -> float | None:
        if busy():
            scheduler.idle_since = None
            return 0.0
        return type(scheduler).check_idle(scheduler)

    scheduler.check_idle = check_idle  # type: ignore[method-assign]
    scheduler.handlers["check_idle"] = check_idle
    scheduler.periodic_callbacks["idle-timeout"].callback = check_idle  # type: ignore[assignment]


def open_error(exception: object, traceback: object) -> tuple[BaseException, TracebackType | None]:
    """Return the exception and traceback of a task error, wherever it has come from."""
    opened = [_opened(part) for part in (exception, traceback)]
    _, error, trace = clean_exception(*opened)
    if error is None:
        error = RuntimeError("the task failed, but its exception did not arrive")
    return error, trace


def _opened(part: object) -> Any:
    if isinstance(part, Serialized):
        return deserialize(part.header, part.frames)
    if isinstance(part, (Serialize, ToPickle)):
        return part.data
    return part


def make_task(key: str, func: Callable[..., Any], *args: Any) -> Task:
    """Return a task specification whose arguments are taken as they are."""
    return Task(key, func, *args)


async def install_local(scheduler: Scheduler, host: Any, runner: Any, name: str) -> None:
    """Put the pool's plugins on a scheduler in this process, without a copy of the host.

    ``name`` is that of the runner's.
    """
    scheduler.add_plugin(host)
    await host.start(scheduler)
    await scheduler.register_worker_plugin(
        comm=None, plugin=dumps(runner), name=name, idempotent=False
    )


async def install_remote(client: Client, host: Any, runner: Any, name: str) -> None:
    """Put the pool's plugins on a scheduler elsewhere; ``name`` is that of the runner's."""
    await client._register_scheduler_plugin(host, name=host.name, idempotent=False)
    await client._register_worker_plugin(runner, name=name, idempotent=False)


async def uninstall_remote(client: Client, host: Any, runner: Any) -> None:
    """Take the pool's plugins off a scheduler elsewhere that goes on without the pool."""
    await client._unregister_worker_plugin(runner.name)
    await run_on_scheduler(client, _take_host_off, host.name)


async def _take_host_off(name: str, dask_scheduler: Any) -> None:
    await _take_off(dask_scheduler, dask_scheduler.plugins[name])


async def _take_off(scheduler: Scheduler, host: Any) -> None:
    await host.before_close()
    scheduler.remove_plugin(host.name)
    scheduler.stream_handlers.pop(OP, None)
    scheduler.handlers.pop(OP, None)
    scheduler.handlers.pop(ARRIVE, None)
    scheduler.handlers.pop(CODE, None)


async def run_on_scheduler(client: Client, function: Any, *args: Any) -> Any:
    """Run a function in the process of a scheduler elsewhere; on the event loop."""
    return await client._run_on_scheduler(function, *args)


async def uninstall_local(scheduler: Scheduler, host: Any, runner: Any) -> None:
    """Take the pool's plugins off a scheduler that goes on without the pool."""
    if host in scheduler.plugins.values():
        await _take_off(scheduler, host)
        await scheduler.unregister_worker_plugin(comm=None, name=runner.name)


# -- worker --------------------------------------------------------------------------------------


def send_to_scheduler(worker: Worker, message: dict[str, Any]) -> None:
    """Send over a worker's own stream; in order with its completions and status changes."""
    worker.batched_send({"op": OP, **message})


async def ask_for_code(worker: Worker, since: int, stream: int) -> dict[str, Any]:
    """Ask the pool's host for code of the parent; see ``CodeSource.answer``."""
    ask: Any = getattr(worker.scheduler, CODE)
    reply: dict[str, Any] = await ask(address=worker.address, since=since, stream=stream)
    return reply["answer"]  # type: ignore[no-any-return]


def listen_to_scheduler(worker: Worker, handler: Callable[..., None]) -> None:
    """Let ``handler`` take what the pool's host sends to a worker. It must not raise."""
    worker.stream_handlers[OP] = handler


def attach_result(key: str, value: object) -> None:
    """Let a small value travel with the completion of the task that is now running."""
    task = get_worker().state.tasks.get(key)
    if task is not None:  # freed meanwhile: nobody wants the result any more
        task.metadata[RESULT] = value


def has_work(worker: Worker, kind: type, ignored: Container[Any]) -> bool:
    """Tell whether a worker executes tasks, but for the ignored keys, or has results of a kind."""
    state = worker.state
    if any(task.key not in ignored for task in (*state.executing, *state.long_running)):
        return True
    return any(isinstance(value, kind) for value in list(worker.data.values()))


def set_threads(worker: Worker, threads: int) -> None:
    """Let a worker that has just started run so many tasks at the same time."""
    pool: Any = worker.executors["default"]
    if worker.state.nthreads != threads:
        name = "Dask-Default-Threads"
        worker.executors["default"] = ThreadPoolExecutor(threads, thread_name_prefix=name)
        pool.shutdown(wait=False)
        worker.state.nthreads = threads


async def dismiss_nanny(worker: Worker) -> None:
    """Tell a worker's nanny, if it has one, that the worker is about to end for good."""
    address: Any = worker.nanny
    if address:
        async with worker.rpc(address) as nanny:
            await nanny.close_gracefully(reason="the pool has ended its worker")


def is_closing(worker: Worker) -> bool:
    """Tell whether a worker is on its way out."""
    return worker.status in (Status.closing, Status.closed, Status.failed)


def take_over_memory(worker: Worker) -> tuple[int | None, Callable[[], None]]:
    """Let Dask do nothing about a worker's memory.

    It would pause a worker that comes near its limit. Calls would wait on it then, though they
    have a slot, and those that run would not be ended.

    Returns
    -------
    tuple
        The bytes that the worker may use, and a function that gives the matter back to Dask.
    """
    manager: Any = worker.memory_manager
    before = manager.memory_pause_fraction, manager.memory_spill_fraction
    manager.memory_pause_fraction = manager.memory_spill_fraction = False

    def give_back() -> None:
        manager.memory_pause_fraction, manager.memory_spill_fraction = before

    return manager.memory_limit or None, give_back


# -- client --------------------------------------------------------------------------------------


class PooledState(FutureState):
    """The state of a future whose value lives in the parent (B3)."""

    __slots__ = ()

    def load(self) -> Any:
        """Return the value; only when the status is ``finished``."""
        raise NotImplementedError


class PoolClient(Client):
    """A Dask client that also knows the futures of its pool.

    The values of these futures live in the parent, they outlive their runners (B3). So whatever
    asks for such a value is answered here, and the scheduler is not asked for it.

    Attributes
    ----------
    flame_release
        Called on the event loop with a key whose last future has gone, and whether it was done.
    flame_lost
        Called on the event loop when the client has no connection to its scheduler any more, and
        at its own end.
    """

    flame_release: Callable[[str, bool], None] | None = None
    flame_lost: Callable[[], None] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs["set_as_default"] = False
        super().__init__(*args, **kwargs)

    def start(self, **kwargs: Any) -> None:
        """Connect, and be the default client only where there is no other.

        ``distributed.wait`` and ``as_completed`` need one. But where a program has a client of its
        own, that is the one for ``dask.compute``: a pool without runners would never answer.
        """
        super().start(**kwargs)
        if self not in _global_clients.values():
            _global_clients[min(_global_clients, default=0) - 1] = self

    def listen(self, handler: Callable[..., None]) -> None:
        """Let ``handler`` take what the pool's host sends."""
        self._stream_handlers[OP] = handler

    def hasten(self) -> None:
        """Send to the scheduler at once, not in batches of 10 ms."""
        hasten(self.scheduler_comm)

    def tell(self, message: dict[str, Any]) -> None:
        """Send to the pool's host; on the event loop only."""
        self._send_to_scheduler_safe({"op": OP, **message})

    async def ask(self, what: str) -> Any:
        """Put a question to the pool's host."""
        scheduler: Any = self.scheduler
        reply = await scheduler.flame(what=what)
        return reply["answer"]

    def adopt(self, key: str, state: PooledState) -> None:
        """Let the futures of ``key`` have this state."""
        self.futures[key] = state

    def let_go(self, key: str) -> None:
        """Count one future of ``key`` less; on the event loop only."""
        self._dec_ref(key)

    def drop(self, key: str) -> None:
        """Strike a key off, whoever still holds a future of it."""
        self.futures.pop(key, None)

    async def _handle_report(self) -> None:
        await super()._handle_report()
        if self.flame_lost is not None:
            self.flame_lost()

    def close(self, *args: Any, **kwargs: Any) -> Any:
        """Close the client, and the loop's thread also if it has closed by itself before."""
        closing = super().close(*args, **kwargs)
        if not self.asynchronous and self.status == "closed" and not self._is_finalizing():
            self._loop_runner.stop()
        return closing

    async def _close(self, fast: bool = False) -> None:
        if self.flame_lost is not None:  # before futures are released, which reads as a wish
            self.flame_lost()
        await super()._close(fast)

    async def _reconnect(self) -> None:
        # Orders to boot and to stop may have been lost meanwhile, and the host has let go of all
        # calls: there is nothing to come back to.
        await self._close()

    def _release_key(self, key: Any) -> None:
        state = self.futures.get(key)
        if not isinstance(state, PooledState):
            super()._release_key(key)
            return
        del self.futures[key]
        if self.flame_release is not None:
            self.flame_release(key, state.done())

    async def _gather(
        self, futures: Any, errors: str = "raise", direct: Any = None, local_worker: Any = None
    ) -> Any:
        # Dask looks for values in a local worker's data before it asks the cluster: the pool's
        # delivered values take that place.
        return await super()._gather(
            futures, errors=errors, direct=direct, local_worker=local_worker or _Delivered(self)
        )

    async def _gather_remote(self, direct: bool, local_worker: Any) -> dict[str, Any]:
        if not self._gather_keys:
            self._gather_keys = None
            self._gather_future = None
            return {"status": "OK", "data": {}}
        remote = False if isinstance(local_worker, _Delivered) else local_worker
        result: dict[str, Any] = await super()._gather_remote(direct, remote)
        return result

    async def _cancel(self, futures: Any, *args: Any, **kwargs: Any) -> None:
        rest = []
        for future in self.futures_of(futures):
            if isinstance(future._state, PooledState):
                future.terminate()
            else:
                rest.append(future)
        if rest:
            await super()._cancel(rest, *args, **kwargs)

    async def fetch(self, key: str, address: str) -> Any:
        """Fetch a result from the runner that holds it, without the scheduler."""
        reply = await get_data_from_worker(self.rpc, keys=[key], worker=address, who=self.id)
        if reply["status"] != "OK" or key not in reply["data"]:
            raise LookupError(f"{address} does not hold the result of {key}")
        return reply["data"][key]


class _Delivered(Mapping[Any, Any]):
    """The delivered values, as ``Client._gather`` looks for them in a worker's ``data``."""

    def __init__(self, client: PoolClient) -> None:
        self._futures = client.futures
        self.data = self

    def __bool__(self) -> bool:
        return True

    def __contains__(self, key: object) -> bool:
        state = self._futures.get(key)
        return isinstance(state, PooledState) and state.status == "finished"

    def __getitem__(self, key: Any) -> Any:
        return self._futures[key].load()

    def __iter__(self) -> Iterator[Any]:
        return (key for key in list(self._futures) if key in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


# -- cluster -------------------------------------------------------------------------------------


def start_cluster(factory: Callable[..., Any], **options: Any) -> Any:
    """Start a cluster on an event loop in a thread of its own.

    A cluster that does not start leaves the thread of its loop behind, and nothing by which to end
    it. So the loop is made here. It ends with the cluster, which is left as its only user.
    """
    runner = LoopRunner()
    runner.start()
    try:
        cluster = factory(loop=runner.loop, **options)
    except BaseException:
        LoopRunner._all_loops.pop(runner.loop, None)
        runner._real_stop(timeout=10)
        raise
    runner.stop()
    return cluster


def use_loop(cluster: Any) -> None:
    """Let a cluster count as a user of its event loop; nothing happens if it is asynchronous."""
    cluster._loop_runner.start()


def leave_loop(cluster: Any) -> None:
    """End the event loop of a cluster that is closed, unless others use it; in any thread."""
    cluster._loop_runner.stop()


@contextlib.contextmanager
def loop_held(loop: Any) -> Iterator[None]:
    """Keep an event loop running though all others that use it let go of it meanwhile.

    Whoever closes the last client or cluster on a loop of Dask's ends it, and cuts off what others
    are waiting for there.
    """
    runner = None
    with contextlib.suppress(RuntimeError, AssertionError):  # it has ended already
        runner = LoopRunner(loop)
        runner.start()
    try:
        yield
    finally:
        if runner is not None:
            runner.stop()


async def start_member(
    cluster: SpecCluster, name: str, cls: type[ProcessInterface], options: Mapping[str, Any]
) -> ProcessInterface:
    """Start one worker of a cluster, concurrently with others.

    ``SpecCluster._correct_state`` starts workers in rounds under a lock, so that one slow boot
    delays the next. A worker that stands both in the specification and among the started ones is
    left alone by it, yet belongs to the cluster: it is closed with it.
    """
    if cluster.status != Status.running:
        # It would be closed without this one.
        raise RuntimeError(f"the cluster is {cluster.status.name}")
    scheduler: Any = cluster.scheduler
    address = getattr(scheduler, "contact_address", None) or scheduler.address
    member = cls(address, name=name, **options)
    member._cluster = weakref.ref(cluster)  # type: ignore[attr-defined]  # as SpecCluster does
    cluster._created.add(member)
    cluster.worker_spec[name] = {"cls": cls, "options": dict(options)}
    cluster.workers[name] = member
    await member
    return member


async def stop_member(cluster: SpecCluster, name: str) -> None:
    """Close one worker of a cluster and strike it off; nothing happens if it is not there."""
    cluster.worker_spec.pop(name, None)
    member = cluster.workers.get(name)
    if member is not None:
        await member.close()
        cluster.workers.pop(name, None)


async def unregister_worker(cluster: SpecCluster, address: str, stimulus_id: str) -> None:
    """Have the scheduler of a cluster let a worker go, which closes then."""
    comm: Any = cluster.scheduler_comm
    await comm.unregister(address=address, stimulus_id=stimulus_id)


def forget_adaptive(cluster: Any, adaptive: Any) -> None:
    """Leave a cluster without this ``Adaptive``, and without its options for the next one."""
    if not hasattr(cluster, "_adaptive"):  # it has no place for one
        return
    if cluster._adaptive is adaptive:
        adaptive.stop()
        cluster._adaptive = None
        del cluster._adaptive_options

"""What lives on after its call has answered: tracked resources (I) and placed children (H).

The call goes on in its thread or process, and with it its lease: nothing else is needed for its
slot to stay taken, for its runner to stay, and for both to end with the parent. It waits for
orders: to run a function on what it keeps, to let go of something, to stop.
"""

from __future__ import annotations

import inspect
import logging
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flame_dask.payload import Payload, pack_value
from flame_dask.runner import coroutines, here
from flame_dask.runner.channel import Channel, Message
from flame_dask.runner.channel import here as the_channel
from flame_dask.runner.threads import CallRaised, Terms
from flame_dask.tracking import Resource, sending, track_resources

logger = logging.getLogger("flame_dask.runner")

#: What is kept in this process, by the call that keeps it and its number there.
_kept: dict[tuple[str, int], Any] = {}


def kept_value(call: str, index: int) -> Any:
    """Return what is kept: the unpickling of a call calls it that has a ``RemoteObject``.

    Raises
    ------
    LookupError
        If it has been released.
    """
    try:
        return _kept[call, index]
    except KeyError:
        raise LookupError(f"nothing is kept here as number {index} of call {call}") from None


def invoke(obj: Any, method: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call a method of what is kept; awaited, if it is an ``async def``."""
    value = getattr(obj, method)(*args, **kwargs)
    return coroutines.run(value) if inspect.iscoroutine(value) else value


def itself(obj: Any) -> Any:
    """Return what is kept, to be sent."""
    return obj


class Keeper:
    """Keeps things, and serves those who use them.

    Parameters
    ----------
    channel
        The way to the parent.
    terms
        Those of the call that keeps them.
    """

    def __init__(self, channel: Channel, terms: Terms) -> None:
        self._channel = channel
        self._terms = terms
        self._resources: list[Resource] = []
        # Of those that take more than one request at a time. All others are this thread's business.
        self._executors: dict[int, ThreadPoolExecutor] = {}
        self._live: set[int] = set()
        self._lock = threading.Lock()
        # What the call has kept that runs in this thread.
        self._own = threading.local()
        channel.keeper = self
        channel.asked_first = 1.0  # before anybody knows of it, and can have it killed

    def keep(self, value: Any) -> Any:
        """Keep what has to stay of a value; return what is to be sent (I1)."""
        parent = here.parent()
        runner = "" if parent is None else parent.runner
        with self._lock:
            first = len(self._resources)
            try:
                value, _ = track_resources(value, self._resources, runner)
            except BaseException:
                del self._resources[first:]
                raise
            self._take(first)
            self._own.numbers = [*self._numbers(), *range(first, len(self._resources))]
        return value

    def add(self, resource: Resource) -> None:
        """Keep one thing."""
        with self._lock:
            self._resources.append(resource)
            self._take(len(self._resources) - 1)

    def pack(self, value: Any) -> Payload:
        """Pickle what is to be sent, with what stands for the things that are kept."""
        with sending(self._terms.pool, self._terms.call):
            return pack_value(value)

    def held(self) -> list[list[int]]:
        """Tell what the call has kept that runs in this thread.

        Returns
        -------
        list
            Of each the number, whether it ends by itself, and how many calls to it run at the same
            time.
        """
        found = [(number, self._resources[number]) for number in self._numbers()]
        return [
            [number, int(resource.ended is not None), resource.concurrency]
            for number, resource in found
        ]

    def _numbers(self) -> list[int]:
        return getattr(self._own, "numbers", [])

    @property
    def live(self) -> bool:
        """Whether anything is kept."""
        return bool(self._live)

    def _take(self, first: int) -> None:
        for index, resource in list(enumerate(self._resources))[first:]:
            _kept[self._terms.call, index] = resource.value
            self._live.add(index)
            if resource.concurrency > 1:
                self._executors[index] = ThreadPoolExecutor(resource.concurrency, "flame-kept")
            if resource.ended is not None:
                threading.Thread(
                    target=self._watch, args=(index, resource.ended), name="flame-held", daemon=True
                ).start()

    def serve(self) -> str:
        """Carry out orders until nothing is kept any more; return what has ended it.

        Returns
        -------
        str
            ``released``, ``stop`` or ``give up``.
        """
        try:
            while self._live:
                order = self._channel.get()
                assert order is not None, "it waits without a limit"
                kind = order["kind"]
                if kind == "request":
                    self._request(order)
                elif kind == "release":
                    self._release(order["index"])
                elif kind in ("stop", "give up"):
                    return str(kind)
            return "released"
        finally:
            self.close()

    def close(self) -> None:
        """Let go of everything, when what is under way is over."""
        try:
            for executor in self._executors.values():
                executor.shutdown(cancel_futures=True)
        finally:
            for index in list(self._live):
                self._release(index)

    def _watch(self, index: int, ended: Callable[[], object]) -> None:
        try:
            ended()
        except Exception:  # a thread that was never started, say
            logger.warning("call %s: what it keeps can't be waited for", self._terms.call)
        finally:
            self._channel.put({"kind": "release", "index": index})

    def _release(self, index: int) -> None:
        with self._lock:
            self._live.discard(index)
            _kept.pop((self._terms.call, index), None)
            if index < len(self._resources):
                # The list keeps its length: the numbers are positions in it.
                self._resources[index] = self._resources[index]._replace(value=None)

    def _request(self, order: Message) -> None:
        executor = self._executors.get(order["index"])
        if executor is None:
            self._answer(order)
        else:
            executor.submit(self._answer, order)

    def _answer(self, order: Message) -> None:
        no, inputs = order["no"], order.get("inputs")
        self._own.numbers = []
        terms = self._terms._replace(
            call=f"{self._terms.call}/{no}",
            task=f"{self._terms.task}/{no}",
            inline_limit=sys.maxsize,
            limit=order["limit"],
            asynchronous=order["asynchronous"],
            mode="more" if order["track"] else "",
        )
        payload = Payload.from_parts(order["payload"])
        given = inputs and {key: Payload.from_parts(parts) for key, parts in inputs.items()}
        try:
            with sending(self._terms.pool, self._terms.call):
                result = self._channel.run(payload, given or None, terms)
        except CallRaised as error:
            for number in self._numbers():  # the result can't be sent
                self._release(number)
            self._channel.tell("answer", no=no, failure=error.payload.parts())
        else:
            # Without one it was ended: its caller has an answer, or takes that for one.
            parts = None if result is None else result.parts()
            self._channel.tell("answer", no=no, result=parts, held=self.held())
        self._channel.over(no)


def run_tracked(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], terms: Terms
) -> Any:
    """Call a function, and keep what has to stay of its result (I1).

    Returns
    -------
    Any
        The result, if nothing has to stay; nothing if it has been sent already, and all is over.
    """
    channel = the_channel()
    value = _called(fn, args, kwargs)
    keeper = Keeper(channel, terms)
    try:
        value = keeper.keep(value)
        if not keeper.live:
            return value
        result = keeper.pack(value)
        del value
        announce(channel, result, keeper.held())
        del result
        keeper.serve()
    finally:
        keeper.close()  # the result may be one that can't be sent
    return None


def run_more(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], terms: Terms
) -> Any:
    """Call a function for a call that keeps things, which keeps those in the result, too."""
    keeper: Keeper = the_channel().keeper
    return keeper.keep(_called(fn, args, kwargs))


def _called(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    value = fn(*args, **kwargs)
    return coroutines.run(value) if inspect.iscoroutine(value) else value


def announce(channel: Channel, result: Payload, held: list[list[int]]) -> None:
    """Give the parent its answer, though the call goes on.

    Parameters
    ----------
    channel
        The way to the parent.
    result
        The answer.
    held
        What is kept, as :meth:`Keeper.held` tells it.
    """
    channel.tell("kept", result=result.parts(), held=held, process=here.process())

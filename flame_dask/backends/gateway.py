"""Runners of a Dask Gateway, for ``GatewayCluster``.

A gateway starts a scheduler of its own for the cluster, and workers by their number alone: it is
told how many there are to be, and chooses their names. So the pool's host takes each worker that
comes for the runner that has been awaited longest, and has a runner that is to stop end itself.
What is left for this side is the number. It is lowered when a runner is gone, never before: the
gateway would stop any worker that is still on its way instead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from flame_dask.backends.base import Ending
from flame_dask.backends.vendor import check
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

logger = logging.getLogger("flame_dask")

#: Rules that are kept in part only; docs/backends/gateway.md says of each what differs.
IN_PART: Final = ("A6", "C1", "C2", "C6", "E5", "F2", "G3")

#: Seconds for the gateway to answer, and to end a cluster.
ANSWER_LIMIT: Final = 10.0
END_LIMIT: Final = 60.0

#: Seconds between two looks whether it has, and between two attempts to tell it to.
_LOOK_PAUSE: Final = 0.1
_TELL_PAUSE: Final = 1.0

#: Options of ``GatewayCluster`` that the pool decides about, and what to give instead.
_OURS: Final = {
    "asynchronous": "give it to the pool",
    "loop": "leave it out: the pool has one",
    "shutdown_on_close": "leave it out, or give a running cluster, which is left open",
}

#: Options of a pool that a gateway leaves no room for, and why.
_NOT_HERE: Final = {
    "security": "leave it out: a gateway makes the certificates of its clusters",
    "host": "leave it out: the scheduler is the gateway's, where the gateway puts it",
    "contact_address": "leave it out: runners are told by the gateway where the scheduler is",
}


class GatewayBackend:
    """Runners on a cluster of Dask Gateway.

    Parameters
    ----------
    options
        The pool's options.
    cluster
        ``dask_gateway.GatewayCluster``, or one that runs and has no workers; it is left open then.
    given
        Options for the class: ``address``, ``auth``, ``cluster_options`` and so on.
    """

    #: The workers' names are not the pool's.
    adopts = True

    def __init__(self, options: PoolOptions, cluster: Any, given: Mapping[str, Any]) -> None:
        self.given = not isinstance(cluster, type)
        self.cluster: Any = cluster if self.given else None
        self._factory = None if self.given else cluster
        self._options = dict(given)
        self._pool = options.name
        # The runners that there are to be, those that the gateway has been asked for, and the last
        # number that it has been told; `None` if it may have another one.
        self._wanted: set[str] = set()
        self._ordered: set[str] = set()
        self._count: int | None = 0
        self._lock = asyncio.Lock()
        self._closing = False
        self._out_of_reach = False  # while it is closing
        for option, remedy in _NOT_HERE.items():
            value = getattr(options, option)
            if value is not None:
                raise PoolOptionsError(option, value, remedy, problem="is the gateway's to set")
        if options.scheduler == "parent":
            remedy = "give 'remote', or leave it out: workers of a gateway connect to its scheduler"
            raise PoolOptionsError("scheduler", "parent", remedy, problem="can't be had")
        check("GatewayCluster", self._options, _OURS)
        if self.given:
            self._check_running(options)

    def _check_running(self, options: PoolOptions) -> None:
        cluster = self.cluster
        problem = remedy = ""
        if self._options:
            problem = "runs already and takes no options"
            remedy = "give the class with options, or the running cluster alone"
        elif cluster.asynchronous != options.asynchronous:
            problem = f"is {'' if cluster.asynchronous else 'not '}asynchronous, unlike the pool"
            remedy = "make both asynchronous, or none of them"
        elif cluster.status != "running":
            problem, remedy = f"is {cluster.status}", "give one that runs, or the class"
        elif cluster.scheduler_info.get("workers"):
            problem = "has workers already"
            remedy = "scale it to 0: a pool starts all its workers itself"
        if problem:
            raise PoolOptionsError("backend", cluster, remedy, problem=problem)

    def open(self, *, asynchronous: bool) -> Any:
        """Return the cluster."""
        logger.warning(
            "pool %s: on Dask Gateway rules %s hold in part only: it does not say what becomes of "
            "a worker (see docs/backends/gateway.md)",
            self._pool,
            ", ".join(IN_PART),
        )
        if self._factory is not None:
            self.cluster = self._factory(asynchronous=asynchronous, **self._options)
            # It would be closed before the pool at the interpreter's exit.
            self._factory._instances.discard(self.cluster)
        return self.cluster

    async def boot(self, runner: str) -> None:
        """Ask for one more worker."""
        self._wanted.add(runner)
        async with self._lock:
            await asyncio.sleep(0)  # others that boot at this moment are part of this order
            try:
                await self._order(set(self._wanted))
            except _RefusedError:
                # For this one there is no room. The next order is without it: others may fit in.
                self._wanted.discard(runner)
                raise

    async def watch(self, runner: str) -> Ending:
        """Wait for ever: the scheduler sees a runner go, the gateway tells nobody."""
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async def stop(self, runner: str, *, force: bool = False) -> Ending:
        """Ask for one worker less: this one is gone, or has not come."""
        self._wanted.discard(runner)
        async with self._lock:
            if self.cluster.status in ("closing", "closed") or self._out_of_reach:
                return Ending()
            try:
                # Without those that are still to be ordered: the gateway starts at once what it is
                # told to, but takes its time to replace a worker that has gone.
                await self._order(self._ordered & self._wanted)
            except Exception as error:
                if await self._has_ended(self.cluster):
                    return Ending()
                if not self._closing:
                    raise
                self._give_up(error)
        return Ending()

    def closing(self) -> None:
        """Take note that the pool ends: all that is still to be done can be done by `close`."""
        self._closing = True

    def _give_up(self, error: Exception) -> None:
        """Order no more: the gateway is out of reach, and the pool must come to its end (A6)."""
        self._out_of_reach = True
        if self.given:  # nobody is going to end it
            logger.error(
                "pool %s: cluster %s may go on to start workers, its gateway is out of reach (%s): "
                "scale it to 0",
                self._pool,
                self.cluster.name,
                _text(error),
            )

    async def _order(self, runners: set[str]) -> None:
        """Tell the gateway how many workers there are to be, unless it knows."""
        count = len(runners)
        if count != self._count:
            self._count = None
            gateway = self.cluster.gateway
            # Not by `scale`: that waits, if the cluster is not asynchronous, for this very loop;
            # and makes a warning of it when the server allows for fewer workers.
            url = f"{gateway.address}/api/v1/clusters/{self.cluster.name}/scale"
            async with asyncio.timeout(ANSWER_LIMIT):
                response = await gateway._request("POST", url, json={"count": count})
                told = response.content_type == "application/json"
                said = await response.json() if told else {}
            if not said.get("ok", True):
                raise _RefusedError(said.get("msg") or f"the gateway gives no {count} workers")
            self._count = count
        self._ordered = runners

    async def _has_ended(self, cluster: Any) -> bool:
        """Say whether the gateway has ended a cluster, and all its workers; not if it is silent."""
        try:
            async with asyncio.timeout(ANSWER_LIMIT):
                report = await cluster.gateway._cluster_report(cluster.name)
        except ValueError:  # it does not even know it any more
            return True
        except Exception:
            return False
        return report.status.name in ("STOPPED", "FAILED")

    def close(self, cluster: Any) -> Any:
        """End the cluster, unless it was there before the pool; awaitable if it is asynchronous."""
        if self.given:
            return None
        if cluster.asynchronous:
            return self._close(cluster)
        if cluster.status != "closed":
            cluster.gateway.sync(self._end, cluster)
            cluster.close(shutdown=False)
            # When it is collected it would look for its event loop, and complain on stderr that it
            # is gone.
            del cluster.gateway._loop_runner
        return None

    async def _close(self, cluster: Any) -> None:
        await self._end(cluster)
        await cluster.close(shutdown=False)

    async def _end(self, cluster: Any) -> None:
        """Have the gateway end a cluster, and wait until nothing of it is left (A6)."""
        if cluster.name is None:  # it has never been there
            return
        problem = "it does not answer"
        with suppress(TimeoutError):
            async with asyncio.timeout(END_LIMIT):
                # A gateway that is just starting anew may be there again in time.
                while True:
                    try:
                        await cluster.gateway._stop_cluster(cluster.name)
                        break
                    except ValueError:  # it does not even know it any more
                        return
                    except Exception as error:
                        problem = _text(error)
                    await asyncio.sleep(_TELL_PAUSE)
                problem = "it is about to"
                while not await self._has_ended(cluster):
                    await asyncio.sleep(_LOOK_PAUSE)
                return
        logger.error(
            "pool %s: cluster %s may go on: its gateway %s has not ended it within %g s (%s). Have "
            "it stopped there",
            self._pool,
            cluster.name,
            cluster.gateway.address,
            END_LIMIT,
            problem,
        )


class _RefusedError(RuntimeError):
    """The gateway allows for fewer workers; it has as many as it allows for now."""


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__  # a time limit that was passed has no text

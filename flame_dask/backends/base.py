"""What a pool needs of a place where runners live."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

Loss = Literal["exited", "signal", "oom", "preempted"]


class Ending(NamedTuple):
    """How a runner ended, or why it could not be started."""

    phase: str = "setup"
    """``start`` if the backend refused it, ``setup`` if its process ended."""
    cause: object = "its process ended"
    exit_code: int | None = None
    """Negative for a signal, ``None`` if it isn't known."""
    log_tail: tuple[str, ...] = ()
    loss: Loss | None = None
    """What it died of (F2); ``None`` if that isn't known, or if the pool itself ended it."""


@runtime_checkable
class Backend(Protocol):
    """Starts and stops the runners of one pool on a Dask cluster.

    ``open`` and ``close`` run where the pool is opened and closed, the others on the cluster's
    event loop.

    Some attributes are optional:

    - ``kind``: what the cluster's class is called in what runners are told of their parent (A7);
      the class's own name if there is none.
    - ``patience``: the seconds that ``watch`` and ``stop`` may take to tell of an end that the
      scheduler has seen already; 1 if there is none.
    - ``bare``: whether workers come without what makes runners of them
      (:mod:`flame_dask.runner.newcomer` does it then).
    - ``adopts``: whether they choose their own names, too (:mod:`flame_dask.scheduler.adoption`).
    - ``keep_awake``: whether somebody ends the scheduler when it has nothing to do, and must not
      while the pool is open.
    - ``closing``: a method that is called when the pool comes to its end, for a backend that can
      also end runners all at once, in ``close``, so that ``stop`` need not go on trying.
    - ``configured``: a method that takes the options of the pool when some have changed (C8), for a
      backend that tells its runners of any.
    """

    def open(self, *, asynchronous: bool) -> Any:
        """Return a Dask cluster without workers; it is started if it is not asynchronous."""

    async def boot(self, runner: str) -> None:
        """Start one Dask worker whose name is ``runner``. Returns when it is on its way."""

    async def watch(self, runner: str) -> Ending:
        """Wait until the worker ends by itself."""

    async def stop(self, runner: str, *, force: bool = False) -> Ending:
        """Take the worker down, whatever it is doing; say how it had ended, if it had already.

        Returns when nothing of it is left that could cost money. It can be called again, and for
        a runner that is gone. With ``force`` there is work on it that can't be ended otherwise:
        asking it to end would only take time.
        """

    def close(self, cluster: Any) -> Any:
        """Close the cluster, unless it was there before the pool; awaitable if it is."""

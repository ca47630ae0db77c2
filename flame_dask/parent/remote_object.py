"""What the parent has of a thing that lives on a runner (I2, I3)."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from flame_dask import tracking
from flame_dask.errors import PoolClosed, PoolNotFound, SerializationError
from flame_dask.parent import registry
from flame_dask.parent.futures import collected
from flame_dask.parent.kept import Hold
from flame_dask.parent.methods import HasMethods
from flame_dask.runner.keeper import itself, kept_value

if TYPE_CHECKING:
    from flame_dask.parent.pool import FlamePool


class RemoteObject(HasMethods):
    """Something that a call has left on its runner.

    It is made by :func:`flame_dask.keep`, or a :class:`~flame_dask.Trackable`, in the result of a
    call with ``track_resources=True``. The runner keeps it, and with it the call's lease, until it
    is released: by :meth:`release`, at the end of a ``with`` block, when the last reference to it
    goes, or with the pool. Processes and threads are held until they end, even if nobody refers to
    them.

    As an argument of a call it sends the call to its runner, where the function gets the object
    itself. That call needs no slot, and takes turns with the other calls to the same object.

    Examples
    --------
    >>> model = pool.call(load, path, track_resources=True)  # doctest: +SKIP
    >>> model.call("predict", rows)  # doctest: +SKIP
    >>> pool.call(evaluate, model, more_rows)  # doctest: +SKIP
    >>> model.release()  # doctest: +SKIP
    """

    __slots__ = ("__weakref__", "_hold", "_kind", "_pool")

    def __init__(self, pool: FlamePool | str, hold: Hold | None, kind: str) -> None:
        self._pool = pool
        self._hold = hold
        self._kind = kind

    def _bound(self, method: str) -> tuple[FlamePool, Self]:
        pool, _ = self._there()
        return pool, self

    def get(self, **reserved: Any) -> Any:
        """Return a copy of the object itself.

        Parameters
        ----------
        reserved
            Reserved keywords of a call, such as ``timeout``.

        Raises
        ------
        SerializationError
            It can't be pickled.
        RunnerLost
            The runner is gone, and the object with it.
        ValueError
            It has been released.

        Examples
        --------
        >>> settings.get()  # doctest: +SKIP
        {'depth': 3}
        """
        pool, _ = self._there()
        return pool.call(itself, self, **{"track_resources": False, **reserved})

    def release(self) -> None:
        """Let it go: the runner need not keep it any more. It may be called again.

        Examples
        --------
        >>> model.release()  # doctest: +SKIP
        """
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.kept.release(hold.index)

    @property
    def runner(self) -> str:
        """The id of the runner that it lives on."""
        return self._there()[1].kept.runner

    @property
    def alive(self) -> bool:
        """Whether it is still there, as far as is known."""
        return self._hold is not None and not self._hold.kept.life.done()

    def _there(self) -> tuple[FlamePool, Hold]:
        if isinstance(self._pool, str):
            raise PoolClosed(self._pool)
        if self._hold is None:
            raise ValueError(f"this {self._kind} on a runner has been released")
        return self._pool, self._hold

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.release()

    def __reduce__(self) -> Any:
        found = collected()
        if found is None:
            raise TypeError(
                f"a {self._kind} on a runner can't be pickled: give it to a call of its own pool, "
                "or get() it"
            )
        if self._hold is None and not isinstance(self._pool, str):
            raise SerializationError(f"a {self._kind} on a runner", "it has been released")
        _, hold = self._there()
        found.kept.append((hold.kept, hold.index))
        return kept_value, (hold.kept.key, hold.index)

    def __repr__(self) -> str:
        if self._hold is None:
            return f"<RemoteObject: {self._kind}, released>"
        kept = self._hold.kept
        state = "gone" if kept.life.done() else f"on {kept.runner}"
        return f"<RemoteObject: {self._kind}, {state}>"


def _resolve(pool: str, call: str, index: int, held: bool, kind: str) -> RemoteObject:
    """Make one of what has come with a result."""
    try:
        there = registry.get_pool(pool)
        kept = there._desk.ever_kept.get(call)
    except PoolNotFound:
        return RemoteObject(pool, None, kind)  # it is closed by now
    if kept is None:
        return RemoteObject(there, None, kind)
    return RemoteObject(there, kept.hold(index, lasting=held), kind)


tracking.resolver = _resolve

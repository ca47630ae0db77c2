"""Calls to the methods of what lives on a runner: a child (H2), or what was kept (I2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flame_dask.options import split_reserved
from flame_dask.parent.futures import PoolFuture
from flame_dask.runner.keeper import invoke

if TYPE_CHECKING:
    from flame_dask.parent.pool import FlamePool


class HasMethods:
    """Something on a runner whose methods can be called."""

    __slots__ = ()

    def _bound(self, method: str) -> tuple[FlamePool, object]:
        """Return the pool, and what stands for the object among the arguments of a call."""
        raise NotImplementedError

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Call one of its methods, and return what that returns.

        Parameters
        ----------
        method
            The method's name.
        args, kwargs
            As for :meth:`FlamePool.call`, reserved keywords included. The limit of time for running
            counts from the moment at which its turn comes.

        Returns
        -------
        The method's value; an awaitable of it if the pool is asynchronous.

        Raises
        ------
        BaseException
            What the method raised; the object lives on.
        CallTimeout
            It took too long, or its turn did not come in time.
        RunnerLost
            The runner is gone, or the object's own process, and the object with it.
        CallCancelled
            The object has ended.
        TypeError
            It is a child that is a function: it has no methods.
        ValueError
            It was kept by its runner, and has been released.

        Examples
        --------
        >>> child.call("add", 5, timeout="10s")  # doctest: +SKIP
        """
        pool, bound = self._bound(method)
        own, reserved = split_reserved(kwargs)
        return pool.call(invoke, bound, method, args, own, **reserved)

    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> PoolFuture[Any]:
        """Call one of its methods, and return a future at once.

        Parameters, and what the future raises, are those of :meth:`call`.

        Examples
        --------
        >>> future = model.submit("predict", rows)  # doctest: +SKIP
        """
        pool, bound = self._bound(method)
        own, reserved = split_reserved(kwargs)
        return pool.submit(invoke, bound, method, args, own, **reserved)

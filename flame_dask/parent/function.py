"""Functions whose home is a pool (B4)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flame_dask.parent.futures import PoolFuture
    from flame_dask.parent.pool import FlamePool


class PoolFunction:
    """A function that runs on a pool when it is called. Made by :meth:`FlamePool.function`.

    Attributes
    ----------
    local
        The function itself: calling it runs it here.
    """

    def __init__(self, pool: FlamePool, fn: Callable[..., Any], reserved: dict[str, Any]) -> None:
        functools.update_wrapper(self, fn)
        self.local = fn
        self._pool = pool
        self._reserved = reserved

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the function on the pool, as :meth:`FlamePool.call` does."""
        return self._pool.call(self.local, *args, **{**self._reserved, **kwargs})

    def submit(self, *args: Any, **kwargs: Any) -> PoolFuture[Any]:
        """Start a call, as :meth:`FlamePool.submit` does."""
        return self._pool.submit(self.local, *args, **{**self._reserved, **kwargs})

    def map(self, *iterables: Any, **kwargs: Any) -> Any:
        """Call the function for each item, as :meth:`FlamePool.map` does."""
        return self._pool.map(self.local, *iterables, **{**self._reserved, **kwargs})

    def cast(self, *args: Any, **kwargs: Any) -> None:
        """Run the function without a result, as :meth:`FlamePool.cast` does."""
        self._pool.cast(self.local, *args, **{**self._reserved, **kwargs})

    def __reduce__(self) -> tuple[Any, ...]:
        # On a runner it is the plain function: a pool can't travel.
        return _itself, (self.local,)


def _itself(fn: Callable[..., Any]) -> Callable[..., Any]:
    return fn

"""The open pools of this process, by name (A4)."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flame_dask.errors import PoolNotFound, PoolOptionsError

if TYPE_CHECKING:
    from flame_dask.parent.life import PoolLife
    from flame_dask.parent.pool import FlamePool

_lock = threading.Lock()
_pools: dict[str, Any] = {}
_restarting: set[str] = set()


def register(pool: PoolLife) -> None:
    """Take the name for a pool that is about to open.

    Raises
    ------
    PoolOptionsError
        If another open pool has it.
    """
    with _lock:
        if pool.name in _pools:
            raise PoolOptionsError(
                "name", pool.name, "close that pool first, or take another name",
                problem="is the name of an open pool",
            )  # fmt: skip
        _pools[pool.name] = pool


def unregister(pool: PoolLife) -> None:
    """Free the name of a pool that has closed."""
    with _lock:
        if _pools.get(pool.name) is pool:
            del _pools[pool.name]


def set_restarting(name: str, restarting: bool) -> None:
    """Say whether a supervisor is restarting the pool of this name: it can't be found meanwhile."""
    with _lock:
        (_restarting.add if restarting else _restarting.discard)(name)


def is_restarting(name: str) -> bool:
    """Say whether a supervisor is restarting the pool of this name."""
    return name in _restarting


def get_pool(name: str) -> FlamePool:
    """Return the open pool of this name.

    Parameters
    ----------
    name
        The pool's name.

    Raises
    ------
    PoolNotFound
        If no open pool has it. While a supervisor restarts the pool, the error's ``restarting`` is
        true.

    Examples
    --------
    >>> get_pool("web")  # doctest: +SKIP
    <FlamePool 'web': 1 of 0..4 runners>
    """
    with _lock:
        restarting = name in _restarting
        pool = _pools.get(name)
        if pool is None or restarting:
            raise PoolNotFound(name, _pools.keys() - _restarting, restarting=restarting)
        found: FlamePool = pool
        return found


def call(name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Run ``fn`` on the pool of this name, as :meth:`FlamePool.call` does.

    Raises
    ------
    PoolNotFound
        If no open pool has the name.
    """
    return get_pool(name).call(fn, *args, **kwargs)


def cast(name: str, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
    """Run ``fn`` on the pool of this name without a result, as :meth:`FlamePool.cast` does.

    Raises
    ------
    PoolNotFound
        If no open pool has the name.
    """
    get_pool(name).cast(fn, *args, **kwargs)


def place_child(name: str, spec: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Start something long-lived on the pool of this name, as :meth:`FlamePool.place_child` does.

    Raises
    ------
    PoolNotFound
        If no open pool has the name.
    """
    return get_pool(name).place_child(spec, *args, **kwargs)


@atexit.register  # after distributed's own, which close clusters, so it runs before them
def _close_all() -> None:
    for pool in list(_pools.values()):
        pool.close_at_exit()

"""Placed children, on the parent's side (H)."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from dask.utils import funcname

from flame_dask.child_spec import ChildSpec, is_object
from flame_dask.errors import SerializationError
from flame_dask.parent.futures import collected
from flame_dask.parent.kept import Kept
from flame_dask.parent.methods import HasMethods
from flame_dask.runner.keeper import kept_value

if TYPE_CHECKING:
    from flame_dask.parent.pool import FlamePool


class Child(HasMethods):
    """Something long-lived on a runner; :meth:`FlamePool.place_child` starts it.

    Its methods are called as if they were its own: ``child.add(3)`` is ``child.call("add", 3)``.
    They run one at a time, in the order in which they were called, unless its class says otherwise
    by an attribute ``__flame_concurrency__``: the number of them that may run at the same time.

    A linked child ends with the last reference to this object, and with the pool.

    Examples
    --------
    >>> child = pool.place_child(Counter, 10)  # doctest: +SKIP
    >>> child.add(5)  # doctest: +SKIP
    15
    >>> child.stop()  # doctest: +SKIP
    """

    def __init__(self, pool: FlamePool, spec: Any, kept: Kept, *, owns: bool = True) -> None:
        self._pool = pool
        self._spec = spec
        self._kept = kept
        if owns and kept.link:
            weakref.finalize(self, kept.stop, pool.options.shutdown_timeout).atexit = False

    # -- its methods ---------------------------------------------------------------------------

    def _bound(self, method: str) -> tuple[FlamePool, _Itself]:
        if not is_object(self._spec):
            raise TypeError(f"{self!r} is a function: it has no method {method!r}")
        return self._pool, _Itself(self._kept)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return partial(self.call, name)

    # -- its life ------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether it lives, as far as is known."""
        return not self._kept.life.done()

    @property
    def runner(self) -> str:
        """The id of the runner that it lives on."""
        return self._kept.runner

    def wait(self, timeout: float | None = None) -> Any:
        """Wait for its end, whatever that is.

        Parameters
        ----------
        timeout
            Seconds to wait; ``None`` is no limit.

        Returns
        -------
        bool
            Whether it has ended; an awaitable of that if the pool is asynchronous.

        Examples
        --------
        >>> child.wait(10)  # doctest: +SKIP
        False
        """
        if self._pool.asynchronous:
            return self._wait(timeout)
        return self._kept.life.join(timeout)

    async def _wait(self, timeout: float | None) -> bool:
        try:
            await self._kept.life.wait(timeout)
        except TimeoutError:
            return False
        return True

    def result(self, timeout: float | None = None) -> Any:
        """Wait for its end, and return what it has come to.

        Parameters
        ----------
        timeout
            Seconds to wait; ``None`` is no limit.

        Returns
        -------
        What its function has returned; the exit code, if it is a process; ``None`` for any other
        object. An awaitable of it if the pool is asynchronous.

        Raises
        ------
        TimeoutError
            It has not ended in time.
        RunnerLost
            It was killed, or its runner was.
        CallCancelled
            It was ended by :meth:`kill`.
        BaseException
            What its function has raised, or its ``stop``.

        Examples
        --------
        >>> child.result(60)  # doctest: +SKIP
        """
        return self._at_end(timeout, self._kept.life.load)

    def exception(self, timeout: float | None = None) -> Any:
        """Wait for its end, and return what :meth:`result` would raise; ``None`` is nothing.

        Examples
        --------
        >>> child.exception(60)  # doctest: +SKIP
        """
        return self._at_end(timeout, lambda: self._kept.life.exception)

    def _at_end(self, timeout: float | None, come_to: Callable[[], Any]) -> Any:
        """Wait for its end, and return what it has come to, as :meth:`result` says."""

        def outcome(ended: bool) -> Any:
            if not ended:
                raise TimeoutError(f"{self!r} has not ended after {timeout} s")
            return come_to()

        async def awaited() -> Any:
            return outcome(await self._wait(timeout))

        return awaited() if self._pool.asynchronous else outcome(self.wait(timeout))

    def stop(self, timeout: float | None = None) -> Any:
        """End it decently: by its own ``stop``, ``close`` or ``__exit__``, after what it has to do.

        What is not over in time is ended like a call that is out of time. A function is ended like
        that at once.

        Parameters
        ----------
        timeout
            Seconds to wait for its own end; ``None`` is the pool's ``shutdown_timeout``.

        Returns
        -------
        None, or an awaitable if the pool is asynchronous. It has ended then; what had to be ended
        may take as long as a call that is out of time.

        Examples
        --------
        >>> child.stop(5)  # doctest: +SKIP
        """
        limit = self._pool.options.shutdown_timeout if timeout is None else timeout
        self._kept.stop(limit)
        if self._pool.asynchronous:
            return self._stopped()
        self.wait()
        return None

    async def _stopped(self) -> None:
        await self._wait(None)

    def kill(self) -> None:
        """End it at once, without its ``stop``; it is not waited for.

        Examples
        --------
        >>> child.kill()  # doctest: +SKIP
        """
        self._kept.kill()

    def on_exit(self, callback: Callable[[Child], object]) -> None:
        """Have a function called with this child when it has ended; at once, if it has.

        Parameters
        ----------
        callback
            Called once, in a thread of the parent. An exception in it is logged.

        Examples
        --------
        >>> child.on_exit(lambda child: print("gone:", child.exception()))  # doctest: +SKIP
        """
        # Not this one, whose last reference ends it.
        child = Child(self._pool, self._spec, self._kept, owns=False)
        self._kept.life.when_done(partial(self._pool._hooks.fire, callback, child))

    def __reduce__(self) -> Any:
        if collected() is None:
            raise TypeError(f"{self!r} can't be pickled: it may be an argument of a call")
        if not is_object(self._spec):
            raise SerializationError(repr(self), "it is a function that runs, not an object")
        return _Itself(self._kept).__reduce__()

    def __repr__(self) -> str:
        name = self._spec.id if isinstance(self._spec, ChildSpec) else funcname(self._spec)
        state = f"on {self.runner}" if self.alive else "ended"
        return f"<Child {name}: {state}>"


class _Itself:
    """Stands for a child among the arguments of a call, without being a reference to it."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    def __reduce__(self) -> Any:
        found = collected()
        assert found is not None, "it is pickled in a call only"
        found.kept.append((self._kept, 0))
        return kept_value, (self._kept.key, 0)

"""What can be placed on a runner, and how it is stopped (H1, H2)."""

from __future__ import annotations

import inspect
import multiprocessing.process
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

#: The methods by which a child is stopped, the first of them that it has.
_STOPS: Final = ("stop", "close", "__exit__")


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """Says how to start something long-lived on a runner, and how to stop it.

    Parameters
    ----------
    start
        Called on the runner; what it returns is the child. It may be an ``async def``.
    args, kwargs
        Its arguments. Those that :meth:`FlamePool.place_child` is given come after and over these.
    stop
        Called with the child to stop it, or the name of one of its methods. Left out: its
        ``stop``, ``close`` or ``__exit__``, the first of them that it has; a process is sent
        SIGTERM.
    id
        A name for it, in logs and ``repr``.

    Raises
    ------
    TypeError
        If ``start`` or ``stop`` can't be called.

    Examples
    --------
    >>> import subprocess
    >>> spec = ChildSpec(start=subprocess.Popen, args=(["sleep", "60"],), stop="terminate")
    >>> spec.id
    'Popen'
    """

    start: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    stop: Callable[[Any], object] | str | None = None
    id: str = ""

    def __post_init__(self) -> None:
        if not callable(self.start):
            raise TypeError(f"start={self.start!r} can't be called: give a class or a function")
        if self.stop is not None and not isinstance(self.stop, str) and not callable(self.stop):
            raise TypeError(f"stop={self.stop!r}: give a function of the child, or a method's name")
        if not self.id:
            name = getattr(self.start, "__name__", type(self.start).__name__)
            object.__setattr__(self, "id", name)


def is_object(spec: Any) -> bool:
    """Tell whether a child is an object that has methods; a function is no more than its run."""
    return isinstance(spec, ChildSpec) or inspect.isclass(spec)


def is_process(child: Any) -> bool:
    """Tell whether a child is a process."""
    return isinstance(child, subprocess.Popen | multiprocessing.process.BaseProcess)


def stopper_of(spec: Any, child: Any) -> Callable[[], object] | None:
    """Return what stops a child; ``None`` if there is no such thing, and it is just let go of.

    Raises
    ------
    AttributeError
        If it has no method of the name that its spec says.
    """
    given = spec.stop if isinstance(spec, ChildSpec) else None
    if isinstance(given, str):
        method: Callable[[], object] = getattr(child, given)
        return method
    if given is not None:
        return lambda: given(child)
    if is_process(child):
        # Its own `close` and `__exit__` are for one that has ended.
        method = child.terminate
        return method
    for name in _STOPS:
        method = getattr(child, name, None)  # type: ignore[assignment]
        if callable(method):
            return (lambda: child.__exit__(None, None, None)) if name == "__exit__" else method
    return None

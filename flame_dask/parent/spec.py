"""What a pool is going to be, before it is one (K1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flame_dask.backends.resolve import resolve
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

if TYPE_CHECKING:
    from flame_dask.parent.pool import FlamePool


@dataclass(frozen=True, slots=True, repr=False)
class PoolSpec:
    """Describes a pool that a :class:`Supervisor` is to start; made by ``FlamePool.child_spec``.

    Attributes
    ----------
    cls
        The class of the pool.
    options
        Its options, checked and complete: what it gets, however often it is started. What Dask's
        configuration says later does not change them.

    Examples
    --------
    >>> from flame_dask import FlamePool
    >>> spec = FlamePool.child_spec("web", max=4)
    >>> spec.name, spec.options.max
    ('web', 4)
    """

    cls: type[FlamePool]
    options: PoolOptions

    @classmethod
    def check(cls, pool: type[FlamePool], name: str, given: Mapping[str, Any]) -> PoolSpec:
        """Check all that can be checked of a pool without starting it.

        Raises
        ------
        PoolOptionsError
            As for :class:`FlamePool`.
        """
        options = PoolOptions.check(name, **given)
        resolve(options)  # each start of the pool has a backend of its own: this one is not kept
        return cls(pool, options)

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.options.name

    def make(self) -> FlamePool:
        """Make the pool, which takes its name. It is not open yet.

        Raises
        ------
        PoolOptionsError
            The name is that of an open pool.
        """
        pool = self.cls.__new__(self.cls)
        pool._prepare(self.options)
        return pool

    def __repr__(self) -> str:
        o = self.options  # which shows no secret; but most of it is of no interest here
        return (
            f"<{type(self).__name__} {self.name!r}: {self.cls.__name__}, {o.min}..{o.max} runners>"
        )


def by_name(specs: Iterable[PoolSpec], asynchronous: bool) -> dict[str, PoolSpec]:
    """Return descriptions of pools by their names, if one supervisor can have them all.

    Raises
    ------
    PoolOptionsError
        One is no description, has the name of another one, or is asynchronous where the supervisor
        is not, or the other way round.
    """
    found: dict[str, PoolSpec] = {}
    for spec in specs:
        if not isinstance(spec, PoolSpec):
            remedy = "give a list of what FlamePool.child_spec(...) returns"
            raise PoolOptionsError("specs", spec, remedy)
        if spec.name in found:
            remedy = "give each pool a name of its own"
            raise PoolOptionsError("specs", spec, remedy, problem="has the name of another one")
        if spec.options.asynchronous != asynchronous:
            raise PoolOptionsError(
                "specs",
                spec,
                "make supervisor and pools asynchronous, or none of them",
                problem=f"is {'not ' if asynchronous else ''}asynchronous, unlike the supervisor",
            )
        found[spec.name] = spec
    return found

"""Which runner has last served the calls of a key (C7)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Final

from flame_dask.core.records import Runner

#: So many keys are remembered, those that were used last.
KEYS: Final = 10_000


class Affinities:
    """Remembers keys of calls, each with the runner that got the last call of it.

    Parameters
    ----------
    limit
        The most keys. Beyond it the one that has not been used for longest is forgotten.
    """

    __slots__ = ("_keys", "_last", "_limit")

    def __init__(self, limit: int = KEYS) -> None:
        self._limit = limit
        # By the time of their last use.
        self._last: OrderedDict[Hashable, Runner] = OrderedDict()
        # The same from the other side, so that a runner that goes is forgotten at once.
        self._keys: dict[Runner, dict[Hashable, None]] = {}

    def __len__(self) -> int:
        return len(self._last)

    def __iter__(self) -> Iterator[tuple[Hashable, Runner]]:
        """Iterate over the keys and their runners, the one not used for longest first."""
        return iter(self._last.items())

    def last(self, key: Hashable) -> Runner | None:
        """Return the runner that got the last call of a key, ``None`` if it is not known."""
        return self._last.get(key)

    def note(self, key: Hashable, runner: Runner) -> None:
        """Note that a runner gets a call of a key."""
        self._forget(key)
        self._last[key] = runner
        self._keys.setdefault(runner, {})[key] = None
        if len(self._last) > self._limit:
            self._forget(next(iter(self._last)))

    def leave(self, runner: Runner) -> None:
        """Forget a runner: it gets no more calls."""
        for key in self._keys.pop(runner, ()):
            del self._last[key]

    def _forget(self, key: Hashable) -> None:
        runner = self._last.pop(key, None)
        if runner is not None:
            keys = self._keys[runner]
            del keys[key]
            if not keys:
                del self._keys[runner]

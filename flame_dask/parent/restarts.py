"""How many restarts are too many (K1). It reads no clock: time comes in with each call."""

from __future__ import annotations

from collections import deque

from flame_dask.errors import Crash


class Restarts:
    """Counts restarts as Erlang's supervisors do: more than so many within a time are too many.

    Only time in which all pools are up counts. Erlang's processes start in no time, a cluster
    may take minutes. Otherwise one that takes longer than ``max_seconds`` to fail, or to start and
    die at once, could do so for ever.

    Parameters
    ----------
    max_restarts
        The most restarts, of all pools together,
    max_seconds
        within so many seconds, both ends included; ``None`` is in all.

    Attributes
    ----------
    down
        The names of the pools that are not up.

    Examples
    --------
    >>> from datetime import datetime
    >>> restarts = Restarts(1, 5.0)
    >>> crash = Crash("web", datetime.now(), "its cluster was closed")
    >>> restarts.fell("web", 10.0)
    >>> restarts.allows(crash, 10.0)
    True
    >>> restarts.rose("web", 70.0)  # it took a minute
    >>> restarts.fell("web", 74.0)
    >>> restarts.allows(crash, 74.0)
    False
    """

    def __init__(self, max_restarts: int, max_seconds: float | None) -> None:
        self.max_restarts = max_restarts
        self.max_seconds = max_seconds
        self.down: set[str] = set()
        self._down_since = 0.0
        self._down_before = 0.0
        self._crashes: deque[tuple[float, Crash]] = deque()

    @property
    def crashes(self) -> tuple[Crash, ...]:
        """Those that still count."""
        return tuple(crash for _, crash in self._crashes)

    def fell(self, name: str, now: float) -> None:
        """Take note that a pool is down."""
        if not self.down:
            self._down_since = now
        self.down.add(name)

    def rose(self, name: str, now: float) -> None:
        """Take note that a pool is up; nothing happens if it was."""
        if name in self.down:
            self.down.discard(name)
            if not self.down:
                self._down_before += now - self._down_since

    def allows(self, crash: Crash, now: float) -> bool:
        """Count a crash, and say whether there may be a restart after it."""
        up = (self._down_since if self.down else now) - self._down_before
        self._crashes.append((up, crash))
        if self.max_seconds is not None:
            while self._crashes[0][0] < up - self.max_seconds:
                self._crashes.popleft()
        return len(self._crashes) <= self.max_restarts

"""Ordered collections of the core: who waits for a slot, what is due when, who is next.

All are heaps that delete lazily: an entry that is no longer true stays in the heap until it comes
to the top, or until more than half of the heap is dead. So each operation costs O(log n) amortised,
also with a million waiters that leave in any order.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterator
from typing import Final, Generic, TypeVar

K = TypeVar("K", bound=Hashable)

NEVER: Final = math.inf
_SLACK: Final = 64


class Ranked(Generic[K]):
    """Keys by rank, the lowest first; equal ranks in the order in which they were set."""

    __slots__ = ("_heap", "_seq", "_valid")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, K]] = []
        # The entry of a key that counts; entries with another number are dead.
        self._valid: dict[K, int] = {}
        self._seq = 0

    def __len__(self) -> int:
        return len(self._valid)

    def __contains__(self, key: K) -> bool:
        return key in self._valid

    def __iter__(self) -> Iterator[K]:
        """Iterate over the keys, in no particular order."""
        return iter(self._valid)

    def set(self, key: K, rank: float) -> None:
        """Add a key, or change its rank."""
        self._seq = seq = self._seq + 1
        self._valid[key] = seq
        heap = self._heap
        heapq.heappush(heap, (rank, seq, key))
        if len(heap) > 2 * len(self._valid) + _SLACK:
            self._compact()

    def discard(self, key: K) -> None:
        """Take a key out, if it is there."""
        valid = self._valid
        if valid.pop(key, None) is not None and len(self._heap) > 2 * len(valid) + _SLACK:
            self._compact()

    def first(self) -> K | None:
        """Return the key with the lowest rank, ``None`` if there is no key."""
        heap, valid = self._heap, self._valid
        while heap:
            _, seq, key = heap[0]
            if valid.get(key) == seq:
                return key
            heapq.heappop(heap)
        return None

    def pop(self) -> K:
        """Take the key with the lowest rank.

        Raises
        ------
        IndexError
            If there is no key.
        """
        heap, valid = self._heap, self._valid
        while True:
            _, seq, key = heapq.heappop(heap)
            if valid.get(key) == seq:
                del valid[key]
                return key

    def _compact(self) -> None:
        valid = self._valid
        self._heap = [entry for entry in self._heap if valid.get(entry[2]) == entry[1]]
        heapq.heapify(self._heap)


class WaitQueue(Ranked[str]):
    """Calls that wait for a slot: by priority, then first come, first served (C4)."""

    __slots__ = ()

    def push(self, call: str, priority: int) -> None:
        """Let a call wait; a higher priority is served earlier."""
        self.set(call, -priority)


class Alarm:
    """A time that no deadline of a pool is earlier than: one comparison an event.

    It may be too early: a deadline that was moved or forgotten leaves it as it is.
    """

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = NEVER


class Deadlines(Ranked[K]):
    """One deadline a key.

    Parameters
    ----------
    alarm
        Is told of each deadline.
    """

    __slots__ = ("_alarm",)

    def __init__(self, alarm: Alarm) -> None:
        super().__init__()
        self._alarm = alarm

    def set(self, key: K, rank: float) -> None:
        """Set or move the deadline of a key, in seconds."""
        super().set(key, rank)
        self._alarm.at = min(self._alarm.at, rank)

    def next(self) -> float:
        """Return the earliest deadline, ``NEVER`` if there is none."""
        heap, valid = self._heap, self._valid
        while heap:
            at, seq, key = heap[0]
            if valid.get(key) == seq:
                return at
            heapq.heappop(heap)
        return NEVER

    def pop_due(self, now: float) -> K | None:
        """Take one key whose deadline has come, ``None`` if no more is due."""
        return self.pop() if self.next() <= now else None

    def entries(self) -> dict[K, float]:
        """Return all deadlines. O(n): for checks only."""
        return {key: at for at, seq, key in self._heap if self._valid.get(key) == seq}

"""When a failed boot is tried again (C6)."""

from __future__ import annotations

import random
from typing import NamedTuple


class Backoff(NamedTuple):
    """Exponential back-off with jitter, capped.

    Parameters
    ----------
    base, factor, cap
        The n-th retry waits ``base * factor ** (n - 1)`` seconds, at most ``cap``.
    jitter
        The share of the wait that is random, so that many boots refused together (a throttled
        cloud API) do not come back together.
    open_retries
        Retries of one boot while the pool opens; after that opening fails (A5).
    """

    base: float = 0.2
    factor: float = 2.0
    cap: float = 30.0
    jitter: float = 0.5
    open_retries: int = 2

    def delay(self, attempt: int, rng: random.Random) -> float:
        """Seconds to wait after the ``attempt``-th failure in a row (1 is the first)."""
        # The exponent is bounded: 2.0 ** 2000 overflows, and the cap is reached long before.
        whole = min(self.cap, self.base * self.factor ** min(attempt - 1, 64))
        return whole * (1.0 - self.jitter * rng.random())

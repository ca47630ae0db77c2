"""Runners that come from other machines: whether they fit, and what they need (A8)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flame_dask import package

#: What a worker is told that comes when no runner is awaited.
NOT_WANTED = "the pool waits for no runner"


class Arrivals:
    """Answers runners that ask before they take up work.

    Parameters
    ----------
    versions
        What the parent has: that is what runners have to fit.
    threads
        How many calls a runner takes at the same time.
    runner_at
        Says which runner is at an address; ``None`` is for one that nobody waits for.

    Attributes
    ----------
    refused
        Why runners could not be taken, by their ids: what their machine says of its end is of less
        use.
    """

    def __init__(
        self,
        versions: Mapping[str, str],
        threads: int,
        runner_at: Callable[[str], str | None],
    ) -> None:
        self.refused: dict[str, str] = {}
        self._versions = versions
        self._threads = threads
        self._runner_at = runner_at

    async def answer(
        self,
        comm: object,
        runner: str,
        versions: Mapping[str, str | None],
        address: str | None = None,
    ) -> dict[str, Any]:
        """Say whether a runner may come, and give it this package if it has another one or none.

        Parameters
        ----------
        runner
            Its id.
        versions
            What it has.
        address
            If it is a worker whose name the pool has not chosen: where it is. It is told then which
            runner it is.
        """
        known = runner if address is None else self._runner_at(address)
        refused = NOT_WANTED if known is None else package.misfit(versions, self._versions)
        if refused and known is not None:
            self.refused[known] = refused
        missing = not refused and versions.get("flame_dask") != self._versions["flame_dask"]
        return {
            "status": "OK",
            "refused": refused,
            "package": package.archive() if missing else None,
            "runner": known,
            "threads": self._threads,
        }

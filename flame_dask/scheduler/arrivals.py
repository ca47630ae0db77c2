"""Runners that come from other machines: whether they fit, and what they need (A8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flame_dask import package


class Arrivals:
    """Answers runners that ask before they register with the scheduler.

    Attributes
    ----------
    refused
        Why runners could not be taken, by their ids: what their machine says of its end is of less
        use.
    """

    def __init__(self) -> None:
        self.refused: dict[str, str] = {}

    async def answer(
        self, comm: object, runner: str, versions: Mapping[str, str | None]
    ) -> dict[str, Any]:
        """Say whether a runner may come, and give it this package if it has another one or none.

        Parameters
        ----------
        runner
            Its id.
        versions
            What it has.
        """
        refused = package.misfit(versions)
        ours = package.versions()["flame_dask"]
        if refused:
            self.refused[runner] = refused
        missing = not refused and versions.get("flame_dask") != ours
        return {
            "status": "OK",
            "refused": refused,
            "package": package.archive() if missing else None,
        }

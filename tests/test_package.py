"""The package as something to send along (A8)."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import flame_dask
from flame_dask import package
from flame_dask.scheduler.arrivals import Arrivals

OURS = {"python": "3.12.1", "dask": "2026.8.0", "distributed": "2026.8.0"}


@pytest.mark.parametrize(
    "theirs",
    [
        {},
        {"python": "3.12.9"},
        {"dask": "2026.8.5", "distributed": "2026.8.5"},
    ],
)
def test_a8_what_fits(theirs: dict[str, str]) -> None:
    assert package.misfit({**OURS, **theirs}, OURS) == ""


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        ({"python": "3.11.9"}, ["Python 3.11.9", "3.12.1"]),
        ({"python": "3.1.9"}, ["Python 3.1.9", "3.12.1"]),
        ({"distributed": "2026.7.1"}, ["distributed 2026.7.1", "2026.8.0"]),
        ({"dask": "2025.8.0"}, ["dask 2025.8.0", "2026.8.0"]),
        ({"dask": None}, ["no dask", "2026.8.0"]),
    ],
)
def test_a8_what_does_not_fit_names_both(theirs: dict[str, str | None], words: list[str]) -> None:
    text = package.misfit({**OURS, **theirs}, OURS)
    assert [word for word in words if word not in text] == []


def test_a8_the_archive_works_by_itself(tmp_path: Path) -> None:
    """What runners import can be imported from it, with nothing of this checkout."""
    zipfile.ZipFile(io.BytesIO(package.archive())).extractall(tmp_path)
    code = "import flame_dask.runner.plugin, flame_dask; print(flame_dask.__file__)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == tmp_path / "flame_dask" / "__init__.py"


def test_a8_the_preload_is_short_and_needs_dask_alone() -> None:
    text = package.preload()
    assert len(text) < 2500
    tree = ast.parse(text)
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {a.name for node in top if isinstance(node, ast.Import) for a in node.names}
    names |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    assert not {name for name in names if name.startswith("flame")}


async def _ask(versions: dict[str, str | None]) -> tuple[Arrivals, dict[str, object]]:
    arrivals = Arrivals(package.versions(), 1, {}.get)
    return arrivals, await arrivals.answer(None, "r-1", versions)


@pytest.mark.parametrize("theirs", [None, "0.0.1", flame_dask.__version__])
def test_a8_the_package_goes_to_who_has_another_one(theirs: str | None) -> None:
    import asyncio

    arrivals, reply = asyncio.run(_ask({**package.versions(), "flame_dask": theirs}))
    assert (reply["package"] is None) == (theirs == flame_dask.__version__)
    assert (reply["refused"], arrivals.refused) == ("", {})


def test_a8_who_does_not_fit_gets_nothing() -> None:
    import asyncio

    arrivals, reply = asyncio.run(_ask({**package.versions(), "python": "3.0.1"}))
    assert reply["package"] is None
    assert "Python 3.0.1" in str(reply["refused"])
    assert arrivals.refused == {"r-1": reply["refused"]}

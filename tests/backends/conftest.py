"""Interpreters for runners, and parents that are killed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from doomed import Doomed


@pytest.fixture
def make_python(tmp_path: Path) -> Callable[[str], str]:
    """Make an interpreter that has this one's packages, but for what a line of code changes."""

    def make(line: str) -> str:
        (tmp_path / "sitecustomize.py").write_text(
            "import importlib.metadata, sys\n"
            "real = importlib.metadata.version\n"
            "versions = {'flame-dask': '0.0.1'}\n"
            "importlib.metadata.version = lambda name: versions.get(name) or real(name)\n"
            f"{line}\n"
        )
        python = tmp_path / "python"
        # A package that came along lies elsewhere: it would count as another one, not covered.
        words = f"env -u COVERAGE_PROCESS_CONFIG PYTHONPATH={tmp_path} {sys.executable}"
        python.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        python.chmod(0o755)
        return str(python)

    return make


@pytest.fixture
def python_without_flame(make_python: Callable[[str], str]) -> str:
    """Make an interpreter that has Dask and not flame_dask."""
    root = str(Path(__file__).parents[2])
    return make_python(f"sys.path[:] = [path for path in sys.path if path != {root!r}]")


@pytest.fixture
def make_doomed(tmp_path: Path) -> Iterator[Callable[..., Doomed]]:
    """Start a parent in a program of its own."""
    made: list[Doomed] = []

    def make(kind: type, given: Any, options: dict[str, Any], before: str = "") -> Doomed:
        made.append(Doomed(tmp_path, kind, given, options, before))
        return made[-1]

    yield make
    for each in made:
        each.kill()

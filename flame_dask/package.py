"""The package itself, as something to send, for runners that don't have it (A8)."""

from __future__ import annotations

import ast
import functools
import importlib.resources
import io
import platform
import sys
import zipfile
from collections.abc import Mapping
from importlib.resources.abc import Traversable

#: What runners never import.
_LEFT_OUT = frozenset({"__pycache__", "testing", "integrations"})


def versions() -> dict[str, str]:
    """Return the versions here of what parent and runners have in common."""
    found = {"python": platform.python_version()}
    for module in ("dask", "distributed", "flame_dask"):
        found[module] = str(sys.modules[module].__version__)
    return found


def misfit(theirs: Mapping[str, str | None], ours: Mapping[str, str] | None = None) -> str:
    """Say why a runner with these versions can't work for this parent; nothing if it can.

    Python has to be of the same minor version, since functions travel as its byte code. Dask and
    distributed have to be of the same month: what its parts say to each other changes.

    Examples
    --------
    >>> ours = {"python": "3.12.1", "dask": "2026.8.0", "distributed": "2026.8.0"}
    >>> misfit({"python": "3.12.9", "dask": "2026.8.1", "distributed": "2026.8.0"}, ours)
    ''
    >>> misfit({"python": "3.11.2", "dask": "2026.8.1", "distributed": "2026.8.0"}, ours)
    'the runner has Python 3.11.2, the parent has 3.12.1: install the same minor version there'
    """
    ours = versions() if ours is None else ours
    problems = []
    for name, remedy in (
        ("python", "install the same minor version there"),
        ("dask", "install the same one there"),
        ("distributed", "install the same one there"),
    ):
        there = theirs.get(name)
        if there is None or there.split(".")[:2] != ours[name].split(".")[:2]:
            shown = "Python" if name == "python" else name
            has = f"has {shown} {there}" if there else f"has no {shown}"
            problems.append(f"the runner {has}, the parent has {ours[name]}: {remedy}")
    return "; ".join(problems)


@functools.cache
def archive() -> bytes:
    """Return the package as a zip archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as zipped:
        _add(zipped, importlib.resources.files("flame_dask"), "flame_dask")
    return stream.getvalue()


def _add(zipped: zipfile.ZipFile, folder: Traversable, name: str) -> None:
    for entry in folder.iterdir():
        if entry.name in _LEFT_OUT:
            continue
        path = f"{name}/{entry.name}"
        if entry.is_dir():
            _add(zipped, entry, path)
        else:
            zipped.writestr(path, entry.read_bytes())


@functools.cache
def preload() -> str:
    """Return the text that Dask is to run in a worker before it connects.

    It is as short as it can be: the services by which it travels have narrow limits.
    """
    text = (importlib.resources.files("flame_dask.runner") / "arrival.py").read_text()
    tree = ast.parse(text)
    tree.body = tree.body[1:]  # the docstring
    return ast.unparse(tree)

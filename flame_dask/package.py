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
from typing import Any

#: What runners never import.
_LEFT_OUT = frozenset({"__pycache__", "testing", "integrations"})


def versions() -> dict[str, str]:
    """Return the versions here of what parent and runners have in common."""
    found = {"python": platform.python_version()}
    for module in ("dask", "distributed", "flame_dask"):
        found[module] = str(sys.modules[module].__version__)
    return found


def misfit(
    theirs: Mapping[str, str | None],
    ours: Mapping[str, str] | None = None,
    who: str = "runner",
) -> str:
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
            problems.append(f"the {who} {has}, the parent has {ours[name]}: {remedy}")
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


class AsText:
    """Something of a module that travels as the module's text, for who need not have flame_dask.

    It is pickled as what another process makes of it: whatever unpickles it has the thing itself.

    Parameters
    ----------
    module
        The module, which may import only what is there.
    expression
        What is wanted of it; it may use ``values``.
    values
        Things that can be pickled without flame_dask.

    Examples
    --------
    >>> import pickle
    >>> there = AsText("flame_dask.scheduler.welcome", "found")
    >>> pickle.loads(pickle.dumps(there))()["python"] == versions()["python"]
    True
    """

    def __init__(self, module: str, expression: str, **values: object) -> None:
        self._module = module
        self._expression = expression
        self._values = values

    def __reduce__(self) -> tuple[Any, tuple[str, dict[str, object]]]:
        package, _, name = self._module.rpartition(".")
        text = (importlib.resources.files(package) / f"{name}.py").read_text()
        names = {"__name__": name, "flame_text": text, **self._values}
        return eval, (f"exec(flame_text) or {self._expression}", names)


@functools.cache
def preload() -> str:
    """Return the text that Dask is to run in a worker before it connects.

    It is as short as it can be: the services by which it travels have narrow limits.
    """
    text = (importlib.resources.files("flame_dask.runner") / "arrival.py").read_text()
    tree = ast.parse(text)
    tree.body = tree.body[1:]  # the docstring
    return ast.unparse(tree)

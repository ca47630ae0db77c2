"""Installed packages that a program uses: they are not copied, but have to be there (A8)."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from flame_dask.code_sync.trees import Tree


def used(trees: Sequence[Tree]) -> dict[str, str]:
    """Return the installed packages that the loaded modules of some trees import.

    What counts is what they import as they are imported themselves, and can't do without: neither
    imports in functions nor those within a ``try``. For a module that is not loaded, nobody knows
    whether a runner is ever to load it.

    Parameters
    ----------
    trees
        Where the program's own code is.

    Returns
    -------
    dict
        Versions, by the names of the packages.
    """
    sources = [source for tree in trees for source in tree.sources]
    own = {source.stem for tree in trees for _, source in tree.pieces}
    names: set[str] = set()
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.endswith(".py"):
            path = Path(file)
            if any(path.is_relative_to(source) for source in sources):
                with suppress(OSError):  # it has gone meanwhile
                    names |= needed(path, path.stat().st_mtime_ns)
    names -= own | set(sys.stdlib_module_names)
    if not names:
        return {}
    found: dict[str, str] = {}
    owners = _owners(tuple(sys.path))
    for name in names:
        for package in owners.get(name, ()):
            if not _is_copied(package, sources):
                found[package] = importlib.metadata.version(package)
    return found


def _is_copied(package: str, sources: Iterable[Path]) -> bool:
    """Tell whether a package is installed in a way that has its files in the trees."""
    distribution = importlib.metadata.distribution(package)
    if '"editable": true' in (distribution.read_text("direct_url.json") or ""):
        return True
    place = Path(str(distribution.locate_file("")))
    return any(place == source for source in sources)


# Both are asked again for each runner that boots, while others wait for code.


@functools.lru_cache(maxsize=1)
def _owners(path: tuple[str, ...]) -> Mapping[str, list[str]]:
    """Return the installed packages by the modules that they bring, for a ``sys.path``."""
    return importlib.metadata.packages_distributions()


@functools.lru_cache(maxsize=10_000)
def needed(file: Path, changed: int) -> frozenset[str]:
    """Return the top-level modules that a module can't be imported without.

    Parameters
    ----------
    file
        Its source.
    changed
        When that was changed.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    return frozenset(_imports(tree.body))


def _imports(body: Iterable[ast.stmt]) -> Iterator[str]:
    for statement in body:
        match statement:
            case ast.Import(names):
                for alias in names:
                    yield alias.name.partition(".")[0]
            case ast.ImportFrom(str(module), _, 0):
                yield module.partition(".")[0]
            case ast.ClassDef():
                yield from _imports(statement.body)
            # Not what is within `try`, `if` or `with`: the code can do without.


def unfit(wanted: Mapping[str, str]) -> list[str]:
    """Say which packages are missing here, or of another version.

    Parameters
    ----------
    wanted
        Versions, by the names of the packages.

    Returns
    -------
    list of str
        A text for each.

    Examples
    --------
    >>> unfit({"toolz": "0.0.1", "no-such-package": "2.0"})  # doctest: +ELLIPSIS
    ['no-such-package is missing, the parent has 2.0', 'toolz is ..., the parent has 0.0.1']
    """
    texts = []
    for package, version in sorted(wanted.items()):
        try:
            here = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            texts.append(f"{package} is missing, the parent has {version}")
        else:
            if here != version:
                texts.append(f"{package} is {here}, the parent has {version}")
    return texts

"""What a parent's code is, and where it lies (J2, J3).

A *tree* is a folder on the runner from which can be imported, and the files here that it is to
have. Its paths are those on the runner. Links are followed: what is copied is what they lead to.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import os
import site
import stat
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from flame_dask.code_options import CodeSync
from flame_dask.code_sync.archive import Member, Refused
from flame_dask.errors import PoolOptionsError

#: Where files and code are in the runner's folder.
FILES: Final = "files"
CODE: Final = "code"

#: Folders that belong to tools, not to a program.
_SKIPPED: Final = frozenset(
    {
        *("__pycache__", ".git", ".hg", ".svn", "node_modules", ".venv", ".tox", ".nox"),
        *(".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".ipynb_checkpoints"),
    }
)

#: What is there already, since it runs the runner itself.
_THERE: Final = frozenset({"flame_dask", "dask", "distributed"})

_SUFFIXES: Final = tuple(importlib.machinery.all_suffixes())


#: A folder that was looked into: its path, and which one it is, by device and number.
Folder = tuple[Path, int, int]


@dataclass(frozen=True)
class Tree:
    """A folder on the runner from which can be imported.

    Parameters
    ----------
    name
        Its path in the runner's folder.
    root
        A folder here: all that can be imported from it belongs to the tree.
    pieces
        Or just these: what they are called there, and what they are here.
    """

    name: str
    root: Path | None = None
    pieces: tuple[tuple[str, Path], ...] = ()

    @property
    def sources(self) -> list[Path]:
        """The files and folders here that it is made from."""
        return [self.root] if self.root is not None else [source for _, source in self.pieces]

    def walk(self, without: frozenset[Path] = frozenset()) -> Walk:
        """Find the files that belong to it, but for those below the paths ``without``."""
        walk = Walk(without)
        if self.root is not None:
            namespaces = self.root not in (Path.home(), Path(self.root.anchor))
            walk.importable(self.root, self.name, namespaces=namespaces, top=True)
        # Of two files for one place the first one is imported, as here.
        for name, source in reversed(self.pieces):
            walk.everything(source, f"{self.name}/{name}", _SKIPPED)
        return walk


@dataclass
class Walk:
    """Files as they are found.

    Parameters
    ----------
    without
        Paths here that are left out, with all below them.

    Attributes
    ----------
    files
        What is found: paths here, by those on the runner.
    folders
        The folders that were looked into.
    kept
        Folders that are to be there whatever is in them, by their paths on the runner.
    targets
        What links lead to.
    unreadable
        Folders here that can't be looked into, and why.
    """

    without: frozenset[Path] = frozenset()
    files: dict[str, Path] = field(default_factory=dict)
    folders: set[Folder] = field(default_factory=set)
    kept: dict[str, Path] = field(default_factory=dict)
    targets: set[Path] = field(default_factory=set)
    unreadable: dict[Path, OSError] = field(default_factory=dict)
    _above: list[tuple[int, int]] = field(default_factory=list)

    def everything(self, source: Path, path: str, skipped: frozenset[str] = frozenset()) -> None:
        """Take a file, or a folder with all that is in it."""
        if source in self.without:
            return
        if not os.path.isdir(source):  # noqa: PTH112  # that of a Path may raise
            self._take(source, path)
            self._watch(source.parent)
            return
        if not skipped:
            self.kept[path] = source
        for entry in self._enter(source):
            if entry.name in skipped:
                continue
            if not _is_folder(entry):
                self._take(Path(entry.path), f"{path}/{entry.name}", entry)
            elif not (skipped and os.path.exists(f"{entry.path}/pyvenv.cfg")):  # noqa: PTH110
                self.everything(Path(entry.path), f"{path}/{entry.name}", skipped)
        self._leave()

    def importable(self, source: Path, path: str, *, namespaces: bool, top: bool = False) -> None:
        """Take what can be imported from a folder: modules, and packages with all their files."""
        if source in self.without:
            return
        for entry in self._enter(source):
            name, there = entry.name, f"{path}/{entry.name}"
            if name in _SKIPPED or (top and name.partition(".")[0] in _THERE):
                continue
            if _is_folder(entry):
                if name.endswith((".egg-info", ".dist-info")):
                    self.everything(Path(entry.path), there, _SKIPPED)
                elif not name.isidentifier():
                    continue
                elif os.path.exists(f"{entry.path}/__init__.py"):  # noqa: PTH110
                    self.everything(Path(entry.path), there, _SKIPPED)
                elif namespaces and not os.path.exists(f"{entry.path}/pyvenv.cfg"):  # noqa: PTH110
                    self.importable(Path(entry.path), there, namespaces=True)
            elif name.endswith(_SUFFIXES) and name.partition(".")[0].isidentifier():
                self._take(Path(entry.path), there, entry)
        self._leave()

    def _enter(self, source: Path) -> list[os.DirEntry[str]]:
        here = (0, 0)
        try:
            status = source.stat()
            here = status.st_dev, status.st_ino
            if here in self._above:  # a link leads back to where it is
                return []
            with os.scandir(source) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):  # it has gone meanwhile
            return []
        except OSError as error:
            self.unreadable[source] = error
            return []
        finally:
            self._above.append(here)
        self.folders.add((source, *here))
        return found

    def _leave(self) -> None:
        self._above.pop()

    def _take(self, source: Path, path: str, entry: os.DirEntry[str] | None = None) -> None:
        if source in self.without:
            return
        linked = source.is_symlink() if entry is None else entry.is_symlink()
        try:
            mode = source.stat().st_mode if entry is None else entry.stat().st_mode
        except OSError:
            return  # a link that leads nowhere; editors leave such beside a file that is open
        if stat.S_ISREG(mode):  # not a socket, or a pipe
            self.files[path] = source
            if linked:
                target = source.resolve()
                self.targets.add(target)
                self._watch(target.parent)

    def _watch(self, folder: Path) -> None:
        with suppress(OSError):  # it has gone meanwhile
            status = folder.stat()
            self.folders.add((folder, status.st_dev, status.st_ino))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to where we may not look
        return False


def copied_paths(options: CodeSync, folder: Path) -> dict[str, Path]:
    """Say where the files of ``copy_paths`` go.

    Parameters
    ----------
    options
        The option.
    folder
        The parent's working folder.

    Returns
    -------
    dict
        Paths here, by those on the runner.

    Raises
    ------
    PoolOptionsError
        If two of them would have the same place.
    """
    places: dict[str, Path] = {}
    for text in options.copy_paths:
        source = Path(os.path.abspath(folder / text))  # noqa: PTH100  # links stay as they are
        inside = source.is_relative_to(folder)
        name = source.relative_to(folder).as_posix() if inside else source.name
        place = FILES if name in (".", "") else f"{FILES}/{name}"
        if places.get(place, source) != source:
            raise PoolOptionsError(
                "code_sync.copy_paths",
                text,
                "give one of the two another name, or copy a folder that holds both",
                problem=f"would take the place of {str(places[place])!r}",
            )
        places[place] = source
    return places


def copied_members(places: dict[str, Path]) -> Iterator[Member]:
    """Yield the files of ``copy_paths``, as they are now, and the folders that they are in.

    Raises
    ------
    Refused
        If something can't be copied: it is gone, say.
    """
    for path, source in places.items():
        walk = Walk()
        walk.everything(source, path)
        for folder, error in walk.unreadable.items():
            raise Refused(f"{folder} can't be copied: {error}")
        if not walk.kept and not walk.files:
            raise Refused(f"{source} can't be copied: it is gone, or neither a file nor a folder")
        for there, here in {**walk.kept, **walk.files}.items():
            yield Member(there, here)


def app_trees() -> list[Tree]:
    """Return the parent's own importable code, in the order of its ``sys.path``."""
    libraries = _libraries()
    trees: list[Tree] = []
    roots: set[Path] = set()
    for text in sys.path:
        root = Path(text or ".").absolute()
        resolved = root.resolve()
        if resolved in roots or not os.path.exists(root) or _is_within(resolved, libraries):  # noqa: PTH110
            continue
        roots.add(resolved)
        name = f"{CODE}/app-{len(trees)}"
        # A file is an archive with modules in it.
        trees.append(Tree(name, root) if root.is_dir() else Tree(name, None, ((root.name, root),)))
    pieces = [piece for piece in _editable() if piece[1].parent.resolve() not in roots]
    if pieces:
        trees.append(Tree(f"{CODE}/app-{len(trees)}", None, tuple(pieces)))
    return trees


@functools.cache
def _libraries() -> list[Path]:
    """Where the standard library is, and where packages are installed."""
    names = ("stdlib", "platstdlib", "purelib", "platlib")
    folders: list[str | None] = [sysconfig.get_path(name) for name in names]
    folders += [*site.getsitepackages(), site.getusersitepackages()]
    base = Path(sys.base_prefix)
    version = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    folders.append(str(base / "lib" / version))
    return [Path(folder).resolve() for folder in folders if folder]


def is_library(file: str) -> bool:
    """Tell whether a module's file belongs to the standard library or an installed package."""
    path = Path(file).resolve()
    return any(path.is_relative_to(folder) for folder in _libraries())


def _is_within(path: Path, folders: list[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders) or path.name in (
        "site-packages",
        "dist-packages",
    )


def _editable() -> list[tuple[str, Path]]:
    """Return the packages of editable installs, which ``sys.path`` need not show."""
    pieces: list[tuple[str, Path]] = []
    for distribution in importlib.metadata.distributions():
        try:
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        except ValueError:
            continue
        if not origin.get("dir_info", {}).get("editable"):
            continue
        for name in (distribution.read_text("top_level.txt") or "").split():
            if name not in _THERE:
                pieces += _pieces_of(name) or []
    return pieces


def _pieces_of(name: str) -> list[tuple[str, Path]] | None:
    """Return where a top-level module is; ``None`` if there is none that consists of files."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations is not None:
        return [(name, Path(folder)) for folder in spec.submodule_search_locations]
    if not spec.has_location or spec.origin is None:
        return None
    source = Path(spec.origin)
    return [(source.name, source)]


def _is_regular(pieces: list[tuple[str, Path]]) -> bool:
    return all(source.is_file() or (source / "__init__.py").exists() for _, source in pieces)


def sync_trees(options: CodeSync) -> list[Tree]:
    """Return what ``sync_modules`` names.

    Raises
    ------
    PoolOptionsError
        If there is no module of that name, or it does not consist of files.
    """
    trees = []
    for number, text in enumerate(options.sync_modules):
        name = f"{CODE}/sync-{number}"
        found = _pieces_of(text) if text.isidentifier() else None
        folder = Path(os.path.abspath(text))  # noqa: PTH100  # links stay as they are
        if folder.is_dir() and (not found or not _is_regular(found)):
            # "src", say, that can be imported as well, as any folder can.
            if not (folder / "__init__.py").exists():
                trees.append(Tree(name, folder))
                continue
            found = [(folder.name, folder)]
        if not found or found[0][0] in _THERE:
            raise PoolOptionsError(
                "code_sync.sync_modules",
                text,
                "give names of modules of yours that can be imported here, or folders",
                problem="is no module that can be sent",
            )
        trees.append(Tree(name, None, tuple(found)))
    return trees

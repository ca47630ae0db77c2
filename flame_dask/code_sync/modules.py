"""Modules whose code has changed are unloaded, so that the next import gets the new code (J3).

With a changed module go those that import it, and those that import these: they hold names of it.
Nothing is executed anew in place. So a call that is running goes on with the modules that it has,
all of one age, and an error in new code is raised where it is imported.
"""

from __future__ import annotations

import importlib
import linecache
import re
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from importlib.machinery import all_suffixes
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from flame_dask.code_sync.trees import is_library

#: Seconds that an import which is under way in another thread gets to come to its end.
_IMPORT: Final = 5.0


def module_name(path: str) -> str | None:
    """Return the name of the module that a path stands for; ``None`` if it is no module.

    Examples
    --------
    >>> module_name("shop/basket.py"), module_name("shop/__init__.py"), module_name("shop/x.json")
    ('shop.basket', 'shop', None)
    """
    for suffix in sorted(all_suffixes(), key=len, reverse=True):
        if path.endswith(suffix):
            parts = path.removesuffix(suffix).split("/")
            return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return None


def unload(changed: Iterable[str], folder: Path, texts: dict[str, bytes]) -> list[str]:
    """Unload modules, and whatever of the copied code imports them.

    Parameters
    ----------
    changed
        Names of modules whose code is another one now, or gone.
    folder
        Where the copied code is: only modules from there are unloaded beside those that changed.
    texts
        What is known of the source of modules from there, from one time to the next.

    Returns
    -------
    list of str
        The modules that were unloaded.
    """
    importlib.invalidate_caches()
    linecache.checkcache()
    changed = set(changed)
    for name in changed:
        texts.pop(name, None)
    gone = stale(changed, folder, texts)
    for name in sorted(gone, reverse=True):
        module = sys.modules.get(name)
        _await_import(module)
        sys.modules.pop(name, None)
        texts.pop(name, None)
        package, _, last = name.rpartition(".")
        # `from package import module` would find it there.
        above = sys.modules.get(package)
        if above is not None and vars(above).get(last) is module:
            delattr(above, last)
    return sorted(gone)


def stale(changed: Collection[str], folder: Path, texts: dict[str, bytes]) -> set[str]:
    """Return the loaded modules that have changed, or import what has."""
    loaded = dict(sys.modules)
    importers = _Importers(loaded, f"{folder}/", texts)
    below: dict[str, list[str]] = {}
    for name in loaded:
        parts = name.split(".")
        for length in range(1, len(parts)):
            below.setdefault(".".join(parts[:length]), []).append(name)
    gone: set[str] = set()
    seen: set[str] = set()
    todo = set(changed)
    while todo:
        name = todo.pop()
        seen.add(name)
        module = loaded.get(name)
        if module is not None:
            if not _may_go(name, module, f"{folder}/"):
                continue
            gone.add(name)
        # A new package object would not know of the modules in it that are loaded already.
        todo.update(set(below.get(name, ())) - seen)
        todo.update(importers.of(name) - seen)
    return gone


def _may_go(name: str, module: ModuleType, prefix: str) -> bool:
    """Tell whether a module is none of what the runner itself runs on."""
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
    if not isinstance(file, str) or name in ("__main__", "__mp_main__"):
        return False
    return file.startswith(prefix) or not is_library(file)


#: For so many modules it is quicker to search all texts than to take these apart.
_FEW: Final = 20

#: Turns what can't be part of a name into space.
_SPACED: Final = bytes(
    byte if chr(byte).isalnum() or byte == ord("_") or byte > 127 else ord(" ")
    for byte in range(256)
)

#: Where a module that imports another one speaks of it: after a dot, on a line with an import, or
#: where it is imported by a function.
_IMPORTS: Final = re.compile(
    rb"\.\s*([\w\x80-\xff]+)"
    rb"|\b(?:import|from)\b([^\n(]*(?:\([^)]*\))?[^\n]*)"
    rb"|\b(?:import_module|__import__)\s*\(\s*['\"]([\w\x80-\xff]+)"
)


class _Importers:
    """Knows which modules of the copied code import which, as their text says."""

    def __init__(
        self, loaded: Mapping[str, ModuleType], prefix: str, texts: dict[str, bytes]
    ) -> None:
        self._texts: dict[str, bytes] = {}
        self._found: dict[str, set[bytes]] = {}
        self._users: dict[bytes, list[str]] = {}
        self._compiled: set[str] = set()
        self._asked = 0
        for name, module in loaded.items():
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and file.startswith(prefix):
                if name not in texts:
                    try:
                        texts[name] = Path(file).read_bytes()
                    except OSError:  # it is one of those that are gone
                        continue
                self._texts[name] = texts[name]
                if not file.endswith(".py"):
                    self._compiled.add(name)

    def of(self, name: str) -> set[str]:
        """Return the modules that seem to import this one: all that do, and maybe some more."""
        word = name.rpartition(".")[2].encode()
        return {
            user
            for user in self._with(word)
            if user != name and (user in self._compiled or word in self._imported(user))
        }

    def _with(self, word: bytes) -> list[str]:
        """Return the modules in whose text there is a word: that rules out most, and quickly."""
        self._asked += 1
        if self._asked <= _FEW:
            return [name for name, text in self._texts.items() if word in text]
        if not self._users:
            for name, text in self._texts.items():
                for each in set(text.translate(_SPACED).split()):
                    self._users.setdefault(each, []).append(name)
        compiled = [name for name in self._compiled if word in self._texts[name]]
        return self._users.get(word, []) + compiled

    def _imported(self, name: str) -> set[bytes]:
        found = self._found.get(name)
        if found is None:
            parts = _IMPORTS.findall(self._texts[name].replace(b"\\\n", b" "))
            found = set(b" ".join(map(b" ".join, parts)).translate(_SPACED).split())
            self._found[name] = found
        return found


def _await_import(module: ModuleType | None) -> None:
    """Let an import come to its end: it fails if its module is taken away meanwhile."""
    end = time.monotonic() + _IMPORT
    spec: Any = getattr(module, "__spec__", None)
    while getattr(spec, "_initializing", False) and time.monotonic() < end:
        time.sleep(0.002)

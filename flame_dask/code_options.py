"""What of the parent's code and files its runners get: the option ``code_sync`` (J1)."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from flame_dask.errors import PoolOptionsError

__all__ = ["CodeSync"]

_PACKAGES: Final = ("error", "warn", "ignore")


@dataclass(frozen=True, kw_only=True)
class CodeSync:
    """What runners get of the parent's code and files, and what they do with it (J1).

    It is checked when it is made, and can be given as a dict just as well.

    Parameters
    ----------
    copy_paths
        Files and folders that each runner gets as it boots, within ``boot_timeout``. A path below
        the parent's working folder keeps its place, relative to that; of another one the last part
        is taken.
    copy_apps
        Whether each runner gets the code that the parent can import: what is on ``sys.path``
        outside of the standard library and of installed packages, and editable installs.
    sync_modules
        Top-level modules or packages by name, or folders with code. Runners get these as they boot
        and, before each call, what has changed meanwhile.
    start_apps
        Functions as ``"package.module:function"``, which are called on each runner before its first
        call. ``True`` is all entry points of the group ``flame_dask.apps``, and sets ``copy_apps``.
    compress
        Whether to compress what is sent.
    verbose
        Whether to log what is sent.
    chunk_size
        Bytes that are sent at a time.
    extract_dir
        The folder on the runner in which it makes a folder of its own; ``None`` is its temporary
        one.
    tmp_dir
        The folder on the runner for what has not arrived in full; ``None`` is the same.
    packages
        What to do about installed packages that the program uses and a runner has in another
        version, or not at all: ``"error"``, ``"warn"`` or ``"ignore"``.

    Raises
    ------
    PoolOptionsError
        One of them can't be used.

    Examples
    --------
    >>> CodeSync(sync_modules="shop", start_apps=True)  # doctest: +NORMALIZE_WHITESPACE
    CodeSync(copy_paths=(), copy_apps=True, sync_modules=('shop',), start_apps=True,
             compress=True, verbose=False, chunk_size=65536, extract_dir=None, tmp_dir=None,
             packages='error')
    """

    copy_paths: tuple[str, ...] = ()
    copy_apps: bool = False
    sync_modules: tuple[str, ...] = ()
    start_apps: bool | tuple[str, ...] = False
    compress: bool = True
    verbose: bool = False
    chunk_size: int = 65536
    extract_dir: str | None = None
    tmp_dir: str | None = None
    packages: str = "error"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _CHECKS[field.name](f"code_sync.{field.name}", getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        if self.start_apps is True:
            object.__setattr__(self, "copy_apps", True)

    @classmethod
    def check(cls, value: object) -> CodeSync | None:
        """Read what was given for the option.

        Parameters
        ----------
        value
            One of these, a mapping of their parameters, or ``None``.

        Returns
        -------
        CodeSync or None
            It, checked.

        Raises
        ------
        PoolOptionsError
            It can't be used.

        Examples
        --------
        >>> CodeSync.check({"sync_modules": ["shop"]}).sync_modules
        ('shop',)
        """
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise PoolOptionsError(
                "code_sync", value, "give a CodeSync, a mapping of what it takes, or None"
            )
        # Keys of a configuration file may have hyphens.
        given = {str(key).replace("-", "_"): part for key, part in value.items()}
        for key, part in given.items():
            if key not in _CHECKS:
                near = difflib.get_close_matches(key, _CHECKS, n=1, cutoff=0.4)
                remedy = f"did you mean {near[0]}?" if near else f"give {', '.join(_CHECKS)}"
                raise PoolOptionsError(
                    f"code_sync.{key}", part, remedy, problem="is not a part of code_sync"
                )
        return cls(**given)


def _bool(option: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise PoolOptionsError(option, value, "give True or False")
    return value


def _path(option: str, value: object) -> str:
    try:
        text = os.fspath(value)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise PoolOptionsError(option, value, "give a path as a text that is not empty")
    return text


def _folder(option: str, value: object) -> str | None:
    return None if value is None else _path(option, value)


def _paths(option: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str | os.PathLike):
        return (_path(option, value),)
    if not isinstance(value, list | tuple):
        raise PoolOptionsError(option, value, "give a list of texts")
    return tuple([_path(option, each) for each in value])


def _existing(option: str, value: object) -> tuple[str, ...]:
    paths = _paths(option, value)
    for path in paths:
        if not os.path.exists(path):  # noqa: PTH110  # it is a text, and stays one
            raise PoolOptionsError(
                option, path, "give files and folders that are there", problem="does not exist"
            )
        if not os.path.isfile(path) and not os.path.isdir(path):  # noqa: PTH112, PTH113
            problem = "is neither a file nor a folder"
            raise PoolOptionsError(option, path, "give files and folders", problem=problem)
    return paths


def _modules(option: str, value: object) -> tuple[str, ...]:
    names = _paths(option, value)
    for name in names:
        if os.path.isdir(name):  # noqa: PTH112
            continue
        if os.sep in name:
            _existing(option, name)
            remedy = "give the folder that it is in, or the name of the module"
            raise PoolOptionsError(option, name, remedy, problem="is a file")
        if os.path.isfile(name):  # noqa: PTH113
            stem = name.partition(".")[0]
            raise PoolOptionsError(
                option, name, f"give the module's name, {stem!r}", problem="is a file"
            )
        if "." in name and all(part.isidentifier() for part in name.split(".")):
            top = name.partition(".")[0]
            raise PoolOptionsError(
                option, name, f"give the whole of it, {top!r}", problem="is a part of a package"
            )
        if not name.isidentifier():
            raise PoolOptionsError(option, name, "give the name of a module, or a folder")
    return names


def _apps(option: str, value: object) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    names = _paths(option, value)
    for name in names:
        module, _, function = name.partition(":")
        parts = [*module.split("."), *function.split(".")]
        if not all(part.isidentifier() for part in parts):
            raise PoolOptionsError(option, name, 'give functions such as "package.module:start"')
    return names


def _chunk_size(option: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1024 <= value <= 1 << 24:
        raise PoolOptionsError(option, value, "give bytes, from 1024 to 16777216")
    return value


def _packages(option: str, value: object) -> str:
    if not isinstance(value, str) or value not in _PACKAGES:
        raise PoolOptionsError(option, value, f"give {' or '.join(map(repr, _PACKAGES))}")
    return value


_CHECKS: Final[dict[str, Callable[[str, object], Any]]] = {
    "copy_paths": _existing,
    "copy_apps": _bool,
    "sync_modules": _modules,
    "start_apps": _apps,
    "compress": _bool,
    "verbose": _bool,
    "chunk_size": _chunk_size,
    "extract_dir": _folder,
    "tmp_dir": _folder,
    "packages": _packages,
}

"""What a scheduler elsewhere is asked before the pool moves in (A8). It is sent as text.

Only the standard library is used here: flame_dask need not be there.
"""

import atexit
import importlib
import io
import shutil
import sys
import tempfile
import zipfile
from importlib.metadata import PackageNotFoundError, version


def found() -> dict[str, str | None]:
    """Return which versions this process has."""
    versions: dict[str, str | None] = {"python": sys.version.split()[0], "flame_dask": None}
    for package in ("dask", "distributed"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    try:
        versions["flame_dask"] = importlib.import_module("flame_dask").__version__
    except Exception:  # whatever is wrong with that one, it is not what is wanted
        versions["flame_dask"] = None
    return versions


def unpack(package: bytes) -> None:
    """Put another flame_dask in the place of the one that is here, if there is one."""
    folder = tempfile.mkdtemp(prefix="flame_dask-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    zipfile.ZipFile(io.BytesIO(package)).extractall(folder)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    for name in list(sys.modules):
        if name.partition(".")[0] == "flame_dask":
            del sys.modules[name]

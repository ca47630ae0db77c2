"""Preload of a runner on another machine. It is sent as text: flame_dask need not be there (A8).

Only Dask and the standard library are used here. Before the worker registers, it asks the pool's
scheduler whether the two fit, and gets the package that is missing.
"""

import io
import os
import shutil
import sys
import threading
import zipfile
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_arrived = threading.Event()


def _end(reason: str) -> None:
    sys.stderr.write(f"flame_dask: {reason}: ending\n")
    sys.stderr.flush()
    shutil.rmtree(os.environ.get("FLAME_RUNNER_FOLDER", ""), ignore_errors=True)
    os._exit(1)


def _wait_for_arrival(seconds: float) -> None:
    # Without the pool there is nobody who could end this machine (G3).
    if not _arrived.wait(seconds):
        _end(f"no runner of a pool after {seconds:g} s")


_limit = os.environ.get("FLAME_BOOT_TIMEOUT")
if _limit is not None:
    threading.Thread(target=_wait_for_arrival, args=(float(_limit),), daemon=True).start()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


async def dask_setup(worker: Any) -> None:
    """Become a runner; called by Dask."""
    try:
        await _arrive(worker)
    except Exception as error:
        _end(repr(error))  # Dask would log it, and go on


async def _arrive(worker: Any) -> None:
    versions = {"python": sys.version.split()[0], "flame_dask": _version("flame-dask")}
    versions |= {package: _version(package) for package in ("dask", "distributed")}
    reply = await worker.scheduler.flame_arrive(runner=str(worker.name), versions=versions)
    if reply["refused"]:
        _end(reply["refused"])
    if reply["package"] is not None:
        folder = f"{worker.local_directory}/flame_dask-package"
        zipfile.ZipFile(io.BytesIO(reply["package"])).extractall(folder)
        sys.path.insert(0, folder)
    # The first one watches the way to the parent, if there is one.
    from flame_dask.runner import boot, lifeline

    boot.forget_secrets()
    lifeline.arrived = _arrived.set

"""A preload of the runners of a chaos run: it notes that one boots, and makes some boots fail.

It does so while it is imported, which is before the worker is there: to raise in ``dask_setup``
would only be logged.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Final

from chaos_calls import FAILING, FOLDER, MARKER, RUNNER, SEED, append

#: Seconds that a boot hangs which hangs: longer than any pool of a run is patient.
HANGS: Final = 120.0


def draw(seed: str, boot: int, percent: float) -> str:
    """Say what becomes of a boot; the same each time for the same number of the same parent."""
    rng = random.Random(f"{seed}/boot/{boot}")
    if rng.uniform(0, 100) >= percent:
        return "boots"
    return rng.choice(["raises", "raises", "exits", "dies", "hangs"])


def main() -> None:
    """Take a number, and do what is drawn for it."""
    os.environ[RUNNER] = str(os.getpid())  # calls in a process of their own inherit it
    life = os.environ[MARKER].partition("/")[2]
    # One file a parent, with one byte for each boot: whoever writes learns which number it has.
    path = Path(os.environ[FOLDER], f"boots-{life}")
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, b".")
        number = os.lseek(descriptor, 0, os.SEEK_CUR)
    finally:
        os.close(descriptor)
    fate = draw(f"{os.environ[SEED]}/{life}", number, float(os.environ[FAILING]))
    records = Path(os.environ[FOLDER], "boots.jsonl")
    append(records, "boot", life=life, pid=os.getpid(), fate=fate)
    if fate == "raises":
        raise RuntimeError("this boot fails on purpose")
    if fate == "exits":
        os._exit(7)
    if fate == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if fate == "hangs":
        time.sleep(HANGS)


main()

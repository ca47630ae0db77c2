"""Parents that are programs of their own, to be killed: what is left of them then (G3)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flame_dask.backends import reap
from support import alive, pids

PROGRAM = """
import os, sys, time
from {module} import {kind}
from flame_dask import FlamePool
{before}

def work(log):
    with open(log, "a") as file:
        file.write(f"{{os.getpid()}}\\n")
    while True:
        time.sleep(0.01)

if __name__ == "__main__":
    pool = FlamePool(
        "doomed", max=2, max_concurrency=1, backend=({kind}, {given!r}), **{options!r}
    )
    futures = [pool.submit(work, sys.argv[1]) for _ in range(2)]
    time.sleep(60)
"""


class Doomed:
    """A parent with work for two runners.

    Parameters
    ----------
    folder
        Where its program goes.
    kind, given
        The cluster class, and its options.
    options
        Options of the pool.
    before
        Lines of code that its program has before it opens the pool.
    """

    def __init__(
        self, folder: Path, kind: type, given: Any, options: dict[str, Any], before: str = ""
    ) -> None:
        file, self.log = folder / "doomed.py", folder / "doomed.log"
        tests = Path(__file__).parent
        file.write_text(
            PROGRAM.format(
                module=kind.__module__,
                kind=kind.__name__,
                given=given,
                options=options,
                before=before,
            )
        )
        self.process = subprocess.Popen(
            [sys.executable, str(file), str(self.log)],
            env={**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}"},
            start_new_session=True,
        )

    def at_work(self) -> bool:
        """Tell whether both runners work."""
        return len(pids(self.log)) == 2

    def runners(self) -> list[int]:
        """Return the runners' pids."""
        return pids(self.log)

    def kill(self) -> None:
        """End it, so that it can do nothing more."""
        self.process.kill()
        self.process.wait()


def check_reap(
    doomed: Doomed, given: Any, there: Callable[[], list[Any]], until: Callable[..., Any]
) -> None:
    """Have one of two runners hang, kill the parent, and have `reap` find and end what is left.

    Parameters
    ----------
    given
        What `reap` is told.
    there
        Lists all that costs money; something of somebody else's is among it.
    """
    until(doomed.at_work, 40)
    assert reap(given) == []  # its parent lives
    hung = doomed.runners()[0]
    os.kill(hung, signal.SIGSTOP)
    doomed.kill()
    until(lambda: len(there()) == 2, 35)  # the other one has ended
    [left] = reap(given)
    assert (left.pool, left.stopped) == ("doomed", False)
    assert f"process {doomed.process.pid} here, is gone" in left.reason
    assert alive(hung)
    assert reap(given, pool="another") == []
    [left] = reap(given, apply=True)
    assert left.stopped
    until(lambda: not alive(hung), 10)
    until(lambda: len(there()) == 1, 5)
    assert reap(given, apply=True) == []

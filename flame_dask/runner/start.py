"""Starts a runner whose calls have processes of their own: ``isolation="process"``.

The nursery, of which these are forked, is forked here itself, while the runner has neither an event
loop nor threads, and has imported what it needs: it is there at once, and shares all of that.
"""

from __future__ import annotations

import os

from distributed.cli.dask_spec import main

from flame_dask.constants import BOOT_TIMEOUT, RUNNER_FOLDER
from flame_dask.runner import here, nursery


def _become_nursery() -> None:
    # They are for the runner, and so is what the module does that is imported then.
    os.environ.pop(RUNNER_FOLDER, None)
    os.environ.pop(BOOT_TIMEOUT, None)
    from flame_dask.runner.boot import forget_secrets

    forget_secrets()
    here.become_another()


if __name__ == "__main__":
    nursery.fork(_become_nursery)
    main()

"""What starts a runner in a job.

Its text is written into a file together with what the runner needs, and run there.
"""

import os
import runpy
import sys


def start(environment: dict[str, str]) -> None:
    """Become the program that the rest of the command line names, as after ``python -m``."""
    # The file goes first: no call can read it. And a queue that starts the same job anew, because
    # a node has failed for instance, does not make another runner of the same name (F1).
    os.unlink(sys.argv[0])  # noqa: PTH108  # one import less
    os.environ.update(environment)
    sys.path[0] = os.getcwd()  # noqa: PTH109
    sys.argv[:3] = [sys.argv[2]]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

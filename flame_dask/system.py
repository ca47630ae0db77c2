"""What more than one part of a pool asks of the operating system."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def kernel_kills() -> int:
    """How many processes the kernel of this machine has killed for want of memory, ever.

    It is the machine's figure: all that can be told of a process that SIGKILL has ended.
    """
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:  # not Linux
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def is_running(process: psutil.Process) -> bool:
    """Tell whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def take_lifeline() -> int:
    """Take the pipe to the parent, which is the standard input, out of everybody else's reach.

    Returns
    -------
    int
        Its descriptor. At its end of file the parent is gone. Standard input is empty from now on.
    """
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return pipe

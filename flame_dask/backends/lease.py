"""What is written on a machine of a pool, so that one that was left behind can be told (G3).

Runners end by themselves when their parent is gone. One that can't, because it hangs, goes on
costing money, and there is nobody left who knows of it but the service that runs it. So whatever a
pool starts there carries three tags: whose it is (``flame-pool``), which process is its parent
(``flame-parent``), and until when it is surely needed (``flame-expires``). The parent puts that
time off while it lives.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

POOL: Final = "flame-pool"
PARENT: Final = "flame-parent"
EXPIRES: Final = "flame-expires"

#: Seconds that a runner is needed for at least, as far as others can tell. A living parent renews
#: the lease when half of it has passed: clocks may differ, and the service be out of reach, for as
#: long as the other half.
LEASE: float = 3600.0

#: What a tag may not hold at Amazon, the narrowest of the services.
_FORBIDDEN: Final = re.compile(r"[^\w\s+\-=.:/@]", re.ASCII)
_LONGEST: Final = 256


def tag(text: str) -> str:
    """Return a text as the value of a tag.

    Examples
    --------
    >>> tag("thumbnails (big)")
    'thumbnails _big_'
    """
    return _FORBIDDEN.sub("_", text)[:_LONGEST]


def expiry(seconds: float | None = None) -> str:
    """Return when a lease ends that begins now: UTC, in ISO format."""
    end = datetime.now(UTC) + timedelta(seconds=LEASE if seconds is None else seconds)
    return end.isoformat(timespec="seconds")


def tags(pool: str) -> dict[str, str]:
    """Return the tags of something that this process starts now for one of its pools."""
    return {POOL: tag(pool), PARENT: parent(), EXPIRES: expiry()}


def parent() -> str:
    """Say who this process is: host, pid, when it started, and where that pid means something.

    The last two are for others to compare. Pids are used again, many containers are called
    ``localhost``, and what a pid means ends with its container and with a restart of its machine.
    """
    host = tag(socket.gethostname()).replace("/", "_") or "unknown"
    return f"{host}/{os.getpid()}/{_started(os.getpid()) or 0}/{_place()}"


def left_behind(found: dict[str, str]) -> str | None:
    """Say why something with these tags has no parent any more; ``None`` if it may have one.

    Where the parent can be looked for, on its own machine, that decides. Elsewhere the lease does.
    """
    who, until = found.get(PARENT, ""), found.get(EXPIRES, "")
    if POOL not in found or not who or not until:
        return None
    host, _, rest = who.partition("/")
    pid, _, rest = rest.partition("/")
    started, _, place = rest.partition("/")
    if place and place == _place():
        if not pid.isdecimal() or _started(int(pid)) == started:
            return None
        return f"its parent, process {pid} here, is gone"
    try:
        end = datetime.fromisoformat(until)
        passed = end < datetime.now(UTC)
    except (ValueError, TypeError):  # no time, or one without a zone: not written by a pool
        return None
    return (
        f"its parent on {host} has not renewed its lease, which ended at {until}"
        if passed
        else None
    )


def _place() -> str:
    """Name what pids of this process are valid in; empty where that can't be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        numbers = Path("/proc/self/ns/pid").readlink()
    except OSError:  # not Linux: the lease alone decides there
        return ""
    return hashlib.sha256(f"{boot}{numbers}".encode()).hexdigest()[:16]


def _started(pid: int) -> str | None:
    """Return when a process started, in ticks since the machine did; ``None`` if it has ended."""
    try:
        # The name of its program comes first, and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]

"""What is left of a runner when it dies, however it dies, is ended by its guard (G3).

The guard is a shell in a session of its own, which costs less than a megabyte. It holds the read
end of a pipe whose write end the runner holds. The runner writes down the process groups that it
makes; when the pipe ends the runner is gone, and the guard kills these groups and removes the
runner's folder. It also has an eye on the parent, for a runner that can't: one that is stopped, or
hangs in C code.
"""

from __future__ import annotations

import logging
import math
import os
import subprocess
import threading
from pathlib import Path
from typing import Final

from flame_dask.constants import LAST_RESORT

logger = logging.getLogger("flame_dask.runner")

#: What the guard is run by.
SHELL: Final = "/bin/sh"

#: A file in the runner's folder that is there while work goes on which is not linked (G2).
UNLINKED: Final = "unlinked"

#: Seconds from the parent's end until a runner is killed that does nothing about it. Its own clock,
#: see :mod:`flame_dask.runner.lifeline`, comes first.
HUNG: Final = 0.7 * LAST_RESORT

#: Write ends of the pipes to guards.
_pipes: set[int] = set()


def _forget_pipes() -> None:
    """Let go of them in a forked child, which may live longer than the runner."""
    while _pipes:
        os.close(_pipes.pop())


os.register_at_fork(after_in_child=_forget_pipes)

# $1: the runner's own process group, or nothing; $2: its folder, or nothing; $3: whether standard
# output is the pipe by which the parent's end shows; $4: seconds from then on until the runner is
# killed. If it has unlinked work by then there is a file that says how much longer that may take,
# or is empty if there is no limit.
#
# All of it is put into the background, so that the guard is not the runner's child: what kills the
# runner's children must spare it. The shell would give it another standard input there, if that
# did not come by way of descriptor 4. The clock is a shell of its own, with a child that sleeps:
# they go with SIGTERM, which the guard ignores by then. What dash does not know is kill -KILL, and
# descriptors of two digits.
_SCRIPT: Final = """
trap '' INT HUP
end() {
    if [ -n "$1" ]; then kill -s KILL -- "-$1" 2>/dev/null; fi
}
exec 4<&0
{
    if [ -n "$3" ]; then
        {
            read -r nothing <&1
            sleep "$4"
            if [ -e "$2/unlinked" ]; then
                more=
                read -r more <"$2/unlinked"
                if [ -z "$more" ]; then exit; fi
                sleep "$more"
            fi
            end "$1"
        } &
    fi
    groups=' '
    while read -r act group; do
        case "$act" in
            +) groups="$groups$group " ;;
            -) groups="${groups%% $group *} ${groups#* $group }" ;;
        esac
    done
    for group in $groups; do end "$group"; done
    end "$1"
    if [ -n "$2" ]; then rm -rf -- "$2"; fi
    trap '' TERM
    kill -s TERM 0
} <&4 4<&- &
"""


class Guard:
    """The runner's side of its guard.

    Parameters
    ----------
    group
        The runner's own process group, to be killed as well; ``None`` if it shares it with others.
    folder
        The runner's own folder, to be removed.
    lifeline
        A descriptor at whose end of file the parent is gone.

    Attributes
    ----------
    limit
        Seconds that unlinked work may go on after the parent's end; ``None`` is no limit.
    """

    def __init__(
        self,
        group: int | None = None,
        folder: str | None = None,
        lifeline: int | None = None,
    ) -> None:
        self.limit: float | None = 0.0
        self._folder = folder
        self._lock = threading.Lock()
        self._unlinked = 0
        ours, self._pipe = os.pipe()
        arguments = [
            "" if group is None else str(group),
            folder or "",
            "" if lifeline is None else "yes",
            str(math.ceil(HUNG)),
        ]
        try:
            subprocess.run(
                [SHELL, "-c", _SCRIPT, "flame-guard", *arguments],
                stdin=ours,
                stdout=subprocess.DEVNULL if lifeline is None else lifeline,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
                check=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            logger.warning("no guard for this runner: %s", error)
            os.close(self._pipe)
        else:
            _pipes.add(self._pipe)
        finally:
            os.close(ours)

    def add(self, group: int) -> None:
        """Take note of a process group that has to go with the runner."""
        self._write(f"+ {group}\n")

    def remove(self, group: int) -> None:
        """Take note that a process group is gone."""
        self._write(f"- {group}\n")

    def count_unlinked(self, by: int) -> None:
        """Take note that unlinked work has begun or ended: it may outlive the parent (G2)."""
        if self._folder is None:
            return
        with self._lock:
            before, self._unlinked = self._unlinked, self._unlinked + by
            mark = Path(self._folder, UNLINKED)
            if not before and self._unlinked:
                mark.write_text("" if self.limit is None else f"{math.ceil(self.limit)}\n")
            elif before and not self._unlinked:
                mark.unlink(missing_ok=True)

    def close(self) -> None:
        """Let the guard go about its work, as if the runner had died."""
        if self._pipe in _pipes:
            _pipes.discard(self._pipe)
            os.close(self._pipe)

    def _write(self, line: str) -> None:
        if self._pipe in _pipes:  # it is not in a forked child
            try:
                os.write(self._pipe, line.encode())
            except OSError as error:
                logger.warning("the guard of this runner is gone: %s", error)
                self.close()

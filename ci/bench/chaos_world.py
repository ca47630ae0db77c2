"""The world around the pools of a chaos run: it sees their processes from outside, and harms some.

It knows a process of the run by a variable in its environment, which all processes below a parent
inherit, so also those that have lost their parent.
"""

from __future__ import annotations

import heapq
import itertools
import os
import random
import signal
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil  # type: ignore[import-untyped]
from chaos_calls import CALL_MARKER, FOLDER, MARKER, append

#: Seconds after which a process is what it is: a young one may still be the copy of another one.
GROWN_UP: Final = 2.0

#: What hits a runner, what has to be switched on for it, and how often, in percent.
BLOWS: Final = (("SIGKILL", "kills", 45), ("SIGSTOP", "stops", 30), ("SIGTERM", "terms", 25))

#: Dask's folder for temporary files, and what it keeps there though no worker is left.
DASKS: Final = "dask-scratch-space"
KEPT: Final = frozenset(["global.lock", "purge.lock"])


@dataclass(frozen=True, slots=True)
class Seen:
    """A process of the run.

    Parameters
    ----------
    process
        It.
    life
        The name of the parent to which it belongs.
    call
        The call that has started it, if one has.
    runner
        Whether it is a runner, and not the parent, a scheduler, or something else.
    command
        Its command line.
    """

    process: psutil.Process
    life: str
    call: str | None
    runner: bool
    command: str

    def alive(self) -> bool:
        """Whether it is there still. A dead one that nobody has waited for is not."""
        try:
            status = self.process.status()
            return bool(self.process.is_running()) and status != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass
class Census:
    """All processes of the run.

    Parameters
    ----------
    folder
        Where the records are.
    run
        The name of the run.
    """

    folder: Path
    run: str
    known: dict[int, tuple[psutil.Process, Seen | None]] = field(default_factory=dict)
    programs: dict[int, tuple[str, float]] = field(default_factory=dict)

    def take(self) -> dict[str, list[Seen]]:
        """Look at all processes of the machine.

        Returns
        -------
        dict
            Those of the run, by parent. All of them were alive together when it returned, but for
            what has died in the meantime.
        """
        found: dict[str, list[Seen]] = defaultdict(list)
        pids = psutil.pids()
        for gone in self.known.keys() - set(pids):
            del self.known[gone]
        seen = [s for pid in pids if (s := self._look_at(pid)) is not None]
        # All have been listed by now: those that are still alive are so at the same time.
        for one in seen:
            if one.alive():
                found[one.life].append(one)
        self._note_programs(found)
        return found

    def _look_at(self, pid: int) -> Seen | None:
        if pid in self.known:
            process, seen = self.known[pid]
            if process.is_running():
                return seen
            del self.known[pid]
        try:
            process = psutil.Process(pid)
            young = time.time() - process.create_time() < GROWN_UP
            seen = self._identify(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # dead by now, or somebody else's
            return None
        if not young:
            self.known[pid] = process, seen
        return seen

    def _identify(self, process: psutil.Process) -> Seen | None:
        environment = process.environ()
        run, _, life = environment.get(MARKER, "").partition("/")
        if run != self.run:
            return None
        command = process.cmdline()
        call = environment.get(CALL_MARKER)
        runner = is_runner(command)
        if runner:
            # What a runner is just starting looks like it until it has become another program.
            above = process.parent()
            runner = above is None or not is_runner(above.cmdline())
        return Seen(process, life, call, runner, " ".join(command)[:160])

    def _note_programs(self, found: dict[str, list[Seen]]) -> None:
        """Write down which programs of calls are gone by now, and when they were last seen."""
        now = time.monotonic()
        programs = {
            one.process.pid: (one.call, now)
            for those in found.values()
            for one in those
            if one.call is not None
        }
        for pid in self.programs.keys() - programs.keys():
            call, last = self.programs[pid]
            append(self.folder / "work.jsonl", "work", call=call, seen=last)
        self.programs = programs

    def kill(self, life: str | None = None) -> None:
        """End what is left of a parent, or of all, and wait for that."""
        found = self.take()
        doomed = [one.process for name in found if life in (None, name) for one in found[name]]
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(doomed, timeout=5)


@dataclass
class Blows:
    """What befalls the runners of one parent.

    Parameters
    ----------
    folder
        Where the records are.
    life
        The parent's name.
    rng
        What decides.
    features
        What is switched on.
    rate
        Blows a minute.
    """

    folder: Path
    life: str
    rng: random.Random
    features: Sequence[str]
    rate: float
    due: float = 0.0
    frozen: list[tuple[float, int, psutil.Process]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._kinds = [
            (name, weight) for name, feature, weight in BLOWS if feature in self.features
        ]
        self._numbers = itertools.count()
        self._plan()

    def _plan(self) -> None:
        self.due = time.monotonic() + self.rng.expovariate(self.rate / 60)

    def strike(self, runners: Sequence[Seen]) -> None:
        """Hit a runner, if it is time to."""
        self.thaw()
        if time.monotonic() < self.due or not self._kinds or not runners:
            return
        self._plan()
        names, weights = zip(*self._kinds, strict=True)
        [name] = self.rng.choices(names, weights)
        victim = self.rng.choice(sorted(runners, key=lambda seen: seen.process.create_time()))
        # Before it happens: a parent that hears of it must not be told that there was nothing.
        append(
            self.folder / "world.jsonl",
            "hit",
            life=self.life,
            pid=victim.process.pid,
            signal=name,
        )
        with suppress(psutil.NoSuchProcess):
            victim.process.send_signal(signal.Signals[name])
            if name == "SIGSTOP":
                pause = self.rng.choices(
                    [self.rng.uniform(0.1, 2.0), self.rng.uniform(3.0, 8.0), float("inf")],
                    [70, 22, 8],
                )[0]
                thaw = time.monotonic() + pause
                heapq.heappush(self.frozen, (thaw, next(self._numbers), victim.process))

    def thaw(self, *, all_of_them: bool = False) -> None:
        """Let go on those whose time has come."""
        now = time.monotonic()
        while self.frozen and (all_of_them or self.frozen[0][0] <= now):
            _, _, process = heapq.heappop(self.frozen)
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def is_runner(command: Sequence[str]) -> bool:
    """Whether a command line is that with which a pool starts a worker process."""
    return "--spec" in command and "distributed.Worker" in command[-1]


def listening(pids: set[int]) -> dict[int, set[int]]:
    """Return the TCP ports on which processes listen, by pid."""
    ports: dict[int, set[int]] = defaultdict(set)
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.pid in pids:
            ports[connection.pid].add(connection.laddr.port)
    return ports


def still_listening(ports: set[int], life: str) -> list[str]:
    """Return which of these ports a process of this life listens on, or one that nobody knows.

    A port that is free is soon somebody else's: another parent's, or another program's.
    """
    return [
        f"port {c.laddr.port} (pid {c.pid})"
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port in ports and not _of_another(c.pid, life)
    ]


def _of_another(pid: int | None, life: str) -> bool:
    try:
        marker = psutil.Process(pid).environ().get(MARKER, "") if pid else f"/{life}"
    except psutil.Error:
        return False
    return marker.partition("/")[2] != life


def files_in(folder: Path, *, killed: bool) -> list[str]:
    """Return what is left in the folder for temporary files of a parent, by the first names.

    Left out is what Dask keeps for its next worker or scheduler, and what only that one removes:
    the folder of a scheduler whose process was killed.

    Parameters
    ----------
    folder
        The folder.
    killed
        Whether the parent was killed, in which the scheduler may have been.
    """
    found = set()
    for path in folder.rglob("*"):
        first, *rest = path.relative_to(folder).parts
        if first == DASKS and (killed or not rest or rest[0] in KEPT):
            continue
        found.add("/".join([first, *rest[:1]]) if first == DASKS else first)
    return sorted(found)


def environment(folder: Path, marker: str, temporary: Path, here: Path) -> dict[str, str]:
    """Return the environment of a parent, which all of its processes inherit."""
    paths = [str(here), os.environ.get("PYTHONPATH", "")]
    own: dict[str, Any] = {
        MARKER: marker,
        FOLDER: folder,
        "TMPDIR": temporary,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # Boots fail often here; callers are not to wait half a minute for the next try.
        "DASK_FLAME__BOOT_BACKOFF__CAP": "2s",
    }
    return {**os.environ, **{name: str(value) for name, value in own.items()}}

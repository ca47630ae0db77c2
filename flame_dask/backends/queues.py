"""What job queues say of their jobs, for :mod:`flame_dask.backends.jobqueue`.

dask-jobqueue submits jobs and cancels them; what becomes of one it doesn't ask. A pool has to know:
a job that ended before it was a runner is a failed boot, and one that is still there costs money.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from flame_dask.backends.base import Loss
from flame_dask.constants import OOM_EXIT

logger = logging.getLogger("flame_dask")

#: Seconds for a queue's program to answer; a controller under load takes its time.
ANSWER_LIMIT: float = 60.0


class JobState(NamedTuple):
    """What a queue says of a job."""

    name: str = "gone"
    """In the queue's own word; ``gone`` if it does not know the job any more."""
    there: bool = False
    """Whether it is still in the queue: waits, runs, or is being ended."""
    hopeless: bool = False
    """Whether it is there, but will never run: a held job, say."""
    loss: Loss | None = None
    """What it died of."""
    exit_code: int | None = None
    """Negative for a signal."""
    reason: str = ""
    """The queue's own, for whatever it is the reason of."""


@dataclass(frozen=True)
class Kind:
    """How a kind of queue is asked for the states of jobs, and how its answer is read.

    Parameters
    ----------
    command
        The program and its arguments; ``{}`` stands for the jobs.
    row
        A line of the answer: ``id``, ``state``, and perhaps ``code`` and ``reason``.
    ended
        The states of jobs that are over, with what they died of; ``exited`` is for those of which
        the exit code says more.
    hopeless
        States of jobs that are there and will never run.
    unknown
        What the program says when it fails because it does not know a job, or any more. After any
        other failure nothing is known.
    separator
        Stands between jobs; a space makes each an argument of its own.
    kill
        The program that kills a job without asking it to end; jobs are added to its arguments.
    wait_status
        Whether ``code`` is what ``wait`` gives, instead of an exit code.
    """

    command: tuple[str, ...]
    row: re.Pattern[str]
    ended: Mapping[str, Loss | None]
    hopeless: re.Pattern[str] = field(default_factory=lambda: re.compile(r"(?!)"))
    unknown: re.Pattern[str] = field(default_factory=lambda: re.compile(r"(?!)"))
    separator: str = " "
    kill: tuple[str, ...] | None = None
    wait_status: bool = False

    def arguments(self, jobs: Sequence[str]) -> list[str]:
        """Return the command that asks for some jobs.

        Examples
        --------
        >>> KINDS["pbs"].arguments(["7", "8"])
        ['qstat', '7', '8']
        """
        named = [self.separator.join(jobs)] if self.separator != " " else list(jobs)
        words: list[str] = []
        for word in self.command:
            words += named if word == "{}" else [word.replace("{}", self.separator.join(jobs))]
        return words

    def read(self, jobs: Sequence[str], code: int, said: str) -> dict[str, JobState]:
        """Return the states of jobs, by what the command said.

        Parameters
        ----------
        jobs
            Those that it was asked for.
        code
            The exit code.
        said
            Its output, with that for errors.

        Raises
        ------
        RuntimeError
            If it can't be told.

        Examples
        --------
        >>> KINDS["slurm"].read(["7", "8"], 0, "7|RUNNING|0|None|")["8"].name
        'gone'
        """
        rows = {found["id"]: found for found in self.row.finditer(said)}
        if code and not self.unknown.search(said) and not rows.keys() >= set(jobs):
            raise RuntimeError(f"{self.command[0]}: exit code {code}: {said.strip()}")
        return {job: self._state(rows[job]) if job in rows else JobState() for job in jobs}

    def _state(self, row: re.Match[str]) -> JobState:
        parts = row.groupdict()
        name, reason = parts["state"], parts.get("reason") or ""
        if name not in self.ended:
            return JobState(name, True, bool(self.hopeless.search(name)), reason=reason)
        code, loss = self._exit_code(parts.get("code") or ""), self.ended[name]
        if loss == "exited" and code is not None:
            loss = "oom" if code == OOM_EXIT else "signal" if code < 0 else "exited"
        return JobState(name, False, False, loss, code, reason)

    def _exit_code(self, said: str) -> int | None:
        if not said.isdigit():
            return None
        code = int(said)
        if self.wait_status:
            if code & 0x7F:
                return -(code & 0x7F)
            code >>= 8
        # A shell in between tells of a signal in a number of its own.
        return 128 - code if code > 128 else code


#: The kinds of queues that can be asked, by the name that dask-jobqueue has for their section of
#: the configuration. Only SLURM's has been tried with the real thing.
KINDS: Final[Mapping[str, Kind]] = {
    "slurm": Kind(
        # All states: without that, a job that is over is not shown. With one job the program
        # fails for one that is not known any more; with several it leaves that out.
        command=(
            "squeue",
            "--noheader",
            "--states=all",
            "--Format=JobID:|,State:|,exit_code:|,Reason:|",
            "--jobs={}",
        ),
        row=re.compile(r"^(?P<id>\d+)\|(?P<state>\w+)\|(?P<code>\d*)\|(?P<reason>[^|\n]*)\|", re.M),
        ended={
            "COMPLETED": "exited",
            "FAILED": "exited",
            "OUT_OF_MEMORY": "oom",
            "CANCELLED": "preempted",
            "PREEMPTED": "preempted",
            "DEADLINE": "preempted",
            "TIMEOUT": "preempted",
            "REVOKED": "preempted",
            "NODE_FAIL": None,
            "BOOT_FAIL": None,
        },
        unknown=re.compile("Invalid job id specified"),
        separator=",",
        kill=("scancel", "--full", "--signal=KILL"),
        wait_status=True,
    ),
    "pbs": Kind(
        command=("qstat", "{}"),
        row=re.compile(r"^(?P<id>\d+)\S*(?:\s+\S+){3}\s+(?P<state>[A-Z])\s", re.M),
        ended={"C": None, "F": None, "X": None},
        unknown=re.compile("Unknown Job Id|Job has finished", re.I),
    ),
    "sge": Kind(
        command=("qstat",),  # all of the user's: it knows no list of jobs
        row=re.compile(r"^\s*(?P<id>\d+)(?:\s+\S+){3}\s+(?P<state>[a-zA-Z]+)\s", re.M),
        ended={},
        hopeless=re.compile("E"),
    ),
    "lsf": Kind(
        command=("bjobs", "-noheader", "-o", "jobid stat exit_code delimiter='|'", "{}"),
        row=re.compile(r"^(?P<id>\d+)\|(?P<state>\w+)\|(?P<code>\d*)", re.M),
        ended={"DONE": "exited", "EXIT": "exited"},
        unknown=re.compile("is not found"),
    ),
    "htcondor": Kind(
        command=("condor_q", "{}", "-af:j", "JobStatus"),
        row=re.compile(r"^(?P<id>\d+\.\d+) (?P<state>\d)", re.M),
        ended={"3": None, "4": None},  # removed, completed
        hopeless=re.compile("5"),  # held
    ),
}


def kind_of(job_class: type) -> Kind | None:
    """Return the kind of queue that jobs of a class are in; ``None`` if it can't be asked.

    It is told by the class of dask-jobqueue itself, since classes that inherit from it often have
    a section of the configuration of their own.
    """
    for cls in job_class.__mro__:
        if cls.__module__.partition(".")[0] == "dask_jobqueue":
            return KINDS.get(getattr(cls, "config_name", None) or "")
    return None


class Queue:
    """Asks a queue for the states of jobs: with one command for all that is wanted at a moment.

    Parameters
    ----------
    kind
        How it is asked.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._wanted: dict[str, list[asyncio.Future[JobState]]] = {}
        self._asking: asyncio.Task[None] | None = None

    async def look(self, job: str) -> JobState:
        """Return the state of a job.

        Raises
        ------
        RuntimeError, OSError
            If the queue does not say it.
        """
        answer: asyncio.Future[JobState] = asyncio.get_running_loop().create_future()
        self._wanted.setdefault(job, []).append(answer)
        if self._asking is None:
            self._asking = asyncio.ensure_future(self._ask())
        return await answer

    async def _ask(self) -> None:
        """Ask for all that is wanted; what comes up meanwhile is for another turn."""
        try:
            while self._wanted:
                wanted, self._wanted = self._wanted, {}
                answers: dict[str, JobState] = {}
                problem: Exception | None = None
                try:
                    answers = self._kind.read(list(wanted), *await self._said(list(wanted)))
                except Exception as error:  # whoever asked is told, whatever it is
                    problem = error
                for job, futures in wanted.items():
                    for future in futures:
                        if future.done():  # whoever asked has given up
                            continue
                        if problem is None:
                            future.set_result(answers[job])
                        else:
                            future.set_exception(problem)
        finally:
            self._asking = None

    async def _said(self, jobs: list[str]) -> tuple[int, str]:
        return await run(self._kind.arguments(jobs))

    async def kill(self, job: str) -> None:
        """Kill a job without asking it to end, where the queue has a way to do so."""
        if self._kind.kill is not None:
            code, said = await run([*self._kind.kill, job])
            if code:  # its end by the ordinary way follows, and tells of a failure
                logger.info("%s %s: %s", self._kind.kill[0], job, said.strip())


async def run(command: Sequence[str]) -> tuple[int, str]:
    """Run a program; return its exit code and all that it has said.

    Raises
    ------
    OSError
        If it can't be run, or has no end.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(ANSWER_LIMIT):
            said, _ = await process.communicate()
    except TimeoutError as error:
        raise TimeoutError(f"{command[0]} has not answered within {ANSWER_LIMIT:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return process.returncode, said.decode(errors="replace")

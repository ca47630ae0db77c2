"""One job of a queue that is a runner; for :mod:`flame_dask.backends.jobqueue`."""

from __future__ import annotations

import asyncio
import importlib.resources
import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from distributed.deploy.spec import ProcessInterface

from flame_dask.backends.base import Ending
from flame_dask.backends.process import describe_exit
from flame_dask.backends.queues import JobState, Queue
from flame_dask.constants import LAST_RESORT

logger = logging.getLogger("flame_dask")

#: Seconds between two looks into the queue: at first, and at most. A job that fails at once is
#: noticed soon, and one that waits long is no burden for the queue.
FIRST_LOOK: float = 1.0
LAST_LOOK: Final = 30.0

#: Seconds between two looks whether a runner is still connected. They cost nothing.
CONNECTION_LOOK: Final = 0.25

#: Seconds for the queue to notice that a job is over whose runner is gone.
OWN_END: Final = 0.8

#: Seconds after which a job that is still there is cancelled anew.
CANCEL_AGAIN: Final = 60.0


class JobFolder:
    """A folder of the pool's own that its jobs can reach; made when it is needed.

    Parameters
    ----------
    parent
        Where it is made; the working directory by default, as in dask-jobqueue.
    """

    def __init__(self, parent: str | None) -> None:
        self._parent = os.path.expanduser(os.path.expandvars(parent)) if parent else None  # noqa: PTH111
        self._path: str | None = None

    def path(self) -> Path:
        """Return the folder. Nobody else can look into it."""
        if self._path is None:
            where = self._parent or os.getcwd()  # noqa: PTH109
            self._path = tempfile.mkdtemp(prefix=".flame-", dir=where)
        return Path(self._path)

    def write(self, text: str) -> Path:
        """Write a text into a new file, for the user's eyes only."""
        handle, name = tempfile.mkstemp(suffix=".py", dir=self.path())
        os.close(handle)
        path = Path(name)
        path.write_text(text)
        return path

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            self._path = None


class JobRunner(ProcessInterface):
    """A worker that is a job.

    Parameters
    ----------
    scheduler
        The address that it is to connect to.
    name
        The runner's id.
    job_class, job_options
        The vendor's class, and what it is made with.
    python
        What runs Python on the nodes: a part of a command line.
    log_directory
        Where the queue is to leave what the job says; ``folder`` by default.
    folder
        For what the runner needs.
    queue
        Says what becomes of the job; ``None`` if nothing does.
    environment
        Environment variables, with certificates.
    connected
        Says of a runner whether it is connected to the scheduler.

    Attributes
    ----------
    connected
        Whether it has ever been: one that dies the moment after was there, too.
    """

    def __init__(
        self,
        scheduler: str,
        name: str,
        job_class: Any,
        job_options: Mapping[str, Any],
        python: str,
        log_directory: str | None,
        folder: JobFolder,
        queue: Queue | None,
        environment: Mapping[str, str],
        connected: Callable[[str], bool],
    ) -> None:
        super().__init__(scheduler, name)
        self.name = name
        self._scheduler = scheduler
        self._job_class = job_class
        self._options = job_options
        self._python = python
        self._log_directory = log_directory
        self._folder = folder
        self._queue = queue
        self._environment = environment
        self._is_connected = connected
        self.connected = False
        self._file: Path | None = None
        self.job: Any = None
        self._submission: asyncio.Future[None] | None = None
        self._state: JobState | None = None
        self._told_to_end = False
        self._gone = False

    async def start(self) -> None:
        """Submit the job."""
        text = (importlib.resources.files("flame_dask.backends") / "jobqueue_start.py").read_text()
        # On a line of its own, which no traceback shows.
        text = f"environment = {dict(self._environment)!r}\n{text}\nstart(environment)\n"
        self._file = self._folder.write(text)
        self.job = self._job_class(
            self._scheduler,
            name=self.name,
            python=f"{self._python} {shlex.quote(str(self._file))}",
            log_directory=self._log_directory or str(self._folder.path()),
            **self._options,
        )
        # Whoever gives up must not cut it off: there may be a job whose number nobody knows.
        self._submission = asyncio.ensure_future(self.job.start())
        try:
            await asyncio.shield(self._submission)
        except FileNotFoundError as error:
            problem = f"there is no program {error.filename}: jobs can't be submitted from here"
            raise RuntimeError(problem) from error
        except RuntimeError as error:
            # The vendor tells of the whole command. What counts is what the queue says.
            words = str(error).partition("stderr:")[2].strip() or str(error)
            raise RuntimeError(words) from error
        await super().start()

    def _here(self) -> bool:
        return self._is_connected(self.name)

    async def finished(self) -> None:
        """Wait until the job is over, or can't begin.

        The queue is asked only while there is no connection to the runner.
        """
        pause = FIRST_LOOK
        while True:
            if self._here():
                pause = FIRST_LOOK
                await asyncio.sleep(CONNECTION_LOOK)
                continue
            if self._queue is None:
                if self.connected:
                    return
                await asyncio.sleep(CONNECTION_LOOK)
                continue
            try:
                self._state = await self._queue.look(self.job.job_id)
            except (RuntimeError, OSError):
                # It may be down for a while, and its jobs go on.
                logger.warning("can't see what becomes of job %s", self.job.job_id, exc_info=True)
            else:
                if not self._state.there or self._state.hopeless:
                    return
            end = asyncio.get_running_loop().time() + pause
            while not self._here() and asyncio.get_running_loop().time() < end:
                await asyncio.sleep(min(CONNECTION_LOOK, pause))
            pause = min(pause * 1.5, LAST_LOOK)

    async def end(self, force: bool = False) -> None:
        """Cancel the job, and wait until the queue no longer has it."""
        await self._end(force, self._here)

    async def _end(self, force: bool, connected: Callable[[], bool]) -> None:
        async with self.lock:  # not while it is being started
            if self._gone:
                return
            if self._submission is not None:
                await asyncio.wait([self._submission])
                if not self._submission.cancelled():
                    self._submission.exception()  # whoever waited for it has been told
            if self._file is not None:
                self._file.unlink(missing_ok=True)
            if self.job is not None and self.job.job_id is not None:
                if self._queue is None:
                    await self._cancel_unseen(connected)
                elif self._state is None or self._state.there:
                    await self._cancel(self._queue, force, connected)
                await self._disconnected(connected)
            self._gone = True

    async def _cancel_unseen(self, connected: Callable[[], bool]) -> None:
        """Cancel a job in a queue that can't be asked: all there is to see is the connection."""
        self._told_to_end = True
        await self.job.close()
        if not await self._disconnected(connected, CANCEL_AGAIN):
            raise RuntimeError(f"job {self.job.job_id} goes on though it was cancelled")

    async def _cancel(self, queue: Queue, force: bool, connected: Callable[[], bool]) -> None:
        job, loop = self.job, asyncio.get_running_loop()
        state = await queue.look(job.job_id)
        if self.connected and not connected():
            # It may have ended by itself a moment ago: to cancel it now would hide how.
            end = loop.time() + OWN_END
            while state.there and loop.time() < end:
                await asyncio.sleep(0.1)
                state = await queue.look(job.job_id)
        self._state = state
        if not state.there:
            return
        self._told_to_end = True
        if force:
            await queue.kill(job.job_id)
        await job.close()
        pause, again = 0.1, loop.time() + CANCEL_AGAIN
        while (await queue.look(job.job_id)).there:
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, 5.0)
            if loop.time() > again:
                await job.close()
                again = loop.time() + CANCEL_AGAIN

    async def _disconnected(
        self, connected: Callable[[], bool], seconds: float = LAST_RESORT
    ) -> bool:
        """Wait until the runner has let go of its connection; say whether it has.

        A queue may no longer have a job whose processes are just being ended. One that was to be
        queued anew, for instance, is gone at once.
        """
        end = asyncio.get_running_loop().time() + seconds
        while connected():
            if asyncio.get_running_loop().time() > end:
                logger.warning("the queue has no job %s, but it goes on", self.job.job_id)
                return False
            await asyncio.sleep(CONNECTION_LOOK / 5)
        return True

    async def close(self) -> None:
        """Cancel the job."""
        await self._end(False, lambda: False)
        await super().close()

    def cancel_command(self) -> list[str]:
        """Return the command that cancels the job; nothing if there is none."""
        if self._gone or self.job is None or self.job.job_id is None:
            return []
        return [*shlex.split(self.job.cancel_command), self.job.job_id]

    async def ending(self) -> Ending:
        """Say how the job ended."""
        state = self._state
        if self.job is None or self.job.job_id is None or state is None:
            return Ending()
        number = self.job.job_id
        cause = f"job {number} was {state.name}" if state.there else f"job {number}: {state.name}"
        if state.exit_code:
            cause += f", {describe_exit(state.exit_code)}"
        if state.reason not in ("", "None"):
            cause += f" ({state.reason})"
        log = await asyncio.to_thread(self._log)
        if not log and not self.connected and not state.there:
            cause += (
                f"; it has left no word in {self._log_directory or self._folder.path()}, "
                "which has to be a folder that the nodes share (shared_temp_directory)"
            )
        if state.there:
            # It was cancelled while it waited, or did not get as far as to connect: who waits for
            # it wants to know why.
            log = [*log, cause]
        loss = None if self._told_to_end else state.loss
        return Ending(cause=cause, exit_code=state.exit_code, log_tail=tuple(log), loss=loss)

    def _log(self, lines: int = 20) -> list[str]:
        """Return the last lines that the job has left in its files."""
        folder = Path(self._log_directory or self._folder.path())
        of_it = re.compile(rf"(?<![\d.]){re.escape(self.job.job_id)}(?!\d)")
        said: list[str] = []
        try:
            found = [path for path in folder.iterdir() if of_it.search(path.name)]
            for path in sorted(found, key=lambda path: path.stat().st_mtime):
                with path.open("rb") as file:
                    file.seek(max(path.stat().st_size - 16_384, 0))
                    said += file.read().decode(errors="replace").splitlines()
        except OSError as error:
            said.append(f"its log can't be read: {error}")
        return said[-lines:]

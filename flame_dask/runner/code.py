"""The parent's code on this runner: got as it boots, and kept up to date call by call (J2 to J4).

Getting it is done in a thread of its own. A call that needs more than there is waits for that, in
a way in which it can be ended at any moment; what it waits for goes on.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flame_dask import dask_internals as internals
from flame_dask import package
from flame_dask.code_sync import packages
from flame_dask.code_sync.archive import sendable
from flame_dask.code_sync.receiver import NotCopied, Places, Receiver
from flame_dask.errors import BootError
from flame_dask.runner import here

if TYPE_CHECKING:
    from distributed import Worker

logger = logging.getLogger("flame_dask.runner")

#: Seconds between two looks whether new code is there.
_PAUSE: Final = 0.002

#: The last lines of a traceback that the parent is shown.
_LINES: Final = 50


class NotReady(Exception):
    """A runner can't work for its parent.

    Parameters
    ----------
    phase
        How far it came, as in :class:`~flame_dask.BootError`.
    cause
        Why.
    log_tail
        What more there is to say.
    """

    def __init__(self, phase: str, cause: str, log_tail: list[str] | None = None) -> None:
        super().__init__(phase, cause, log_tail)
        self.phase = phase
        self.cause = sendable(cause)
        self.log_tail = [sendable(line) for line in log_tail or ()]


class RunnerCode:
    """The code of a runner's parent.

    Parameters
    ----------
    worker
        The Dask worker.
    places
        Where it is put.
    changed
        Is called, in a thread, when there is other code than before, with the folder of the files.
    """

    def __init__(self, worker: Worker, places: Places, changed: Callable[[Path], None]) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._changed = changed
        own = Path(worker.local_directory)
        self._base = own if places.extract_dir is None else Path(places.extract_dir)
        self._tmp = None if places.tmp_dir is None else Path(places.tmp_dir)
        self._receiver: Receiver | None = None
        self._revision = -1
        self._tickets: list[_Ticket] = []
        self._busy = False
        self._closed = False
        self._asked: Future[dict[str, Any]] | None = None

    # -- the boot: in a thread -----------------------------------------------------------------

    def boot(self, info: here.ParentInfo | None, runner: str) -> None:
        """Get everything, and start what is to be started.

        Parameters
        ----------
        info, runner
            What this process is to know of its parent.

        Raises
        ------
        NotReady
            It can't be done.
        """
        problem = "" if info is None else package.misfit(package.versions(), info.versions)
        if problem:
            raise NotReady("code", problem)
        try:
            receiver = self._receiver = Receiver(self._ask, self._base, self._tmp)
            if self._closed:
                receiver.close()
            receiver.update()
        except (NotCopied, OSError) as error:
            raise NotReady("code", f"the parent's code can't be got: {error}") from error
        self._check_packages(receiver.first)
        here.arrive(info, runner, receiver.files)
        self._changed(receiver.files)
        self._revision = receiver.revision
        for app in receiver.first["apps"]:
            self._start_app(app)

    def _check_packages(self, first: dict[str, Any]) -> None:
        unfit = packages.unfit(first["packages"])
        if not unfit:
            return
        text = f"packages that the program uses don't fit here: {'; '.join(unfit)}"
        if not first["only_warn"]:
            raise NotReady(
                "code", f"{text}: install them, or set packages='warn' or 'ignore' in code_sync"
            )
        logger.warning("%s", text)

    def _start_app(self, app: str) -> None:
        module, _, function = app.partition(":")
        try:
            start: Any = importlib.import_module(module)
            for name in function.split("."):
                start = getattr(start, name)
            started = start()
            if inspect.iscoroutine(started):
                asyncio.run_coroutine_threadsafe(started, self._loop).result()
        except BaseException as error:
            story = traceback.format_exception(error)
            name = type(error).__name__
            raise NotReady(
                "apps",
                f"start_apps: {app} raised {name}: {error}",
                "".join(story).splitlines()[-_LINES:],
            ) from error

    def _ask(self, since: int, stream: int) -> dict[str, Any]:
        try:
            asked = internals.ask_for_code(self._worker, since, stream)
            self._asked = asyncio.run_coroutine_threadsafe(asked, self._loop)
            if self._closed:
                self._asked.cancel()
            return self._asked.result()
        except (OSError, RuntimeError, CancelledError) as error:
            raise NotCopied(f"the way to the parent is cut: {error}") from error

    # -- calls ---------------------------------------------------------------------------------

    def require(self, revision: int, given_up: Callable[[], object] = lambda: False) -> None:
        """Wait for a revision; in the thread of a call, where an exception may strike.

        Parameters
        ----------
        revision
            Which.
        given_up
            Tells whether it need not be waited for any more.

        Raises
        ------
        BootError
            It can't be got.
        """
        if self._revision >= revision:
            return
        ticket = _Ticket(revision)
        self._loop.call_soon_threadsafe(self._take, ticket)
        # No lock is held, and none is waited for, when the exception strikes.
        while not ticket.done and not given_up():
            time.sleep(_PAUSE)
        if ticket.error is not None:
            raise ticket.error

    async def require_async(self, revision: int) -> None:
        """Wait for a revision; on the event loop. Errors are those of :meth:`require`."""
        if self._revision >= revision:
            return
        ticket = _Ticket(revision)
        self._take(ticket)
        while not ticket.done:
            await asyncio.sleep(_PAUSE)
        if ticket.error is not None:
            raise ticket.error

    def _take(self, ticket: _Ticket) -> None:
        if self._closed:
            ticket.settle(BootError("code", "the runner is closing"))
            return
        self._tickets.append(ticket)
        self._serve(None)

    def _serve(self, error: BootError | None) -> None:
        """Settle what can be settled, and have the rest seen to; on the event loop."""
        for ticket in self._tickets:
            if error is not None or self._revision >= ticket.revision:
                ticket.settle(error)
        self._tickets = [ticket for ticket in self._tickets if not ticket.done]
        if self._tickets and not self._busy:
            self._busy = True
            threading.Thread(target=self._update, name="flame-code", daemon=True).start()

    def _update(self) -> None:
        assert self._receiver is not None, "calls come when the boot is over"
        error: BootError | None = None
        try:
            self._receiver.update()
            self._changed(self._receiver.files)
        except NotCopied as failure:
            error = BootError("code", f"the parent's code can't be got: {failure}")
        except Exception as failure:
            logger.exception("the parent's code can't be taken over")
            error = BootError("code", failure)
        try:
            self._loop.call_soon_threadsafe(self._updated, error)
        except RuntimeError:  # the loop is closed, and the runner with it
            logger.debug("too late for new code")

    def _updated(self, error: BootError | None) -> None:
        assert self._receiver is not None, "it has just been used"
        self._busy = False
        self._revision = self._receiver.revision
        self._serve(error)

    def stop(self) -> None:
        """Get nothing more; on the event loop."""
        self._closed = True
        if self._asked is not None:
            self._asked.cancel()
        for ticket in self._tickets:
            ticket.settle(BootError("code", "the runner is closing"))
        self._tickets.clear()

    def close(self) -> None:
        """Remove all that has been copied, after it has been stopped; in a thread."""
        if self._receiver is not None:
            self._receiver.close()


class _Ticket:
    """What a call waits for. Only plain attributes are used by both threads."""

    def __init__(self, revision: int) -> None:
        self.revision = revision
        self.error: BootError | None = None
        self.done = False

    def settle(self, error: BootError | None) -> None:
        self.error = error
        self.done = True

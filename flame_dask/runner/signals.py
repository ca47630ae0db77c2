"""SIGTERM, for a runner that is a process of its own (E5)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

_taken = False


def take_sigterm(
    loop: asyncio.AbstractEventLoop, handler: Callable[[], object]
) -> Callable[[], None]:
    """Have a function called on the event loop when SIGTERM comes; in the main thread only.

    That is in place of what Dask's command line does: it closes a worker at once.

    Returns
    -------
    Callable
        Puts things back as they were.
    """
    global _taken  # noqa: PLW0603  # there is one SIGTERM a process
    before = signal.getsignal(signal.SIGTERM)
    loop.add_signal_handler(signal.SIGTERM, handler)
    _taken = True

    def give_back() -> None:
        global _taken  # noqa: PLW0603
        _taken = False
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)

    return give_back


def _leave_to_the_runner() -> None:
    """Do without it in a forked child.

    A signal there would be told to the event loop of the runner by the socket that both have, and
    the runner would take it for its own. Children get SIGTERM when their call has to end.
    """
    if _taken:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_the_runner)

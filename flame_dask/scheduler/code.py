"""Code on its way from the parent to its runners: what they ask is handed on, and the answers (J3).

A runner asks for each piece when it has dealt with the one before. So nobody on the way ever holds
more than one piece for each runner, however slow that is.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Final

Message = dict[str, Any]

#: What runners are told when there is nobody who could answer.
NOBODY: Final = {"refused": "the parent is gone"}


class CodeRelay:
    """Hands on between runners and the parent.

    Parameters
    ----------
    runner_at
        The runners, by their addresses.
    send
        Sends a message to the parent; says whether there is one.
    """

    def __init__(self, runner_at: Mapping[str, str], send: Callable[[Message], bool]) -> None:
        self._runner_at = runner_at
        self._send = send
        self._numbers = itertools.count(1)
        self._open: dict[int, tuple[str, asyncio.Future[Message]]] = {}

    async def ask(self, comm: object, address: str, since: int, stream: int) -> Message:
        """Take what a runner asks; answer when the parent has."""
        runner = self._runner_at.get(address)
        no = next(self._numbers)
        question = {"what": "code", "runner": runner, "no": no, "since": since, "stream": stream}
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        if runner is not None:
            self._open[no] = runner, answer
        if runner is None or not self._send(question):
            self._open.pop(no, None)
            return {"status": "OK", "answer": NOBODY}
        return {"status": "OK", "answer": await answer}

    def answered(self, client: str, no: int, answer: Message) -> None:
        """Take the parent's answer."""
        _, waiting = self._open.pop(no, ("", None))
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def gone(self, runner: str) -> None:
        """Tell the parent that a runner asks nothing more."""
        for no in [no for no, (who, _) in self._open.items() if who == runner]:
            self.answered("", no, NOBODY)
        self._send({"what": "code-done", "runner": runner})

    def give_up(self) -> None:
        """Answer all that waits: the parent is gone."""
        for no in list(self._open):
            self.answered("", no, NOBODY)

"""The books of a chaos run, put together from the lines that all of its processes have written.

It reads files, and knows nothing of pools: so the accounting can be tested with forged lines.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = Mapping[str, Any]


@dataclass(slots=True)
class Start:
    """One start of a function, as it has recorded it, and when that came to an end."""

    at: float
    pid: int
    runner: int
    ended: float | None = None


@dataclass(slots=True)
class Call:
    """A call: what its parent has recorded of it, and its function.

    Parameters
    ----------
    name, life, kind, how, limit, retries, link
        As in the parent's program.
    made
        When.
    overs
        What its caller was told: one line, if all is well.
    starts
        Each start of its function.
    beat, finished, alive
        When its function last said that it went on, when it came to its end, and when a process
        that it had started was last seen.
    """

    name: str
    life: str
    kind: str
    how: str
    limit: float
    retries: int
    link: bool
    made: float
    overs: list[Line] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    beat: float | None = None
    finished: float | None = None
    alive: float | None = None

    @property
    def outcome(self) -> str | None:
        """What has become of it, in a word."""
        return self.overs[0]["outcome"] if self.overs else None

    @property
    def error(self) -> str | None:
        """The type of its error."""
        return self.overs[0].get("error") if self.overs else None

    @property
    def over(self) -> float | None:
        """When its caller had an outcome."""
        return self.overs[0]["at"] if self.overs else None


@dataclass(slots=True)
class Life:
    """One parent, from its start until nothing of it is left.

    Parameters
    ----------
    name, options
        Its name, and the options of its pool.
    began, ended, how
        When it was started, and when it was told to end, and how.
    gone
        What was left of it at last, and after how long.
    most_status, samples
        The most runners that the pool's status has shown, and how often that was asked.
    most_runners, looks
        The most runner processes that were seen at one instant, and how often they were counted.
    hits
        The runners, by pid, that were sent a signal.
    no_status
        What asking for the status has raised, other than PoolClosed.
    """

    name: str
    options: Mapping[str, Any]
    began: float
    how: str = ""
    ended: float | None = None
    gone: Line | None = None
    most_status: int = 0
    samples: int = 0
    most_runners: int = 0
    looks: int = 0
    hits: set[int] = field(default_factory=set)
    no_status: list[str] = field(default_factory=list)

    @property
    def max(self) -> int:
        """The most runners that may be there."""
        return int(self.options["max"])


@dataclass(slots=True)
class Books:
    """All that was recorded in a run."""

    calls: dict[str, Call] = field(default_factory=dict)
    lives: dict[str, Life] = field(default_factory=dict)
    strangers: set[str] = field(default_factory=set)
    signals: Counter[str] = field(default_factory=Counter)
    fates: Counter[str] = field(default_factory=Counter)
    openings_failed: int = 0
    seconds: float = 0.0


# -- reading ---------------------------------------------------------------------------------------


def lines(path: Path) -> Iterator[Line]:
    """Yield what was appended to a file, oldest first."""
    if path.exists():
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)


def read(folder: Path) -> Books:
    """Put together what parents, functions, boots and the world outside have written down.

    Parameters
    ----------
    folder
        Where the records are.
    """
    books = Books()
    for line in lines(folder / "world.jsonl"):
        _read_world(books, line)
    for path in sorted(folder.glob("calls-*.jsonl")):
        for line in lines(path):
            _read_parent(books, line)
    for line in lines(folder / "starts.jsonl"):
        _read_function(books, line)
    for line in lines(folder / "work.jsonl"):
        if line["call"] in books.calls:
            books.calls[line["call"]].alive = line["seen"]
        else:
            books.strangers.add(line["call"])
    for line in lines(folder / "boots.jsonl"):
        books.fates[line["fate"]] += 1
    return books


def _read_world(books: Books, line: Line) -> None:
    what = line["what"]
    if what == "life":
        books.lives[line["life"]] = Life(line["life"], line["options"], line["at"])
    elif what == "run":
        books.seconds = line["seconds"]
    elif what == "hit":
        books.signals[line["signal"]] += 1
        books.lives[line["life"]].hits.add(line["pid"])
    elif what == "runners":
        life = books.lives[line["life"]]
        life.most_runners = max(life.most_runners, line["most"])
        life.looks += line["looks"]
    elif what == "ending":
        life = books.lives[line["life"]]
        life.how, life.ended = line["how"], line["at"]
    elif what == "gone":
        books.lives[line["life"]].gone = line


def _read_parent(books: Books, line: Line) -> None:
    what = line["what"]
    if what == "made":
        books.calls[line["call"]] = Call(
            line["call"],
            line["life"],
            line["kind"],
            line["how"],
            line["limit"],
            line["retries"],
            line["link"],
            line["at"],
        )
    elif what == "over":
        books.calls[line["call"]].overs.append(line)
    elif what == "status":
        life = books.lives[line["life"]]
        life.most_status = max(life.most_status, line["most"])
        life.samples += line["samples"]
    elif what == "not-open":
        books.openings_failed += 1
    elif what == "no-status":
        books.lives[line["life"]].no_status.append(line["text"])


def _read_function(books: Books, line: Line) -> None:
    call = books.calls.get(line["call"])
    if call is None:
        books.strangers.add(line["call"])
        return
    what, at = line["what"], line["at"]
    if what == "start":
        call.starts.append(Start(at, line["pid"], line["runner"]))
        return
    if what == "beat":
        call.beat = at
        return
    if what == "end":
        call.finished = at
    for start in call.starts:
        if start.pid == line["pid"] and start.ended is None:
            start.ended = at

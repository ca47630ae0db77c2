"""What came out of a chaos run: its figures, and which rules it has found broken."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chaos_record import Books, Call, Life, read
from common import percentile, table

#: Seconds after its deadline within which a call has to be over (F3).
LATE: Final = 5.0

#: Seconds beyond ``shutdown_timeout`` until all of a parent has to be gone, by how it ended. What
#: a killed one leaves ends itself (G3); a pool that closes gives its runners time for that (A6).
GONE: Final = {"killed": 5.0, "closed": 12.0, "interrupted": 12.0}

#: Seconds beyond ``shutdown_timeout`` until the work of a call that is over has to be gone (E3).
WORK_GONE: Final = 5.0

#: Seconds within which it is known that one of a runner's calls has ended (D5).
NEWS: Final = 1.0

#: Work that is never over by itself.
ENDLESS: Final = frozenset(
    [
        "fills_memory",
        "sleeps",
        "spins",
        "never_returns",
        "swallows",
        "waits_for_ever",
        "starts_program",
        "starts_family",
    ]
)

#: Calls whose runner may end because of them.
DEADLY: Final = ENDLESS | {"exits", "dies"}

#: Errors that a call may end with at any time; others have to be somebody's doing.
ANY_TIME: Final = frozenset(["CallTimeout", "RunnerLost"])

#: Calls of a parent after which its runners must have been seen.
AT_WORK: Final = 20

#: How many violations of one rule are told in full.
TOLD: Final = 5


@dataclass(frozen=True, slots=True)
class Report:
    """What came out.

    Parameters
    ----------
    figures
        The lines of a table: what it is, and how much.
    broken
        A sentence for each violation, which begins with the ids of the rules.
    """

    figures: list[tuple[str, str]]
    broken: list[str]

    def text(self, seed: object) -> str:
        """Lay the report out for a terminal.

        Parameters
        ----------
        seed
            What to start the run with so that its choices are the same again.
        """
        lines = [table(["what", f"seed {seed}"], self.figures), ""]
        if not self.broken:
            return "\n".join([*lines, "All rules held."])
        lines.append(f"BROKEN, with seed {seed}:")
        told: Counter[str] = Counter()
        for sentence in self.broken:
            rules = sentence.partition(":")[0]
            told[rules] += 1
            if told[rules] <= TOLD:
                lines.append(f"  {sentence}")
        lines += [f"  {rules}: and {n - TOLD} more" for rules, n in told.items() if n > TOLD]
        return "\n".join(lines)


def account(folder: Path) -> Report:
    """Account for every call of a run.

    Parameters
    ----------
    folder
        Where its records are.

    Returns
    -------
    Report
        With nothing in ``broken`` if all rules held.
    """
    books = read(folder)
    broken = [sentence for rule in RULES for sentence in rule(books)]
    return Report(list(figures(books)), broken)


# -- the rules -------------------------------------------------------------------------------------


def at_most_once(books: Books) -> Iterator[str]:
    """F1: a function starts once, and with ``retries=n`` at most n more times."""
    for call in books.calls.values():
        if len(call.starts) > 1 + call.retries:
            runners = ", ".join(str(start.runner) for start in call.starts)
            yield (
                f"F1: {story(call)} with retries={call.retries} started {len(call.starts)} times,"
                f" on runners {runners}"
            )


def in_time(books: Books) -> Iterator[str]:
    """F3: a call is over soon after its deadline, whatever happens."""
    for call in books.calls.values():
        late = lateness(call, books.lives[call.life])
        if call.outcome == "hung":
            yield f"F3: {story(call)} hung"
        elif late is not None and late > LATE:
            state = "was over" if call.overs else "had no outcome"
            yield f"F3: {story(call)} {state} {late:.1f} s after its deadline"


def lateness(call: Call, life: Life) -> float | None:
    """How long after its deadline a call was over, or was not when it last could have been."""
    if call.overs:
        if call.outcome in ("dropped", "hung"):
            return None
        return float(call.overs[0]["at"] - call.overs[0]["due"])
    return None if life.ended is None else life.ended - (call.made + call.limit)


def one_outcome(books: Books) -> Iterator[str]:
    """F3, F4: each call has one outcome: a value, what it raised, or an error for a reason."""
    for call in books.calls.values():
        life = books.lives[call.life]
        wrong = None
        if len(call.overs) > 1:
            wrong = f"had {len(call.overs)} outcomes"
        elif not call.overs:
            if life.how != "killed":
                wrong = "had none, though its parent lived"
        elif call.outcome in ("untyped", "wrong"):
            wrong = f"ended badly ({call.outcome}): {call.overs[0].get('text', 'another value')}"
        elif call.outcome == "value" and (call.kind in DEADLY or call.kind == "raises"):
            wrong = "returned a value"
        elif call.outcome in ("value", "raised") and not call.starts:
            wrong = "has a result, but its function has never started"
        elif call.outcome == "error" and not excused(call, life):
            wrong = f"raised {call.error} for no reason: {call.overs[0].get('text')}"
        if wrong is not None:
            yield f"F3/F4: {story(call)} {wrong}"


def excused(call: Call, life: Life) -> bool:
    """Whether somebody's doing was behind an error that is nobody's right at any time."""
    if call.error in ANY_TIME or (call.error == "CallCancelled" and call.how == "cancel"):
        return True
    closing = life.ended is not None and call.over is not None and call.over >= life.ended
    return closing and call.error in ("PoolClosed", "CallCancelled")


def losses_have_causes(books: Books) -> Iterator[str]:
    """D3, F2: a call loses its runner only if something has befallen that very runner."""
    deadly: dict[str, set[int]] = defaultdict(set)
    for call in books.calls.values():
        if call.kind in DEADLY:
            deadly[call.life].update(start.runner for start in call.starts)
    for call in books.calls.values():
        life = books.lives[call.life]
        if call.error != "RunnerLost" or not call.starts:
            continue
        if life.ended is not None and call.over is not None and call.over >= life.ended:
            continue
        runners = {start.runner for start in call.starts}
        if runners.isdisjoint(life.hits | deadly[call.life]):
            text = call.overs[0].get("text")
            yield f"D3/F2: {story(call)} lost a runner that nothing had befallen: {text}"


def never_too_many(books: Books) -> Iterator[str]:
    """C1: there are never more than ``max`` runners."""
    for life in books.lives.values():
        for most, whose in (
            (life.most_status, "runners in its status"),
            (life.most_runners, "runner processes"),
        ):
            if most > life.max:
                yield f"C1: parent {life.name} had {most} {whose}, with max={life.max}"


def work_ends(books: Books) -> Iterator[str]:
    """E3, G1, G2: when a call is over, so is its work."""
    for call in books.calls.values():
        life = books.lives[call.life]
        if call.kind in ENDLESS and call.finished is not None:
            yield f"E3: {story(call)} was not ended: its function came to its end"
        end = call.over if call.over is not None else life.ended
        if end is None:
            continue
        if not call.link:  # it may go on without its caller, up to its own limit (G2)
            end = max(end, call.made + call.limit)
        limit = float(life.options["shutdown_timeout"]) + WORK_GONE
        for last, what in ((call.beat, "function"), (call.alive, "program")):
            if last is not None and last - end > limit:
                yield f"E3: {story(call)}: its {what} went on for {last - end:.1f} s after its end"


def single_use(books: Books) -> Iterator[str]:
    """D5: with ``single_use`` nothing starts on a runner where a call has ended."""
    starts = defaultdict(list)
    for call in books.calls.values():
        if books.lives[call.life].options["single_use"]:
            for start in call.starts:
                starts[call.life, start.runner].append((start, call))
    for (name, runner), those in starts.items():
        options = books.lives[name].options
        if options["max_concurrency"] == 1 and len(those) > 1:
            ids = ", ".join(call.name for _, call in those)
            yield f"D5: runner {runner} of parent {name} ran {len(those)} calls: {ids}"
            continue
        ends = [start.ended for start, _ in those if start.ended is not None]
        for start, call in those:
            if ends and start.at > min(ends) + NEWS:
                after = start.at - min(ends)
                yield f"D5: {story(call)} started on runner {runner} {after:.1f} s after an end"


def nothing_is_left(books: Books) -> Iterator[str]:
    """A6, G3: a parent that is gone leaves nothing, and a pool that closes lets its parent go."""
    for life in books.lives.values():
        if life.gone is None:
            yield f"A6/G3: parent {life.name} was never seen to be gone"
            continue
        limit = float(life.options["shutdown_timeout"]) + GONE[life.how]
        if life.gone["processes"] or life.gone["after"] > limit:
            some = "; ".join(life.gone["processes"][:4]) or "its processes"
            yield (
                f"A6/G3: {limit:g} s after parent {life.name} was {life.how},"
                f" {len(life.gone['processes'])} processes were left: {some}"
            )
        for what in ("files", "sockets"):
            if life.gone[what]:
                yield f"A6/G3: parent {life.name} ({life.how}) left {what}: {life.gone[what]}"
        code = life.gone["exit_code"]
        if code not in {"killed": (-9,), "closed": (0,), "interrupted": (130, -2)}[life.how]:
            yield f"A6: parent {life.name} was {life.how}, and ended with exit code {code}"


def all_are_known(books: Books) -> Iterator[str]:
    """Every start is that of a call that was made."""
    for name in sorted(books.strangers):
        yield f"F1: {name} started, but nobody has made that call"


def eyes_were_open(books: Books) -> Iterator[str]:
    """C1, C10: a pool at work has been looked at: else nothing would ever be found."""
    starts = Counter(call.life for call in books.calls.values() if call.starts)
    for life in books.lives.values():
        for text in life.no_status:
            yield f"C10: the status of parent {life.name} raised {text}"
        if starts[life.name] < AT_WORK:
            continue
        if not life.samples or not life.most_status:
            yield f"C1: nobody has looked at the status of parent {life.name}"
        if not life.looks or not life.most_runners:
            yield f"C1: nobody has seen the runners of parent {life.name}"


RULES: Final[tuple[Callable[[Books], Iterator[str]], ...]] = (
    at_most_once,
    in_time,
    one_outcome,
    losses_have_causes,
    never_too_many,
    work_ends,
    single_use,
    nothing_is_left,
    all_are_known,
    eyes_were_open,
)


def story(call: Call) -> str:
    """Name a call in a sentence."""
    link = "" if call.link else ", link=False"
    return f"call {call.name} ({call.kind}, {call.how}{link})"


# -- the figures -----------------------------------------------------------------------------------


def figures(books: Books) -> Iterator[tuple[str, str]]:
    """Yield the lines of the table."""
    calls, lives = list(books.calls.values()), list(books.lives.values())
    minutes = books.seconds / 60
    rate = f" ({len(calls) / minutes:,.0f} a minute)" if minutes else ""
    yield "calls", f"{len(calls):,}{rate}"
    yield from _outcomes(calls)
    yield from _starts(calls)
    late = [x for c in calls if c.overs and (x := lateness(c, books.lives[c.life])) is not None]
    overdue = sorted((x for x in late if x > 0), reverse=True)
    yield "calls over after their deadline", f"{len(overdue):,}"
    if overdue:
        yield (
            "  p50, p99, latest",
            ", ".join(
                f"{x:.3f} s" for x in (percentile(overdue, 50), percentile(overdue, 99), overdue[0])
            ),
        )
    yield from _ends_of_work(books)
    yield from _crowds(lives)
    yield from _world(books)
    yield from _remains(lives)


def _outcomes(calls: list[Call]) -> Iterator[tuple[str, str]]:
    words = {
        "value": "a value",
        "raised": "what their function raised",
        "dropped": "dropped by their caller",
        None: "none: their parent was killed",
        "hung": "HUNG",
        "wrong": "A WRONG VALUE",
        "untyped": "AN ERROR WITHOUT A TYPE",
    }
    counts = Counter(call.outcome for call in calls if call.outcome != "error")
    for outcome, word in words.items():
        if counts[outcome] or outcome in ("value", "raised", "dropped", None):
            yield f"  {word}", f"{counts[outcome]:,}"
    errors = Counter(call.error for call in calls if call.error is not None)
    details: dict[str | None, Counter[str]] = defaultdict(Counter)
    for call in calls:
        if call.error is not None and call.overs[0].get("detail") is not None:
            details[call.error][call.overs[0]["detail"]] += 1
    for error, count in errors.most_common():
        why = ", ".join(f"{detail} {n}" for detail, n in details[error].most_common())
        yield f"  {error}", f"{count:,}" + (f" ({why})" if why else "")


def _starts(calls: list[Call]) -> Iterator[tuple[str, str]]:
    once = [call for call in calls if not call.retries]
    again = [call for call in calls if call.retries]
    most = max((len(call.starts) for call in once), default=0)
    yield "starts of functions", f"{sum(len(call.starts) for call in calls):,}"
    yield "  most of one call, without retries", f"{most} (at most 1)"
    if again:
        over = max(len(call.starts) - call.retries for call in again)
        tries = sum(len(call.starts) > 1 for call in again)
        yield "  most of one call, less its retries", f"{over} (at most 1)"
        yield "  calls that were started again", f"{tries:,} of {len(again):,} with retries"


def _ends_of_work(books: Books) -> Iterator[tuple[str, str]]:
    endless = [call for call in books.calls.values() if call.kind in ENDLESS and call.starts]
    yield "calls without an end that had started", f"{len(endless):,}"
    ended = sum(call.finished is None for call in endless)
    yield "  of them ended by the pool", f"{ended:,}"
    after = [
        last - call.over
        for call in endless
        for last in (call.beat, call.alive)
        if last is not None and call.over is not None and call.link
    ]
    yield "  longest that one went on after its end", f"{max([0.0, *after]):.1f} s"
    unlinked = [
        call
        for call in books.calls.values()
        if not call.link and call.outcome in ("dropped", None) and call.starts
    ]
    if unlinked:
        mortal = [call for call in unlinked if call.kind not in DEADLY]
        done = sum(call.finished is not None for call in mortal)
        yield "link=False calls let go, which finished", f"{done:,} of {len(mortal):,}"


def _crowds(lives: list[Life]) -> Iterator[tuple[str, str]]:
    for label, most, looks in (
        ("status", "most_status", "samples"),
        ("processes", "most_runners", "looks"),
    ):
        spare = min((life.max - getattr(life, most) for life in lives), default=0)
        total = sum(getattr(life, looks) for life in lives)
        state = f"never more than max ({total:,} looks)" if spare >= 0 else f"{-spare} TOO MANY"
        yield f"runners by {label}", state


def _world(books: Books) -> Iterator[tuple[str, str]]:
    signals = ", ".join(f"{name} {n:,}" for name, n in books.signals.most_common())
    yield "signals sent to runners", signals or "none"
    total = sum(books.fates.values())
    failed = total - books.fates["boots"]
    kinds = ", ".join(f"{fate} {n}" for fate, n in books.fates.most_common() if fate != "boots")
    yield "boots", f"{total:,}, {failed:,} failed" + (f" ({kinds})" if kinds else "")
    if books.openings_failed:
        yield "openings of pools that failed", f"{books.openings_failed:,}"
    ends = Counter(life.how for life in books.lives.values())
    yield "parents", ", ".join(f"{how} {n}" for how, n in ends.most_common())


def _remains(lives: list[Life]) -> Iterator[tuple[str, str]]:
    for how in GONE:
        after = [life.gone["after"] for life in lives if life.how == how and life.gone]
        if after:
            yield (
                f"  {how}: all gone after, p50 and longest",
                (f"{percentile(after, 50):.1f} s, {max(after):.1f} s"),
            )
    for what in ("processes", "files", "sockets"):
        left = sum(len(life.gone[what]) for life in lives if life.gone)
        yield f"{what} left behind", f"{left:,}"

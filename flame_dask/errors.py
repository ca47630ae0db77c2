"""Everything that flame_dask raises on purpose (rule F4).

::

    Exception
    └── FlameError                 catches all of the below
        ├── PoolOptionsError       an option or a call keyword can't be used   (also a ValueError)
        ├── PoolNotFound           no open pool has this name                  (also a LookupError)
        ├── PoolClosed             the pool is closed or closing               (also a RuntimeError)
        ├── BootError              a runner did not get ready                  (also a RuntimeError)
        ├── SerializationError     something can't be pickled                  (also a TypeError)
        ├── CallTimeout            a deadline of a call passed                 (also a TimeoutError)
        ├── CallCancelled          a call was cancelled     (also concurrent.futures.CancelledError)
        ├── RunnerLost             the runner died under the call              (also a RuntimeError)
        └── SupervisorFailed       a supervisor's pools crashed too often      (also a RuntimeError)

Three promises hold for each of them:

- it pickles, and comes back with the same attributes and the same text (see ``FlameError``);
- its text is one sentence that names the values and says what to do;
- its text holds no secret: values of options that carry secrets are never shown, and text from
  elsewhere (a vendor's exception, a runner's log) goes through ``redact`` first.

This module imports the standard library alone, because every part of flame_dask raises from it.
"""

from __future__ import annotations

import concurrent.futures
import pickle
import re
import reprlib
import signal as signals
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, ClassVar, Final, Literal, NamedTuple, TypeVar

__all__ = [
    "BootError",
    "CallCancelled",
    "CallTimeout",
    "Crash",
    "FlameError",
    "PoolClosed",
    "PoolNotFound",
    "PoolOptionsError",
    "RunnerLost",
    "SerializationError",
    "SupervisorFailed",
    "redact",
]

LossCause = Literal["exited", "signal", "oom", "preempted", "unreachable"]
CallPhase = Literal["queued", "booting", "running"]

HIDDEN: Final = "<hidden>"
"""What stands in place of a secret."""

_Error = TypeVar("_Error", bound="FlameError")

# Options whose values are secrets as a whole, and the words in a name that tell of any other.
_SECRET_OPTIONS: Final = frozenset({"env", "security"})
_SECRET_WORD: Final = re.compile(
    "password|passwd|secret|token|credential|authorization|(?:private|api|access)[_-]?key", re.I
)
_SECRET_TEXTS: Final = (
    # A PEM block, or the rest of the text if its end was cut off.
    (re.compile(r"-----BEGIN [^-]+-----.*?(?:-----END [^-]+-----|\Z)", re.DOTALL), HIDDEN),
    # user:password in an address.
    (re.compile(r"(://)[^/\s:@]*:[^/\s@]+(?=@)"), rf"\g<1>{HIDDEN}"),
    # token=..., 'password': '...', Authorization: Bearer ... What is before the word in the name
    # stays out of the pattern: it would make it quadratic in the length of a long name.
    (
        re.compile(
            rf"((?:{_SECRET_WORD.pattern})[\w.-]{{0,40}}['\"]?\s*[=:]\s*)"
            r"(?:(?:Bearer|Basic)\s+)?(?:\"[^\"]*\"?|'[^']*'?|[^\s,;)}\]]+)",
            re.IGNORECASE,
        ),
        rf"\g<1>{HIDDEN}",
    ),
)


def redact(text: str) -> str:
    """Hide what looks like a secret in a text that came from elsewhere (rule F4).

    Certificates and keys in PEM form, the login part of addresses, and the values of anything
    named like a password, token or key are replaced. It is a safety net for messages and logs, not
    a licence to put secrets there.

    Parameters
    ----------
    text
        Any text.

    Returns
    -------
    str
        The text with ``<hidden>`` in place of each secret.

    Examples
    --------
    >>> redact("403 from https://me:pw@host, token=abc123")
    '403 from https://<hidden>@host, token=<hidden>'
    """
    for pattern, replacement in _SECRET_TEXTS:
        text = pattern.sub(replacement, text)
    return text


class FlameError(Exception):
    """The base class of all errors of flame_dask.

    Parameters
    ----------
    message
        The sentence that ``str()`` gives.

    Notes
    -----
    An exception with an ``__init__`` of its own does not survive pickling by default: Python calls
    ``type(error)(*error.args)``, and ``args`` is the finished message, not the arguments. So
    ``__reduce__`` carries message and attributes and skips ``__init__``.

    Examples
    --------
    >>> try:
    ...     raise PoolClosed("web")
    ... except FlameError as error:
    ...     error.name
    'web'
    """

    # Attributes that hold objects of other people, which may pickle badly or not at all.
    _foreign: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, message: str = "") -> None:
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        foreign = {name: _pack(state.pop(name)) for name in self._foreign & state.keys()}
        return _rebuild, (type(self), self.args, state, foreign)

    def __copy__(self: _Error) -> _Error:
        # By the way of __reduce__, a copy would hold a copy of the cause, or just its text.
        return _rebuild(type(self), self.args, self.__dict__, {})


class PoolOptionsError(FlameError, ValueError):
    """An option of a pool, or a reserved keyword of a call, can't be used (rule A2).

    Parameters
    ----------
    option
        The name of the option.
    value
        What was given. Values of ``env`` and ``security``, and of unknown options that look like
        they carry a secret, are replaced by ``"<hidden>"`` here and in the message.
    remedy
        What would be right, as it follows a colon.
    problem
        What is wrong, as it follows the option and its value.
    source
        Where the value came from, if not from the caller: ``"Dask config key flame.timeout"``.
    missing
        True if the option was not given at all, so that there is no value to show.

    Examples
    --------
    >>> print(PoolOptionsError("max", 0, "give a whole number of at least 1"))
    max=0 is not valid: give a whole number of at least 1.
    """

    _foreign = frozenset({"value"})

    def __init__(
        self,
        option: str,
        value: object,
        remedy: str,
        *,
        problem: str = "is not valid",
        source: str | None = None,
        missing: bool = False,
    ) -> None:
        if option in _SECRET_OPTIONS or _SECRET_WORD.search(option):
            value = HIDDEN
        given = option if missing else f"{option}={shown(option, value)}"
        came_from = f" (from the {source})" if source else ""
        super().__init__(f"{given}{came_from} {problem}: {_sentence(remedy)}")
        self.option = option
        self.value = value
        self.remedy = remedy
        self.problem = problem
        self.source = source


class PoolNotFound(FlameError, LookupError):
    """No open pool of this process has the name that was asked for (rule A4).

    Parameters
    ----------
    name
        The name that was looked up.
    known
        The names of the pools that are open.
    restarting
        Whether a supervisor is restarting the pool (rule K1), so that it will soon be there.

    Examples
    --------
    >>> print(PoolNotFound("wbe", ["web", "gpu"]))  # doctest: +NORMALIZE_WHITESPACE
    No open pool is named 'wbe': use one of 'gpu', 'web', or open it first
    with FlamePool('wbe', max=...).
    """

    def __init__(self, name: str, known: Iterable[str] = (), *, restarting: bool = False) -> None:
        self.name = name
        self.known = tuple(sorted(known))
        self.restarting = restarting
        if restarting:
            super().__init__(
                f"Pool {name!r} has died, and its supervisor is restarting it: "
                "try again when it is up."
            )
            return
        some = ", ".join(map(repr, self.known[:20])) + (", ..." if len(self.known) > 20 else "")
        choice = f"use one of {some}, or open it" if some else "no pool is open here, so open it"
        super().__init__(
            f"No open pool is named {name!r}: {choice} first with FlamePool({name!r}, max=...)."
        )


class PoolClosed(FlameError, RuntimeError):
    """The pool takes no more work, because it is closed or closing (rule A6).

    Parameters
    ----------
    name
        The name of the pool.

    Examples
    --------
    >>> print(PoolClosed("web"))
    Pool 'web' is closed: open a new FlamePool, and make calls before its with block ends.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"Pool {name!r} is closed: "
            "open a new FlamePool, and make calls before its with block ends."
        )


class BootError(FlameError, RuntimeError):
    """A runner could not be started, or did not get ready (rules A5, A8, C6).

    Parameters
    ----------
    phase
        How far it came: ``"start"``, ``"connect"``, ``"setup"``, ...
    cause
        The exception, or a text, that says why. Where it can't be pickled, its text travels.
    log_tail
        The last lines that the runner logged, oldest first. They go through ``redact``.
    attempts
        How often the boot was tried.

    Examples
    --------
    >>> print(BootError("connect", "no route to host", attempts=3))
    A runner did not boot: phase 'connect' failed on 3 attempts: no route to host.
    """

    _foreign = frozenset({"cause"})

    def __init__(
        self,
        phase: str,
        cause: BaseException | str | None = None,
        *,
        log_tail: Iterable[str] = (),
        attempts: int = 1,
    ) -> None:
        self.phase = phase
        self.cause = cause
        # Joined first: a certificate in a log spans lines.
        lines = "\n".join([log_tail] if isinstance(log_tail, str) else log_tail)
        self.log_tail = tuple(redact(lines).splitlines())
        self.attempts = attempts
        tries = "" if attempts == 1 else f" on {attempts} attempts"
        reason = _text(cause) or "no reason is known; see the log of the backend"
        hint = "; the last lines of its log are in .log_tail" if self.log_tail else ""
        super().__init__(
            f"A runner did not boot: phase {phase!r} failed{tries}: {_sentence(reason + hint)}"
        )


class SerializationError(FlameError, TypeError):
    """Something that has to travel between parent and runner can't be pickled (rule B6).

    Parameters
    ----------
    part
        Which variable of the closure, argument, or part of the result it is.
    reason
        What the pickler said: its exception or a text.

    Examples
    --------
    >>> print(SerializationError("variable 'lock' of fetch()", "no pickling of locks"))
    ... # doctest: +NORMALIZE_WHITESPACE
    Can't send variable 'lock' of fetch(): no pickling of locks; leave it out
    or make it where it is used.
    """

    def __init__(self, part: str, reason: BaseException | str | None = None) -> None:
        self.part = part
        why = (_text(reason) or "it can't be pickled").rstrip(". ")
        super().__init__(f"Can't send {part}: {why}; leave it out or make it where it is used.")


class CallTimeout(FlameError, TimeoutError):
    """A deadline of a call passed, and the call has been ended (rules E1, E2).

    Parameters
    ----------
    phase
        Where the call was: ``"queued"``, ``"booting"`` (waiting for a runner that boots) or
        ``"running"``.
    queued, booting, running
        The seconds that it spent in each phase.
    boot_error
        The last failure of a boot while it waited, if there was one (rule C6).
    call
        The id of the call.
    limit
        The limit that it passed, in seconds.

    Examples
    --------
    >>> print(CallTimeout("running", queued=0.5, running=30.0, call="c-7", limit=30.0))
    ... # doctest: +NORMALIZE_WHITESPACE
    Call c-7 passed its limit of 30 s while running (queued 0.5 s, booting 0 s, running 30 s):
    give it a longer timeout.
    """

    def __init__(
        self,
        phase: CallPhase,
        *,
        queued: float = 0.0,
        booting: float = 0.0,
        running: float = 0.0,
        boot_error: BootError | None = None,
        call: str | None = None,
        limit: float | None = None,
    ) -> None:
        self.phase = phase
        self.queued = float(queued)
        self.booting = float(booting)
        self.running = float(running)
        self.boot_error = boot_error
        self.call = call
        self.limit = limit
        passed = "its limit" if limit is None else f"its limit of {_seconds(limit)}"
        spent = ", ".join(
            f"{name} {_seconds(getattr(self, name))}" for name in ("queued", "booting", "running")
        )
        if boot_error is not None:
            remedy = f"see to its boot error first ({str(boot_error).rstrip('.')})"
        else:
            remedy = _LONGER.get(phase, _LONGER["running"])
        super().__init__(
            f"{_call(call)} passed {passed} while {phase} ({spent}): {_sentence(remedy)}"
        )


class CallCancelled(FlameError, concurrent.futures.CancelledError):
    """A call was cancelled before it had a result (rule E4).

    Parameters
    ----------
    call
        The id of the call.
    reason
        Who or what cancelled it, as it follows "by": ``"future.cancel()"``.

    Examples
    --------
    >>> print(CallCancelled("c-7", "future.cancel()"))
    Call c-7 was cancelled by future.cancel(): call again if its result is still wanted.
    """

    def __init__(self, call: str | None = None, reason: str | None = None) -> None:
        self.call = call
        self.reason = reason
        by = f" by {reason}" if reason else ""
        super().__init__(
            f"{_call(call)} was cancelled{by}: call again if its result is still wanted."
        )


class RunnerLost(FlameError, RuntimeError):
    """The runner died under a call, which may have run in part (rules F1, F2).

    Parameters
    ----------
    cause
        ``"exited"``, ``"signal"``, ``"oom"`` (out of memory), ``"preempted"`` (SIGTERM or a spot
        notice, rule E5) or ``"unreachable"``.
    exit_code
        The exit code of the runner's process, where it is known.
    signal
        The number of the signal that ended it, where it is known.
    runner
        The id of the runner.
    call
        The id of the call that failed with it.

    Examples
    --------
    >>> print(RunnerLost("signal", signal=9, runner="r-1", call="c-7"))
    Call c-7 lost runner r-1, which was ended by a signal (SIGKILL): call again if it may run twice.
    """

    def __init__(
        self,
        cause: LossCause,
        *,
        exit_code: int | None = None,
        signal: int | None = None,
        runner: str | None = None,
        call: str | None = None,
    ) -> None:
        self.cause = cause
        self.exit_code = exit_code
        self.signal = None if signal is None else int(signal)
        self.runner = runner
        self.call = call
        facts = [] if exit_code is None else [f"exit code {exit_code}"]
        if self.signal is not None:
            facts.append(_signal_name(self.signal))
        known = f" ({', '.join(facts)})" if facts else ""
        story, remedy = _LOSSES.get(cause, (f"was lost: {cause}", "call again if it may run twice"))
        which = "its runner" if runner is None else f"runner {runner}"
        super().__init__(f"{_call(call)} lost {which}, which {story}{known}: {remedy}.")


class Crash(NamedTuple):
    """The death of a supervised pool, or a restart of it that failed (rule K1).

    Parameters
    ----------
    pool
        The name of the pool.
    time
        When it was noticed.
    cause
        The exception that a restart failed with, or a text that says what the pool died of. Where
        an exception can't be pickled, its text travels.

    Examples
    --------
    >>> from datetime import timezone
    >>> at = datetime(2027, 1, 31, 12, 30, tzinfo=timezone.utc)
    >>> print(Crash("web", at, "its cluster was closed"))
    pool 'web' at 2027-01-31 12:30:00 UTC: its cluster was closed
    """

    pool: str
    time: datetime
    cause: BaseException | str

    def __str__(self) -> str:
        cause = _text(self.cause).rstrip(". ")
        return f"pool {self.pool!r} at {self.time:%Y-%m-%d %H:%M:%S %Z}".rstrip() + f": {cause}"

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception of somebody else may pickle badly or not at all, see FlameError.
        return _crash, (self.pool, self.time, _pack(self.cause))

    def __copy__(self) -> Crash:
        return Crash(self.pool, self.time, self.cause)


class SupervisorFailed(FlameError, RuntimeError):
    """The pools of a supervisor crashed too often, so it has stopped them all (rule K1).

    Parameters
    ----------
    causes
        The crashes that were one too many, oldest first.
    max_restarts
        How many restarts the supervisor was allowed,
    max_seconds
        within so many seconds; ``None`` is in all.

    Examples
    --------
    >>> from datetime import timezone
    >>> at = datetime(2027, 1, 31, 12, 30, tzinfo=timezone.utc)
    >>> print(SupervisorFailed([Crash("web", at, "its cluster was closed")], 0, 5.0))
    ... # doctest: +NORMALIZE_WHITESPACE
    The supervisor gave up and has stopped its pools, because it may restart them 0 times within 5 s
    and they crashed once: (1) pool 'web' at 2027-01-31 12:30:00 UTC: its cluster was closed.
    """

    def __init__(
        self, causes: Iterable[Crash], max_restarts: int, max_seconds: float | None
    ) -> None:
        self.causes = tuple(causes)
        self.max_restarts = max_restarts
        self.max_seconds = max_seconds
        within = "in all" if max_seconds is None else f"within {_seconds(max_seconds)}"
        each = "; ".join(f"({n}) {crash}" for n, crash in enumerate(self.causes, 1))
        super().__init__(
            "The supervisor gave up and has stopped its pools, because it may restart them "
            f"{_times(max_restarts)} {within} and they crashed {_times(len(self.causes))}: "
            f"{_sentence(each)}"
        )


# Other words than these are taken too: an error that can't be made leaves a caller waiting (F3).
_LONGER: Final[Mapping[str, str]] = {
    "queued": "give it a longer timeout or queue_timeout, or the pool a larger max",
    "booting": "give it a longer timeout or queue_timeout, or the pool a min or buffer of runners",
    "running": "give it a longer timeout",
}

_LOSSES: Final[Mapping[str, tuple[str, str]]] = {
    "exited": ("exited", "call again if it may run twice"),
    "signal": ("was ended by a signal", "call again if it may run twice"),
    "oom": ("ran out of memory", "give runners more memory or fewer slots (max_concurrency)"),
    "preempted": ("was taken away", "call again if it may run twice"),
    "unreachable": ("can't be reached", "check its network, and call again if it may run twice"),
}


def _rebuild(
    cls: type[_Error], args: tuple[Any, ...], state: Mapping[str, Any], foreign: Mapping[str, Any]
) -> _Error:
    """Make an error again from what ``FlameError.__reduce__`` took apart."""
    error = cls.__new__(cls)
    # Not through __new__: OSError, above CallTimeout, drops them there.
    error.args = args
    error.__dict__.update(state)
    for name, packed in foreign.items():
        setattr(error, name, _unpack(*packed))
    return error


def _crash(pool: str, time: datetime, packed: tuple[bytes | None, str]) -> Crash:
    """Make a crash again from what ``Crash.__reduce__`` took apart."""
    cause: Any = _unpack(*packed)
    return Crash(pool, time, cause)


def _pack(value: object) -> tuple[bytes | None, str]:
    """Pickle an object of somebody else for itself, with its text in case that does not work."""
    text = _text(value) if isinstance(value, BaseException) else _short(value)
    try:
        return pickle.dumps(value), text
    except Exception:  # a foreign __reduce__ may raise anything
        return None, text


def _unpack(packed: bytes | None, text: str) -> object:
    # The other side may lack the vendor's package, or the class may fail to unpickle: the very
    # trap that FlameError avoids. An error about a boot must not be lost over that.
    if packed is None:
        return text
    try:
        return pickle.loads(packed)
    except Exception:  # as above
        return text


_repr: Final = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlong = 40


def _short(value: object) -> str:
    """Give a repr of bounded length, without secrets, for any object however broken."""
    if isinstance(value, str):
        value = redact(value[:10_000])  # before it is cut, which could hide the marks of a secret
    try:
        return redact(_repr.repr(value))
    except Exception:  # a foreign __repr__ may raise anything, and an int of 4,300 digits does
        return f"<{type(value).__name__}>"


def shown(option: str, value: object) -> str:
    """Give the repr of an option's value for a message or another repr, without secrets (F4)."""
    if value is None or (isinstance(value, str) and value == HIDDEN):
        return str(value)
    if option == "security":
        return HIDDEN
    if option == "env" and isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {HIDDEN}" for name in value) + "}"
    if option == "backend" and isinstance(value, tuple):
        return f"({', '.join('{...}' if isinstance(v, Mapping) else _short(v) for v in value)})"
    return _short(value)


def _text(reason: BaseException | str | None) -> str:
    """Say a reason in one line of bounded length, without secrets."""
    if reason is None:
        return ""
    if isinstance(reason, BaseException):
        kind = type(reason).__name__
        try:
            reason = f"{kind}: {reason}" if str(reason) else kind
        except Exception:  # a foreign __str__ may raise anything
            reason = kind
    line = " ".join(redact(reason[:10_000]).split())
    return line if len(line) <= 500 else f"{line[:497]}..."


def _sentence(text: str) -> str:
    return f"{text.rstrip('. ')}."


def _call(call: str | None) -> str:
    return "A call" if call is None else f"Call {call}"


def _seconds(seconds: float) -> str:
    return f"{round(seconds, 3):g} s"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:  # real-time signals have no name
        return f"signal {number}"

"""The options of a pool and of a call, checked once and in full before anything starts (A1, A2).

``PoolOptions.check`` and ``CallOptions.check`` are the only way in. What they return needs no
further look: durations are seconds as ``float``, or ``None`` for no limit, defaults are filled in,
and options that belong together fit together. What they refuse, they refuse with a
``PoolOptionsError`` that says what would be right. An option without effect would be a lie: there
is none.

Where an option is not given, its default comes from Dask's configuration under ``flame:`` (A3);
``flame.yaml`` beside this module has the values that flame_dask comes with.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import math
import numbers
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final, Literal

import cloudpickle
import dask.config
from dask.utils import parse_timedelta
from distributed.security import Security

from flame_dask.code_options import CodeSync
from flame_dask.errors import HIDDEN, PoolOptionsError, shown

__all__ = [
    "RESERVED",
    "CallOptions",
    "PoolOptions",
    "SupervisorOptions",
    "duration",
]


# -- Checks: each takes a value and returns it in its normal form, or raises _Refused -------------


class _Refused(Exception):
    """A value is not valid; the text says what would be right."""


def _needs(words: str, holds: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not holds(value):
            raise _Refused(f"give {words}")
        return value

    return check


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except Exception:  # a tuple has that of what is in it, and a foreign __hash__ raises anything
        return False
    return True


_any = _needs("anything", lambda value: True)
_bool = _needs("True or False", lambda value: isinstance(value, bool))
_hook = _needs("a function, or None", lambda value: value is None or callable(value))
_name = _needs("a text that is not empty", _is_text)
_host = _needs("an address as a text, or None", lambda value: value is None or _is_text(value))
_security = _needs(
    "distributed.Security(require_encryption=True, tls_ca_file=..., ...), or leave it out: the "
    "pool makes certificates of its own where it needs them",
    lambda value: value is None or (isinstance(value, Security) and value.require_encryption),
)


def _one_of(*choices: str | None) -> Callable[[Any], Any]:
    # Compared by type first: an array is equal to each of its items, and to none.
    return _needs(
        " or ".join(map(repr, choices)),
        lambda value: isinstance(value, str | None) and value in choices,
    )


def _whole(least: float, words: str = "") -> Callable[[Any], int]:
    def holds(value: Any) -> bool:
        # A bool is an int to Python, but max=True is a mistake. numpy's integers are Integral.
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return whole and int(value) >= least

    check = _needs(f"a whole number{words}", holds)
    return lambda value: int(check(value))


def _duration(value: Any) -> float | None:
    """Read a duration the way Dask does, with ``None`` for no limit."""
    if value is None:
        return None
    try:
        if isinstance(value, timedelta):
            seconds = value.total_seconds()
        elif isinstance(value, str):
            seconds = float(parse_timedelta(value))
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):
            seconds = float(value)
        else:
            raise TypeError
    except (TypeError, ValueError, LookupError, OverflowError):
        raise _Refused(
            'give seconds, a timedelta, a text such as "30s", or None for no limit'
        ) from None
    # Infinity would do as "no limit", but then there would be two ways to say it, and to test for.
    if not 0 <= seconds < math.inf:
        raise _Refused("give a duration of zero or more, or None for no limit")
    return seconds


def _idle(value: Any) -> tuple[float | None, Callable[[], object] | None]:
    """Read ``idle_shutdown_after``: a duration, or a duration and a check (D2)."""
    if not isinstance(value, tuple):
        return _duration(value), None
    if len(value) != 2 or not callable(value[1]):
        raise _Refused("give a duration, or a pair of a duration and a function without arguments")
    try:
        cloudpickle.dumps(value[1])  # it runs on the runner, so it has to get there
    except Exception as error:  # a foreign __reduce__ may raise anything
        kind = type(error).__name__
        raise _Refused(f"give a check that can be pickled (this one: {kind})") from error
    return _duration(value[0]), value[1]


def _env(value: Any) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise _Refused("give a mapping of names to texts")
    for name, text in value.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise _Refused("give a mapping whose names are texts that are not empty, without '='")
        if not isinstance(text, str) or "\0" in text:
            # The name may be shown, the value never (F4).
            raise _Refused(f"give {name!r} a text as its value, not {type(text).__name__}")
    return dict(value)


# Each option of A1, in its order there, with its check.
_CHECKS: Final[dict[str, Callable[[Any], Any]]] = {
    "name": _name,
    "backend": _any,
    "min": _whole(0, " of at least 0"),
    "max": _whole(1, " of at least 1"),
    "max_concurrency": _whole(1, " of at least 1"),
    "single_use": _bool,
    "timeout": _duration,
    "queue_timeout": _duration,
    "boot_timeout": _duration,
    "shutdown_timeout": _duration,
    "idle_shutdown_after": _idle,
    "min_idle_shutdown_after": _duration,
    "on_grow_start": _hook,
    "on_grow_end": _hook,
    "on_shrink": _hook,
    "on_cast_error": _hook,
    "track_resources": _bool,
    "code_sync": CodeSync.check,
    "isolation": _one_of("thread", "process"),
    "buffer": _whole(0, " of at least 0"),
    "placement": _one_of("spread", "pack"),
    "env": _env,
    "log": _bool,
    "asynchronous": _bool,
    "security": _security,
    "scheduler": _one_of("parent", "remote", None),
    "host": _host,
    "contact_address": _host,
}

_CALL_CHECKS: Final[dict[str, Callable[[Any], Any]]] = {
    "timeout": _duration,
    "queue_timeout": _duration,
    "link": _bool,
    "track_resources": _bool,
    "retries": _whole(0, " of at least 0"),
    "priority": _whole(-math.inf),
    "affinity": _needs(
        "something that can be a key of a dict, such as a text, a number, or a tuple of these",
        _is_hashable,
    ),
}

_SUPERVISOR_CHECKS: Final[dict[str, Callable[[Any], Any]]] = {
    "max_restarts": _whole(0, " of at least 0"),
    "max_seconds": _duration,
    "on_failure": _hook,
    "asynchronous": _bool,
}

RESERVED: Final[frozenset[str]] = frozenset(_CALL_CHECKS)
"""The keywords of a call that are for flame_dask, not for the function (B1)."""


def split_reserved(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the keywords of a call into the function's own and the reserved ones.

    Examples
    --------
    >>> split_reserved({"x": 1, "timeout": 5})
    ({'x': 1}, {'timeout': 5})
    """
    own = {name: value for name, value in kwargs.items() if name not in RESERVED}
    return own, {name: value for name, value in kwargs.items() if name in RESERVED}


CONFIGURABLE: Final = frozenset(
    {
        *("min", "max", "buffer", "placement"),
        *("timeout", "queue_timeout", "boot_timeout"),
        *("idle_shutdown_after", "min_idle_shutdown_after"),
    }
)
"""What can be changed on a running pool (C8). Runners are told of the rest as they start."""


# -- Defaults in Dask's configuration (A3) --------------------------------------------------------

with importlib.resources.as_file(importlib.resources.files("flame_dask") / "flame.yaml") as _path:
    [_SHIPPED] = dask.config.collect_yaml([str(_path)])
dask.config.update_defaults(_SHIPPED)

# `max` has no default (A1). The others are objects, or for the program alone to say.
_NOT_CONFIGURED: Final = {"name", "max", "asynchronous", "security"}
_KEYS: Final = {
    option: option.replace("_", "-")
    for option in _CHECKS
    if option not in _NOT_CONFIGURED and not option.startswith("on_")
}
# What stands where neither the caller nor the configuration says anything; see E1 for the one
# that is left out.
_UNSET: Final = dict.fromkeys(_CHECKS.keys() - {"queue_timeout"}) | {"asynchronous": False}
_ABSENT: Final = object()


def _add_configured(values: dict[str, object]) -> dict[str, str]:
    """Add what is not given but configured, and say for each of these where it is from."""
    sources = {}
    for option, key in _KEYS.items():
        # backend=None is what a program hands through that has no backend of its own (A3).
        if option not in values or (option == "backend" and values[option] is None):
            # The shipped value stands behind, for a program that cleared its configuration.
            value = dask.config.get(f"flame.{key}", _SHIPPED["flame"].get(key, _ABSENT))
            if value is not _ABSENT:
                values[option] = value
                sources[option] = f"Dask config key flame.{key}"
    return sources


# -- The options ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOptions:
    """The reserved keywords of one call, checked (B1). Made by ``check`` only.

    Parameters
    ----------
    timeout
        The most seconds that the call may take, and ``timeout_is_total`` says for what: True for
        waiting and running together, if given with the call; False for running alone (E1).
    queue_timeout
        The most seconds that it may wait for a slot; ``None`` is no limit of its own.
    link, track_resources, retries, priority, affinity
        See G1, I1, F1, C4 and C7 of the contract.
    """

    timeout: float | None
    queue_timeout: float | None
    timeout_is_total: bool
    link: bool
    track_resources: bool
    retries: int
    priority: int
    affinity: Hashable

    @classmethod
    def check(cls, pool: PoolOptions, **given: object) -> CallOptions:
        """Check the reserved keywords of a call.

        Parameters
        ----------
        pool
            The options of the pool, for what is not given.
        given
            Any of ``RESERVED``. Durations are seconds, a ``timedelta`` or a text such as ``"30s"``;
            ``None`` is no limit.

        Returns
        -------
        CallOptions
            With nothing given, the same object each time: each call comes by here.

        Raises
        ------
        PoolOptionsError
            A keyword is unknown, or can't be used.

        Examples
        --------
        >>> pool = PoolOptions.check("web", max=2)
        >>> CallOptions.check(pool, timeout="2m").timeout
        120.0
        """
        if not given:
            return pool.call_defaults
        _refuse_unknown(given, _CALL_CHECKS, "is not a reserved keyword of a call")
        values: dict[str, Any] = {
            option: _checked(_CALL_CHECKS[option], option, value) for option, value in given.items()
        }
        if "timeout" in values:
            # E1: the call's own limit takes the place of both limits of the pool.
            values["timeout_is_total"] = True
            values.setdefault("queue_timeout", None)
        return dataclasses.replace(pool.call_defaults, **values)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PoolOptions:
    """The options of a pool, checked and complete (A1). Made by its methods only.

    The fields are the options in the contract's order, then three that follow from them.

    Parameters
    ----------
    backend
        As it was given, or as Dask's configuration has it; ``None`` means ``LocalCluster`` (A3).
    timeout, queue_timeout, boot_timeout, shutdown_timeout, idle_shutdown_after, \
    min_idle_shutdown_after
        Seconds; ``None`` is no limit, or never.
    idle_check
        The check out of ``idle_shutdown_after=(duration, check)`` (D2).
    queue_timeout_given
        False if ``queue_timeout`` is just ``boot_timeout``, for want of a value of its own (E1).
    call_defaults
        What ``CallOptions.check`` returns for a call without reserved keywords.
    """

    name: str
    backend: Any = field(hash=False)
    min: int
    max: int
    max_concurrency: int
    single_use: bool
    timeout: float | None
    queue_timeout: float | None
    boot_timeout: float | None
    shutdown_timeout: float | None
    idle_shutdown_after: float | None
    min_idle_shutdown_after: float | None
    on_grow_start: Callable[..., object] | None
    on_grow_end: Callable[..., object] | None
    on_shrink: Callable[..., object] | None
    on_cast_error: Callable[..., object] | None
    track_resources: bool
    code_sync: CodeSync | None
    isolation: Literal["thread", "process"]
    buffer: int
    placement: Literal["spread", "pack"]
    env: Mapping[str, str] = field(hash=False)
    log: bool
    asynchronous: bool
    security: Any = field(hash=False)
    scheduler: Literal["parent", "remote"] | None
    host: str | None
    contact_address: str | None
    idle_check: Callable[[], object] | None
    queue_timeout_given: bool
    call_defaults: CallOptions = field(init=False, compare=False)

    def __post_init__(self) -> None:
        defaults = CallOptions(
            timeout=self.timeout,
            queue_timeout=self.queue_timeout,
            timeout_is_total=False,
            link=True,
            track_resources=self.track_resources,
            retries=0,
            priority=0,
            affinity=None,
        )
        object.__setattr__(self, "call_defaults", defaults)

    @classmethod
    def check(cls, name: str, **given: object) -> PoolOptions:
        """Check the options of a pool; nothing is started by it (A2).

        Parameters
        ----------
        name
            The pool's name.
        given
            Options by name. ``max`` has to be among them; the defaults of the others are in Dask's
            configuration under ``flame:``. Durations are seconds, a ``timedelta`` or a text such as
            ``"30s"``; ``None`` is no limit.

        Returns
        -------
        PoolOptions
            Complete, with durations in seconds.

        Raises
        ------
        PoolOptionsError
            An option is unknown or missing, can't be used, or does not fit another one. If the
            value is from Dask's configuration, it says so.

        Examples
        --------
        >>> options = PoolOptions.check("web", max=10, idle_shutdown_after="5m")
        >>> options.idle_shutdown_after, options.queue_timeout
        (300.0, 30.0)
        """
        _refuse_unknown(given, _CHECKS, "is not an option of FlamePool")
        values = {"name": name, **given}
        return cls._from(values, _add_configured(values))

    def replace(self, **changes: object) -> PoolOptions:
        """Change some options and check all again (C8).

        Parameters
        ----------
        changes
            Options by name, as ``check`` takes them. A new ``idle_shutdown_after`` takes the place
            of duration and check; ``queue_timeout`` follows a new ``boot_timeout`` unless it was
            given. Dask's configuration is not read again.

        Returns
        -------
        PoolOptions
            A new object; this one stays as it is.

        Raises
        ------
        PoolOptionsError
            As for ``check``.

        Examples
        --------
        >>> PoolOptions.check("web", max=10).replace(max=20).max
        20
        """
        _refuse_unknown(changes, _CHECKS, "is not an option of FlamePool")
        values = {option: getattr(self, option) for option in _CHECKS}
        if self.idle_check is not None:
            values["idle_shutdown_after"] = (self.idle_shutdown_after, self.idle_check)
        if not self.queue_timeout_given:
            del values["queue_timeout"]
        return self._from(values | changes, {})

    def configure(self, **changes: object) -> PoolOptions:
        """Change options of a pool that runs, and check all again (C8).

        Parameters
        ----------
        changes
            Any of ``CONFIGURABLE``, as ``check`` takes them. A duration for ``idle_shutdown_after``
            leaves its check as it is; a pair must have that same check.

        Returns
        -------
        PoolOptions
            A new object; this one stays as it is.

        Raises
        ------
        PoolOptionsError
            As for ``check``, and for an option that can't be changed any more.

        Examples
        --------
        >>> PoolOptions.check("web", max=10).configure(max=20, buffer=1).buffer
        1
        """
        _refuse_unknown(changes, _CHECKS, "is not an option of FlamePool")
        for option, value in changes.items():
            if option not in CONFIGURABLE:
                problem = "can't be changed on a running pool"
                raise PoolOptionsError(
                    option, value, "close the pool and open another", problem=problem
                )
        new = self.replace(**changes)
        if new.idle_check == self.idle_check:
            return new
        idle = changes["idle_shutdown_after"]
        if isinstance(idle, tuple):
            # Those that are there have the other one, and it can't be taken from them.
            raise PoolOptionsError(
                "idle_shutdown_after",
                idle,
                "give a duration alone, which leaves the check as it is, or close the pool and "
                "open another",
                problem="has another check than the pool's runners",
            )
        return dataclasses.replace(new, idle_check=self.idle_check)

    @classmethod
    def _from(cls, values: Mapping[str, object], sources: Mapping[str, str]) -> PoolOptions:
        if "max" not in values:
            raise PoolOptionsError(
                "max",
                None,
                "give the most runners that may exist at the same time, such as max=10",
                problem="is missing",
                missing=True,
            )
        values = {**_UNSET, **values}
        checked = {
            option: _checked(check, option, values[option], sources.get(option))
            for option, check in _CHECKS.items()
            if option in values
        }
        checked["idle_shutdown_after"], checked["idle_check"] = checked["idle_shutdown_after"]
        checked["queue_timeout_given"] = "queue_timeout" in checked
        checked.setdefault("queue_timeout", checked["boot_timeout"])  # E1
        if checked["min"] > checked["max"]:
            raise PoolOptionsError(
                "min",
                values["min"],
                f"give at most max={checked['max']}, or a larger max",
                source=sources.get("min"),
            )
        return cls(**checked)

    def __repr__(self) -> str:
        # Shown as given, without secrets (F4): env by its names, security and backend not in full.
        options = ", ".join(
            f"{option}={shown(option, value)}"
            for option in (*_CHECKS, "idle_check")
            if (value := getattr(self, option)) is not None
        )
        return f"{type(self).__name__}({options})"


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorOptions:
    """The options of a supervisor, checked (K1). Made by ``check`` only.

    Parameters
    ----------
    max_restarts
        The most restarts within ``max_seconds``, of all its pools together.
    max_seconds
        Seconds; ``None`` is no limit: all restarts count.
    on_failure, asynchronous
        As they were given.
    """

    max_restarts: int
    max_seconds: float | None
    on_failure: Callable[..., object] | None
    asynchronous: bool

    @classmethod
    def check(cls, **given: object) -> SupervisorOptions:
        """Check the options of a supervisor; all of them have to be given.

        Raises
        ------
        PoolOptionsError
            One of them can't be used.

        Examples
        --------
        >>> SupervisorOptions.check(
        ...     max_restarts=3, max_seconds="1m", on_failure=None, asynchronous=False
        ... ).max_seconds
        60.0
        """
        return cls(
            **{
                name: _checked(check, name, given[name])
                for name, check in _SUPERVISOR_CHECKS.items()
            }
        )


def duration(option: str, value: object) -> float | None:
    """Read a duration that is not an option of a pool or a call.

    Raises
    ------
    PoolOptionsError
        It can't be read; ``option`` says there what it is.

    Examples
    --------
    >>> duration("timeout", "2m")
    120.0
    """
    seconds: float | None = _checked(_duration, option, value)
    return seconds


# -- Refusing -------------------------------------------------------------------------------------


def _checked(
    check: Callable[[Any], Any], option: str, value: object, source: str | None = None
) -> Any:
    try:
        return check(value)
    except _Refused as refused:
        raise PoolOptionsError(option, value, str(refused), source=source) from refused.__cause__
    except PoolOptionsError as error:  # of an option that has parts
        if source is None:
            raise
        problem = error.problem
        raise PoolOptionsError(
            error.option, error.value, error.remedy, problem=problem, source=source
        ) from None


def _refuse_unknown(given: Mapping[str, object], known: Mapping[str, object], problem: str) -> None:
    for option, value in given.items():
        if option in known:
            continue
        near = difflib.get_close_matches(option, known, n=1, cutoff=0.4)
        # A misspelt env holds secrets just the same (F4), and so may any object.
        hide = near in (["env"], ["security"]) or not isinstance(value, str | int | float | None)
        remedy = f"did you mean {near[0]}?" if near else f"give one of {', '.join(known)}"
        raise PoolOptionsError(option, HIDDEN if hide else value, remedy, problem=problem)

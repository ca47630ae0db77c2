"""Payloads: exceptions (B6, F3, F4)."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import pickle
import subprocess
import threading
import traceback
import types
from typing import Any

import pytest
from distributed.core import clean_exception, error_message

from flame_dask.errors import RunnerLost, SerializationError
from flame_dask.payload import check_exception, pack_value

LOCK = threading.Lock()


class TwoArguments(Exception):
    """The classic trap."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{code}: {why}")
        self.code = code


class Wordy(Exception):
    """Unpickles by itself, but says "code code 5" then."""

    def __init__(self, code: object) -> None:
        super().__init__(f"code {code}")


class Newer(Exception):
    """The trap in ``__new__``, which tblib falls into."""

    def __new__(cls, code: int, why: str) -> Newer:
        return super().__new__(cls, why)

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)


class Slots(Exception):
    __slots__ = ("code",)

    def __init__(self, code: int) -> None:
        self.code = code


class NoFile(FileNotFoundError):
    def __init__(self, name: str) -> None:
        super().__init__(2, "no such file", name)


def no_words() -> None: ...


class Hopeless(Exception):
    """Its own ``__reduce__`` is wrong."""

    def __reduce__(self) -> tuple[Any, ...]:
        return no_words, (1, 2)


class Disguised(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        return ValueError, self.args


class Mute(Exception):
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __str__(self) -> str:
        raise RuntimeError


def thrown(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """Raise and catch, for a traceback."""
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def arrived(error: BaseException) -> BaseException:
    """What the parent gets to see."""
    back = pickle.loads(pickle.dumps(pack_value(check_exception(error)))).load()
    assert isinstance(back, BaseException)
    return back


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyError("a"),
        FileNotFoundError(2, "no such file", "a.txt"),
        subprocess.CalledProcessError(1, ["false"], b"out"),
        multiprocessing.ProcessError(),
        KeyboardInterrupt(),
        TwoArguments(5, "no"),
        SystemExit(3),
        ModuleNotFoundError("No module named 'a'", name="a"),
        json.JSONDecodeError("no", "{", 1),
        NoFile("a.txt"),
        Wordy(5),
        ExceptionGroup("all", [KeyError(3), TwoArguments(5, "no")]),
        RunnerLost("oom", runner="r-1"),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_exceptions_that_survive(error: BaseException) -> None:
    """B1: unchanged here, and there with type, text, attributes and traceback."""
    caught = thrown(error)
    assert check_exception(caught) is caught
    back = arrived(caught)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert repr(back) == repr(error)
    assert vars(back) == vars(error)
    for name in ("name", "code", "value", "errno", "filename", "lineno", "object"):
        assert getattr(back, name, None) == getattr(error, name, None)
    assert back.__traceback__ is not None
    assert back.__traceback__.tb_frame.f_code.co_name == "thrown"


def test_more_of_an_exception_that_survives() -> None:
    """B1: what it keeps in slots, notes, and fields of built-in exceptions."""
    stop, slots = StopIteration(5), Slots(7)
    slots.add_note("careful")
    assert arrived(stop).value == 5  # type: ignore[attr-defined]
    assert arrived(slots).code == 7  # type: ignore[attr-defined]
    assert arrived(slots).__notes__ == ["careful"]
    # Inside of a result, too. distributed makes plain pickle send these in tblib's way.
    (error,) = pack_value([UnicodeDecodeError("ascii", b"x", 0, 1, "bad")]).load()
    assert str(error) == "'ascii' codec can't decode byte 0x78 in position 0: bad"
    assert str(pack_value(Newer(5, "why")).load()) == "why"
    group = pack_value(BaseExceptionGroup("all", [SystemExit(3), Newer(5, "why")])).load()
    assert [str(part) for part in group.exceptions] == ["3", "why"]
    assert group.exceptions[0].code == 3


@pytest.mark.parametrize(
    "error",
    [UnicodeDecodeError("ascii", b"x", 0, 1, "bad"), SyntaxError("bad", ("a.py", 1, 2, "text"))],
)
def test_text_that_dask_would_lose(error: Exception) -> None:
    """B1: a payload keeps it. When Dask sends the exception itself, there is a note of it."""
    back = arrived(error)
    assert (type(back), str(back)) == (type(error), str(error))
    sent: Any = error_message(check_exception(error))["exception"]
    by_dask = clean_exception(sent.data)[1]
    assert type(by_dask) is type(error)
    assert str(error) in by_dask.__notes__


def test_causes_are_carried() -> None:
    """B1: the chain is that of the runner, even if it goes round."""
    error = thrown(ValueError("outer"), thrown(TwoArguments(5, "inner")))
    back = arrived(error)
    assert type(back.__cause__) is TwoArguments
    assert back.__cause__.__traceback__ is not None
    assert (back.__context__, back.__suppress_context__) == (None, True)

    assert error.__cause__
    error.__cause__.__cause__ = error
    back = pack_value(error).load()
    assert back.__cause__.__cause__ is back


def test_context_is_carried() -> None:
    """B1: the exception during whose handling it was raised, whether shown or not."""
    with pytest.raises(ValueError, match="outer") as caught:  # noqa: PT012
        try:
            raise KeyError("inner")
        except KeyError:
            raise ValueError("outer")  # noqa: B904
    back = arrived(caught.value)
    assert type(back.__context__) is KeyError
    assert not back.__suppress_context__
    caught.value.__suppress_context__ = True
    assert arrived(caught.value).__suppress_context__


def test_a_cause_that_cannot_be_sent() -> None:
    """B1: costs the chain, whose text goes along, but not the type."""
    error = thrown(ValueError("outer"), thrown(Hopeless("inner")))
    back = arrived(error)
    assert type(back) is ValueError
    assert back.__cause__ is None
    (note,) = back.__notes__
    assert note.startswith("Remote traceback:\n")
    assert "Hopeless: inner" in note
    assert "in thrown" in note


def test_a_traceback_too_deep_to_send() -> None:
    """B1: that of a RecursionError."""

    def deeper() -> None:
        deeper()

    with pytest.raises(RecursionError) as caught:
        deeper()
    back = arrived(caught.value)
    assert type(back) is RecursionError
    assert "in deeper" in "".join(traceback.format_exception(back))


@pytest.mark.parametrize(
    "error", [Hopeless("why"), Disguised("why"), Newer(5, "why"), ValueError("no", LOCK)]
)
def test_exceptions_that_do_not_survive(error: Exception) -> None:
    """B6, F3: their place is taken by an error with type, text and traceback."""
    back = arrived(thrown(error))
    assert type(back) is SerializationError
    name = type(error).__name__
    assert back.part.startswith(f"the {name} that was raised, for ")
    assert f"{name}: " in str(back)
    assert "why" in str(back) or name == "ValueError"
    assert "Remote traceback:\nTraceback (most recent call last):" in str(back)
    assert "in thrown" in str(back)


def test_the_reason_that_an_exception_does_not_survive() -> None:
    """B6: the attribute, or the class."""
    error = ValueError("no")
    error.conn = types.SimpleNamespace(lock=LOCK)  # type: ignore[attr-defined]
    back = check_exception(error)
    assert isinstance(back, SerializationError)
    assert back.part == "the ValueError that was raised, for exception.conn.lock"
    back = check_exception(Hopeless("why"))
    assert isinstance(back, SerializationError)
    assert back.part == "the Hopeless that was raised, for its class"
    assert "TypeError (give it __reduce__)" in str(back)


def test_text_of_an_exception_is_bounded_and_without_secrets() -> None:
    """F4: it is text from elsewhere."""
    error = thrown(Hopeless("x" * 100_000 + " password=hunter2"))
    text = str(arrived(error))
    assert len(text) < 12_000
    assert "hunter2" not in text
    assert "password=<hidden>" in text

    assert "Mute" in str(arrived(thrown(Mute())))

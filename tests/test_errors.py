"""Rule F4: one tree of errors, that pickle whole and hold no secret."""

import asyncio
import concurrent.futures
import copy
import datetime
import doctest
import pickle
import subprocess
import sys
import threading
import time

import cloudpickle
import pytest
from distributed.protocol import deserialize, serialize
from distributed.protocol.pickle import dumps, loads
from hypothesis import given
from hypothesis import strategies as st

from flame_dask import errors
from flame_dask.errors import (
    BootError,
    CallCancelled,
    CallTimeout,
    Crash,
    FlameError,
    PoolClosed,
    PoolNotFound,
    PoolOptionsError,
    RunnerLost,
    SerializationError,
    SupervisorFailed,
    redact,
)

BOOT = BootError("connect", OSError(113, "No route"), log_tail=["a", "b"], attempts=3)

AT = datetime.datetime(2027, 1, 31, 12, 30, tzinfo=datetime.UTC)

# One of each, with every argument away from its default, and the attributes it must keep.
EXAMPLES = [
    (FlameError("no"), {}),
    (
        PoolOptionsError("max", 0, "give more", problem="is little", source="Dask config key x"),
        {"option": "max", "value": 0, "remedy": "give more", "source": "Dask config key x"},
    ),
    (PoolNotFound("wbe", ["web", "gpu"]), {"name": "wbe", "known": ("gpu", "web")}),
    (PoolClosed("web"), {"name": "web"}),
    (
        BootError("setup", "no such image", log_tail=("x", "y"), attempts=2),
        {"phase": "setup", "cause": "no such image", "log_tail": ("x", "y"), "attempts": 2},
    ),
    (SerializationError("variable 'lock'", TypeError("no locks")), {"part": "variable 'lock'"}),
    (
        CallTimeout(
            "booting", queued=1, booting=28.5, running=0.0, boot_error=BOOT, call="c-1", limit=30.0
        ),
        {"phase": "booting", "queued": 1.0, "booting": 28.5, "running": 0.0}
        | {"call": "c-1", "limit": 30.0},
    ),
    (CallCancelled("c-1", "Ctrl-C"), {"call": "c-1", "reason": "Ctrl-C"}),
    (
        RunnerLost("oom", exit_code=137, signal=9, runner="r-1", call="c-1"),
        {"cause": "oom", "exit_code": 137, "signal": 9, "runner": "r-1", "call": "c-1"},
    ),
    (
        SupervisorFailed([Crash("web", AT, "a"), Crash("gpu", AT, "b.")], 1, 5.0),
        {"causes": (Crash("web", AT, "a"), Crash("gpu", AT, "b."))}
        | {"max_restarts": 1, "max_seconds": 5.0},
    ),
]
IDS = [type(error).__name__ for error, _ in EXAMPLES]

WAYS = {
    **{
        f"pickle{n}": lambda error, n=n: pickle.loads(pickle.dumps(error, n))
        for n in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "cloudpickle": lambda error: cloudpickle.loads(cloudpickle.dumps(error)),
    "distributed": lambda error: loads(dumps(error)),
    "serialize": lambda error: deserialize(*serialize(error)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "twice": lambda error: copy.copy(pickle.loads(pickle.dumps(error))),
}


def comparable(error):
    """The attributes, with exceptions among them as type and text."""
    return {
        name: (type(value), str(value)) if isinstance(value, BaseException) else value
        for name, value in vars(error).items()
    }


def test_examples_are_the_whole_tree():
    tree = {FlameError, *FlameError.__subclasses__()}
    assert {type(error) for error, _ in EXAMPLES} == tree
    assert {cls.__name__ for cls in tree} <= set(errors.__all__)


@pytest.mark.parametrize(
    ("cls", "base"),
    [
        (PoolOptionsError, ValueError),
        (PoolNotFound, LookupError),
        (PoolClosed, RuntimeError),
        (BootError, RuntimeError),
        (SerializationError, TypeError),
        (CallTimeout, TimeoutError),
        (CallTimeout, asyncio.TimeoutError),
        (CallTimeout, concurrent.futures.TimeoutError),
        (CallCancelled, concurrent.futures.CancelledError),
        (RunnerLost, RuntimeError),
        (SupervisorFailed, RuntimeError),
    ],
)
def test_each_is_a_flame_error_and_a_builtin_one(cls, base):
    assert issubclass(cls, FlameError)
    assert issubclass(cls, base)


@pytest.mark.parametrize(("error", "attributes"), EXAMPLES, ids=IDS)
def test_attributes(error, attributes):
    assert {name: getattr(error, name) for name in attributes} == attributes


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES], ids=IDS)
def test_travels_with_text_and_attributes(error, way):
    back = WAYS[way](error)
    assert type(back) is type(error)
    assert back is not error
    assert str(back) == str(error) != ""
    assert repr(back) == repr(error)
    assert back.args == error.args
    assert comparable(back) == comparable(error)


def test_every_error_travels_with_only_what_it_needs():
    for error in (
        BootError("start"),
        CallTimeout("queued"),
        CallCancelled(),
        RunnerLost("exited"),
        SerializationError("the result"),
        PoolNotFound("web"),
        PoolNotFound("web", restarting=True),
        SupervisorFailed([], 0, None),
        FlameError(),
    ):
        back = pickle.loads(pickle.dumps(error))
        assert str(back) == str(error)
        assert vars(back) == vars(error)


def test_notes_travel_too():
    error = PoolClosed("web")
    error.add_note("closed by a signal")
    assert pickle.loads(pickle.dumps(error)).__notes__ == ["closed by a signal"]


def test_copy_keeps_the_very_cause_and_leaves_the_original_alone():
    error = BootError("start", threading.BrokenBarrierError())
    twin = copy.copy(error)
    assert twin.cause is error.cause
    twin.phase = "setup"
    assert error.phase == "start"


def test_subclasses_travel_too():
    class Mine(BootError):
        def __init__(self, here, there):
            super().__init__("start", f"{here} to {there}")
            self.here = here

    back = cloudpickle.loads(cloudpickle.dumps(Mine("a", "b")))
    assert (back.here, back.phase) == ("a", "start")


class TwoArguments(Exception):
    """The classic trap: it pickles, and fails to unpickle."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class HoldsLock(Exception):
    """It fails to pickle."""

    def __init__(self):
        super().__init__("locked")
        self.lock = threading.Lock()


class NoText(Exception):
    def __str__(self):
        raise ZeroDivisionError

    __repr__ = __str__


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (TwoArguments(1, 2), "TwoArguments: 1 and 2"),
        (HoldsLock(), "HoldsLock: locked"),
    ],
)
def test_a_cause_that_cannot_travel_becomes_its_text(cause, text):
    error = BootError("start", cause)
    assert error.cause is cause
    back = pickle.loads(pickle.dumps(CallTimeout("booting", boot_error=error))).boot_error
    assert back.cause == text
    assert back.phase == "start"
    assert str(back) == str(error)
    assert text in str(back)


def test_a_cause_unknown_on_the_other_side_becomes_its_text(tmp_path):
    """Say, an exception of a cloud's package that only the parent has."""
    (tmp_path / "vendor.py").write_text("class ThrottledError(Exception): pass")
    script = (
        "import sys, pickle; from vendor import ThrottledError; "
        "from flame_dask.errors import BootError; "
        "sys.stdout.buffer.write(pickle.dumps(BootError('start', ThrottledError('slow down'))))"
    )
    path = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, *{sys.path!r}]; "
    done = subprocess.run([sys.executable, "-c", path + script], check=True, capture_output=True)
    assert pickle.loads(done.stdout).cause == "ThrottledError: slow down"


def test_a_value_that_cannot_travel_becomes_its_repr():
    error = PoolOptionsError("on_shrink", threading.Lock(), "give a function")
    back = pickle.loads(pickle.dumps(error))
    assert "lock" in back.value
    assert str(back) == str(error)


def test_broken_objects_do_no_harm():
    assert "NoText" in str(BootError("start", NoText()))
    assert "NoText" in str(PoolOptionsError("max", NoText(), "give a number"))
    assert "int" in str(PoolOptionsError("max", 10**5000, "give less"))
    assert len(str(BootError("start", "x" * 10**6))) < 1000
    assert len(str(PoolOptionsError("name", "x" * 10**6, "give less"))) < 1000


def test_timeout_says_where_the_time_went_and_why():
    text = str(EXAMPLES[IDS.index("CallTimeout")][0])
    assert "Call c-1 passed its limit of 30 s while booting" in text
    assert "(queued 1 s, booting 28.5 s, running 0 s)" in text
    assert "No route" in text
    assert "A call passed its limit while queued" in str(CallTimeout("queued"))
    assert CallTimeout("queued").boot_error is None


@pytest.mark.parametrize("phase", ["queued", "booting", "running"])
def test_timeout_has_a_remedy_for_each_phase(phase):
    assert "give it a longer timeout" in str(CallTimeout(phase))


def test_runner_lost_says_how():
    assert "(exit code 3)" in str(RunnerLost("exited", exit_code=3))
    assert "(SIGKILL)" in str(RunnerLost("signal", signal=9))
    assert "signal 40" in str(RunnerLost("signal", signal=40))
    texts = {
        str(RunnerLost(cause)) for cause in ("exited", "signal", "oom", "preempted", "unreachable")
    }
    assert len(texts) == 5


def test_f3_unknown_words_do_not_keep_an_error_from_being_made():
    assert "meteorite" in str(RunnerLost("meteorite"))
    assert "while sleeping" in str(CallTimeout("sleeping"))


def test_boot_error_says_why_and_how_often():
    assert str(BOOT).startswith("A runner did not boot: phase 'connect' failed on 3 attempts: ")
    assert "No route" in str(BOOT)
    assert "log_tail" in str(BOOT)
    assert "attempts" not in str(BootError("start", "no"))
    assert BootError("start", log_tail="one text").log_tail == ("one text",)


def test_pool_not_found_names_the_pools_there_are():
    assert "'gpu', 'web'" in str(PoolNotFound("wbe", iter(["web", "gpu"])))
    assert "no pool is open" in str(PoolNotFound("wbe"))
    assert len(str(PoolNotFound("x", map(str, range(10_000))))) < 500


def test_pool_not_found_says_that_it_comes_back():
    error = PoolNotFound("web", ["gpu"], restarting=True)
    assert error.restarting
    assert not PoolNotFound("web").restarting
    assert str(error).endswith("restarting it: try again when it is up.")


def test_supervisor_failed_tells_each_cause():
    error = SupervisorFailed([Crash("web", AT, BOOT), Crash("gpu", AT, "it is gone")], 1, None)
    assert "1 times" not in str(error)
    assert "restart them once in all and they crashed 2 times" in str(error)
    assert f"(1) pool 'web' at 2027-01-31 12:30:00 UTC: BootError: {str(BOOT)[:-1]}; " in str(error)
    assert str(error).endswith("(2) pool 'gpu' at 2027-01-31 12:30:00 UTC: it is gone.")


@pytest.mark.parametrize("way", WAYS)
def test_causes_of_a_crash_travel(way):
    crash = Crash("web", AT, BOOT)
    [back] = WAYS[way](SupervisorFailed([crash], 0, 5.0)).causes
    assert (back.pool, back.time, str(back)) == (crash.pool, crash.time, str(crash))
    assert comparable(back.cause) == comparable(BOOT)
    [back] = WAYS[way](SupervisorFailed([Crash("web", AT, HoldsLock())], 0, 5.0)).causes
    assert "HoldsLock" in str(back)
    assert copy.copy(crash).cause is crash.cause


@pytest.mark.parametrize("error", [error for error, _ in EXAMPLES[1:]], ids=IDS[1:])
def test_messages_are_one_sentence_in_one_line(error):
    assert "\n" not in str(error)
    assert str(error).endswith(".")
    assert not str(error).endswith("..")
    assert ": " in str(error)


SECRET = "hunter2-s3cr3t"
SECRET_TEXTS = [
    f"token={SECRET}",
    f"AWS_SECRET_ACCESS_KEY={SECRET}",
    f"{{'password': '{SECRET} {SECRET}'}}",
    f'{{"api_key": "{SECRET}"}}',
    f"api-key: '{SECRET} cut",
    f"Authorization: Bearer {SECRET}",
    f"can't log in at https://me:{SECRET}@host:8786/x",
    f"tls://:{SECRET}@host",
    f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
    f"-----BEGIN CERTIFICATE-----\n{SECRET}",
]


@pytest.mark.parametrize("text", SECRET_TEXTS)
def test_no_secret_of_others_is_shown(text):
    for error in (
        BootError("start", text),
        BootError("start", OSError(text)),
        CallTimeout("booting", boot_error=BootError("start", text)),
        BootError("start", log_tail=["before", *text.split("\n"), "after"]),
        SerializationError("the result", TypeError(text)),
        PoolOptionsError("host", text, "give a host"),
        PoolOptionsError("host", text + "x" * 200, "give a host"),
        PoolOptionsError("code_sync", [text], "give a mapping"),
    ):
        shown = f"{error} {error!r} {getattr(error, 'log_tail', '')}"
        assert SECRET not in shown


@pytest.mark.parametrize("option", ["env", "security", "api_token", "DB_PASSWORD", "access_key"])
def test_no_value_of_a_secret_option_is_kept(option):
    error = PoolOptionsError(option, {"TOKEN": SECRET}, "give something else")
    assert SECRET not in str(error)
    assert error.value == "<hidden>"
    assert SECRET.encode() not in pickle.dumps(error)


def test_cutting_a_long_value_uncovers_no_secret():
    address = f"tls://me:{SECRET}{'x' * 99}@host{'/y' * 99}"
    assert SECRET not in str(PoolOptionsError("host", address, "give a host"))


def test_options_of_a_backend_are_not_shown():
    error = PoolOptionsError("backend", (dict, {"aws": SECRET}), "give a class")
    assert SECRET not in str(error)
    assert "dict" in str(error)


def test_redact_keeps_what_is_no_secret():
    text = "At 10:30, worker tcp://10.0.0.1:8786 said: no module named 'foo' (exit=1); keys: a, b"
    assert redact(text) == text


@given(st.text())
def test_redact_takes_any_text(text):
    assert isinstance(redact(text), str)


@pytest.mark.parametrize(
    "text", ["a" * 10**6, "token" * 10**5, "://" * 10**5, "-----BEGIN " * 10**4]
)
def test_redact_is_fast_on_long_texts(text):
    started = time.perf_counter()
    redact(text)
    assert time.perf_counter() - started < 5


def test_only_the_standard_library_is_imported():
    """Every part of flame_dask raises from there, also where a runner has nothing else."""
    script = (
        "import importlib.util, sys\n"
        "before = set(sys.modules)\n"
        f"spec = importlib.util.spec_from_file_location('errors', {errors.__file__!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert new <= sys.stdlib_module_names, new - sys.stdlib_module_names\n"
    )
    subprocess.run([sys.executable, "-I", "-c", script], check=True)


def test_examples_in_docstrings():
    assert doctest.testmod(errors).failed == 0

"""Rules A1, A2, A3 (B1, E1 for calls): options are checked once, in full, before any start."""

import copy
import dataclasses
import doctest
import math
import os
import pickle
import subprocess
import sys
import threading
from datetime import timedelta
from fractions import Fraction

import dask.config
import numpy as np
import pytest
from dask.utils import parse_bytes, parse_timedelta
from distributed import Security
from hypothesis import given
from hypothesis import strategies as st

from flame_dask import options
from flame_dask.code_options import CodeSync
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

SECRET = "hunter2-s3cr3t"

SECURITY = Security(require_encryption=True)

A1 = [
    *("name", "backend", "min", "max", "max_concurrency", "single_use", "timeout"),
    *("queue_timeout", "boot_timeout", "shutdown_timeout", "idle_shutdown_after"),
    *("min_idle_shutdown_after", "on_grow_start", "on_grow_end", "on_shrink", "on_cast_error"),
    *("track_resources", "code_sync", "isolation", "buffer", "placement", "env", "log"),
    *("asynchronous", "security", "scheduler", "host", "contact_address"),
]

A1_DEFAULTS = {
    "min": 0,
    "max_concurrency": 100,
    "single_use": False,
    "timeout": 30.0,
    "boot_timeout": 30.0,
    "shutdown_timeout": 30.0,
    "idle_shutdown_after": 30.0,
    "min_idle_shutdown_after": None,
    "track_resources": False,
    "isolation": "thread",
    "buffer": 0,
    "placement": "spread",
    "log": False,
}
DURATIONS = [
    "timeout",
    "queue_timeout",
    "boot_timeout",
    "shutdown_timeout",
    "idle_shutdown_after",
    "min_idle_shutdown_after",
]
BOOLS = ["single_use", "track_resources", "log", "asynchronous"]
HOOKS = ["on_grow_start", "on_grow_end", "on_shrink", "on_cast_error"]


def check(**given):
    return PoolOptions.check("web", **{"max": 10, **given})


def refused(**given):
    """Check options that must be refused, and give the error."""
    with pytest.raises(PoolOptionsError) as caught:
        check(**given)
    return caught.value


@pytest.fixture(autouse=True)
def _no_configuration_of_this_machine(monkeypatch):
    monkeypatch.setitem(dask.config.config, "flame", copy.deepcopy(options._SHIPPED["flame"]))


# -- A1: the options and their defaults ---------------------------------------------------------


def test_a1_options_are_those_of_the_contract():
    fields = [field.name for field in dataclasses.fields(PoolOptions)]
    assert fields[: len(A1)] == A1
    assert fields[len(A1) :] == ["idle_check", "queue_timeout_given", "call_defaults"]
    assert list(options._CHECKS) == A1


def test_a1_defaults():
    made = check()
    assert {option: getattr(made, option) for option in A1_DEFAULTS} == A1_DEFAULTS
    assert made.name == "web"
    assert made.max == 10
    rest = set(A1) - A1_DEFAULTS.keys() - {"name", "max", "queue_timeout"}
    assert {option: getattr(made, option) for option in rest} == {
        option: {"env": {}, "asynchronous": False}.get(option) for option in rest
    }
    assert made.idle_check is None


def test_a1_max_has_no_default_even_if_configured():
    with dask.config.set({"flame.max": 7}), pytest.raises(PoolOptionsError) as caught:
        PoolOptions.check("web")
    assert caught.value.option == "max"
    assert str(caught.value).startswith("max is missing: give the most runners")


def test_a1_options_do_not_change():
    made = check()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.max = 11
    assert not hasattr(made, "__dict__")


def test_options_are_values():
    assert check(env={"A": "1"}) == check(env={"A": "1"}) != check()
    assert len({check(backend=(dict, {})), check(backend=(dict, {}))}) == 1
    assert pickle.loads(pickle.dumps(check())) == check()


# -- A2: everything is checked ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("max_concurency", "max_concurrency"),
        ("idle_timeout", "queue_timeout"),
        ("maximum", "max"),
        ("Min", "min"),
        ("on_grow", "on_grow_end"),
        ("boot-timeout", "boot_timeout"),
        ("enviro", "env"),
        ("idle_check", "code_sync"),
    ],
)
def test_a2_an_unknown_option_is_named_with_the_nearest_one(typo, nearest):
    error = refused(**{typo: 1})
    assert error.option == typo
    assert typo in str(error)
    assert "is not an option of FlamePool: did you mean" in str(error)
    if typo not in {"idle_timeout", "on_grow", "idle_check"}:  # these have several near ones
        assert f"did you mean {nearest}?" in str(error)


def test_a2_an_option_like_no_other_gets_the_list():
    text = str(refused(zzz=1))
    assert all(option in text for option in A1)


def test_a2_unknown_options_are_refused_before_values():
    assert refused(max=-1, zzz=1).option == "zzz"


@given(st.text(min_size=1).filter(lambda text: text not in {*A1, "cls"}))
def test_a2_no_unknown_option_passes(option):
    assert refused(**{option: 1}).option == option


@pytest.mark.parametrize("option", ["min", "max", "max_concurrency", "buffer"])
@pytest.mark.parametrize(
    "value", [-1, True, 1.0, 2.5, "3", None, math.nan, math.inf, [1], object()]
)
def test_a2_whole_numbers(option, value):
    error = refused(**{option: value})
    assert error.option == option
    assert str(error).startswith(f"{option}=")
    assert "give a whole number of at least" in str(error)


@pytest.mark.parametrize(("option", "least"), [("max", 1), ("max_concurrency", 1), ("min", 0)])
def test_a2_least_numbers(option, least):
    assert getattr(check(**{option: least}), option) == least
    assert f"of at least {least}" in str(refused(**{option: least - 1}))


def test_a2_whole_numbers_of_numpy_become_int():
    made = check(max=np.int64(5), buffer=np.uint8(1))
    assert (type(made.max), type(made.buffer)) == (int, int)


def test_a2_min_above_max():
    error = refused(min=4, max=3)
    assert str(error) == "min=4 is not valid: give at most max=3, or a larger max."
    assert (error.option, error.value) == ("min", 4)
    assert check(min=3, max=3).min == 3


@pytest.mark.parametrize("option", DURATIONS)
@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (30, 30.0),
        (0, 0.0),
        (0.5, 0.5),
        (Fraction(1, 2), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        ("30s", 30.0),
        ("2 m", 120.0),
        ("1h", 3600.0),
        ("500ms", 0.5),
        ("7", 7.0),
        (timedelta(minutes=1, milliseconds=5), 60.005),
        (None, None),
    ],
)
def test_a2_durations_become_seconds(option, value, seconds):
    made = getattr(check(**{option: value}), option)
    assert made == seconds
    assert type(made) is type(seconds)


def without_address(value):
    """A test's id that is the same in each process: not the ``repr`` of a plain object."""
    return "object()" if type(value) is object else repr(value)


BAD_DURATIONS = [
    *[-1, -0.001, math.nan, math.inf, -math.inf, True, timedelta(seconds=-1), 10**400],
    *["soon", "", " ", "-5s", "30 parsecs", "1e999", "nan", "inf", "30s 5"],
    *[[30], {}, object(), 1j, b"30s", np.array([1.0, 2.0])],
]


@pytest.mark.parametrize("option", DURATIONS)
@pytest.mark.parametrize("value", BAD_DURATIONS, ids=without_address)
def test_a2_durations_that_cannot_be_read(option, value):
    error = refused(**{option: value})
    assert error.option == option
    assert str(error).startswith(f"{option}=")
    assert "None for no limit" in str(error)


@given(st.floats(min_value=0, allow_infinity=False) | st.integers(0, 10**300))
def test_a2_any_number_of_seconds(value):
    assert check(timeout=value).timeout == float(value)


@given(st.timedeltas(min_value=timedelta(0)))
def test_a2_any_timedelta(value):
    assert check(timeout=value).timeout == value.total_seconds()


@given(
    st.text()
    | st.from_regex(r"[-+0-9.e ]{0,6}(s|m|h|ms|us|days?|x|)", fullmatch=True)
    | st.floats()
    | st.integers()
)
def test_a2_a_duration_is_read_as_dask_does_or_refused(value):
    try:
        made = check(timeout=value).timeout
    except PoolOptionsError:
        return
    assert made == float(parse_timedelta(value))
    assert 0 <= made < math.inf


@pytest.mark.parametrize("option", BOOLS)
@pytest.mark.parametrize("value", [0, 1, None, "true", []])
def test_a2_bools(option, value):
    assert "give True or False" in str(refused(**{option: value}))


@pytest.mark.parametrize("option", HOOKS)
def test_a2_hooks(option):
    assert getattr(check(**{option: print}), option) is print
    assert getattr(check(**{option: None}), option) is None
    assert "give a function, or None" in str(refused(**{option: "print"}))


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        ("placement", ["spread", "pack"], ["SPREAD", "", None, 1, [], np.array(["pack", "pack"])]),
        ("isolation", ["thread", "process"], ["proc", None, True]),
        ("scheduler", ["parent", "remote", None], ["tcp://host:8786", 1]),
        ("host", ["10.0.0.1", None], ["", 5]),
        ("contact_address", ["tls://host:8786", None], ["  ", 5]),
        ("code_sync", [CodeSync(copy_apps=True), None], [True, ["src"]]),
        ("security", [SECURITY, None], [object(), Security(), "tls", True]),
    ],
)
def test_a2_choices(option, good, bad):
    for value in good:
        assert getattr(check(**{option: value}), option) == value
    for value in bad:
        assert refused(**{option: value}).option == option


@pytest.mark.parametrize("name", ["", "  ", None, 5, b"web", ["web"]])
def test_a2_names(name):
    with pytest.raises(PoolOptionsError) as caught:
        PoolOptions.check(name, max=1)
    assert caught.value.option == "name"


def test_a2_env_is_copied():
    env = {"A": "1", "B": ""}
    made = check(env=env)
    env["A"] = "2"
    assert made.env == {"A": "1", "B": ""}
    assert check(env=None).env == {}


@pytest.mark.parametrize(
    "env",
    [{"A": 1}, {1: "A"}, {"": "A"}, {"A=B": "C"}, {"A": "\0"}, {"A\0": "B"}, [("A", "1")], "A"],
)
def test_a2_env(env):
    assert "give " in str(refused(env=env))


def test_a2_a_refusal_is_a_value_error_that_says_all():
    error = refused(timeout="soon")
    assert isinstance(error, ValueError)
    assert (error.option, error.value, error.source) == ("timeout", "soon", None)
    assert str(error) == (
        "timeout='soon' is not valid: "
        'give seconds, a timedelta, a text such as "30s", or None for no limit.'
    )


# -- D2, A2: the idle check ---------------------------------------------------------------------


def test_d2_idle_check():
    made = check(idle_shutdown_after=("1m", is_idle))
    assert made.idle_shutdown_after == 60.0
    assert made.idle_check is is_idle
    assert check(idle_shutdown_after=(5, lambda: True)).idle_check() is True


def is_idle():
    return True


@pytest.mark.parametrize(
    "value", [(), (30,), (30, 5), (30, is_idle, 1), (is_idle, 30), [30, is_idle]]
)
def test_a2_idle_checks_of_the_wrong_form(value):
    error = refused(idle_shutdown_after=value)
    assert error.option == "idle_shutdown_after"
    assert "is not valid: give " in str(error)


def test_a2_an_idle_check_with_an_unreadable_duration():
    assert "give a duration of zero or more" in str(refused(idle_shutdown_after=(-1, is_idle)))


def test_a2_an_unpicklable_idle_check():
    lock = threading.Lock()
    error = refused(idle_shutdown_after=(30, lambda: not lock.locked()))
    assert "give a check that can be pickled" in str(error)
    assert "TypeError" in str(error)
    assert isinstance(error.__cause__, TypeError)


# -- A3: defaults in Dask's configuration -------------------------------------------------------


def test_a3_every_default_of_the_contract_is_in_the_configuration():
    keys = options._SHIPPED["flame"]
    assert {option.replace("_", "-") for option in A1_DEFAULTS} | {"backend"} | {
        "inline-limit",
        "terminate-grace",
        "boot-retries",
        "boot-backoff",
    } == set(keys)


def test_a3_the_internal_defaults_can_be_read():
    assert parse_bytes(dask.config.get("flame.inline-limit")) == 65536
    assert dask.config.get("flame.boot-retries") == 2
    backoff = dask.config.get("flame.boot-backoff")
    assert parse_timedelta(backoff["base"]) == 0.2
    assert parse_timedelta(backoff["cap"]) == 30
    assert backoff["factor"] == 2


@pytest.mark.parametrize("spelling", ["flame.idle-shutdown-after", "flame.idle_shutdown_after"])
def test_a3_config_set(spelling):
    with dask.config.set({spelling: "5m"}):
        assert check().idle_shutdown_after == 300.0
        assert check(idle_shutdown_after=7).idle_shutdown_after == 7.0
    assert check().idle_shutdown_after == 30.0


@pytest.mark.parametrize("option", sorted(options._KEYS))
def test_a3_each_option_has_its_key(option):
    key = f"flame.{option.replace('_', '-')}"
    value = {
        **dict.fromkeys(DURATIONS, 77),
        **dict.fromkeys(BOOLS, True),
        "placement": "pack",
        "isolation": "process",
        "scheduler": "parent",
        "env": {"A": "1"},
        "code_sync": {"copy_apps": True},
        "backend": "some.Cluster",
        "host": "some.host",
        "contact_address": "some.host",
    }.get(option, 7)
    with dask.config.set({key: value}):
        wanted = CodeSync(**value) if option == "code_sync" else value
        assert getattr(check(), option) == wanted
    if option != "backend":  # it is resolved elsewhere
        with dask.config.set({key: object()}):
            error = refused()
        assert error.option == option
        assert error.source == f"Dask config key {key}"
        assert f"(from the Dask config key {key})" in str(error)


def test_a3_what_is_given_comes_before_a_bad_configuration():
    with dask.config.set({"flame.timeout": "soon"}):
        assert check(timeout=5).timeout == 5.0


def test_a3_min_of_the_configuration_above_max():
    with dask.config.set({"flame.min": 5}):
        assert "from the Dask config key flame.min" in str(refused(max=3))


def test_a3_backend_of_none_is_the_configured_one():
    with dask.config.set({"flame.backend": "some.Cluster"}):
        assert check().backend == "some.Cluster"
        assert check(backend=None).backend == "some.Cluster"
        assert check(backend=dict).backend is dict
    assert check().backend is None


def test_a3_a_cleared_configuration_leaves_the_shipped_defaults(monkeypatch):
    expected = check()
    monkeypatch.setitem(dask.config.config, "flame", None)
    assert check() == expected
    monkeypatch.delitem(dask.config.config, "flame")
    assert check() == expected


def test_a3_file_and_variables(tmp_path):
    """Dask reads them when it is imported, so this takes a new process."""
    (tmp_path / "flame.yaml").write_text("flame:\n  boot-timeout: 2m\n  timeout: 1m\n  min: 1\n")
    env = {
        **os.environ,
        "DASK_CONFIG": str(tmp_path),
        "DASK_FLAME__TIMEOUT": "5s",
        "DASK_FLAME__MAX_CONCURRENCY": "3",
        "DASK_FLAME__QUEUE_TIMEOUT": "None",
        "DASK_FLAME__PLACEMENT": "pack",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    script = (
        "from flame_dask.options import PoolOptions; o = PoolOptions.check('web', max=2);"
        "import dask.config; print(dask.config.get('flame.boot-retries'));"
        "print(o.min, o.boot_timeout, o.timeout, o.max_concurrency, o.queue_timeout, o.placement)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["2", "1", "120.0", "5.0", "3", "None", "pack"]


# -- E1: queue_timeout --------------------------------------------------------------------------


def test_e1_queue_timeout_is_boot_timeout_unless_given():
    made = check(boot_timeout=7)
    assert made.queue_timeout == 7.0
    assert not made.queue_timeout_given
    made = check(boot_timeout=7, queue_timeout=None)
    assert made.queue_timeout is None
    assert made.queue_timeout_given
    assert check(boot_timeout=None).queue_timeout is None
    with dask.config.set({"flame.queue-timeout": None}):
        assert check().queue_timeout is None


# -- F4: no secrets -----------------------------------------------------------------------------


def test_f4_repr_shows_no_secret():
    security = Security(require_encryption=True, tls_ca_file=SECRET)
    made = check(
        env={"TOKEN": SECRET}, security=security, backend=(dict, {"key": SECRET}), buffer=2
    )
    assert SECRET not in repr(made)
    assert "env={'TOKEN': <hidden>}" in repr(made)
    assert "security=<hidden>" in repr(made)
    assert "dict" in repr(made)
    assert "name='web'" in repr(made)
    assert "buffer=2" in repr(made)
    assert "host" not in repr(made)


@pytest.mark.parametrize(
    "given",
    [
        {"env": SECRET},
        {"env": [SECRET]},
        {"env": {"A": SECRET.encode()}},
        {"env": {"A": SECRET, "B": 5}},
        {"env": {5: SECRET}},
        {"environment": {"A": SECRET}},
        {"envs": SECRET},
        {"securty": SECRET},
        {"security": SECRET},
        {"api_token": SECRET},
        {"zzz": {"A": SECRET}},
    ],
)
def test_f4_refusals_show_no_secret(given):
    error = refused(**given)
    assert SECRET not in f"{error} {error!r} {error.value!r}"
    assert error.option in given


def test_f4_an_env_variable_is_named():
    assert "give 'PORT' a text as its value, not int" in str(refused(env={"PORT": 8080}))


# -- C8: replace --------------------------------------------------------------------------------


def test_c8_replace_checks_again():
    made = check(min=2, timeout="1m")
    changed = made.replace(max=20, idle_shutdown_after="5m")
    assert (changed.min, changed.max, changed.timeout) == (2, 20, 60.0)
    assert changed.idle_shutdown_after == 300.0
    assert made.max == 10
    for changes in ({"max": 1}, {"max": None}, {"mx": 3}, {"timeout": -1}):
        with pytest.raises(PoolOptionsError):
            made.replace(**changes)
    assert made.replace() == made
    assert made.replace(name="gpu").name == "gpu"


def test_c8_replace_does_not_read_the_configuration_again():
    made = check()
    with dask.config.set({"flame.timeout": 1, "flame.queue-timeout": 1, "flame.backend": "x"}):
        assert made.replace(max=10) == made


def test_c8_e1_queue_timeout_follows_boot_timeout_unless_given():
    assert check().replace(boot_timeout=7).queue_timeout == 7.0
    assert check(queue_timeout=9).replace(boot_timeout=7).queue_timeout == 9.0
    assert check(queue_timeout=None).replace(boot_timeout=7).queue_timeout is None
    assert check().replace(timeout=7).call_defaults.timeout == 7.0


def test_c8_d2_replace_keeps_the_idle_check_until_there_is_a_new_one():
    made = check(idle_shutdown_after=(5, is_idle))
    assert made.replace(max=3).idle_check is is_idle
    assert made.replace(idle_shutdown_after=6).idle_check is None


# -- configure -----------------------------------------------------------------------------------


@pytest.mark.parametrize("option", sorted(options._CHECKS.keys() - options.CONFIGURABLE))
def test_c8_what_runners_are_told_as_they_start_can_not_be_changed(option):
    with pytest.raises(PoolOptionsError, match="on a running pool: close the pool and") as caught:
        check().configure(**{"buffer": 1, option: "v4lue"})
    assert caught.value.option == option
    assert "v4lue" not in str(caught.value) or option not in ("env", "security")


def test_c8_all_else_is_changed_and_checked_as_one():
    made = check(min=1, boot_timeout=10)
    changes = {"min": 2, "max": 3, "buffer": 1, "placement": "pack", "timeout": "1m"}
    changes |= {"queue_timeout": 5, "boot_timeout": 7, "idle_shutdown_after": "2s"}
    changes |= {"min_idle_shutdown_after": timedelta(seconds=9)}
    assert changes.keys() == options.CONFIGURABLE
    new = made.configure(**changes)
    assert new == made.replace(**changes)
    assert (new.timeout, new.call_defaults.timeout, new.min_idle_shutdown_after) == (60, 60, 9)
    assert made.configure() == made
    assert made.configure(boot_timeout=7).queue_timeout == 7
    with pytest.raises(PoolOptionsError, match="give at most max=1, or a larger max"):
        made.configure(min=2, max=1)


def test_c8_d2_a_duration_leaves_the_check_as_it_is():
    made = check(idle_shutdown_after=(10, bool))
    new = made.configure(idle_shutdown_after=20, max=7)
    assert (new.idle_shutdown_after, new.idle_check, new.max) == (20, bool, 7)
    assert made.configure(max=7).idle_check is bool
    assert made.configure(idle_shutdown_after=(None, bool)).idle_shutdown_after is None
    for other in (made, check()):
        with pytest.raises(PoolOptionsError, match="another check") as caught:
            other.configure(idle_shutdown_after=(20, int))
        assert caught.value.option == "idle_shutdown_after"


def test_examples_in_docstrings():
    assert doctest.testmod(options).failed == 0

"""The options of a call (B1, E1): checked once, in full, before any start."""

import copy
import math
import time
from datetime import timedelta

import dask.config
import numpy as np
import pytest

from flame_dask import options
from flame_dask.errors import PoolOptionsError
from flame_dask.options import RESERVED, CallOptions, PoolOptions


@pytest.fixture(autouse=True)
def _no_configuration_of_this_machine(monkeypatch):
    monkeypatch.setitem(dask.config.config, "flame", copy.deepcopy(options._SHIPPED["flame"]))


def check(**given):
    return PoolOptions.check("web", max=10, **given)


def test_b1_reserved_keywords_are_those_of_the_contract():
    expected = ["timeout", "queue_timeout", "link", "track_resources", "retries", "priority"]
    assert {*expected, "affinity"} == RESERVED


def test_b1_a_call_without_keywords_costs_nothing():
    pool = check(timeout=5)
    made = CallOptions.check(pool)
    assert made is CallOptions.check(pool)
    assert made == CallOptions(
        timeout=5.0,
        queue_timeout=30.0,
        timeout_is_total=False,
        link=True,
        track_resources=False,
        retries=0,
        priority=0,
        affinity=None,
    )


def test_b1_checking_a_call_is_fast():
    pool = check()

    def best(n, **given):
        times = []
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(n):
                CallOptions.check(pool, **given)
            times.append((time.perf_counter() - started) / n)
        return min(times)

    # Far above what it takes (0.1 and 3 microseconds), far below the 500 of a call.
    assert best(1000) < 5e-6
    assert best(1000, timeout=5) < 100e-6


@pytest.mark.parametrize(
    ("given", "timeout", "queue_timeout", "total"),
    [
        ({}, 30.0, 20.0, False),
        ({"timeout": "2m"}, 120.0, None, True),
        ({"timeout": None}, None, None, True),
        ({"timeout": 0}, 0.0, None, True),
        ({"queue_timeout": 1}, 30.0, 1.0, False),
        ({"queue_timeout": None}, 30.0, None, False),
        ({"timeout": 9, "queue_timeout": timedelta(seconds=1)}, 9.0, 1.0, True),
    ],
)
def test_e1_limits_of_a_call(given, timeout, queue_timeout, total):
    made = CallOptions.check(check(queue_timeout=20), **given)
    assert (made.timeout, made.queue_timeout) == (timeout, queue_timeout)
    assert made.timeout_is_total is total


def test_b1_priority_and_what_is_as_the_default():
    pool = check()
    assert CallOptions.check(pool, priority=-3).priority == -3
    assert CallOptions.check(pool, priority=np.int64(3)).priority == 3
    same = {"link": True, "track_resources": False, "retries": 0, "affinity": None}
    assert CallOptions.check(pool, **same) == CallOptions.check(pool)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("timeout", value) for value in (-1, "soon", True, math.nan)],
        *[("queue_timeout", value) for value in (-1, "soon", True, math.nan)],
        *[("priority", value) for value in (1.5, "1", True, None, math.inf)],
        *[("retries", value) for value in (-1, 1.5, True, None)],
        *[("link", value) for value in (1, None)],
        *[("affinity", value) for value in ([1], ("user", {}), np.zeros(2))],
        *[("track_resources", value) for value in (1, None)],
    ],
)
def test_a2_bad_keywords_of_a_call(option, value):
    with pytest.raises(PoolOptionsError) as caught:
        CallOptions.check(check(), **{option: value})
    assert caught.value.option == option
    assert "is not valid" in str(caught.value)


def test_a2_an_unknown_keyword_of_a_call():
    with pytest.raises(PoolOptionsError, match=r"of a call: did you mean priority\?"):
        CallOptions.check(check(), prioritty=1)


def test_c7_whatever_can_be_a_key_of_a_dict_is_an_affinity():
    for key in ("user", 5, ("user", 5), frozenset("ab"), object(), check):
        assert CallOptions.check(check(), affinity=key).affinity is key
    with pytest.raises(PoolOptionsError) as caught:
        CallOptions.check(check(), affinity=["user", 5])
    assert str(caught.value) == (
        "affinity=['user', 5] is not valid: give something that can be a key of a dict, such as a "
        "text, a number, or a tuple of these."
    )


def test_b1_keywords_once_they_are_carried_out():
    given = {"link": False, "track_resources": True, "retries": 2, "affinity": ("user", 5)}
    made = CallOptions.check(check(), **given)
    assert {option: getattr(made, option) for option in given} == given
    assert CallOptions.check(check(track_resources=True)).track_resources

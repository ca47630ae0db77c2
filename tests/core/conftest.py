"""Hypothesis profiles: `HYPOTHESIS_PROFILE=thorough` takes minutes and finds rare things."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

_slow_data = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

# The same examples each time, so that a change that breaks nothing is never stopped by chance.
settings.register_profile(
    "bounded",
    max_examples=100,
    stateful_step_count=30,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    report_multiple_bugs=False,
    suppress_health_check=_slow_data,
)
settings.register_profile(
    "thorough",
    settings.get_profile("bounded"),
    max_examples=20_000,
    stateful_step_count=60,
    derandomize=False,
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "bounded"))


@pytest.fixture(autouse=True)
def nothing_is_left() -> None:
    """Nothing to look for: the core starts no thread and no process. Saves a tenth of a second."""

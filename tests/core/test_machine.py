"""Random events against the core: see flame_dask/testing/machine.py for what is checked."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from flame_dask.testing.machine import PoolMachine

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"

TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=settings().max_examples * (1 if THOROUGH else 3))
pytestmark = pytest.mark.timeout(3600 if THOROUGH else 300)

"""Fixtures for tests of payloads."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module", autouse=True)
def functions_by_value() -> None:
    """In place of that of all tests: here it matters what goes by name and what by value."""

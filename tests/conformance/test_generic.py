"""The conformance tests, on a cluster class that flame_dask has never heard of."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends.my_clusters import MyCluster
from flame_dask.testing.conformance import Conformance, On

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("kills_runners")]


class TestMyCluster(Conformance):
    @pytest.fixture
    def on(self, tmp_path: Path) -> On:
        options = {"folder": str(tmp_path), "arguments": ("--no-nanny",)}
        return On((MyCluster, options), slow=1.5)

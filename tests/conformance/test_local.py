"""The conformance tests, on processes of this machine."""

from __future__ import annotations

import pytest
from distributed import LocalCluster
from distributed.deploy.subprocess import SubprocessCluster

from flame_dask.testing.conformance import Conformance, On

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("kills_runners")]

QUIET = {"scheduler_kwargs": {"dashboard": False}}


class TestLocalCluster(Conformance):
    @pytest.fixture
    def on(self) -> On:
        return On((LocalCluster, QUIET))


class TestSubprocessCluster(Conformance):
    @pytest.fixture
    def on(self) -> On:
        return On((SubprocessCluster, QUIET))

"""The conformance tests, on two hosts behind SSH servers."""

from __future__ import annotations

from typing import Any

import pytest
from distributed import SSHCluster

from flame_dask.testing.conformance import Conformance, On

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("kills_runners")]


class TestSSHCluster(Conformance):
    @pytest.fixture
    def on(self, ssh_hosts: Any) -> On:
        return On((SSHCluster, ssh_hosts.options))

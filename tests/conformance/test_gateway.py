"""The conformance tests, on a server of Dask Gateway."""

from __future__ import annotations

from typing import Any

import pytest

from flame_dask.testing.conformance import Conformance, On

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("kills_runners")]


class TestGatewayCluster(Conformance):
    @pytest.fixture
    def on(self, gateway_server: Any) -> On:
        from dask_gateway import GatewayCluster

        backend = (GatewayCluster, {"address": gateway_server.address})
        return On(backend, left=lambda: gateway_server.processes(kind="worker"))

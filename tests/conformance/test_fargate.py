"""The conformance tests, on tasks of ECS: Amazon's part by moto, what runs in the tasks is real."""

from __future__ import annotations

from typing import Any

import pytest

from flame_dask.testing.conformance import Conformance, On

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("kills_runners")]


class TestFargateCluster(Conformance):
    @pytest.fixture
    def on(self, ecs: Any, fargate_options: dict[str, Any]) -> On:
        from dask_cloudprovider.aws import FargateCluster

        backend = (FargateCluster, fargate_options)
        return On(backend, left=ecs.unstopped, options={"host": "127.0.0.1"})

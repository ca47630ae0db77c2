"""The conformance tests, on an imitation of Kubernetes with the Dask operator."""

from __future__ import annotations

from typing import Any

import pytest

from flame_dask.testing.conformance import Conformance, On

pytestmark = [
    pytest.mark.backend,
    pytest.mark.usefixtures("kills_runners"),
    # dask-kubernetes gives up reading its configuration half-way when the scheduler is there.
    pytest.mark.filterwarnings("ignore:unclosed file .*/config:ResourceWarning"),
]


class TestKubeCluster(Conformance):
    @pytest.fixture
    def on(self, kube: Any) -> On:
        from dask_kubernetes.operator import KubeCluster

        # By its idle timeout the operator ends the cluster of a parent that was killed.
        given = {"scheduler_service_type": "LoadBalancer", "idle_timeout": 4}
        return On((KubeCluster, given), left=kube.pods)

"""The conformance tests, on a SLURM of one node."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flame_dask.testing.conformance import Conformance, On

pytestmark = [
    pytest.mark.backend,
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("kills_runners"),
]


def jobs() -> list[str]:
    """Return the jobs that the queue knows."""
    command = ["squeue", "--noheader", "--format=%i"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


class TestSLURMCluster(Conformance):
    @pytest.fixture
    def on(self, slurm: Path, tmp_path: Path) -> On:
        from dask_jobqueue import SLURMCluster

        options = {"cores": 1, "memory": "1GiB", "shared_temp_directory": str(tmp_path)}
        return On((SLURMCluster, options), slow=2, left=jobs, options={"host": "127.0.0.1"})

"""What runners to come are told when a pool's options have changed (C8)."""

from __future__ import annotations

import base64
import os
import re
import zlib
from pathlib import Path
from typing import Any

import pytest

from flame_dask.backends.resolve import resolve
from flame_dask.constants import BOOT_TIMEOUT
from flame_dask.options import PoolOptions

#: The package that a class needs, its path, and its options.
BACKENDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ssh": ("asyncssh", "distributed.SSHCluster", {"hosts": ["127.0.0.1"]}),
    "slurm": (
        "dask_jobqueue",
        "dask_jobqueue.SLURMCluster",
        {"cores": 1, "memory": "1GB", "death_timeout": 60},
    ),
    "vm": ("hcloud", "dask_cloudprovider.hetzner.HetznerCluster", {}),
}


def told(kind: str, backend: Any) -> list[object]:
    """Return all limits that a runner is told of."""
    limit = backend.environment().get(BOOT_TIMEOUT)
    if kind == "slurm":
        return [limit, backend.worker()[1]["job_options"]["death_timeout"]]
    if kind == "vm":
        program = zlib.decompress(base64.b64decode(backend._told("tls://x:1", "p-1"))).decode()
        return [limit, *re.findall(rf"'{BOOT_TIMEOUT}': '(.*?)'", program)]
    return [limit]


@pytest.mark.parametrize("kind", BACKENDS)
def test_c8_g3_a_runner_is_told_of_the_new_boot_timeout(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or else it would give up at the old one, though the pool waits for it."""
    package, path, given = BACKENDS[kind]
    pytest.importorskip(package)
    program = tmp_path / "sbatch"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = PoolOptions.check("p", max=1, backend=(path, given), boot_timeout=7)
    backend: Any = resolve(options)
    in_full = {"slurm": ["7.0", 7.0], "vm": ["7.0", "7.0"], "ssh": ["7.0"]}[kind]
    assert told(kind, backend) == in_full
    backend.configured(options.configure(boot_timeout=50))
    assert told(kind, backend) == [type(limit)("50.0") for limit in in_full]
    backend.configured(options.configure(boot_timeout=None))
    assert told(kind, backend) == {"slurm": ["60.0", 60.0]}.get(kind, [None])

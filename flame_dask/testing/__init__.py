"""A test kit for pools, without a cluster and without waiting.

:class:`Script` runs the core of a pool in virtual time, with a backend that is played: a test of
minutes of growing, failing and shrinking takes a millisecond, and reads like a story::

    pool = Script(min=1, max=2, max_concurrency=2, boots=0.5).open()
    pool.run_for(0.5)
    call = pool.submit(work=10)
    assert pool.runner_of(call) == "pool-1"

:class:`Simulator` is what it stands on; it runs workloads of millions of calls.
:mod:`flame_dask.testing.machine` holds the random tests, and needs hypothesis (the extra ``test``).
"""

from flame_dask.testing.script import Script
from flame_dask.testing.simulator import HANGS, Arrival, Dies, Fails, Simulator, Up, fail_every

__all__ = ["HANGS", "Arrival", "Dies", "Fails", "Script", "Simulator", "Up", "fail_every"]

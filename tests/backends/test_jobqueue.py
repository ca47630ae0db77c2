"""Job queues other than SLURM: how they are read, and runners in one that is made up."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame_dask import BootError, FlamePool, RunnerLost
from flame_dask.backends.queues import KINDS, JobState, Queue, kind_of
from support import alive, pids, states

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = [pytest.mark.backend, pytest.mark.usefixtures("kills_runners")]

PBS = """\
Job id            Name             User              Time Use S Queue
----------------  ---------------- ----------------  -------- - -----
123.server        dask-worker      me                00:00:01 R workq
124.server        dask-worker      me                       0 Q workq
125.server        dask-worker      me                00:00:01 C workq
"""

SGE = """\
job-ID  prior   name       user         state submit/start at     queue          slots ja-task-ID
-------------------------------------------------------------------------------------------------
    123 0.55500 dask-worke me           r     11/24/2026 13:50:52 all.q@node         1
    124 0.00000 dask-worke me           Eqw   11/24/2026 13:50:52                    1
"""


@pytest.mark.parametrize(
    ("kind", "job", "code", "said", "state"),
    [
        ("slurm", "7", 0, "7|RUNNING|0|None|\n", JobState("RUNNING", True, reason="None")),
        ("slurm", "7", 0, "7|PENDING|0|Priority|", JobState("PENDING", True, reason="Priority")),
        ("slurm", "7", 0, "7|COMPLETING|0|None|", JobState("COMPLETING", True, reason="None")),
        ("slurm", "7", 0, "8|RUNNING|0|None|\n", JobState()),
        ("slurm", "7", 1, "slurm_load_jobs error: Invalid job id specified\n", JobState()),
        ("slurm", "7", 0, "7|FAILED|768||", JobState("FAILED", loss="exited", exit_code=3)),
        ("slurm", "7", 0, "7|FAILED|9||", JobState("FAILED", loss="signal", exit_code=-9)),
        ("slurm", "7", 0, "7|FAILED|35072||", JobState("FAILED", loss="signal", exit_code=-9)),
        ("slurm", "7", 0, "7|FAILED|22016||", JobState("FAILED", loss="oom", exit_code=86)),
        (
            "slurm",
            "7",
            0,
            "7|OUT_OF_MEMORY|9||",
            JobState("OUT_OF_MEMORY", False, False, "oom", -9),
        ),
        ("slurm", "7", 0, "7|TIMEOUT|0||", JobState("TIMEOUT", loss="preempted", exit_code=0)),
        ("pbs", "123", 0, PBS, JobState("R", True)),
        ("pbs", "124", 0, PBS, JobState("Q", True)),
        ("pbs", "125", 0, PBS, JobState("C")),
        ("pbs", "126", 153, PBS + "qstat: Unknown Job Id 126.server\n", JobState()),
        ("pbs", "126", 35, "qstat: 126.server Job has finished, use -x or -H\n", JobState()),
        ("sge", "123", 0, SGE, JobState("r", True)),
        ("sge", "124", 0, SGE, JobState("Eqw", True, hopeless=True)),
        ("sge", "125", 0, SGE, JobState()),
        ("lsf", "123", 0, "123|RUN|-\n", JobState("RUN", True)),
        ("lsf", "123", 0, "123|EXIT|137\n", JobState("EXIT", loss="signal", exit_code=-9)),
        ("lsf", "123", 255, "Job <123> is not found\n", JobState()),
        ("htcondor", "12.0", 0, "12.0 2\n", JobState("2", True)),
        ("htcondor", "12.0", 0, "12.0 5\n", JobState("5", True, hopeless=True)),
        ("htcondor", "12.0", 0, "112.0 2\n", JobState()),
    ],
)
def test_what_a_queue_says_is_understood(
    kind: str, job: str, code: int, said: str, state: JobState
) -> None:
    assert KINDS[kind].read([job], code, said)[job] == state


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_queue_that_can_not_be_asked_says_nothing(kind: str) -> None:
    """Least of all that there are no jobs: they may run, and cost money."""
    with pytest.raises(RuntimeError, match="no route to host"):
        KINDS[kind].read(["7"], 1, "error: no route to host\n")


def test_the_kind_is_that_of_the_vendors_own_class() -> None:
    dask_jobqueue = pytest.importorskip("dask_jobqueue")

    class MySite(dask_jobqueue.PBSCluster.job_cls):  # type: ignore[misc]
        config_name = "mine"

    assert kind_of(MySite) is KINDS["pbs"]
    assert kind_of(dask_jobqueue.SLURMCluster.job_cls) is KINDS["slurm"]
    assert kind_of(dask_jobqueue.OARCluster.job_cls) is None
    assert kind_of(dask_jobqueue.MoabCluster.job_cls) is None


def test_c2_all_that_is_wanted_at_a_moment_is_asked_with_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    _program(tmp_path / "bin" / "squeue", f'echo "$@" >>{log}; echo "7|RUNNING|0|None|"')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    async def look() -> list[JobState]:
        queue = Queue(KINDS["slurm"])
        return await asyncio.gather(*(queue.look(job) for job in "789"))

    assert [state.name for state in asyncio.run(look())] == ["RUNNING", "gone", "gone"]
    assert [line.split()[-1] for line in log.read_text().splitlines()] == ["--jobs=7,8,9"]


def test_f3_a_queue_that_does_not_answer_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    log = tmp_path / "log"
    _program(tmp_path / "bin" / "squeue", f"echo $$ >{log}; exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr("flame_dask.backends.queues.ANSWER_LIMIT", 0.5)
    with pytest.raises(TimeoutError, match=r"squeue has not answered within 0\.5 s"):
        asyncio.run(Queue(KINDS["slurm"]).look("7"))
    until(lambda: not alive(*pids(log)), 5)


# -- a queue that is made up of three programs ---------------------------------------------------


def _program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PBS, which is a Moab too: a job is a process, and its number the pid."""
    pytest.importorskip("dask_jobqueue")
    programs, logs = tmp_path / "bin", tmp_path / "logs"
    logs.mkdir()
    submit = f"""
copy=$(mktemp {tmp_path}/script-XXXXXX)
cp "$1" "$copy"
setsid sh -c 'exec sh "$0" >{logs}/worker.e$$ 2>&1' "$copy" >/dev/null 2>&1 &
echo "$!.made-up"
"""
    cancel = 'for job; do kill -s TERM -- "-$job" || exit 1; done'
    status = f"""
[ -e {tmp_path}/down ] && echo "cannot connect to server" >&2 && exit 1
for job; do
    if [ -d /proc/$job ] && ! grep -q "^State:.Z" /proc/$job/status; then
        echo "$job.made-up dask-worker me 0 R q"
    else
        echo "qstat: Unknown Job Id $job.made-up" >&2; code=153
    fi
done
exit $code
"""
    for name, text in (("qsub", submit), ("qdel", cancel), ("qstat", status)):
        _program(programs / name, text)
    _program(programs / "msub", submit)
    _program(programs / "canceljob", cancel)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


def _options(folder: Path) -> dict[str, Any]:
    return {
        "cores": 1,
        "memory": "1GiB",
        "python": sys.executable,
        "log_directory": str(folder / "logs"),
        "shared_temp_directory": str(folder),
    }


@pytest.mark.parametrize("name", ["PBSCluster", "MoabCluster"])
def test_d4_f2_runners_in_another_queue(
    made_up: Path, name: str, make_pool: MakePool, until: Until
) -> None:
    """One whose jobs can be looked at, and one whose jobs can't."""
    import dask_jobqueue

    backend = (getattr(dask_jobqueue, name), _options(made_up))
    pool = make_pool(max=1, backend=backend, host="127.0.0.1", idle_shutdown_after=1)
    pid = pool.call(os.getpid)
    future = pool.submit(time.sleep, 60)
    until(lambda: pool.status().runners[0].leases == 1, 10)
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RunnerLost):
        future.result(20)
    other = pool.call(os.getpid, queue_timeout=20)
    assert other != pid
    until(lambda: pool.status().runners == (), 20)
    until(lambda: not alive(other), 5)


def test_f4_a_job_that_fails_in_another_queue(made_up: Path, make_pool: MakePool) -> None:
    from dask_jobqueue import PBSCluster

    given = {**_options(made_up), "job_script_prologue": ["echo no licence", "exit 1"]}
    with pytest.raises(BootError) as caught:
        make_pool(min=1, max=1, backend=(PBSCluster, given), host="127.0.0.1")
    assert "no licence" in caught.value.log_tail


def test_c1_a_queue_that_is_down_is_asked_again(
    made_up: Path, make_pool: MakePool, until: Until, flame_log: Any
) -> None:
    """A job that may still be there counts."""
    from dask_jobqueue import PBSCluster

    backend = (PBSCluster, _options(made_up))
    pool = make_pool(max=1, backend=backend, host="127.0.0.1", idle_shutdown_after=0.5)
    pid = pool.call(os.getpid)
    down = made_up / "down"
    down.touch()
    until(lambda: any("could not stop runner" in text for text in flame_log.texts()), 20)
    assert states(pool) == ["stopping"]
    down.unlink()
    until(lambda: pool.status().runners == (), 20)
    until(lambda: not alive(pid), 5)

"""Amazon ECS on this machine: its API by moto, and an agent that runs tasks as processes.

What is Amazon's is simulated; what runs in the tasks is real. Faults are put in here, at the edge.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moto.ecs import ecs_backends
from moto.ecs.exceptions import EcsClientException, ECSException
from moto.ecs.models import EC2ContainerServiceBackend
from moto.ecs.responses import EC2ContainerServiceResponse
from moto.moto_api import state_manager

from moto_server import ACCOUNT, REGION, Moto
from support import make_site


class Throttled(ECSException):
    def __init__(self) -> None:
        super().__init__("ThrottlingException", "Rate exceeded")


class ServerFault(ECSException):
    def __init__(self) -> None:
        super().__init__("ServerException", "Something went wrong")

    status_code = 500


class Denied(ECSException):
    def __init__(self) -> None:
        super().__init__("AccessDeniedException", "User: me is not authorized to perform this")


def denied(*_: Any) -> None:
    raise Denied


def throttled() -> None:
    raise Throttled


def no_capacity() -> None:
    raise EcsClientException("Capacity is unavailable at this time. Please try again later.")


class ECS(Moto):
    """The service, with an agent.

    Attributes
    ----------
    faults
        Taken by the next requests for a task, one each: ``None`` lets it pass, a text is a failure
        that is reported in an answer, a function raises, and ``"lost"`` starts the task and says
        that it failed.
    holds
        Taken by the next tasks, one each: they stay pending until the event is set.
    delay
        Seconds that each request for a task takes.
    grace
        Seconds that a process has to end after it was asked to; 30 at Amazon.
    unaware
        Seconds for which it is not noticed that a process has ended.
    commands
        Taken by the next tasks: what is run in place of their command.
    requests
        Each request for a task, with the fault or the task.
    most
        The most tasks that there have been at a time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[Any] = []
        self.holds: list[threading.Event] = []
        self.commands: list[list[str]] = []
        self.extra_environment: dict[str, str] = {}
        self.requests: list[dict[str, Any]] = []
        self.asked: list[int] = []  # how many tasks each describe_tasks was for
        self.throttle_describe = 0
        self.delay = self.unaware = 0.0
        self.grace = 1.0
        self.under_way = 0  # requests for a task that have come in
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.most = 0
        self._numbers = iter(range(2, 250))
        self._over = threading.Event()
        self._lock = threading.Lock()
        make_site(folder / "site")
        super().__init__(folder)
        # Otherwise each look at a task would take it a step further to its end.
        state_manager.set_transition("ecs::task", {"progression": "manual", "times": 10**9})
        self._thread = threading.Thread(target=self._attend, name="ecs-agent", daemon=True)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Have moto do as Amazon does, where it doesn't, and let faults in."""
        agent = self
        run, stop = EC2ContainerServiceResponse.run_task, EC2ContainerServiceBackend.stop_task
        describe = EC2ContainerServiceResponse.describe_tasks

        def run_task(self: Any) -> Any:
            with agent._lock:
                fault = agent.faults.pop(0) if agent.faults else None
            with agent._lock:
                agent.under_way += 1
            agent._over.wait(agent.delay)
            if callable(fault):
                agent.requests.append({"fault": fault.__name__})
                fault()
            result = run(self)
            if isinstance(fault, str) and fault != "lost":
                agent.requests.append({"fault": fault})
                for task in result._result["tasks"]:
                    agent.forget(task)
                result._result.update(tasks=[], failures=[{"arn": "arn:x", "reason": fault}])
                return result
            for task in result._result["tasks"]:
                task.last_status = "PROVISIONING"
                task.hold = agent.holds.pop(0) if agent.holds else None
                task.ended_at = None
                agent.requests.append({"task": task})
                agent.most = max(agent.most, len(agent.unstopped()))
            if fault == "lost":
                raise ServerFault
            return result

        def stop_task(self: Any, cluster_str: str, task_str: str, reason: str) -> Any:
            """A task is not stopped at once: its process has to end first."""
            for task in agent.tasks():
                if task.task_arn.endswith(task_str) and task.last_status != "STOPPED":
                    task.desired_status = "STOPPED"
                    task.stopped_reason = reason
                    task.stop_code = "UserInitiated"
                    return task
            return stop(self, cluster_str, task_str, reason)

        def describe_tasks(self: Any) -> Any:
            agent.asked.append(len(self._get_param("tasks", [])))
            if agent.throttle_describe > 0:
                agent.throttle_describe -= 1
                raise Throttled
            return describe(self)

        EC2ContainerServiceResponse.run_task = run_task
        EC2ContainerServiceResponse.describe_tasks = describe_tasks
        EC2ContainerServiceBackend.stop_task = stop_task
        try:
            yield
        finally:
            EC2ContainerServiceResponse.run_task = run
            EC2ContainerServiceResponse.describe_tasks = describe
            EC2ContainerServiceBackend.stop_task = stop

    def start(self) -> None:
        self._thread.start()

    def tasks(self) -> list[Any]:
        """All tasks that there have been."""
        found = ecs_backends[ACCOUNT][REGION].tasks
        return [task for tasks in list(found.values()) for task in list(tasks.values())]

    def unstopped(self) -> list[Any]:
        """The tasks that cost money."""
        return [task for task in self.tasks() if task.last_status != "STOPPED"]

    def forget(self, task: Any) -> None:
        del ecs_backends[ACCOUNT][REGION].tasks[task.cluster_name][task.task_arn]

    def reset(self) -> None:
        """Begin anew: no faults, no records."""
        self.faults, self.holds, self.commands, self.extra_environment = [], [], [], {}
        self.requests, self.asked, self.throttle_describe = [], [], 0
        self.delay, self.unaware, self.grace = 0.0, 0.0, 1.0
        self.under_way = 0
        self.most = len(self.unstopped())

    # -- the agent -----------------------------------------------------------------------------

    def _attend(self) -> None:
        while not self._over.wait(0.02):
            for task in self.tasks():
                try:
                    self._attend_one(task)
                except Exception as error:
                    task.last_status = "STOPPED"
                    task.stopped_reason = f"the agent failed: {error!r}"

    def _attend_one(self, task: Any) -> None:
        process = self.processes.get(task.task_arn)
        if process is None and task.desired_status == "STOPPED":
            task.last_status = "STOPPED"
        elif task.last_status == "PROVISIONING":
            task.last_status = "PENDING"
        elif task.last_status == "PENDING":
            if task.hold is None or task.hold.is_set():
                self.processes[task.task_arn] = self._launch(task)
                task.last_status = "RUNNING"
        elif process is not None and task.last_status != "STOPPED":
            code = process.poll()
            if code is not None:
                task.ended_at = task.ended_at or time.monotonic()
                if time.monotonic() < task.ended_at + self.unaware:
                    return
                self._kill(process)  # a container ends with its first process
                self._hand_in_log(task)
                container = task.containers[0]
                container.exit_code = container.exitCode = code if code >= 0 else 128 - code
                if task.desired_status != "STOPPED":
                    task.desired_status = "STOPPED"
                    task.stop_code = "EssentialContainerExited"
                    task.stopped_reason = "Essential container in task exited"
                task.last_status = "STOPPED"
            elif task.desired_status == "STOPPED" and task.last_status == "RUNNING":
                task.last_status = "STOPPING"
                task.kill_at = time.monotonic() + self.grace
                process.terminate()
            elif task.last_status == "STOPPING" and time.monotonic() > task.kill_at:
                self._kill(process)

    def _launch(self, task: Any) -> subprocess.Popen[bytes]:
        [override] = task.overrides["containerOverrides"]
        command = list(override["command"])
        if self.commands:
            command = self.commands.pop(0)
        elif command[0] == "dask":
            # Its own address, so that no two tasks are taken for one machine.
            command += ["--host", f"127.0.5.{next(self._numbers)}"]
            # "dask worker" would import the commands of all packages first.
            command[:2] = [sys.executable, "-m", "distributed.cli.dask_worker"]
        environment = {each["name"]: each["value"] for each in override.get("environment", ())}
        folder = self.folder / task.id
        folder.mkdir()
        usual = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        with open(folder / "log", "wb") as log:
            return subprocess.Popen(
                command,
                env={
                    **usual,
                    "TMPDIR": str(folder),
                    "PYTHONPATH": str(self.folder / "site"),
                    **self.extra_environment,
                    **environment,
                },
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def log_of(self, task: Any) -> str:
        """What a task has said."""
        return (self.folder / task.id / "log").read_text()

    def _hand_in_log(self, task: Any) -> None:
        """Put what a task has said where its definition says, as the driver ``awslogs`` does."""
        definition = ecs_backends[ACCOUNT][REGION].describe_task_definition(
            task.task_definition_arn
        )
        [container] = definition.container_definitions
        how = container.get("logConfiguration")
        lines = [line for line in self.log_of(task).splitlines() if line]
        if how is None or not lines:
            return
        told = how["options"]
        where = {
            "logGroupName": told["awslogs-group"],
            "logStreamName": f"{told['awslogs-stream-prefix']}/{container['name']}/{task.id}",
        }
        now = int(time.time() * 1000)
        logs = self.client("logs")
        logs.create_log_stream(**where)
        logs.put_log_events(
            **where, logEvents=[{"timestamp": now, "message": line} for line in lines[-1000:]]
        )

    def kill_all(self) -> None:
        """End all tasks at once."""
        for task in self.unstopped():
            task.desired_status = "STOPPED"
            if task.task_arn in self.processes:
                self._kill(self.processes[task.task_arn])
        while self.unstopped():
            self._over.wait(0.02)

    def close(self) -> None:
        self._over.set()
        self._thread.join(10)
        for process in self.processes.values():
            self._kill(process)
            process.wait()
        super().close()

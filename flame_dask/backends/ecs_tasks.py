"""Runners as tasks of ECS, Amazon's service for containers."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any, Final

from distributed.deploy.spec import ProcessInterface

from flame_dask.backends import lease
from flame_dask.backends.base import Ending
from flame_dask.backends.ecs_logs import TaskLogs
from flame_dask.constants import OOM_EXIT

logger = logging.getLogger("flame_dask")

#: The container of a task definition that runs the worker; the vendor's class calls it so.
CONTAINER: Final = "dask-worker"

#: What ECS allows of characters for all that a task has in addition to its definition.
OVERRIDES_LIMIT: Final = 8192

#: Seconds between two looks at the tasks: while one of them boots, ends, or is missed by the
#: scheduler; and otherwise.
QUICK: float = 1.0
CALM: float = 15.0

#: Seconds that a task of a runner that the scheduler has lost gets to stop by itself. Told to, it
#: would look as if it had ended for that, and nobody would hear what it died of.
LAST_BREATH: float = 3.0

#: The longest pause, in seconds, if ECS says that it is asked too often.
BACK_OFF: Final = 60.0

#: How many tasks ECS describes at once.
_AT_ONCE: Final = 100

#: Seconds for which ECS may not know a task yet that it has started.
_UNKNOWN_AT_FIRST: Final = 60.0

#: Seconds between two tries to renew leases.
RENEWAL_PAUSE: float = 300.0


def overrides(command: list[str], environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what a task has in addition to its definition."""
    variables = [{"name": name, "value": value} for name, value in environment.items()]
    container = {"name": CONTAINER, "command": command, "environment": variables}
    return {"containerOverrides": [container]}


def oversize(extra: Mapping[str, Any]) -> str:
    """Say by how much this is more than ECS allows; nothing if it is not."""
    size = len(json.dumps(extra))
    if size <= OVERRIDES_LIMIT:
        return ""
    return (
        f"takes {size} characters with certificates and command, and ECS allows {OVERRIDES_LIMIT}"
    )


class TaskRunner(ProcessInterface):
    """A worker in a task of its own.

    Parameters
    ----------
    scheduler
        The address that it is to connect to.
    name
        The runner's id.
    tasks
        Where it is followed.
    request
        What ``run_task`` needs besides.
    command
        Makes the worker's command, from the scheduler's address and the runner's id.
    environment
        Its environment variables, with certificates.
    tags
        Makes the tags of the task.

    Attributes
    ----------
    connected
        Whether it has ever come to the scheduler.
    """

    def __init__(
        self,
        scheduler: str,
        name: str,
        tasks: Tasks,
        request: Mapping[str, Any],
        command: Callable[[str, str], list[str]],
        environment: Mapping[str, str],
        tags: Callable[[], Mapping[str, str]],
    ) -> None:
        super().__init__(scheduler, name)
        self.name = name
        self.arn: str | None = None
        #: What ECS said of it last.
        self.task: dict[str, Any] = {}
        self.connected = False
        self.told_to_end = False
        self._scheduler = scheduler
        self._tasks = tasks
        self._request = request
        self._command = command
        self._environment = environment
        self._tags = tags
        # By it a task is found whose start has not been heard of.
        self._token = uuid.uuid4().hex
        self._launch: asyncio.Future[str] | None = None
        self._log: tuple[str, ...] | None = None

    async def start(self) -> None:
        """Start the task; returns when ECS has taken it on, and fails at once if it has not."""
        extra = overrides(self._command(self._scheduler, self.name), self._environment)
        if problem := oversize(extra):
            raise RuntimeError(f"the environment of a runner {problem}")
        self._launch = asyncio.ensure_future(self._run(extra))
        # Whoever gives up meanwhile needs to know what it has started, to end it.
        self.arn = await asyncio.shield(self._launch)
        await super().start()

    async def _run(self, extra: dict[str, Any]) -> str:
        tags = [{"key": key, "value": value} for key, value in self._tags().items() if value]
        reply = await self._tasks.once.run_task(
            **self._request,
            overrides=extra,
            tags=tags,
            count=1,
            startedBy=self._token,
            clientToken=self._token,
        )
        if not reply.get("tasks"):
            raise RuntimeError(f"ECS did not start a task: {_failures(reply)}")
        [self.task] = reply["tasks"]
        arn: str = self.task["taskArn"]
        self._tasks.follow(arn, self)
        return arn

    async def end(self, force: bool = False) -> None:
        """Have the task stopped, and wait until it is.

        There is nothing stronger than to ask ECS, which kills what has not ended half a minute
        later. So ``force`` makes no difference.
        """
        if self._launch is None or self._event_finished.is_set():
            return
        await asyncio.wait([self._launch])
        arns = [self.arn] if self.arn else await self._unheard_of()
        if self.connected and not self._tasks.is_present(self.name):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._event_finished.wait(), LAST_BREATH)
        if not self._event_finished.is_set():
            self.told_to_end = True
            for arn in arns:
                await self._tasks.stop(arn)
            if arns:
                await self._event_finished.wait()

    async def _unheard_of(self) -> list[str]:
        """Return the task that was started though its start has failed, or was given up."""
        assert self._launch is not None
        if self._launch.cancelled() or (error := self._launch.exception()) is None:
            return [] if self._launch.cancelled() else [self._launch.result()]
        if not _may_have_started(error):
            return []
        reply = await self._tasks.patient.list_tasks(
            cluster=self._request["cluster"], startedBy=self._token
        )
        arns: list[str] = reply["taskArns"]
        for arn in arns:
            self._tasks.follow(arn, self)
        return arns

    async def close(self) -> None:
        """End the task."""
        await self.end()
        await super().close()

    def has_stopped(self) -> None:
        """Take note that the task has stopped."""
        self._event_finished.set()

    async def last_words(self) -> tuple[str, ...]:
        """Return the end of its log, if it has ended before it came to the scheduler."""
        ran = _exit_code(self.task) is not None
        if self._log is None and ran and not self.connected:
            self._log = await self._tasks.logs.tail(self.task, patient=not self.told_to_end)
        return self._log or ()

    def ending(self) -> Ending:
        """Say how the task ended."""
        code = _exit_code(self.task)
        cause = _cause(self.task, code)
        loss: Any = None
        # It may have died of itself in the moment in which it was told to end.
        ours = self.told_to_end and self.task.get("stopCode") != "EssentialContainerExited"
        if self._event_finished.is_set() and not ours:
            loss = _loss(self.task, code)
            if loss == "exited" and self.told_to_end:
                loss = None
        return Ending(cause=cause, exit_code=code, loss=loss)


class Tasks:
    """All tasks of a pool: looks after them together, with as few requests as can be.

    Parameters
    ----------
    cluster
        The ARN of the ECS cluster.
    client
        Makes a client for a service; ``retry`` says whether it tries again what fails.
    present
        Returns the runners that are connected to the scheduler.

    Attributes
    ----------
    once, patient
        Clients: one that tells at once of what fails, and one that tries again.
    logs
        Where the logs of tasks can be read.
    """

    def __init__(
        self, cluster: str, client: Callable[..., Any], present: Callable[[], Collection[str]]
    ) -> None:
        self.logs = TaskLogs(client, CONTAINER)
        self._cluster = cluster
        self._client = client
        self._present = present
        self._stack = AsyncExitStack()
        self._runners: dict[str, TaskRunner] = {}  # by ARN
        self._since: dict[str, float] = {}
        self._seen: set[str] = set()
        self._watcher: asyncio.Task[None] | None = None
        self._renewer: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self.once: Any = None
        self.patient: Any = None

    async def open(self) -> None:
        """Make the clients. Nothing is asked until there is a task."""
        self.once = await self._stack.enter_async_context(self._client("ecs", retry=False))
        self.patient = await self._stack.enter_async_context(self._client("ecs", retry=True))

    async def close(self) -> None:
        """Let go of everything; the tasks are not stopped."""
        for work in (self._watcher, self._renewer):
            if work is not None:
                work.cancel()
                await asyncio.wait([work])
        await self._stack.aclose()

    def follow(self, arn: str, runner: TaskRunner) -> None:
        """Look after a task until it has stopped."""
        self._runners[arn] = runner
        self._since[arn] = _now()
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.ensure_future(self._watch())
        if self._renewer is None:
            self._renewer = asyncio.ensure_future(self._renew_leases())
        self._hurry.set()

    def is_present(self, runner: str) -> bool:
        """Tell whether a runner is connected to the scheduler."""
        return runner in self._present()

    async def stop(self, arn: str) -> None:
        """Ask for a task to be stopped."""
        from botocore.exceptions import ClientError

        if arn not in self._runners:
            return
        try:
            await self.patient.stop_task(
                cluster=self._cluster, task=arn, reason="flame_dask: its pool has no use for it"
            )
        except ClientError as error:
            if "not found" not in str(error):
                raise
            self._over(arn)  # it stopped so long ago that ECS has forgotten it
        self._hurry.set()

    def _over(self, arn: str) -> None:
        runner = self._runners.pop(arn)
        del self._since[arn]
        self._seen.discard(arn)
        runner.has_stopped()

    async def _watch(self) -> None:
        """Look at all tasks again and again, until there are none."""
        due, pause = 0.0, QUICK
        while self._runners:
            now = _now()
            if now >= due or (pause == QUICK and self._awaits_news()):
                # Cleared before the look: what is told meanwhile needs another one.
                self._hurry.clear()
                try:
                    await self._look()
                    pause = QUICK
                    due = _now() + CALM
                except Exception as error:
                    # More patient each time. It goes on: what is not stopped costs money.
                    pause = min(pause * 2, BACK_OFF)
                    due = _now() + pause
                    level = logging.INFO if _is_throttled(error) else logging.WARNING
                    logger.log(level, "ECS could not be asked for tasks: %s", error)
            # Not longer, since the scheduler may miss a runner any time.
            await asyncio.sleep(QUICK if pause == QUICK else pause)

    def _awaits_news(self) -> bool:
        """Tell whether a task boots, ends, or is missed by the scheduler."""
        if self._hurry.is_set():
            return True
        present = self._present()
        return any(
            runner.told_to_end or runner.name not in present for runner in self._runners.values()
        )

    async def _look(self) -> None:
        arns = list(self._runners)
        for start in range(0, len(arns), _AT_ONCE):
            some = arns[start : start + _AT_ONCE]
            reply = await self.once.describe_tasks(cluster=self._cluster, tasks=some)
            told = {task["taskArn"]: task for task in reply["tasks"]}
            for arn in some:
                self._take(arn, told.get(arn))

    def _take(self, arn: str, task: dict[str, Any] | None) -> None:
        """Take in what ECS says of a task."""
        runner = self._runners.get(arn)
        if runner is None:  # it has stopped, and that has been told
            return
        if task is not None:
            self._seen.add(arn)
            runner.task = task
            if task["lastStatus"] == "STOPPED":
                self._over(arn)
        elif arn in self._seen or _now() - self._since[arn] > _UNKNOWN_AT_FIRST:
            self._over(arn)

    async def _renew_leases(self) -> None:
        """Say of all tasks, every now and then, that they have a parent."""
        from botocore.exceptions import BotoCoreError, ClientError

        renewed: dict[str, float] = {}
        while True:
            await asyncio.sleep(min(RENEWAL_PAUSE, lease.LEASE / 4))
            for arn in list(self._runners):
                if _now() - max(renewed.get(arn, 0.0), self._since.get(arn, _now())) < (
                    lease.LEASE / 2
                ):
                    continue
                tags = [{"key": lease.EXPIRES, "value": lease.expiry()}]
                try:
                    await self.patient.tag_resource(resourceArn=arn, tags=tags)
                    renewed[arn] = _now()
                except (BotoCoreError, ClientError) as error:
                    # Only `reap` on another machine would be misled by that.
                    logger.warning("the lease of task %s could not be renewed: %s", arn, error)
            renewed = {arn: when for arn, when in renewed.items() if arn in self._runners}


def _now() -> float:
    return asyncio.get_running_loop().time()


def _failures(reply: Mapping[str, Any]) -> str:
    failures: Iterable[Mapping[str, str]] = reply.get("failures") or ()
    words = [each.get("reason") or each.get("detail") or str(dict(each)) for each in failures]
    return "; ".join(words) or "it gave no reason"


def _is_throttled(error: BaseException) -> bool:
    response: dict[str, Any] = getattr(error, "response", None) or {}
    code: str = response.get("Error", {}).get("Code", "")
    return code == "ThrottlingException"


def _may_have_started(error: BaseException) -> bool:
    """Tell whether ECS may have started a task though the request for it has failed."""
    response = getattr(error, "response", None)
    if response is None:
        # No answer has come. An answer without a task is no error of the client's.
        return not isinstance(error, RuntimeError)
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
    return bool(status >= 500 or response.get("Error", {}).get("Code") == "ServerException")


def _exit_code(task: Mapping[str, Any]) -> int | None:
    for container in task.get("containers", ()):
        if container.get("name") == CONTAINER:
            code: int | None = container.get("exitCode")
            return 128 - code if code is not None and code > 128 else code
    return None


def _cause(task: Mapping[str, Any], code: int | None) -> str:
    reasons = [task.get("stoppedReason")]
    reasons += [container.get("reason") for container in task.get("containers", ())]
    words = ": ".join(reason for reason in reasons if reason) or "ECS gave no reason"
    how = "" if code is None else f", exit code {code}" if code >= 0 else f", signal {-code}"
    return f"the task stopped ({words}{how})"


def _loss(task: Mapping[str, Any], code: int | None) -> str | None:
    words = " ".join(str(c.get("reason", "")) for c in task.get("containers", ()))
    if code == OOM_EXIT or "OutOfMemory" in words:
        return "oom"
    if task.get("stopCode") in ("SpotInterruption", "TerminationNotice"):
        return "preempted"
    if code is None:
        return None
    return "signal" if code < 0 else "exited"

"""Runners as tasks of Amazon's ECS, on Fargate or on machines of one's own.

For dask-cloudprovider's ``FargateCluster`` and ``ECSCluster``. The scheduler is in the parent, so
that a pool without runners has no task at all (D4). Of the vendor's class a pool takes what it
makes at Amazon around its tasks, and starts and stops each task itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import dask.config
from distributed import SpecCluster

from flame_dask.backends import lease
from flame_dask.backends.base import Ending
from flame_dask.backends.ecs_source import make_source
from flame_dask.backends.ecs_tasks import TaskRunner, Tasks, overrides, oversize
from flame_dask.backends.remote import RemoteBackend
from flame_dask.backends.sourced import SourcedCluster
from flame_dask.backends.vendor import check, is_fargate, where
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

_PARENT: Final = "leave it out: the scheduler is in the parent"

_OF_ITS_SCHEDULER: Final = (
    "fargate_scheduler", "mount_volumes_on_scheduler", "scheduler_address", "scheduler_cpu",
    "scheduler_extra_args", "scheduler_mem", "scheduler_task_definition_arn",
    "scheduler_task_kwargs", "scheduler_timeout",
)  # fmt: skip

#: Options of the vendor's classes that a pool takes; ``scheduler_port`` is for its own scheduler.
_TAKEN: Final = frozenset({
    "aws_access_key_id", "aws_secret_access_key", "cloudwatch_logs_default_retention",
    "cloudwatch_logs_group", "cloudwatch_logs_stream_prefix", "cluster_arn",
    "cluster_name_template", "cpu_architecture", "environment", "execution_role_arn",
    "fargate_spot", "fargate_use_private_ip", "fargate_workers", "image", "mount_points",
    "name", "platform_version", "region_name", "scheduler_port", "security_groups", "subnets",
    "tags", "task_role_arn", "task_role_policies", "volumes", "vpc", "worker_cpu",
    "worker_extra_args", "worker_gpu", "worker_mem", "worker_task_definition_arn",
    "worker_task_kwargs",
})  # fmt: skip

#: Others, and what to do instead.
_REFUSED: Final = {
    "n_workers": "use the pool's own options `min` and `max`",
    "worker_nthreads": "use the pool's own option `max_concurrency`",
    "skip_cleanup": "leave it out: what it takes for stale may be a pool that is empty just now",
    "security": "use the pool's own option `security`",
    "asynchronous": "use the pool's own option `asynchronous`",
    **dict.fromkeys(_OF_ITS_SCHEDULER, _PARENT),
}

#: Arguments of a worker, and of a request for a task, that the pool sets.
_OWN_ARGUMENTS: Final = (
    "--name", "--nthreads", "--nworkers", "--nanny", "--no-nanny", "--preload", "--tls",
    "--death-timeout", "--scheduler", "--protocol",
)  # fmt: skip
_OWN_REQUEST: Final = frozenset({"clientToken", "cluster", "count", "overrides", "startedBy"})


class ECSBackend(RemoteBackend):
    """Runners as tasks of ECS.

    Parameters
    ----------
    options
        The pool's options.
    given
        The vendor's class.
    more
        Options of it.
    """

    #: ECS takes its time until it says what has become of a task.
    patience = 10.0

    def __init__(self, options: PoolOptions, given: type, more: Mapping[str, Any]) -> None:
        self._given = given
        self._more = dict(more)
        self._check(options)
        scheduler = {"port": self._more.pop("scheduler_port", 0)}
        super().__init__(options, given.__name__, scheduler, local=False)
        self._source: Any = None
        self._tasks: Tasks | None = None
        extra = overrides(
            self._command("tls://" + (options.contact_address or "x" * 40) + ":65535", "x" * 40),
            {**(self._more.get("environment") or {}), **self.environment()},
        )
        if problem := oversize(extra):
            remedy = "give less of it, or certificates with shorter keys"
            raise PoolOptionsError("env", options.env, remedy, problem=problem)

    def _check(self, options: PoolOptions) -> None:
        kind = self._given.__name__
        # Fargate has no other workers.
        taken = _TAKEN - {"fargate_workers"} if is_fargate(self._given) else _TAKEN
        check(kind, self._more, _REFUSED, taken)
        for option, value in self._more.items():
            self._check_one(where(kind, option), option, value)
        if options.scheduler == "remote":
            raise PoolOptionsError("scheduler", options.scheduler, _PARENT)
        configured = dask.config.get("cloudprovider.ecs", {}) or {}
        if not is_fargate(self._given) and not (
            self._more.get("cluster_arn") or configured.get("cluster_arn")
        ):
            place = where(kind, "cluster_arn")
            remedy = "give the ARN of the ECS cluster that has your machines, or use FargateCluster"
            raise PoolOptionsError(place, None, remedy, missing=True, problem="is missing")

    def _check_one(self, place: str, option: str, value: Any) -> None:
        own: list[str] = []
        if option == "worker_extra_args":
            own = [each for each in value or () if str(each).startswith(tuple(_OWN_ARGUMENTS))]
        elif option == "worker_task_kwargs":
            own = sorted(_OWN_REQUEST.intersection(value or ()))
        elif option == "tags":
            own = [each for each in value or () if str(each).startswith("flame-")]
        elif option == "security_groups" and value is not None and not value:
            raise PoolOptionsError(place, value, "give the ids of some, or leave it out")
        if own:
            remedy = f"leave out {', '.join(own)}"
            raise PoolOptionsError(place, own, remedy, problem="has what is the pool's to set")

    # -- the cluster ---------------------------------------------------------------------------

    def factory(self, **options: Any) -> SpecCluster:
        """Make the cluster: one that takes the vendor's along."""
        return SourcedCluster(self, **options)

    async def set_up(self, cluster: SpecCluster) -> None:
        """Have everything made at Amazon that tasks need; on the event loop."""
        name = self._pool_options.name
        self._source = make_source(
            self._given, self._more, lease.tags(name), cluster.loop, self._nthreads
        )
        await self._source._start()
        scheduler: Any = cluster.scheduler

        def present() -> set[str]:
            return {str(worker.name) for worker in scheduler.workers.values()}

        self._tasks = Tasks(self._source.cluster_arn, self._source.client, present)
        await self._tasks.open()

    async def tidy(self) -> None:
        """Delete at Amazon what was made there; on the event loop."""
        if self._tasks is not None:
            await self._tasks.close()
            self._tasks = None
        if self._source is not None:
            await self._source.tidy()
            self._source = None

    # -- runners -------------------------------------------------------------------------------

    @property
    def _nthreads(self) -> int:
        return self._pool_options.max_concurrency

    def worker(self) -> tuple[type, dict[str, Any]]:
        """Return what starts a runner."""
        if self._source is None:  # the cluster is being made
            return TaskRunner, {}
        told = self._source.new_spec["options"]
        return TaskRunner, {
            "tasks": self._tasks,
            "request": _request(told),
            "command": self._command,
            "environment": {**(told["environment"] or {}), **self.environment()},
            "tags": self._tags,
        }

    def _tags(self) -> dict[str, str]:
        given = {key: lease.tag(str(value)) for key, value in self._source.tags.items() if value}
        asked = (self._source.new_spec["options"]["task_kwargs"] or {}).get("tags") or ()
        given |= {pair["key"]: pair["value"] for pair in asked}
        return {**given, **lease.tags(self._pool_options.name)}

    def _command(self, scheduler: str, runner: str) -> list[str]:
        """Return the command of a worker.

        Not ``dask-worker``, as the vendor's class has it: new versions of Dask don't come with it,
        and all that fit have this one.
        """
        told: dict[str, Any] = {} if self._source is None else self._source.new_spec["options"]
        more = told.get("extra_args") or self._more.get("worker_extra_args") or ()
        # With a task definition of somebody's own, the vendor's default says nothing about it.
        own = self._more.get("worker_task_definition_arn")
        memory = self._more.get("worker_mem") if own else told.get("mem")
        limit = self._pool_options.boot_timeout
        return [
            "dask", "worker", scheduler,
            "--memory-limit", "auto" if memory is None else f"{int(memory)}MiB",
            "--no-dashboard",
            *more,
            "--name", runner,
            "--nthreads", str(self._nthreads),
            "--no-nanny",
            *(() if limit is None else ("--death-timeout", f"{limit:g}")),
        ]  # fmt: skip

    async def ending(self, member: Any) -> Ending:
        """Say how a task ended, and what it said last."""
        ending = await super().ending(member)
        return ending._replace(log_tail=await member.last_words())


def _request(told: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request for a task, from what the vendor's class tells a worker of its."""
    public = told["fargate"] and not told["fargate_use_private_ip"]
    network = {
        "subnets": told["vpc_subnets"],
        "securityGroups": told["security_groups"],
        "assignPublicIp": "ENABLED" if public else "DISABLED",
    }
    request = {
        **{key: value for key, value in (told["task_kwargs"] or {}).items() if key != "tags"},
        "cluster": told["cluster_arn"],
        "taskDefinition": told["task_definition_arn"],
        "networkConfiguration": {"awsvpcConfiguration": network},
    }
    if told["fargate"]:
        if told["platform_version"]:
            request["platformVersion"] = told["platform_version"]
        if told["fargate_capacity_provider"]:
            request["capacityProviderStrategy"] = [
                {"capacityProvider": told["fargate_capacity_provider"]}
            ]
        else:
            request["launchType"] = "FARGATE"
    return request

"""dask-cloudprovider's ``ECSCluster`` as a source: of all that a task at Amazon needs around it.

The class makes roles, networks, a log group and a task definition, and knows how a task is started
from these. That is its ``_start``. What it would do as a Dask cluster is left out: the scheduler is
in the parent, and the pool starts each runner itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from distributed import SpecCluster
from distributed.core import Status

from flame_dask.backends import secure

logger = logging.getLogger("flame_dask")

#: Seconds between two tries to delete a security group, and how many there are. A network card of a
#: task that has just stopped keeps its group for a while.
GROUP_PAUSE: float = 5.0
GROUP_TRIES: Final = 13


class _Still(SpecCluster):
    """Comes after the vendor's class, and before what it would do as a cluster of Dask."""

    async def _start(self) -> None:
        self.status = Status.running


class _Source:
    """Comes before the vendor's class: what a pool does in another way."""

    flame_tags: dict[str, str]
    _made: list[tuple[str, Callable[[], Awaitable[Any]]]]

    @property
    def tags(self: Any) -> dict[str, str]:
        """Return the tags of everything that is made.

        Without the class's own ``createdBy``: each of these clusters deletes, when it starts, what
        carries that tag and has no tasks. An empty pool of somebody else looks like that.
        """
        names = {"cluster": self.cluster_name, "dask_cluster_name": self.name}
        return {**(self._tags or {}), **names, **self.flame_tags}

    def sync(self, func: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: it is called when the interpreter exits, to delete what ``tidy`` deletes."""

    async def _create_cluster(self: Any) -> Any:
        made = await super()._create_cluster()  # type: ignore[misc]  # the vendor's, as below
        self._made.append(("cluster", self._delete_cluster))
        return made

    async def _create_execution_role(self: Any) -> Any:
        name = self._execution_role_name
        self._made.append((f"role {name}", lambda: self._delete_role(name)))
        return await super()._create_execution_role()  # type: ignore[misc]

    async def _create_task_role(self: Any) -> Any:
        name = self._task_role_name
        self._made.append((f"role {name}", lambda: self._delete_role(name)))
        return await super()._create_task_role()  # type: ignore[misc]

    async def _create_worker_task_definition_arn(self: Any) -> Any:
        made = await super()._create_worker_task_definition_arn()  # type: ignore[misc]
        self._made.append(("task definition", self._delete_worker_task_definition_arn))
        return made

    async def _create_security_groups(self: Any) -> list[str]:
        """Make a security group that lets in the private network of the tasks, and nobody else.

        The class's own one lets the whole world in at ports 8786 and 8787.
        """
        async with self._client("ec2") as ec2:
            [network] = (await ec2.describe_vpcs(VpcIds=[self._vpc]))["Vpcs"]
            ranges = [
                {"CidrIp": each["CidrBlock"], "Description": "its own network"}
                for each in network.get("CidrBlockAssociationSet") or [network]
            ]
            tags = [{"Key": key, "Value": value} for key, value in self.tags.items() if value]
            made = await ec2.create_security_group(
                GroupName=self._security_group_name,
                Description="Runners of flame_dask",
                VpcId=self._vpc,
                TagSpecifications=[{"ResourceType": "security-group", "Tags": tags}],
            )
            group: str = made["GroupId"]
            self._made.append((f"security group {group}", lambda: self._delete_group(group)))
            everything = {"IpProtocol": "tcp", "FromPort": 0, "ToPort": 65535, "IpRanges": ranges}
            await ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[everything])
        return [group]

    async def _delete_group(self: Any, group: str) -> None:
        from botocore.exceptions import ClientError

        async with self._client("ec2") as ec2:
            for _ in range(GROUP_TRIES - 1):
                try:
                    await ec2.delete_security_group(GroupId=group)
                except ClientError as error:
                    if error.response["Error"]["Code"] != "DependencyViolation":
                        raise
                    await asyncio.sleep(GROUP_PAUSE)
                else:
                    return
            await ec2.delete_security_group(GroupId=group)

    def client(self: Any, service: str, *, retry: bool = True, region: str | None = None) -> Any:
        """Return a client for a service, as an asynchronous context manager.

        Parameters
        ----------
        service
            Its name.
        retry
            Whether it is to try again by itself what was refused, because there were too many
            requests for instance.
        region
            Where it is, if not in the class's own region.
        """
        from aiobotocore.config import AioConfig

        retries = {"mode": "standard", "total_max_attempts": 6 if retry else 1}
        return self.session.create_client(
            service,
            aws_access_key_id=self._aws_access_key_id,
            aws_secret_access_key=self._aws_secret_access_key,
            region_name=region or self._region_name,
            config=AioConfig(retries=retries, connect_timeout=10, max_pool_connections=50),
        )

    async def tidy(self: Any) -> None:
        """Delete what was made, the last first; what can't be deleted is named in the log."""
        self.status = Status.closed
        while self._made:
            name, delete = self._made.pop()
            try:
                await delete()
            except Exception:
                logger.warning("pool: %s at Amazon could not be deleted", name, exc_info=True)


def make_source(
    given: type, options: dict[str, Any], flame_tags: dict[str, str], loop: Any, nthreads: int
) -> Any:
    """Return a source that has not been started; to be used on ``loop``.

    Parameters
    ----------
    given
        The vendor's class.
    options
        Its options.
    flame_tags
        Tags of all that it makes.
    loop
        The event loop.
    nthreads
        Threads of a worker.
    """
    secure.keep_out_of_vendors_logs()
    cls = type(given.__name__, (_Source, given, _Still), {"flame_tags": flame_tags})
    # Instances are made before they are told anything else, so this can't be set by __init__.
    source: Any = cls(
        **options,
        asynchronous=True,
        loop=loop,
        n_workers=0,
        worker_nthreads=nthreads,
        scheduler_address="in the parent",
        scheduler_task_definition_arn="none: it is in the parent",
        # What it takes for stale may be somebody's pool that is empty just now.
        skip_cleanup=True,
        shutdown_on_close=False,
    )
    source._made = []
    return source

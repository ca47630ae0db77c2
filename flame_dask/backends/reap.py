"""Finds what dead parents have left running at a cloud, and ends it (G3).

It should find nothing: runners end by themselves when their parent is gone. This is for those that
could not, because they hang for instance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flame_dask.backends import lease, secure
from flame_dask.backends.vendor import is_ec2, is_ecs, split
from flame_dask.errors import PoolOptionsError

#: How many tasks ECS describes at once.
_AT_ONCE = 100


@dataclass(frozen=True)
class Leftover:
    """Something that runs for a parent that is gone.

    Attributes
    ----------
    id
        What the service calls it: the ARN of a task, or the id of an instance.
    pool
        The name of the pool that it was started for.
    parent
        The process that started it: ``host/pid/...``.
    expires
        When its lease ends, in ISO format.
    reason
        How it is known that the parent is gone.
    stopped
        Whether it has been told to stop.
    """

    id: str
    pool: str
    parent: str
    expires: str
    reason: str
    stopped: bool = False


def reap(backend: Any, *, pool: str | None = None, apply: bool = False) -> list[Leftover]:
    """List what dead parents have left running, and end it with ``apply=True``.

    Only what carries the tags of flame_dask is looked at, whatever else runs there. Of that, what
    has no parent any more: on the machine of the parent, if there is no such process; elsewhere, if
    its lease has passed. A parent renews the lease of its runners every half an hour, for an hour,
    so that from another machine a runner is found at most an hour after its parent's end. Run it on
    the parent's own machine, or on one with a right clock.

    Parameters
    ----------
    backend
        As for :class:`~flame_dask.FlamePool`: ``FargateCluster``, ``ECSCluster``, ``EC2Cluster``,
        or one of them with options as ``(class, {...})``. Of the options ``cluster_arn``,
        ``region_name``, ``aws_access_key_id`` and ``aws_secret_access_key`` count, and ``region``
        for ``EC2Cluster``. Without ``cluster_arn`` all ECS clusters of the region are searched.
    pool
        The name of one pool; all, if it is left out.
    apply
        Whether to end what is found. It is only listed by default.

    Returns
    -------
    list of Leftover
        What was found. It takes a task up to half a minute to end after it was told to.

    Raises
    ------
    PoolOptionsError
        If the backend starts nothing that could be left behind.

    Examples
    --------
    >>> from dask_cloudprovider.aws import FargateCluster  # doctest: +SKIP
    >>> reap((FargateCluster, {"region_name": "eu-west-1"}), apply=True)  # doctest: +SKIP
    [Leftover(id='arn:aws:ecs:...:task/...', pool='thumbnails', ..., stopped=True)]
    """
    given, options = split(backend)
    if is_ecs(given):
        return _reap_tasks(_client("ecs", options), options, pool, apply)
    if is_ec2(given):
        return _reap_instances(_client("ec2", options), pool, apply)
    remedy = "give FargateCluster, ECSCluster or EC2Cluster of dask-cloudprovider"
    raise PoolOptionsError("backend", backend, remedy, problem="leaves nothing behind")


def _reap_tasks(
    ecs: Any, options: Mapping[str, Any], pool: str | None, apply: bool
) -> list[Leftover]:
    found = []
    for cluster in _clusters(ecs, options):
        for task in _tasks(ecs, cluster):
            its = {pair["key"]: pair.get("value", "") for pair in task.get("tags", ())}
            left = _left(task["taskArn"], its, pool)
            if left is not None:
                if apply:
                    reason = f"flame_dask: {left.reason}"[:255]
                    ecs.stop_task(cluster=cluster, task=left.id, reason=reason)
                    left = replace(left, stopped=True)
                found.append(left)
    return found


def _reap_instances(ec2: Any, pool: str | None, apply: bool) -> list[Leftover]:
    filters = [
        {"Name": "tag-key", "Values": [lease.POOL]},
        {"Name": "instance-state-name", "Values": ["pending", "running", "stopping", "stopped"]},
    ]
    found = []
    for page in ec2.get_paginator("describe_instances").paginate(Filters=filters):
        for instance in (each for group in page["Reservations"] for each in group["Instances"]):
            its = {pair["Key"]: pair.get("Value", "") for pair in instance.get("Tags", ())}
            left = _left(instance["InstanceId"], its, pool)
            if left is not None:
                if apply:
                    ec2.terminate_instances(InstanceIds=[left.id])
                    left = replace(left, stopped=True)
                found.append(left)
    return found


def _left(ident: str, tags: dict[str, str], pool: str | None) -> Leftover | None:
    """Return what has these tags as something left behind; ``None`` if it is not."""
    reason = lease.left_behind(tags)
    if reason is None or (pool is not None and tags[lease.POOL] != lease.tag(pool)):
        return None
    return Leftover(ident, tags[lease.POOL], tags[lease.PARENT], tags[lease.EXPIRES], reason)


def _client(service: str, options: Mapping[str, Any]) -> Any:
    import botocore.session
    import dask.config

    secure.keep_out_of_vendors_logs()
    names = ("aws_access_key_id", "aws_secret_access_key", "region_name")
    configured = dask.config.get(f"cloudprovider.{service}", {}) or {}
    given = {name: options.get(name) or configured.get(name) for name in names}
    region = options.get("region") or configured.get("region")  # as EC2Cluster calls it
    given["region_name"] = given["region_name"] or region
    return botocore.session.get_session().create_client(service, **given)


def _clusters(ecs: Any, options: Mapping[str, Any]) -> list[str]:
    if options.get("cluster_arn"):
        return [options["cluster_arn"]]
    pages = ecs.get_paginator("list_clusters").paginate()
    return [arn for page in pages for arn in page["clusterArns"]]


def _tasks(ecs: Any, cluster: str) -> list[dict[str, Any]]:
    """Return the tasks of a cluster that nobody has told to stop yet."""
    pages = ecs.get_paginator("list_tasks").paginate(cluster=cluster, desiredStatus="RUNNING")
    try:
        arns = [arn for page in pages for arn in page["taskArns"]]
    except ecs.exceptions.ClusterNotFoundException:  # deleted clusters are listed for a while
        return []
    tasks = []
    for start in range(0, len(arns), _AT_ONCE):
        some = arns[start : start + _AT_ONCE]
        reply = ecs.describe_tasks(cluster=cluster, tasks=some, include=["TAGS"])
        tasks += reply["tasks"]
    return tasks

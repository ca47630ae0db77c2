"""What a pool has to know of a cloud beyond what dask-cloudprovider's class for it does.

The classes start and end machines, each in its own way. What they leave out is what to do when a
start has failed or was given up: whether there is a machine that costs money all the same.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from flame_dask.backends import lease

#: The tag by which a machine is found whose start has not been heard of.
RUNNER: Final = "flame-runner"

#: Seconds after which a cloud is asked once more for a machine that it does not know: it may tell
#: of one later than it has started it.
LATE: float = 5.0

#: Seconds between two looks whether a machine has gone.
PAUSE: float = 1.0


class Cloud:
    """One that is known by nothing but its class.

    Attributes
    ----------
    frees
        Whether a machine that has switched itself off costs nothing any more.
    keeps_lease
        Whether its machines carry the tags that ``reap`` goes by.
    limit
        How many bytes of user data a machine may have; ``None`` if that is not known.
    late
        Whether it may not know a machine yet that it has just started.
    """

    frees = False
    keeps_lease = False
    limit: int | None = None
    late = False

    def tagged(
        self, options: Mapping[str, Any], tags: Mapping[str, str], name: str
    ) -> dict[str, Any]:
        """Return the options of a worker of the vendor's class with tags, if it takes any."""
        return dict(options)

    def knows(self, machine: Any) -> bool:
        """Tell whether the vendor's object knows of its machine, and so can end it."""
        return False

    async def find(self, machine: Any) -> bool | None:
        """Look for a machine by its name, and tell its object of it; ``None`` if that can't be."""
        return None

    async def is_off(self, machine: Any) -> bool:
        """Tell whether a machine has ended, or switched itself off."""
        return False

    async def wait_until_gone(self, machine: Any) -> None:
        """Wait until a machine that was told to end costs nothing any more."""

    async def renew(self, machines: Iterable[Any]) -> None:
        """Say of these machines that they have a parent."""


class EC2(Cloud):
    """Amazon's."""

    frees = True
    keeps_lease = True
    limit = 16384
    late = True

    def tagged(
        self, options: Mapping[str, Any], tags: Mapping[str, str], name: str
    ) -> dict[str, Any]:
        """Tag the machine, and its disk."""
        mine = {**tags, RUNNER: name}
        return {
            **options,
            "instance_tags": {**(options.get("instance_tags") or {}), **mine},
            "volume_tags": {**(options.get("volume_tags") or {}), **mine},
        }

    def knows(self, machine: Any) -> bool:
        """Tell whether the answer with the machine's id has come."""
        return machine.instance is not None

    async def find(self, machine: Any) -> bool | None:
        """Look for the machine by its tag, twice."""
        filters = [
            {"Name": f"tag:{RUNNER}", "Values": [machine.name]},
            {"Name": "instance-state-name", "Values": ["pending", "running", "stopping"]},
        ]
        for pause in (0.0, LATE):
            await asyncio.sleep(pause)
            async with self._client(machine) as client:
                reply = await client.describe_instances(Filters=filters)
            for reservation in reply["Reservations"]:
                for instance in reservation["Instances"]:
                    machine.instance = instance
                    return True
        return False

    async def is_off(self, machine: Any) -> bool:
        """Ask for its state. One that is not known yet may be in a moment."""
        async with self._client(machine) as client:
            ids = [machine.instance["InstanceId"]]
            reply = await client.describe_instances(InstanceIds=ids)
        found = [each for group in reply["Reservations"] for each in group["Instances"]]
        return any(each["State"]["Name"] not in ("pending", "running") for each in found)

    async def renew(self, machines: Iterable[Any]) -> None:
        """Put off the end of the leases."""
        known = [machine for machine in machines if self.knows(machine)]
        if known:
            tags = [{"Key": lease.EXPIRES, "Value": lease.expiry()}]
            ids = [machine.instance["InstanceId"] for machine in known]
            async with self._client(known[0]) as client:
                await client.create_tags(Resources=ids, Tags=tags)

    def _client(self, machine: Any) -> Any:
        return machine.cluster.boto_session.create_client("ec2", region_name=machine.region)


class Hetzner(Cloud):
    """Hetzner's, where a machine costs the same until it is deleted."""

    limit = 32768

    def knows(self, machine: Any) -> bool:
        """Tell whether the server has been heard of."""
        return getattr(machine, "server", None) is not None

    async def find(self, machine: Any) -> bool | None:
        """Look for the server by its name, which is unique there."""
        machine.server = await machine.call_async(machine.client.servers.get_by_name, machine.name)
        return machine.server is not None

    async def is_off(self, machine: Any) -> bool:
        """Ask for its state."""
        return not await self.find(machine) or machine.server.status == "off"

    async def wait_until_gone(self, machine: Any) -> None:
        """Wait until the name is unknown: the order to delete a server is taken on at first."""
        while await self.find(machine):
            await asyncio.sleep(PAUSE)


class Droplets(Cloud):
    """DigitalOcean's."""

    limit = 65536

    def knows(self, machine: Any) -> bool:
        """Tell whether the droplet has an id."""
        return getattr(machine.droplet, "id", None) is not None


class GCP(Cloud):
    """Google's: a machine that is switched off still has a disk."""

    def tagged(
        self, options: Mapping[str, Any], tags: Mapping[str, str], name: str
    ) -> dict[str, Any]:
        """Give the machine labels, which are narrower than tags."""
        labels = {key: _label(value) for key, value in {**tags, RUNNER: name}.items()}
        given = options.get("instance_labels") or {}
        # The vendor's class adds to the labels of the configuration, which is everybody's.
        config = {**options["config"], "instance_labels": dict(given)}
        return {**options, "config": config, "instance_labels": {**given, **labels}}

    def knows(self, machine: Any) -> bool:
        """Machines are ended by their names, which are there from the beginning."""
        return True


class OpenStack(Cloud):
    """OpenStack's."""

    limit = 65535

    def knows(self, machine: Any) -> bool:
        """Tell whether the server has been heard of."""
        return machine.instance is not None


_KNOWN: Final[dict[tuple[str, str], type[Cloud]]] = {
    ("dask_cloudprovider.aws.ec2", "EC2Cluster"): EC2,
    ("dask_cloudprovider.hetzner.vserver", "HetznerCluster"): Hetzner,
    ("dask_cloudprovider.digitalocean.droplet", "DropletCluster"): Droplets,
    ("dask_cloudprovider.gcp.instances", "GCPCluster"): GCP,
    ("dask_cloudprovider.openstack.instances", "OpenStackCluster"): OpenStack,
}


def cloud_of(given: type) -> Cloud:
    """Return what is known of the cloud of one of dask-cloudprovider's classes, or alike."""
    for base in given.__mro__:
        if (base.__module__, base.__name__) in _KNOWN:
            return _KNOWN[base.__module__, base.__name__]()
    return Cloud()


def is_unknown(error: BaseException) -> bool:
    """Tell whether a cloud says that there is no such machine.

    Each has an error of its own for it.

    Examples
    --------
    >>> class NotFoundError(Exception): ...
    >>> is_unknown(NotFoundError()), is_unknown(TimeoutError())
    (True, False)
    """
    answer: Any = getattr(error, "response", None)
    code = answer.get("Error", {}).get("Code", "") if isinstance(answer, dict) else ""
    status = getattr(getattr(error, "resp", None), "status", None)  # Google's
    status = getattr(error, "status_code", status)
    return (
        code.startswith("InvalidInstanceID.NotFound")
        or "NotFound" in type(error).__name__
        or getattr(error, "code", None) == "not_found"
        or str(status) == "404"
    )


def _label(value: str) -> str:
    return re.sub(r"[^a-z0-9_-]", "_", value.lower())[:63]

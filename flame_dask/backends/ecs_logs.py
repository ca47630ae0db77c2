"""The last words of a task of ECS, out of Amazon's CloudWatch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from flame_dask.errors import redact

logger = logging.getLogger("flame_dask")

#: Seconds that it may take to read a log, and between two tries while it is empty: it can be read
#: a moment later than its task is known to have stopped.
LIMIT: float = 4.0
PAUSE: float = 0.5

#: Lines that are kept, and that are read: of a key that is cut off at its beginning and at its end
#: nothing tells that it is one.
_KEPT: Final = 20
_READ: Final = 200

#: Where a log is: region, group, and the beginning of a stream's name.
Place = tuple[str | None, str, str]


class TaskLogs:
    """Reads the logs of tasks, if they go to CloudWatch (``awslogs``).

    Not being allowed to is no error: the log only tells more of one.

    Parameters
    ----------
    client
        Makes a client, from a service and maybe a region.
    container
        The container whose log it is.
    """

    def __init__(self, client: Callable[..., Any], container: str) -> None:
        self._client = client
        self._container = container
        self._places: dict[str, Place | None] = {}  # by task definition

    async def tail(self, task: Mapping[str, Any], *, patient: bool) -> tuple[str, ...]:
        """Return the last lines that a task has logged; nothing if they can't be had.

        Parameters
        ----------
        task
            What ECS says of it.
        patient
            Whether to wait a while for a first line.
        """
        arn: str = task["taskArn"]
        words: list[str] = []
        try:
            async with asyncio.timeout(LIMIT):
                definition = task["taskDefinitionArn"]
                if definition not in self._places:
                    self._places[definition] = await self._find(definition)
                place = self._places[definition]
                if place is None:
                    return ()
                region, group, prefix = place
                stream = f"{prefix}/{self._container}/{arn.rpartition('/')[2]}"
                async with self._client("logs", region=region) as logs:
                    words = await _read(logs, group, stream)
                    while patient and not words:
                        await asyncio.sleep(PAUSE)
                        words = await _read(logs, group, stream)
        except TimeoutError:
            logger.info("task %s has logged nothing that could be read in time", arn)
        except Exception as error:
            logger.info("the log of task %s could not be read: %s", arn, error)
        # All of it first: a key spans lines.
        return tuple(redact("\n".join(words)).splitlines()[-_KEPT:])

    async def _find(self, definition: str) -> Place | None:
        async with self._client("ecs") as ecs:
            reply = await ecs.describe_task_definition(taskDefinition=definition)
        for container in reply["taskDefinition"]["containerDefinitions"]:
            how = container.get("logConfiguration") or {}
            if container["name"] == self._container and how.get("logDriver") == "awslogs":
                told = how.get("options") or {}
                prefix = told.get("awslogs-stream-prefix")
                if prefix:  # without it, ECS doesn't tell the name of the stream
                    return told.get("awslogs-region"), told["awslogs-group"], prefix
        return None


async def _read(logs: Any, group: str, stream: str) -> list[str]:
    try:
        reply = await logs.get_log_events(
            logGroupName=group, logStreamName=stream, limit=_READ, startFromHead=False
        )
    except logs.exceptions.ResourceNotFoundException:  # nothing has been written yet
        return []
    return [line for event in reply["events"] for line in event["message"].splitlines()]

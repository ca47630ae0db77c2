"""Runners as virtual machines: what is put on top of a vendor's class of workers."""

from __future__ import annotations

import asyncio
import base64
import logging
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from distributed.core import Status

from flame_dask.backends.base import Ending
from flame_dask.backends.vm_clouds import Cloud, is_unknown

logger = logging.getLogger("flame_dask")

#: Where a machine keeps what its runner is told: in memory, and for nobody but root.
FILE: Final = "/run/flame-runner"

#: What the container runs. It has no secret: that comes by its standard input.
COMMAND: Final = (
    'python -c "import base64, sys, zlib; '
    'exec(zlib.decompress(base64.b64decode(sys.stdin.read())))" '
    f"< {FILE}"
)

#: Seconds between two looks whether a machine has been heard of whose start is given up.
_PAUSE: Final = 0.1

#: Seconds for which a cloud may not know a machine yet that it has started.
_UNKNOWN_AT_FIRST: Final = 60.0


def program(environment: Mapping[str, str], arguments: Sequence[str]) -> str:
    """Return what the container reads: it sets the environment and starts the worker.

    Examples
    --------
    >>> print(zlib.decompress(base64.b64decode(program({"A": "1"}, ["tls://..."]))).decode())
    import os, sys
    os.environ.update({'A': '1'})
    sys.argv[1:] = ['tls://...']
    from distributed.cli.dask_spec import main
    main()
    """
    text = (
        "import os, sys\n"
        f"os.environ.update({dict(environment)!r})\n"
        f"sys.argv[1:] = {list(arguments)!r}\n"
        "from distributed.cli.dask_spec import main\n"
        "main()"
    )
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


class Machine:
    """Comes before the vendor's class of workers: one machine, from its order to its end.

    Parameters
    ----------
    scheduler
        The address that the worker is to connect to.
    name
        The runner's id.
    machine_name
        What the cloud calls the machine.
    cloud
        What is known of the cloud.
    told
        What the worker is told, as ``program`` gives it.
    options
        Those of the vendor's class.
    """

    def __init__(
        self: Any,
        scheduler: str,
        name: str,
        machine_name: str,
        cloud: Cloud,
        told: str,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(scheduler, **options)  # type: ignore[call-arg]  # the vendor's
        self.runner = name
        # The worker's name is the runner's, whatever the machine is called.
        self.name = machine_name
        self.command = COMMAND
        self.env_vars: dict[str, str] = {}
        self.docker_args = f"-i {self.docker_args}".rstrip()
        # In brackets: the rest of the script is not to have this mask.
        keep = f"(umask 077; echo {told} > {FILE})"
        self.extra_bootstrap = [*(self.extra_bootstrap or ()), keep]
        self.auto_shutdown = True
        self._cloud = cloud
        self._launch: asyncio.Future[None] | None = None
        self._launched_at = 0.0
        self._closing = asyncio.Lock()

    async def start(self: Any) -> None:
        """Have the machine made; returns when it has been, fails if it can't be."""
        limit = self._cloud.limit
        size = len(self.cluster.render_process_cloud_init(self).encode())
        if limit is not None and size > limit:
            words = f"takes {size} bytes with certificates and commands, and the cloud allows"
            raise RuntimeError(f"the user data of a runner {words} {limit}")
        self._launched_at = _now()
        self._launch = asyncio.ensure_future(super().start())  # type: ignore[misc]
        # Whoever gives up meanwhile needs to know what it has started, to end it.
        await asyncio.shield(self._launch)

    async def close(self: Any) -> None:
        """End the machine; returns when the cloud has said that it ends."""
        async with self._closing:
            if self._launch is not None and not self._event_finished.is_set():
                await self._hear_of_it()
                if await self._may_be_there():
                    await self._destroy()
            self.status = Status.closed
            self._event_finished.set()

    async def _hear_of_it(self) -> None:
        """Wait until the machine is known by which it can be ended, or its start is over."""
        assert self._launch is not None
        while not self._launch.done():
            if self._cloud.knows(self):
                self._launch.cancel()  # what follows is to wait for its address, for instance
            await asyncio.wait([self._launch], timeout=_PAUSE)

    async def _may_be_there(self) -> bool:
        assert self._launch is not None
        failed = self._launch.cancelled() or self._launch.exception() is not None
        if not failed or self._cloud.knows(self):
            return True
        found = await self._cloud.find(self)
        return True if found is None else found

    async def _destroy(self: Any) -> None:
        failed = self._launch.cancelled() or self._launch.exception() is not None
        try:
            await super().close()  # type: ignore[misc]
        except (AttributeError, NameError, TypeError):
            if not failed or self._cloud.knows(self):
                raise
            # The vendor's object has nothing to end: so there has been nothing to begin with, as
            # far as can be told.
            logger.warning(
                "the machine %s could not be started; if the cloud has one of that name "
                "nevertheless, delete it",
                self.name,
            )
        except Exception as error:
            early = self._cloud.late and _now() - self._launched_at < _UNKNOWN_AT_FIRST
            if early or not is_unknown(error):
                raise
        await self._cloud.wait_until_gone(self)

    def ending(self) -> Ending:
        """Say how the runner ended: nobody tells."""
        return Ending(cause="the connection to its machine has ended")


def machine_class(worker_class: type) -> type:
    """Return the class of a runner, for a vendor's class of workers."""
    return type(f"Flame{worker_class.__name__}", (Machine, worker_class), {})


def _now() -> float:
    return asyncio.get_running_loop().time()

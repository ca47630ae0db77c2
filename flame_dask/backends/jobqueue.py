"""Runners that are jobs of a batch system, for the cluster classes of dask-jobqueue.

Each runner is one job, which is submitted and cancelled by itself. The scheduler is in the parent,
so that an empty pool has no job at all (D4).

What a runner needs, certificates among it, is in a file that only the user can read, in a folder
that the nodes share, and the first thing that the job does is to remove it. There is no other way
that fits all queues: the arguments of a process are for everybody to see, and so is, depending on
the queue, the script of a job (OAR has it in the arguments, HTCondor shows it to all users); the
environment of the submitting process is kept by some queues, and dropped by others or where a site
says so.
"""

from __future__ import annotations

import inspect
import logging
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Final

import dask.config
from distributed.deploy.spec import ProcessInterface

from flame_dask.backends.base import Ending
from flame_dask.backends.job import JobFolder, JobRunner
from flame_dask.backends.queues import Queue, kind_of
from flame_dask.backends.remote import RemoteBackend
from flame_dask.backends.vendor import check, where
from flame_dask.constants import BOOT_TIMEOUT
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

logger = logging.getLogger("flame_dask")

#: Options of dask-jobqueue that are the pool's to set, and what says it instead.
_OF_THE_POOL: Final = {
    "asynchronous": "make the pool asynchronous",
    "dashboard_address": "give it among scheduler_options",
    "host": "give the pool's option host",
    "job_cls": "give a cluster class that has it",
    "loop": "the pool has one",
    "n_workers": "give the pool's options min and max",
    "name": "the pool's runners have names of their own",
    "nanny": "a runner has none: it lives once",
    "processes": "a runner is one process: give the pool's option max",
    "protocol": "give the pool's option security",
    "scheduler": "the scheduler is in the parent",
    "scheduler_cls": "the scheduler is in the parent, and of the pool's class",
    "security": "give the pool's option security",
    "silence_logs": "set the level of the logger 'distributed'",
    "worker_command": "runners are Dask's own workers",
}

#: Options that the classes of clusters have, but not those of jobs.
_OF_THE_CLUSTER: Final = {"scheduler_options", "shared_temp_directory"}

#: Options that are lists; a text would be taken for a list of letters.
_LISTS: Final = (
    "job_directives_skip",
    "job_extra",
    "job_extra_directives",
    "job_script_prologue",
    "worker_extra_args",
)

#: Arguments of a worker by which it would be no runner of the pool.
_ARGUMENTS_OF_THE_POOL: Final = re.compile(
    r"--(name|nthreads|nworkers|nanny|no-nanny|preload|death-timeout|tls-[\w-]+|protocol|"
    r"scheduler-file|lifetime[\w-]*)\b"
)


class JobQueueBackend(RemoteBackend):
    """Runners that are jobs.

    Parameters
    ----------
    options
        The pool's options.
    cluster_class
        A class that inherits from ``dask_jobqueue.core.JobQueueCluster``.
    given
        Options as for that class; those that are the pool's to set are refused.
    """

    #: A queue takes its time until it says what has become of a job.
    patience = 10.0

    def __init__(self, options: PoolOptions, cluster_class: type, given: Mapping[str, Any]) -> None:
        cluster: Any = cluster_class
        self._name = cluster_class.__name__
        job_class = cluster.job_cls
        if job_class is None:
            remedy = "give a class with an attribute job_cls"
            raise PoolOptionsError("backend", cluster_class, remedy, problem="has no class of jobs")
        self._check_names(job_class, given)
        section = given.get("config_name") or job_class.default_config_name()

        def setting(name: str, default: Any = None) -> Any:
            value = given.get(name)
            if value is not None:
                return value
            found = dask.config.get(f"jobqueue.{section}.{name.replace('_', '-')}", None)
            return default if found is None else found

        scheduler = dict(setting("scheduler_options", {}))
        if setting("interface") and not options.host and "host" not in scheduler:
            scheduler.setdefault("interface", setting("interface"))
        super().__init__(options, self._name, scheduler, local=False)

        self._death_timeout = setting("death_timeout")
        self._python = setting("python") or shlex.quote(sys.executable)
        self._folder = JobFolder(setting("shared_temp_directory"))
        self._log_directory: str | None = setting("log_directory")
        threads = options.max_concurrency
        # A job reserves `cores`, a runner takes `max_concurrency` calls: the two are apart.
        self._job_class: Any = type(
            job_class.__name__,
            (job_class,),
            {"worker_process_threads": property(lambda job: threads)},
        )
        self._job_options = {
            **{name: value for name, value in given.items() if name not in _OF_THE_CLUSTER},
            "processes": 1,
            "nanny": False,
            "worker_command": "distributed.cli.dask_worker",
            "worker_extra_args": ["--no-dashboard", *setting("worker_extra_args", [])],
            **self._limit(),
        }
        for name in ("log_directory", "python"):  # a runner's own
            self._job_options.pop(name, None)
        self._check_job()
        kind = kind_of(job_class)
        self._queue = None if kind is None else Queue(kind)

    def _check_names(self, job_class: Any, given: Mapping[str, Any]) -> None:
        """Refuse options that there are not, and those that are the pool's."""
        known = set(_OF_THE_CLUSTER)
        for cls in job_class.__mro__:
            if "__init__" in vars(cls) and issubclass(cls, ProcessInterface):
                parameters = inspect.signature(cls.__init__).parameters.values()
                known |= {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
        check(self._name, given, _OF_THE_POOL, known - {"self", "args", *_OF_THE_POOL})
        for option in set(_LISTS).intersection(given):
            if isinstance(given[option], str):
                place = where(self._name, option)
                raise PoolOptionsError(place, given[option], "give a list of texts")
        for argument in given.get("worker_extra_args") or ():
            if _ARGUMENTS_OF_THE_POOL.match(str(argument)):
                place, problem = where(self._name, "worker_extra_args"), "is the pool's to set"
                raise PoolOptionsError(place, argument, "leave it out", problem=problem)

    def _check_job(self) -> None:
        """Have the vendor's class look at the options, without anything being done."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they come when there is a job
                # The folder for logs would be made: the name of one that is there is as good.
                self._job_class("tcp://127.0.0.1:0", name="check", log_directory="/",
                                **self._job_options)  # fmt: skip
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            given = {
                name: self._job_options[name]
                for name in ("cores", "memory")
                if name in self._job_options
            }
            place = f"backend=({self._name}, {{...}})"
            remedy = f"give what it asks for, or put it into Dask's configuration ({error})"
            raise PoolOptionsError(place, given, remedy, problem="is refused") from error

    @property
    def _arrival(self) -> float | None:
        """Seconds within which a job has to be a runner, once it runs."""
        # It has no need then of the time that it may wait in the queue.
        limits = [self._death_timeout, self._pool_options.boot_timeout]
        return min((float(limit) for limit in limits if limit is not None), default=None)

    def _limit(self) -> dict[str, float]:
        arrival = self._arrival
        # Without an end it would be Dask's own default.
        return {"death_timeout": 10**8 if arrival is None else arrival}

    def environment(self) -> dict[str, str]:
        """Return the environment variables that make a worker of Dask one of this pool's runners.

        They hold the certificates, so they must not be shown to anybody.
        """
        variables = super().environment()
        if self._arrival is not None:
            variables[BOOT_TIMEOUT] = str(self._arrival)
        return variables

    def worker(self) -> tuple[type, dict[str, Any]]:
        """Return what starts a runner."""
        return JobRunner, {
            "job_class": self._job_class,
            "job_options": {**self._job_options, **self._limit()},
            "python": self._python,
            "log_directory": self._log_directory,
            "folder": self._folder,
            "queue": self._queue,
            "environment": self.environment(),
            "connected": self._connected,
        }

    def _connected(self, runner: str) -> bool:
        scheduler: Any = None if self.cluster is None else self.cluster.scheduler
        return scheduler is not None and runner in scheduler.aliases

    async def ending(self, member: Any) -> Ending:
        """Say how a job ended."""
        ending: Ending = await member.ending()
        return ending

    def kill(self) -> None:
        """Cancel all jobs, because the interpreter exits.

        Those that run end by themselves (G3), but one that waits would begin yet.
        """
        members: list[Any] = [] if self.cluster is None else list(self.cluster.workers.values())
        commands = [command for member in members if (command := member.cancel_command())]
        for command in commands:
            try:
                subprocess.run(command, timeout=5, check=False, capture_output=True)
            except (OSError, subprocess.TimeoutExpired):
                logger.warning("could not run %s", shlex.join(command), exc_info=True)
        self._folder.remove()

    def close(self, cluster: Any) -> Any:
        """Close the cluster, and remove the folder with what jobs have said."""
        closing = super().close(cluster)
        if not inspect.isawaitable(closing):
            self._folder.remove()
            return None
        return self._close_then(closing)

    async def _close_then(self, closing: Any) -> None:
        try:
            await closing
        finally:
            self._folder.remove()

"""A call, as the host of a pool knows it, and the errors that the host makes of the core's news."""

from __future__ import annotations

from flame_dask.core import instructions as do
from flame_dask.core.events import BootProblem
from flame_dask.errors import BootError, CallTimeout, RunnerLost
from flame_dask.payload import Payload
from flame_dask.scheduler.inquest import Verdict


class HostCall:
    """What the host knows of a call, beyond what the core does.

    Parameters
    ----------
    key
        The call's id.
    client
        The Dask client that it came from.
    payload, inputs
        The call, and the values of futures among its arguments.
    keep
        Whether its result is wanted.
    asynchronous
        Whether its function is an ``async def``.
    link
        Whether it ends with its client (G1).
    retries
        How often it may be started anew when its runner is lost (F1).
    mode
        ``track``, ``child`` or ``stream``, if it is more than a call.
    code
        The revision of the parent's code that it needs (J3); 0 is none.
    """

    __slots__ = (
        "address",
        "answered",
        "asynchronous",
        "client",
        "code",
        "delivering",
        "how",
        "inputs",
        "keep",
        "key",
        "limit",
        "link",
        "mode",
        "payload",
        "retries",
        "runs",
        "task",
    )

    def __init__(
        self,
        key: str,
        client: str,
        payload: Payload,
        inputs: dict[str, Payload] | None,
        keep: bool,
        asynchronous: bool,
        link: bool,
        retries: int,
        mode: str = "",
        code: int = 0,
    ) -> None:
        self.key = key
        self.client = client
        # Both are let go of when they have been sent for the last time.
        self.payload: Payload | None = payload
        self.inputs = inputs
        self.keep = keep
        self.asynchronous = asynchronous
        self.link = link
        self.retries = retries
        self.mode = mode
        self.code = code
        self.runs = 0
        # The key of its Dask task: each run has its own, so that news of an earlier one is known
        # as such (F1).
        self.task: str | None = None
        self.address: str | None = None
        self.limit: float | None = None
        self.delivering = False
        # How its work was ended, if it was (E3).
        self.how = ""
        # Its caller has been told of an end, or is gone: nothing more is sent to it.
        self.answered = False

    def begin(self, address: str) -> str:
        """Note a new run on the runner at this address; return the key of its task."""
        self.runs += 1
        self.address = address
        self.task = self.key if self.runs == 1 else f"{self.key}-{self.runs}"
        return self.task


def boot_error(problem: BootProblem, told: str) -> BootError:
    """Return the exception that tells of a failed boot.

    Parameters
    ----------
    problem
        What the core knows of it.
    told
        The address that the runner was told to connect to.
    """
    cause = str(problem.cause)
    if problem.phase == "connect":
        cause += f"; it was told to connect to {told}"
    return BootError(
        problem.phase,
        cause=cause,
        log_tail=problem.log_tail,
        attempts=problem.attempts,
    )


def timeout_error(news: do.Expired, told: str) -> CallTimeout:
    """Return the exception that tells of a call whose time is up (E2); ``told`` as above."""
    problem = news.boot_problem
    return CallTimeout(
        news.phase,  # type: ignore[arg-type]  # the core's word is one of the phases
        queued=news.queued,
        booting=news.booting,
        running=news.running,
        limit=news.limit,
        call=news.call,
        boot_error=None if problem is None else boot_error(problem, told),
    )


def lost_error(call: HostCall, runner: str | None, verdict: Verdict) -> RunnerLost:
    """Return the exception that tells of a runner's end (F2)."""
    return RunnerLost(
        verdict.cause,  # type: ignore[arg-type]  # one of the causes
        exit_code=verdict.exit_code,
        signal=verdict.signal,
        runner=runner,
        call=call.key,
    )


def scaled_message(news: do.Scaled, told: str) -> dict[str, object]:
    """Return what the parent hears of a growing or shrinking pool, for its hooks (C9)."""
    problem = news.problem
    return {
        "what": "scaled",
        "kind": news.kind,
        "runner": news.runner,
        "count": news.runners,
        "reason": news.reason,
        "error": None if problem is None else boot_error(problem, told),
    }

"""What Kubernetes says of a runner's pod: why it does not start, and how its container ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from flame_dask.backends.base import Ending, Loss

Resource = dict[str, Any]

#: Why a container waits that is not going to start unless somebody changes something.
_HOPELESS: Final = frozenset(
    {
        "CreateContainerConfigError",
        "CreateContainerError",
        "ErrImageNeverPull",
        "ImagePullBackOff",
        "InvalidImageName",
        "RunContainerError",
    }
)

#: Why a pod was taken from its machine, though there was nothing wrong with it.
_TAKEN_AWAY: Final = frozenset({"Evicted", "NodeLost", "NodeShutdown", "Preempting", "Terminated"})


def runs(pod: Resource, container: str) -> bool:
    """Tell whether a pod's container of this name runs."""
    return any("running" in each.get("state", {}) for each in _statuses(pod, container))


def trouble(pod: Resource, container: str) -> Ending | None:
    """Return why a pod does not become a runner; ``None`` if it still may."""
    status = pod.get("status", {})
    for each in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        waiting = each.get("state", {}).get("waiting") or {}
        if waiting.get("reason") in _HOPELESS:
            return Ending("start", _said(waiting))
    if status.get("phase") == "Failed" and status.get("reason"):
        loss, exit_code, _ = _how(pod, container)
        return Ending("setup", _said(status), exit_code, loss=loss)
    if _terminated(pod, container):
        # It will be started anew, but what comes is not the runner any more.
        return how_it_ended(pod, container)
    return None


def how_it_ended(pod: Resource, container: str) -> Ending:
    """Return how the container of a runner ended, as far as it has."""
    loss, exit_code, words = _how(pod, container)
    if loss is None:
        return Ending()
    return Ending("setup", words, exit_code, loss=loss)


def _how(pod: Resource, container: str) -> tuple[Loss | None, int | None, str]:
    status = pod.get("status", {})
    conditions = {each["type"]: each for each in status.get("conditions", ())}
    taken = conditions.get("DisruptionTarget", {})
    if taken.get("status") == "True" or status.get("reason") in _TAKEN_AWAY:
        said = _said(taken if taken.get("reason") else status)
        return "preempted", None, f"its pod was taken away ({said})"
    ended = _terminated(pod, container)
    if not ended:
        return None, None, ""
    code = int(ended.get("exitCode", 0))
    words = f"its container ended with exit code {code} ({_said(ended)})"
    if ended.get("reason") == "OOMKilled":
        return "oom", None, words
    # A shell's way to say that it was a signal, which is also that of containers.
    return ("signal", 128 - code, words) if code > 128 else ("exited", code, words)


def _terminated(pod: Resource, container: str) -> Resource:
    """Return what is said of the end of a container that has ended, be it started anew or not."""
    for each in _statuses(pod, container):
        for state in ("lastState", "state"):
            ended: Resource = each.get(state, {}).get("terminated") or {}
            if ended:
                return ended
    return {}


def waits_for(pod: Resource, container: str) -> str:
    """Return what a pod waits for that may still start."""
    for condition in pod.get("status", {}).get("conditions", ()):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return _said(condition)
    for each in _statuses(pod, container):
        waiting = each.get("state", {}).get("waiting")
        if waiting:
            return _said(waiting)
    return ""


def refusal(deployment: Resource) -> str:
    """Return why a pod is not even made, such as for a quota; empty if nothing is said."""
    for condition in deployment.get("status", {}).get("conditions", ()):
        if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
            return _said(condition)
    return ""


def _statuses(pod: Resource, container: str) -> Iterator[Resource]:
    for each in pod.get("status", {}).get("containerStatuses", ()):
        if each.get("name") == container:
            yield each


def _said(thing: Resource) -> str:
    return f"{thing.get('reason', '')}: {thing.get('message', '')}".strip(": ")

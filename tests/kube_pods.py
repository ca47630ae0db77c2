"""Pods of an imitation of Kubernetes: what runs in them is real."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

Resource = dict[str, Any]

#: Seconds before a container is started anew after its second end; Kubernetes' own value is 10.
BACK_OFF: Final = 1.0

#: Images that are special: one that can't be had, one that is on its way for a long time, and one
#: whose program ends at once.
NO_IMAGE: Final = "example.org/nothing"
LARGE_IMAGE: Final = "example.org/large"
BROKEN_IMAGE: Final = "example.org/broken"

#: What such an image says before it ends.
LAST_WORDS: Final = "no such library: libmagic"


class Pod:
    """A pod with a worker's or a scheduler's container, which is started anew when it ends.

    Parameters
    ----------
    folder
        For its files.
    resource
        As the API server has it.
    resolve
        What in a pod a name service and a network of its own would do: changes words of commands
        and variables.
    """

    def __init__(
        self, folder: Path, resource: Resource, resolve: Callable[[str], str], python_path: str
    ) -> None:
        self.resource = resource
        self.restarts = 0
        self.exit_codes: list[int] = []
        self.process: subprocess.Popen[bytes] | None = None
        self._folder = folder / resource["metadata"]["name"]
        self._temporary = self._folder / "tmp"
        self._temporary.mkdir(parents=True)
        spec = resource["spec"]
        self._container = spec["containers"][0]
        self._image = self._container["image"]
        own = {each["name"]: each["value"] for each in self._container.get("env") or []}
        self._env = {
            name: os.environ[name] for name in ("HOME", "LANG", "PATH") if name in os.environ
        }
        self._env |= {"PYTHONPATH": python_path, "TMPDIR": str(self._temporary)}
        self._env |= {name: resolve(value) for name, value in own.items()}
        words = [*(self._container.get("command") or []), *(self._container.get("args") or [])]
        words = [re.sub(r"\$\((\w+)\)", lambda found: self._env[found[1]], w) for w in words]
        self._command = _program(self._image, [words[0], *map(resolve, words[1:])])
        self._grace = float(spec.get("terminationGracePeriodSeconds", 30))
        self._end_at = float("inf")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kube-pod", daemon=True)
        self.update()
        if self._image not in (NO_IMAGE, LARGE_IMAGE):
            self._thread.start()

    def update(self) -> None:
        """Say in its resource how it is."""
        running = self.process is not None and self.process.poll() is None
        container: Resource = {"name": self._container["name"], "restartCount": self.restarts}
        over = self._ended.is_set() and not running
        states = [_terminated(code) for code in self.exit_codes]
        if over and states:
            container["state"] = states.pop()
        if states:
            container["lastState"] = states[-1]
        if running:
            container["state"] = {"running": {}}
        elif over:
            container.setdefault("state", {"waiting": {"reason": "ContainerCreating"}})
        elif self.exit_codes:
            container["state"] = {"waiting": {"reason": "CrashLoopBackOff"}}
        elif self._image == NO_IMAGE:
            waiting = {"reason": "ImagePullBackOff", "message": f"Back-off pulling {self._image}"}
            container["state"] = {"waiting": waiting}
        else:
            container["state"] = {"waiting": {"reason": "ContainerCreating"}}
        ready = "True" if running else "False"
        self.resource["status"] = {
            "phase": "Running" if running or self.exit_codes else "Pending",
            "conditions": [{"type": t, "status": ready} for t in ("Ready", "ContainersReady")],
            "containerStatuses": [container],
        }

    def log(self, previous: bool) -> str:
        """Return what the container said; the ``previous`` one, if it was started anew."""
        log = self._folder / f"log{self.restarts - previous}"
        return log.read_text() if log.exists() else ""

    def _run(self) -> None:
        while not self._ended.wait(BACK_OFF if self.restarts > 1 else 0.0):
            with open(self._folder / f"log{self.restarts}", "wb") as log:
                self.process = subprocess.Popen(
                    self._command,
                    env=self._env,
                    cwd=self._folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            if self._ended.is_set():
                self.process.terminate()
            code = self.process.wait()
            self._kill_rest()
            self.exit_codes.append(128 - code if code < 0 else code)
            if not self._ended.is_set():
                self.restarts += 1

    def _kill_rest(self) -> None:
        """End what is left in the container when its first process has ended."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self, grace: float | None = None) -> None:
        """End it; it can be told again that this has to be sooner."""
        grace = self._grace if grace is None else grace
        self._end_at = min(self._end_at, time.monotonic() + grace)
        if self._thread.ident is None:
            return
        first = not self._ended.is_set()
        self._ended.set()
        if first and self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGTERM)
        while self._thread.is_alive():
            if time.monotonic() > self._end_at:
                self._kill_rest()
            self._thread.join(0.02)
        shutil.rmtree(self._temporary, ignore_errors=True)


def _terminated(code: int) -> Resource:
    return {"terminated": {"exitCode": code, "reason": "Error" if code else "Completed"}}


def _program(image: str, words: list[str]) -> list[str]:
    if image == BROKEN_IMAGE:
        return [sys.executable, "-c", f"import sys; print({LAST_WORDS!r}); sys.exit(3)"]
    if words[0] == "dask":  # which would import the commands of all packages first
        words = [f"dask_{words[1]}", *words[2:]]
    return [sys.executable, "-m", f"distributed.cli.{words[0].replace('-', '_')}", *words[1:]]

"""Clouds on this machine: what is the clouds' is simulated, what runs on the machines is real.

A machine is a process: its cloud-init script is run by a shell, to which ``docker`` and
``shutdown`` are programs of this file. Amazon's part is moto's; Hetzner's is a small server here.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from moto_server import ACCOUNT, REGION, Moto
from support import make_site

IMAGE = "ghcr.io/dask/dask:test"

#: Of all that `docker run` is given, what comes before the image is left out. What a container
#: would not have is not in its environment either.
DOCKER = f"""#!/bin/sh
echo "$@" > "$MACHINE/docker"
while [ "$1" != "{IMAGE}" ]; do shift; done
shift
exec "$@"
"""

PYTHON = f"""#!/bin/sh
exec {sys.executable} "$@"
"""

SHUTDOWN = """#!/bin/sh
touch "$MACHINE/off"
"""


class Machine:
    """One machine, from its cloud-init on."""

    def __init__(self, folder: Path, user_data: str, extra: dict[str, str]) -> None:
        self.folder = folder
        self.user_data = user_data
        folder.mkdir(parents=True)
        commands = yaml.safe_load(user_data)["runcmd"]
        # As cloud-init does it: each is a line of a script that goes on whatever happens.
        script = "\n".join(commands).replace("/run/", f"{folder}/")
        (folder / "script").write_text(f"#!/bin/sh\n{script}\n")
        usual = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        programs = folder.parent / "bin"
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                ["sh", str(folder / "script")],
                env={
                    **usual,
                    "MACHINE": str(folder),
                    "PATH": f"{programs}:{os.environ['PATH']}",
                    "PYTHONPATH": str(folder.parent / "site"),
                    "TMPDIR": str(folder),
                    **extra,
                },
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_off(self) -> bool:
        """Tell whether it has switched itself off."""
        return (self.folder / "off").exists() and self.process.poll() is not None

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def kill(self) -> None:
        """Pull the plug."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Machines:
    """All machines of a cloud."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.all: dict[str, Machine] = {}
        self.most = 0
        self.extra: dict[str, str] = {}
        (folder / "bin").mkdir()
        for name, text in (("docker", DOCKER), ("python", PYTHON), ("shutdown", SHUTDOWN)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        make_site(folder / "site")

    def start(self, name: str, user_data: str) -> None:
        self.all[name] = Machine(self.folder / name, user_data, self.extra)

    def kill(self, name: str) -> None:
        self.all[name].kill()

    def close(self) -> None:
        for machine in self.all.values():
            machine.kill()


class Fault(Exception):
    """Taken for what a service answers."""

    def __init__(self, status: int, code: str, words: str) -> None:
        super().__init__(words)
        self.status, self.code = status, code


class EC2(Moto):
    """Amazon's EC2 by moto, with an agent that runs its instances.

    Attributes
    ----------
    faults
        Taken by the next requests for an instance, one each: ``None`` lets it pass, an exception is
        raised, and ``"lost"`` starts the instance and answers with an error of the service's.
    delay
        Seconds that each request for an instance takes.
    refuse_ends
        How many requests to end an instance are refused.
    """

    def __init__(self, folder: Path) -> None:
        self.machines = Machines(folder)
        self.faults: list[Any] = []
        self.delay = 0.0
        self.under_way = 0
        self.requests = 0
        self.refuse_ends = 0
        self.most = 0
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._ending = threading.Lock()
        super().__init__(folder)
        self._thread = threading.Thread(target=self._attend, name="ec2-agent", daemon=True)

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        """Let faults in where moto has none."""
        from moto.ec2.exceptions import EC2ClientError
        from moto.ec2.models.instances import Instance
        from moto.ec2.responses import EC2Response

        agent = self
        run, end = EC2Response.run_instances, EC2Response.terminate_instances
        terminate = Instance.terminate

        class Refusal(EC2ClientError):
            def __init__(self, code: str, words: str, status: int) -> None:
                super().__init__(code, words)
                self.code = status  # type: ignore[misc]

        def refuse(fault: Fault) -> None:
            raise Refusal(fault.code, str(fault), fault.status)

        def run_instances(self: Any) -> Any:
            with agent._lock:
                agent.requests += 1
                agent.under_way += 1
                fault = agent.faults.pop(0) if agent.faults else None
            agent._over.wait(agent.delay)
            if isinstance(fault, Fault):
                refuse(fault)
            result = run(self)
            agent.most = max(agent.most, len(agent.unended()))
            if fault == "lost":
                refuse(Fault(400, "Unclear", "Something went wrong"))
            return result

        def terminate_instances(self: Any) -> Any:
            if agent.refuse_ends > 0:
                agent.refuse_ends -= 1
                refuse(Fault(400, "NotNow", "Not now"))
            return end(self)

        def end_once(self: Any) -> Any:
            """An instance that has ended may be told to end; moto would miss its network card."""
            with agent._ending:
                return self._state if self._state.name == "terminated" else terminate(self)

        Instance.terminate = end_once
        EC2Response.run_instances = run_instances
        EC2Response.terminate_instances = terminate_instances
        try:
            yield
        finally:
            EC2Response.run_instances = run
            EC2Response.terminate_instances = end
            Instance.terminate = terminate

    def start(self) -> None:
        self._thread.start()

    def instances(self) -> list[Any]:
        from moto.ec2.models import ec2_backends

        return list(ec2_backends[ACCOUNT][REGION].all_instances())

    def unended(self) -> list[Any]:
        """The instances that cost money."""
        return [each for each in self.instances() if each._state.name != "terminated"]

    def machine_of(self, instance: Any) -> Machine:
        return self.machines.all[instance.id]

    def reset(self) -> None:
        self.faults, self.delay = [], 0.0
        self.under_way = self.requests = self.refuse_ends = 0
        self.machines.extra = {}
        self.most = len(self.unended())

    def end_all(self) -> None:
        for each in self.unended():
            each.terminate()
            if each.id in self.machines.all:
                self.machines.kill(each.id)

    def _attend(self) -> None:
        while not self._over.wait(0.02):
            for instance in self.instances():
                machine = self.machines.all.get(instance.id)
                ended = instance._state.name == "terminated"
                if machine is None:
                    if not ended and instance.user_data:
                        data = instance.user_data
                        text = str(data) if "#cloud" in str(data) else _decoded(str(data))
                        self.machines.start(instance.id, text)
                elif ended and machine.process.poll() is None:
                    machine.kill()
                elif not ended and machine.is_off():
                    # InstanceInitiatedShutdownBehavior
                    assert instance.instance_initiated_shutdown_behavior == "terminate"
                    instance.terminate()

    def close(self) -> None:
        self._over.set()
        self._thread.join(10)
        self.machines.close()
        super().close()


def _decoded(text: str) -> str:
    return base64.b64decode(text).decode()


class Hetzner:
    """What Hetzner answers about servers, as far as dask-cloudprovider asks.

    A server that has switched itself off is there until it is deleted, and costs the same.

    Attributes
    ----------
    faults
        As for ``EC2``.
    lag
        Seconds that a server is still there after its deletion was taken on.
    """

    def __init__(self, folder: Path) -> None:
        self.machines = Machines(folder)
        self.faults: list[Any] = []
        self.delay = 0.0
        self.lag = 0.0
        self.servers: dict[int, dict[str, Any]] = {}
        self.deleted_at: dict[int, float] = {}
        self.created = 0
        self.under_way = 0
        self.most = 0
        self._lock = threading.Lock()
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(cloud.get)

            def do_POST(self) -> None:
                self._answer(cloud.post)

            def do_DELETE(self) -> None:
                self._answer(cloud.delete)

            def _answer(self, how: Callable[..., Any]) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size)) if size else {}
                url = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(url.query).items()}
                try:
                    status, reply = 200, how(url.path, query, body)
                except Fault as fault:
                    status = fault.status
                    reply = {"error": {"code": fault.code, "message": str(fault), "details": None}}
                data = json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="hetzner", daemon=True
        )
        self._thread.start()

    def _there(self) -> dict[int, dict[str, Any]]:
        now = time.monotonic()
        for number, when in list(self.deleted_at.items()):
            if now >= when + self.lag:
                self.servers.pop(number, None)
                del self.deleted_at[number]
        return self.servers

    def unended(self) -> list[dict[str, Any]]:
        with self._lock:
            return list(self._there().values())

    def get(self, path: str, query: dict[str, str], body: Any) -> Any:
        with self._lock:
            servers = list(self._there().values())
        if path.endswith("/actions"):
            return {"actions": [_action()], "meta": _META}
        if path.startswith("/v1/actions"):
            return {"action": _action()}
        if path == "/v1/servers":
            found = [each for each in servers if query.get("name") in (None, each["name"])]
            return {"servers": found, "meta": _META}
        raise Fault(404, "not_found", path)

    def post(self, path: str, query: dict[str, str], body: Any) -> Any:
        assert path == "/v1/servers"
        with self._lock:
            fault = self.faults.pop(0) if self.faults else None
            self.under_way += 1
        time.sleep(self.delay)
        if isinstance(fault, Fault):
            raise fault
        with self._lock:
            self.created += 1
            number = self.created
            self._there()[number] = server = _server(number, body["name"])
            self.most = max(self.most, len(self.servers))
        self.machines.start(body["name"], body["user_data"])
        if fault == "lost":
            raise Fault(503, "unavailable", "Something went wrong")
        return {"server": server, "action": _action(), "next_actions": [], "root_password": None}

    def delete(self, path: str, query: dict[str, str], body: Any) -> Any:
        number = int(path.rpartition("/")[2])
        with self._lock:
            if number not in self._there() or number in self.deleted_at:
                raise Fault(404, "not_found", "server not found")
            self.deleted_at[number] = time.monotonic()
            name = self.servers[number]["name"]
        self.machines.kill(name)
        return {"action": _action()}

    def reset(self) -> None:
        self.faults, self.delay, self.lag, self.under_way = [], 0.0, 0.0, 0
        self.most = len(self.unended())

    def end_all(self) -> None:
        self.lag = 0.0
        for each in self.unended():
            with contextlib.suppress(Fault):
                self.delete(f"/{each['id']}", {}, {})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
        self.machines.close()


_META = {
    "pagination": {
        "page": 1,
        "per_page": 25,
        "previous_page": None,
        "next_page": None,
        "last_page": 1,
        "total_entries": 1,
    }
}


def _action() -> dict[str, Any]:
    return {
        "id": 1,
        "command": "create_server",
        "status": "success",
        "progress": 100,
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:00+00:00",
        "resources": [],
        "error": None,
    }


def _server(number: int, name: str) -> dict[str, Any]:
    address = {"id": number, "ip": "127.0.0.1", "blocked": False, "dns_ptr": "localhost"}
    return {
        "id": number,
        "name": name,
        "status": "running",
        "created": "2026-01-01T00:00:00+00:00",
        "public_net": {"ipv4": address, "ipv6": None, "floating_ips": [], "firewalls": []},
        "private_net": [],
        "labels": {},
    }

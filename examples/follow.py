"""The log of a program on a runner, line by line as it is written.

The program is Python's own web server. It is placed on the runner, visited by calls that run there,
and its log is streamed here until three visits are in it.

    python examples/follow.py
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

from flame_dask import ChildSpec, FlamePool


def serve(folder: str) -> subprocess.Popen[bytes]:
    """Start a web server at any free port. What it writes goes to a file."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "-d", folder]
    with Path(folder, "log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def end(server: subprocess.Popen[bytes]) -> None:
    """End it, and see that it has ended."""
    server.terminate()
    server.wait()


def follow(path: str) -> Iterator[str]:
    """Yield the lines of a file, and those that will be written to it."""
    with Path(path).open() as file:
        line = ""
        while True:
            line += file.readline()
            if line.endswith("\n"):
                yield line.rstrip()
                line = ""
            else:
                time.sleep(0.05)


def visit(port: int) -> None:
    """Get the server's page."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=10)) as server:
        server.request("GET", "/")
        server.getresponse().read()


def main() -> None:
    with FlamePool("follow", max=1, max_concurrency=4) as pool:
        folder = pool.call(tempfile.mkdtemp)
        server = pool.place_child(ChildSpec(start=serve, args=(folder,), stop=end))
        seen = 0
        with pool.stream(follow, f"{folder}/log", timeout="30s") as lines:
            while seen < 3:
                line = next(lines)
                print(line)
                seen += '"GET / HTTP' in line
                if port := re.search(r"port (\d+)", line):  # it is up
                    for _ in range(3):
                        pool.cast(visit, int(port[1]))
        server.stop()
        print(f"the server has ended: {server.result()}")
        pool.call(shutil.rmtree, folder)


if __name__ == "__main__":
    main()

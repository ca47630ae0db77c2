"""What starts a runner at the other end of an SSH connection: sent as text, and run there.

It reads from its standard input what it needs, and leaves that input to the runner, which ends
with it.
"""

import contextlib
import json
import os
import sys
import tempfile


def take(count: int) -> bytes:
    """Read so many bytes, and not one more."""
    data = b""
    while len(data) < count:
        piece = os.read(0, count - len(data))
        if not piece:
            sys.exit("the parent is gone")
        data += piece
    return data


def main() -> None:
    """Become a worker of Dask."""
    size = b""
    while not size.endswith(b"\n"):
        size += take(1)
    told = json.loads(take(int(size)))
    with contextlib.suppress(OSError):  # it leads its session already
        os.setsid()
    folder = tempfile.mkdtemp(prefix="flame-")
    os.environ.update(told["environment"], FLAME_RUNNER_FOLDER=folder)
    told["spec"]["opts"].setdefault("local_directory", folder)
    os.write(1, json.dumps({"pid": os.getpid(), "folder": folder}).encode() + b"\n")
    os.dup2(2, 1)
    sys.argv[1:] = [told["scheduler"], "--spec", json.dumps(told["spec"])]

    from distributed.cli.dask_spec import main as start  # it reads the environment

    start()


if __name__ == "__main__":
    main()

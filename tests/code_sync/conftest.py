"""A program to copy, and a way to copy it without any Dask."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flame_dask.code_options import CodeSync
from flame_dask.code_sync.receiver import Receiver
from flame_dask.code_sync.source import CodeSource


@pytest.fixture(autouse=True)
def modules_as_before() -> Iterator[None]:
    """Unload what a test has imported, and leave ``sys.path`` as it was."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Write a file of the program in the folder ``here``."""

    def write(path: str, text: str) -> Path:
        file = tmp_path / "here" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    return write


Pair = tuple[CodeSource, Receiver]


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    """Make both sides, which ask each other without a network."""
    with contextlib.ExitStack() as stack:

        def connect(name: str = "runner", **options: Any) -> Pair:
            source = CodeSource(CodeSync(**options), "pool")
            stack.callback(source.close)
            receiver = Receiver(
                lambda since, stream: source.answer(name, since, stream), tmp_path / "there"
            )
            stack.callback(receiver.close)
            return source, receiver

        yield connect

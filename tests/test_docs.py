"""Runs the code of README.md and of the pages in docs/, and holds the pages against the library.

- Each block marked ``python`` is run, warnings are errors, and there is a deadline.
- A block with ``if __name__ == "__main__":`` is a whole script: it is run by itself, as it stands.
- The other blocks of a page belong together, as in a notebook: they run in order in one process.
- A block marked ``output`` is what the block before it prints.
- ``<!-- not run: reason -->`` before a block exempts it; it must still compile.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from flame_dask.options import RESERVED, PoolOptions

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "_build" not in page.parts),
]
DEADLINE = 90

# What Dask's workers log when a call raises, as some on the pages are meant to. Anything else on
# stderr is a fault, but for a heartbeat that was cut off.
COMPUTE_FAILED = re.compile(r".* - ERROR - Compute Failed\n(?:\w+: .*\n)+\n?")

# Runs blocks one after the other in one namespace and says after each what it printed. The worker
# processes of a pool import this file again, hence the guard.
DRIVER = """
import contextlib, io, json, sys
from pathlib import Path

if __name__ == "__main__":
    blocks = json.loads(Path(sys.argv[1]).read_text())
    for block in blocks:
        printed = io.StringIO()
        # As many line breaks before the code as the page has before it: tracebacks then fit.
        code = compile("\\n" * block["line"] + block["code"], block["page"], "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, globals())
        place = f'{block["page"]}:{block["line"]}'
        if block["output"] is not None:
            assert printed.getvalue() == block["output"], f"{place} printed {printed.getvalue()!r}"
"""


@dataclass
class Block:
    """A piece of Python in a page."""

    page: str
    line: int  # lines before the first line of code
    code: str
    output: str | None = None
    not_run: str | None = None

    @property
    def is_script(self) -> bool:
        return "__name__ ==" in self.code


def blocks_of(page: Path) -> list[Block]:
    blocks: list[Block] = []
    exemption = None
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "html_block":
            found = re.match(r"<!-- *not run:(.*?)-->", token.content, re.DOTALL)
            exemption = found and found[1].strip()
            assert exemption != "", f"{page.name}: a block is not run, and no reason is given"
        elif token.type == "fence" and token.info.strip() == "python":
            assert token.map
            blocks.append(
                Block(
                    page=str(page.relative_to(ROOT)),
                    line=token.map[0] + 1,
                    code=token.content,
                    not_run=exemption,
                )
            )
            exemption = None
        elif token.type == "fence" and token.info.strip() == "output":
            blocks[-1].output = token.content
    return blocks


BLOCKS = {str(page.relative_to(ROOT)): blocks_of(page) for page in PAGES}


@pytest.fixture
def run(tmp_path: Path, without_cut_heartbeats: Callable[[str], str]) -> Callable[..., str]:
    """Run Python in a folder of its own, and return what it printed."""

    def start(*command: str) -> str:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", *command],
            cwd=tmp_path,
            # The warnings are those of the worker processes.
            env=os.environ | {"PYTHONWARNINGS": "error", "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            pytest.fail(f"not done after {DEADLINE} s\n{out}\n{err}")
        err = without_cut_heartbeats(COMPUTE_FAILED.sub("", err))
        if process.returncode or err:
            pytest.fail(f"exit status {process.returncode}\n{out}\n{err}")
        return out

    return start


@pytest.mark.timeout(DEADLINE + 30)
@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_code_of_page_runs(page: str, run: Callable[..., str], tmp_path: Path) -> None:
    blocks = [block for block in BLOCKS[page] if not block.not_run]
    if not blocks:
        pytest.skip("; ".join(block.not_run or "" for block in BLOCKS[page]))

    for block in blocks:
        if block.is_script:
            script = tmp_path / f"line{block.line}.py"
            script.write_text(block.code, encoding="utf-8")
            printed = run(str(script))
            if block.output is not None:
                assert printed == block.output, f"{block.page}:{block.line}"

    together = [vars(block) for block in blocks if not block.is_script]
    if together:
        (tmp_path / "blocks.json").write_text(json.dumps(together), encoding="utf-8")
        (tmp_path / "driver.py").write_text(DRIVER, encoding="utf-8")
        run("driver.py", "blocks.json")


@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if blocks])
def test_code_of_page_compiles(page: str) -> None:
    for block in BLOCKS[page]:
        compile("\n" * block.line + block.code, block.page, "exec")


@pytest.mark.parametrize("table", ["RUNNER", "CALL"])
def test_state_diagram_shows_every_transition(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sphinx", reason="the docs extra is not installed")
    monkeypatch.syspath_prepend(ROOT / "docs" / "_ext")
    state_diagrams = importlib.import_module("state_diagrams")
    transitions = getattr(importlib.import_module("flame_dask.core.transitions"), table)

    drawing = state_diagrams.draw(transitions, table)

    words = re.findall(r"<text[^>]*>([^<]*)</text>", drawing)
    states = {state for state, _ in transitions} | set(transitions.values())
    assert sorted(words) == sorted([*states, *(event for _, event in transitions)])
    assert drawing.count("<polygon") == len(transitions)  # an arrow's head for each
    assert f"state-diagram}} flame_dask.core.transitions:{table}" in (
        ROOT / "docs" / "design.md"
    ).read_text(encoding="utf-8")


def configured(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key of a configuration with its value, as a page writes them."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from configured(value, f"{path}{key}.")
        else:
            yield path + key, value if isinstance(value, str) else json.dumps(value)


def test_configuration_page_has_every_key_with_its_default() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    shipped = yaml.safe_load((ROOT / "flame_dask" / "flame.yaml").read_text(encoding="utf-8"))

    missing = [
        row for key, value in configured(shipped) if (row := f"`{key}` | `{value}`") not in page
    ]

    assert not missing


def test_configuration_page_has_every_option() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    derived = {"idle_check", "queue_timeout_given", "call_defaults"}
    options = {option.name for option in dataclasses.fields(PoolOptions)} - derived

    assert not [option for option in sorted(options) if f"\n| `{option}` | " not in page]
    assert not [option for option in sorted(RESERVED) if f"`{option}`" not in page]


def test_tests_that_the_pages_name_are_there() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
            assert any(f"def {name}(" in source for source in sources), f"{page.name}: {name}"

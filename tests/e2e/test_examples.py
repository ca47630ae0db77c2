"""The examples do their whole job, and their output says so."""

import os
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import flame_dask

# As a user starts it: without measurement of coverage, but with the package that is tested.
ENVIRONMENT = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
ENVIRONMENT["PYTHONPATH"] = str(Path(flame_dask.__file__).parents[1])
ROOT = Path(__file__).parents[2]


def needs(*modules):
    """Skip a test of an example whose modules are not there."""
    missing = [name for name in modules if find_spec(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"not installed: {', '.join(missing)} (extra: demo)"
    )


def run(example, *arguments, folder):
    """Run an example in a folder; return what it has printed."""
    run = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / example, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    return run.stdout


LIFE = re.compile(
    r"^(?P<runner>thumbnails-\d+) +(?P<pid>\d+)"
    r" +(?P<asked>[\d.]+) s +(?P<booted>[\d.]+) s +(?P<calls>\d+)"
    r" +(?P<told>[\d.]+) s +(?P<gone>[\d.]+) s$",
    re.MULTILINE,
)


@pytest.mark.slow
@pytest.mark.timeout(120)
@needs("PIL", "imageio_ffmpeg", "skvideo", "tqdm")
def test_thumbnails(tmp_path):
    from PIL import Image

    output = tmp_path / "sheet.png"
    printed = run(
        "thumbnails.py",
        *("--output", output, "--segments", "8", "--per-segment", "2", "--idle", "0.5"),
        folder=tmp_path,
    )

    assert "the pool is open, with 0 runners" in printed
    assert "the pool is back at zero runners" in printed
    assert f"contact sheet: {output}" in printed

    lives = list(LIFE.finditer(printed))
    assert 1 <= len(lives) <= 2  # the second one may be needed no more by the time it has booted
    assert sum(int(life["calls"]) for life in lives) == 1 + 8
    assert len({life["pid"] for life in lives}) == len(lives)
    for life in lives:
        times = [float(life[name]) for name in ("asked", "booted", "told", "gone")]
        assert times == sorted(times)

    with Image.open(output) as sheet:
        assert sheet.format == "PNG"
        # 16 thumbnails: 5 in a row, each 320 x 180.
        assert sheet.width > 5 * 320
        assert sheet.height > 4 * 180
        # A film and not a blank.
        darkest, brightest = sheet.convert("L").getextrema()
        assert brightest - darkest > 200
        assert len(sheet.resize((64, 64)).getcolors(64 * 64)) > 500


@pytest.mark.slow
@pytest.mark.timeout(120)
@needs("sklearn")
def test_classify(tmp_path):
    printed = run("classify.py", folder=tmp_path)

    learnt = r"^process \d+ has learnt .*: <RemoteObject: SVC, on classify-1>$"
    assert re.search(learnt, printed, re.M)
    assert "it has read 450 more in 15 calls" in printed
    assert "released: <RemoteObject: SVC, released>" in printed
    right = re.search(r"^right: ([\d.]+)%$", printed, re.M)
    assert float(right[1]) > 98


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_search(tmp_path):
    printed = run("search.py", "runner dies", "heliotrope", folder=tmp_path)

    sections, pages = re.search(r"it has (\d+) sections of (\d+) pages", printed).groups()
    assert int(sections) > int(pages) == len(list((ROOT / "docs").rglob("*.md")))
    about_runners, about_flowers = printed.partition("runner dies?\n")[2].split("\nheliotrope?\n")
    found = about_runners.splitlines()
    assert len(found) == 2
    assert all(re.match(r"  \S+\.md, .+: .*<\w+>", line) for line in found)
    assert about_flowers == "\nthere is <Child Index: ended>\n"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_follow(tmp_path):
    printed = run("follow.py", folder=tmp_path)

    first, *visits, last = printed.splitlines()
    port = re.match(r"Serving HTTP on 127\.0\.0\.1 port (\d+) ", first)[1]
    assert len(visits) == 3
    assert all(line.endswith('"GET / HTTP/1.1" 200 -') for line in visits)
    assert last == "the server has ended: -15"
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port))) != 0

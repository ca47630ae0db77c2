"""The example does its whole job, and its output says so."""

import os
import re
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
MISSING = [name for name in ("PIL", "imageio_ffmpeg", "skvideo", "tqdm") if find_spec(name) is None]

LIFE = re.compile(
    r"^(?P<runner>thumbnails-\d+) +(?P<pid>\d+)"
    r" +(?P<asked>[\d.]+) s +(?P<booted>[\d.]+) s +(?P<calls>\d+)"
    r" +(?P<told>[\d.]+) s +(?P<gone>[\d.]+) s$",
    re.MULTILINE,
)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra: demo)")
def test_thumbnails(tmp_path):
    from PIL import Image

    output = tmp_path / "sheet.png"
    command = [
        sys.executable, "-W", "error", ROOT / "examples" / "thumbnails.py",
        "--output", output, "--segments", "8", "--per-segment", "2", "--idle", "0.5",
    ]  # fmt: skip
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )

    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    assert "the pool is open, with 0 runners" in run.stdout
    assert "the pool is back at zero runners" in run.stdout
    assert f"contact sheet: {output}" in run.stdout

    lives = list(LIFE.finditer(run.stdout))
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

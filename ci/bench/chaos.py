"""Pools of real processes in a world where everything dies, and whether each call ends as it must.

Parents open pools and call them from several threads. Meanwhile runners are killed, frozen and told
to go, run out of memory, and fail to boot; calls expire, are cancelled and dropped, and do all that
makes work hard to end; and parents are killed, interrupted and closed in the middle of it. Each
function records its own start. In the end every call is accounted for, and nothing may be left.

    python ci/bench/chaos.py --seed 1 --minutes 10
    python ci/bench/chaos.py --backend local --isolation thread --without parents,memory

It prints figures, and exits with 1 if a rule was broken. The numbers of rules are those of the
contract. The same seed makes the same choices, though not at the same moments of a pool's life.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from chaos_account import GONE, account
from chaos_calls import FAILING, SEED, append
from chaos_world import Blows, Census, Seen, environment, files_in, listening, still_listening
from common import BACKENDS
from tqdm import tqdm  # type: ignore[import-untyped]

HERE: Final = Path(__file__).resolve().parent

FEATURES: Final = {
    "kills": "SIGKILL to runners",
    "stops": "SIGSTOP to runners, and mostly SIGCONT later",
    "terms": "SIGTERM to runners",
    "memory": "calls that take more than the runner's memory_limit",
    "boots": "boots that fail, or hang",
    "exits": "calls that end their own process",
    "cancels": "calls that are cancelled",
    "drops": "calls whose future is dropped",
    "endless": "calls that go on until they are ended: sleeping, spinning, swallowing, ...",
    "retries": "calls with retries",
    "links": "calls with link=False",
    "children": "placed children, called, and stopped, killed or dropped",
    "tracked": "tracked resources, used, and released or dropped",
    "streams": "streams, read to their end or closed before it",
    "configure": "pools whose options change while they work",
    "single_use": "pools with single_use",
    "idle_check": "pools with an idle check",
    "parents": "SIGKILL to parents",
    "interrupts": "Ctrl-C to parents",
}
"""What can be switched off, and what it is."""

#: A runner's memory_limit. One that does nothing needs about a third of it.
MEMORY_LIMIT: Final = 400 * 10**6

#: Seconds that a parent may take to open its pool, whatever is killed meanwhile.
OPENING: Final = 20.0

#: Seconds between two looks at the processes.
TICK: Final = 0.1

#: Seconds between two looks at their sockets.
SOCKETS: Final = 3.0

#: Percentage of boots that fail.
FAILING_BOOTS: Final = 8.0


class Slot:
    """Room for one parent at a time, the next one starting when nothing is left of the last.

    Parameters
    ----------
    number
        Which one it is.
    run
        The run that it is part of.
    """

    def __init__(self, number: int, run: Run) -> None:
        self.number, self.run = number, run
        self.lives = 0
        self.state = "empty"
        self.life = ""

    def start(self) -> None:
        """Start a parent with a pool of drawn options."""
        run = self.run
        self.lives += 1
        self.life = f"{self.number}-{self.lives}"
        rng = random.Random(f"{run.seed}/{self.life}")
        plan = draw_plan(rng, run.features, run.backends, run.isolations)
        plan |= {"life": self.life, "seed": run.seed}
        self.options = plan["options"]
        self.how = draw_end(rng, run.features)
        longest = min(30.0, run.seconds / 2)
        self.length = rng.uniform(longest / 4, longest)
        # Some end while their pool is being opened; with others, time counts from then.
        early = rng.random() < 0.15
        self.end_at = time.monotonic() + (rng.uniform(0.3, 3.0) if early else OPENING)
        self.opened = early
        self.blows = Blows(run.records, self.life, rng, run.features, run.rate)
        self.temporary = run.folder / "tmp" / self.life
        self.temporary.mkdir(parents=True)
        self.log = run.folder / "logs" / f"{self.life}.txt"
        self.ports: set[int] = set()
        self.most = self.looks = 0
        self.empty_looks = 0
        append(run.world, "life", life=self.life, options=plan["options"])
        failing = FAILING_BOOTS if "boots" in run.features else 0.0
        variables = environment(run.records, f"{run.name}/{self.life}", self.temporary, HERE)
        variables |= {FAILING: str(failing), SEED: str(run.seed)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "chaos_parent.py"), json.dumps(plan)],
                env=variables,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.temporary,
                start_new_session=True,  # so that Ctrl-C can be sent to it as a terminal does
            )
        self.state = "running"

    def look(self, seen: Sequence[Seen]) -> None:
        """Do what is due, having seen the processes of the parent."""
        now = time.monotonic()
        if self.state == "empty":
            if now < self.run.until:
                self.start()
            return
        if not self.opened and (self.run.records / f"calls-{self.life}.jsonl").exists():
            self.opened = True
            self.end_at = now + self.length
            self.run.begin()
        runners = [one for one in seen if one.runner]
        self.looks += 1
        self.most = max(self.most, len(runners))
        if self.state == "running":
            if self.process.poll() is not None or now >= min(self.end_at, self.run.until):
                self.end()
            else:
                self.blows.strike(runners)
        else:
            self.blows.thaw()
            self.wait_for_end(seen)

    def end(self) -> None:
        """Bring the parent to its end."""
        append(self.run.world, "ending", life=self.life, how=self.how)
        self.ended = time.monotonic()
        self.state = "ending"
        with suppress(ProcessLookupError):
            if self.how == "killed":
                self.process.kill()
                # Nobody is left who could do something about the frozen ones, nor can they.
                self.blows.thaw(all_of_them=True)
            elif self.how == "interrupted":
                os.killpg(self.process.pid, signal.SIGINT)
        if self.how != "interrupted":
            self.process.stdin.close()  # type: ignore[union-attr]

    def wait_for_end(self, seen: Sequence[Seen]) -> None:
        """See whether all is gone, and if it is, or should be, write down what is left."""
        code = self.process.poll()
        after = time.monotonic() - self.ended
        # Twice: a process that was being started escapes one look.
        self.empty_looks = self.empty_looks + 1 if code is not None and not seen else 0
        limit = self.options["shutdown_timeout"] + GONE[self.how]
        if self.empty_looks < 2 and after <= limit:
            return
        left = [] if self.empty_looks else [f"{one.process.pid} {one.command}" for one in seen]
        files = files_in(self.temporary, killed=self.how == "killed")
        sockets = still_listening(self.ports, self.life)
        if left:
            self.run.census.kill(self.life)
        if code is None:
            self.process.kill()
            code = self.process.wait()
        self.process.stdin.close()  # type: ignore[union-attr]
        world = self.run.world
        append(world, "runners", life=self.life, most=self.most, looks=self.looks)
        append(
            world,
            "gone",
            life=self.life,
            after=after,
            exit_code=code,
            processes=left,
            files=files,
            sockets=sockets,
        )
        shutil.rmtree(self.temporary)
        self.state = "empty"


class Run:
    """A whole run.

    Parameters
    ----------
    options
        Those of the command line.
    folder
        Where everything of the run is kept.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.seed: int = options.seed
        self.name = f"chaos-{os.getpid()}"
        self.folder = folder
        self.records = folder / "records"
        self.world = self.records / "world.jsonl"
        for name in ("records", "logs", "tmp"):
            (folder / name).mkdir()
        self.features: list[str] = [name for name in FEATURES if name not in options.without]
        self.backends = list(BACKENDS) if options.backend == "both" else [options.backend]
        both = ["thread", "process"]
        self.isolations = both if options.isolation == "both" else [options.isolation]
        self.rate: float = options.blows
        self.seconds = options.minutes * 60
        self.until = 0.0
        self.census = Census(self.records, self.name)
        self.seen: dict[str, list[Seen]] = {}
        self.slots = [Slot(number, self) for number in range(options.parents)]

    def go(self) -> None:
        """Let the world run for its time, and until nothing of it is left."""
        sockets = time.monotonic()
        self.until = sockets + OPENING + self.seconds
        with tqdm(total=round(self.seconds), desc="chaos", unit="s", disable=None) as bar:
            while True:
                now = time.monotonic()
                self.seen = self.census.take()
                for slot in self.slots:
                    slot.look(self.seen.get(slot.life, ()))
                if now > sockets:
                    sockets = now + SOCKETS
                    self.look_at_sockets()
                bar.update(max(0, round(self.seconds - max(0.0, self.until - now)) - bar.n))
                if now > self.until and all(slot.state == "empty" for slot in self.slots):
                    break
                time.sleep(max(0.0, now + TICK - time.monotonic()))
        append(self.world, "run", seconds=self.seconds)
        self.census.take()  # for the last programs of calls

    def begin(self) -> None:
        """Let the time count from now on, if it does not yet: a pool is open."""
        self.until = min(self.until, time.monotonic() + self.seconds)

    def look_at_sockets(self) -> None:
        """Remember on which ports the parents' processes listen."""
        pids = {one.process.pid: life for life, those in self.seen.items() for one in those}
        slots = {slot.life: slot for slot in self.slots}
        for pid, ports in listening(set(pids)).items():
            if pids[pid] in slots:
                slots[pids[pid]].ports |= ports

    def stop(self) -> None:
        """End everything at once."""
        for slot in self.slots:
            if slot.state != "empty":
                slot.process.kill()
        self.census.kill()


def draw_plan(
    rng: random.Random, features: Sequence[str], backends: Sequence[str], isolations: Sequence[str]
) -> dict[str, Any]:
    """Decide what pool a parent opens, and how it calls it.

    Parameters
    ----------
    rng
        What decides.
    features
        What is switched on.
    backends, isolations
        The choice of them.

    Returns
    -------
    dict
        What ``chaos_parent.py`` takes.
    """
    most = rng.randint(2, 4)
    slots = rng.choice([1, 2, 4, 4])
    options = {
        "max": most,
        "min": rng.choice([0, 0, 1, 2]),
        "max_concurrency": slots,
        "single_use": "single_use" in features and rng.random() < 0.15,
        "isolation": rng.choice(isolations),
        "timeout": 5.0,
        "boot_timeout": 10.0,
        "shutdown_timeout": 3.0,
        "idle_shutdown_after": round(rng.uniform(0.3, 2.0), 2),
        "buffer": rng.choice([0, 0, 1]),
        "placement": rng.choice(["spread", "pack"]),
    }
    check = "idle_check" in features and rng.random() < 0.3
    return {
        "backend": rng.choice(backends),
        "backend_options": {
            "scheduler_kwargs": {"dashboard": False},
            "memory_limit": MEMORY_LIMIT,
            "preload": ["chaos_boot"],
        },
        "memory_limit": MEMORY_LIMIT,
        "options": options,
        # More than there are slots, so that some wait.
        "callers": min(most * slots + 2, 12),
        "pause": rng.choice([0.02, 0.1, 0.3]),
        "features": [name for name in features if name != "idle_check" or check],
    }


def draw_end(rng: random.Random, features: Sequence[str]) -> str:
    """Decide how a parent ends."""
    weights = {"closed": 35, "killed": 45, "interrupted": 20}
    if "parents" not in features:
        del weights["killed"]
    if "interrupts" not in features:
        del weights["interrupted"]
    return rng.choices(list(weights), list(weights.values()))[0]


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="what can be left out:\n"
        + "\n".join(f"  {name:<12}{what}" for name, what in FEATURES.items()),
    )
    parser.add_argument("--seed", type=int, help="of all choices (default: a new one)")
    parser.add_argument("--minutes", type=float, default=10, help="(default: 10)")
    parser.add_argument(
        "--backend", choices=[*BACKENDS, "both"], default="both", help="(default: both)"
    )
    parser.add_argument(
        "--isolation", choices=["thread", "process", "both"], default="both", help="(default: both)"
    )
    parser.add_argument("--parents", type=int, default=2, help="at a time (default: 2)")
    parser.add_argument(
        "--blows",
        type=float,
        default=20,
        help="how many signals the runners of a parent get in a minute (default: 20)",
    )
    parser.add_argument(
        "--without", type=_features, default=[], metavar="A,B", help="what to leave out, see below"
    )
    parser.add_argument("--keep", action="store_true", help="keep the records and logs, say where")
    parser.add_argument(
        "--check", type=Path, metavar="FOLDER", help="run nothing: account for the records there"
    )
    options = parser.parse_args(arguments)
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(10**6)
    return options


def _features(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in FEATURES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(FEATURES)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chaos, print its figures, and return 1 if a rule was broken."""
    options = read_arguments(argv)
    if options.check is not None:
        report = account(options.check)
        print(report.text(options.seed))
        return 1 if report.broken else 0
    left_out = f", without {', '.join(options.without)}" if options.without else ""
    print(
        f"chaos for {options.minutes:g} minutes, seed {options.seed}, {options.parents} parents at"
        f" a time, backend {options.backend}, isolation {options.isolation}{left_out}",
        flush=True,
    )
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    keep = options.keep
    try:
        run = Run(options, folder)
        try:
            run.go()
        finally:
            run.stop()
        report = account(run.records)
        print(report.text(options.seed))
        keep = keep or bool(report.broken)
    finally:
        if keep:
            print(f"Records and logs are in {folder}.")
        else:
            shutil.rmtree(folder)
    return 1 if report.broken else 0


if __name__ == "__main__":
    sys.exit(main())

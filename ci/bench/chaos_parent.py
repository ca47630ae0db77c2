"""A parent of a chaos run: a program that opens a pool, and calls it from several threads.

It is started by ``chaos.py`` with its plan as JSON. It writes down each call before it is made, and
what has become of it, so that a parent may be killed at any time. It ends when its stdin does.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import chaos_calls as calls
from common import BACKENDS

from flame_dask import (
    BootError,
    CallTimeout,
    FlameError,
    FlamePool,
    PoolClosed,
    PoolFuture,
    RunnerLost,
)

#: Seconds beyond its limit after which a thread no longer waits for the future of a call (F3).
HUNG: Final = 15.0

#: Seconds between two looks at the pool's status.
SAMPLING: Final = 0.04

#: Seconds that something may live on.
LIVING: Final = 20.0

#: Bytes that are too many to travel with the completion of a call.
LARGE: Final = 200_000


@dataclass(frozen=True)
class Kind:
    """A kind of call.

    Parameters
    ----------
    name
        That of its function.
    weight
        How many of all calls, roughly in percent.
    feature
        What has to be switched on for it.
    again
        Whether the call may be made with ``retries``.
    """

    name: str
    weight: float
    feature: str | None = None
    again: bool = False


KINDS: Final = (
    Kind("quick", 42, again=True),
    Kind("large", 6),
    Kind("work", 26, again=True),
    Kind("wait", 9, again=True),
    Kind("raises", 5),
    Kind("exits", 0.4, "exits", again=True),
    Kind("dies", 0.4, "exits", again=True),
    Kind("fills_memory", 0.25, "memory"),
    Kind("Tally", 3, "children"),
    Kind("keeps", 2, "tracked"),
    Kind("counts", 2, "streams"),
    *(Kind(name, 0.6, "endless") for name in calls.ENDLESS),
)


@dataclass(frozen=True)
class Call:
    """A call that is to be made.

    Parameters
    ----------
    name
        Its id: the run's own, which the function records.
    kind
        What is called.
    how
        ``call``, ``submit``, ``cancel`` or ``drop``; ``live`` for what lives on.
    limit
        Seconds within which it has to be over.
    keywords
        Reserved keywords for it.
    pause
        Seconds until it is cancelled or dropped.
    """

    name: str
    kind: Kind
    how: str
    limit: float
    keywords: dict[str, Any]
    pause: float


class Parent:
    """The threads of a parent, and what they write down.

    Parameters
    ----------
    plan
        What ``chaos.py`` has drawn for it.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.life: str = plan["life"]
        self.features = frozenset(plan["features"])
        self.timeout: float = plan["options"]["timeout"]
        self.queue_timeout: float = plan["options"]["boot_timeout"]  # E1
        self.path = Path(os.environ[calls.FOLDER], f"calls-{self.life}.jsonl")
        self.stopping = threading.Event()
        self.memory = threading.Lock()  # one call at a time fills it: others share the machine

    def note(self, what: str, **fields: Any) -> None:
        """Write a line."""
        calls.append(self.path, what, life=self.life, **fields)

    def run(self) -> None:
        """Open the pool, make calls until told to stop, and close it."""
        threading.Thread(target=self.watch_stdin, daemon=True).start()
        options = dict(self.plan["options"])
        if "idle_check" in self.features:
            options["idle_shutdown_after"] = (options["idle_shutdown_after"], calls.is_idle)
        backend = (BACKENDS[self.plan["backend"]], dict(self.plan["backend_options"]))
        threads: list[threading.Thread] = []
        try:
            while not self.stopping.is_set():
                try:
                    with FlamePool("chaos", backend=backend, **options) as pool:
                        self.note("open")
                        threads = self.start_threads(pool)
                        self.stopping.wait()
                except BootError as error:  # boots fail on purpose, sometimes all of one opening
                    self.note("not-open", text=str(error)[:300])
        finally:  # Ctrl-C comes by here too
            self.stopping.set()
            end = time.monotonic() + HUNG
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))

    def watch_stdin(self) -> None:
        """Stop when there is nobody left who could say so."""
        while os.read(0, 1024):  # not sys.stdin: a thread in it would spoil the interpreter's end
            pass
        self.stopping.set()

    def start_threads(self, pool: FlamePool) -> list[threading.Thread]:
        """Start the threads that call, and the one that looks at the status."""
        targets: list[Callable[[], None]] = [lambda: self.sample(pool)]
        if "configure" in self.features:
            targets.append(lambda: self.configure(pool))
        for number in range(self.plan["callers"]):
            targets.append(lambda number=number: self.make_calls(pool, number))  # type: ignore[misc]
        threads = [threading.Thread(target=target, daemon=True) for target in targets]
        for thread in threads:
            thread.start()
        return threads

    # -- looking -------------------------------------------------------------------------------

    def sample(self, pool: FlamePool) -> None:
        """Look how many runners there are, all the time (C1)."""
        most = samples = 0
        limit = self.plan["options"]["max"]
        noted = 0.0
        while not self.stopping.is_set():
            try:
                total = len(pool.status().runners)
            except PoolClosed:
                break
            except Exception as error:  # nothing else may come; it is told, and the rest goes on
                self.note("no-status", text=f"{type(error).__name__}: {error}"[:300])
                break
            samples += 1
            if total > most or time.monotonic() - noted > 1:
                most, noted = max(most, total), time.monotonic()
                self.note("status", most=most, max=limit, samples=samples)
                samples = 0
            self.stopping.wait(SAMPLING)
        self.note("status", most=most, max=limit, samples=samples)

    def configure(self, pool: FlamePool) -> None:
        """Change the pool's options now and then, never beyond what it began with (C8)."""
        rng = random.Random(f"{self.plan['seed']}/{self.life}/configure")
        most = self.plan["options"]["max"]
        while not self.stopping.wait(rng.uniform(0.5, 4.0)):
            limit = rng.randint(1, most)
            change = {"max": limit, "min": rng.randint(0, limit), "buffer": rng.choice([0, 0, 1])}
            try:
                pool.configure(**change)
            except PoolClosed:
                break

    # -- calling -------------------------------------------------------------------------------

    def make_calls(self, pool: FlamePool, thread: int) -> None:
        """Make one call after the other."""
        rng = random.Random(f"{self.plan['seed']}/{self.life}/{thread}")
        number = 0
        while not self.stopping.is_set():
            number += 1
            call = self.draw(rng, f"{self.life}/{thread}/{number}")
            alone = call.kind.name == "fills_memory"
            if alone and not self.memory.acquire(blocking=False):
                continue
            try:
                if not self.make(pool, call):
                    return
            finally:
                if alone:
                    self.memory.release()
            self.stopping.wait(rng.expovariate(1 / self.plan["pause"]))

    def draw(self, rng: random.Random, name: str) -> Call:
        """Decide what the next call is to be."""
        kinds = [k for k in KINDS if k.feature is None or k.feature in self.features]
        [kind] = rng.choices(kinds, [k.weight for k in kinds])
        endless = kind.feature in ("endless", "memory")
        # Work without an end is ended in all three ways alike, other work now and then.
        weights = {"call": 60, "submit": 26, "cancel": 7, "drop": 7}
        if endless:
            weights = {"call": 30, "submit": 20, "cancel": 25, "drop": 25}
        if "cancels" not in self.features or kind.name == "fills_memory":
            del weights["cancel"]
        if "drops" not in self.features or kind.name == "fills_memory":
            del weights["drop"]
        [how] = rng.choices(list(weights), list(weights.values()))
        keywords: dict[str, Any] = {}
        limit = self.queue_timeout + self.timeout
        if kind.feature in ("children", "tracked", "streams"):
            return Call(name, kind, "live", limit + LIVING, {}, 0.0)
        chance = rng.random()
        if kind.name == "fills_memory":
            limit = keywords["timeout"] = self.timeout
        elif endless and how != "drop":
            limit = keywords["timeout"] = round(rng.uniform(0.3, 2.0), 3)
        elif chance < 0.4:
            limit = keywords["timeout"] = round(rng.uniform(2.0, 8.0), 3)
        elif chance < 0.48:  # many of these pass their limit
            limit = keywords["timeout"] = round(rng.uniform(0.01, 0.4), 3)
        elif chance < 0.55:
            keywords["queue_timeout"] = round(rng.uniform(0.05, 1.0), 3)
            limit = keywords["queue_timeout"] + self.timeout
        if kind.again and "retries" in self.features and rng.random() < 0.2:
            keywords["retries"] = rng.choice([1, 2])
            limit = keywords["timeout"] = keywords.get("timeout", 8.0)  # of all tries together
        if "links" in self.features and rng.random() < 0.12:
            keywords["link"] = False
            if endless:  # nothing but its own limit ends it, when nobody is there
                limit = keywords["timeout"] = keywords.get("timeout", 2.0)
        if rng.random() < 0.1:
            keywords["priority"] = rng.choice([-1, 1, 2])
        return Call(name, kind, how, limit, keywords, round(rng.uniform(0.0, 1.0) ** 2, 3))

    def arguments(self, call: Call) -> tuple[Any, ...]:
        """Return the arguments of a call's function, a random number in the name being its seed."""
        rng = random.Random(f"{self.plan['seed']}/{call.name}")
        if call.kind.name in ("work", "wait"):
            return call.name, round(rng.uniform(0.01, 0.5), 3)
        if call.kind.name == "large":
            return call.name, rng.randbytes(LARGE)
        if call.kind.name == "fills_memory":
            return call.name, int(1.6 * self.plan["memory_limit"])
        return (call.name,)

    def make(self, pool: FlamePool, call: Call) -> bool:
        """Make a call, and write down what becomes of it; return whether the pool takes more."""
        function = getattr(calls, call.kind.name)
        arguments = self.arguments(call)
        made = time.monotonic()
        self.note(
            "made",
            call=call.name,
            kind=call.kind.name,
            how=call.how,
            limit=call.limit,
            retries=call.keywords.get("retries", 0),
            link=call.keywords.get("link", True),
        )
        due = made + call.limit
        try:
            if call.how == "live":
                value = self.live(pool, call)
            elif call.how == "call":
                value = pool.call(function, *arguments, **call.keywords)
            else:
                future = pool.submit(function, *arguments, **call.keywords)
                if call.how != "submit":
                    time.sleep(call.pause)
                if call.how == "drop":
                    del future
                    self.note("over", call=call.name, due=due, outcome="dropped")
                    return True
                if call.how == "cancel":
                    future.cancel()  # type: ignore[no-untyped-call]  # it is Dask's
                    due = min(due, time.monotonic())
                value = self.result(future, call)
        except FlameError as error:
            self.note("over", call=call.name, due=due, outcome="error", **describe(error))
            return not isinstance(error, PoolClosed)
        except ValueError as error:
            meant = call.kind.name == "raises" and str(error) == call.name
            outcome = "raised" if meant else "untyped"
            self.note("over", call=call.name, due=due, outcome=outcome, text=repr(error)[:300])
        except Hung:
            self.note("over", call=call.name, due=due, outcome="hung")
        except BaseException as error:  # whatever it is: it should not have been
            text = f"{type(error).__name__}: {error}"[:300]
            self.note("over", call=call.name, due=due, outcome="untyped", text=text)
        else:
            right = value in (call.name, arguments)
            outcome = "value" if right else "wrong"
            self.note("over", call=call.name, due=due, outcome=outcome)
        return True

    def live(self, pool: FlamePool, call: Call) -> Any:
        """Have something live on, use it, and bring it to its end; return whether it was right."""
        rng = random.Random(f"{self.plan['seed']}/{call.name}")
        uses = rng.randint(0, 20)
        if call.kind.name == "counts":
            most = rng.choice([3, 300, 30_000])
            with pool.stream(calls.counts, call.name, most, timeout=LIVING) as numbers:
                wanted = most if rng.random() < 0.5 else uses
                found = [number for number, _ in zip(numbers, range(wanted), strict=False)]
            return call.name if found == list(range(min(most, wanted))) else found
        if call.kind.name == "keeps":
            _, [tally] = pool.call(calls.keeps, call.name, track_resources=True)
        else:
            tally = pool.place_child(calls.Tally, call.name)
        limit = LIVING / (uses + 2)
        for number in range(1, uses + 1):
            total = tally.call("add", rng.uniform(0.0, 0.05), timeout=limit)
            if total != number:
                return total
        end = rng.random()
        if call.kind.name == "keeps":
            if end < 0.5:
                tally.release()
        elif end < 0.5:
            tally.stop(limit)
        elif end < 0.7:
            tally.kill()
        return call.name  # or else it is dropped

    def result(self, future: PoolFuture[Any], call: Call) -> Any:
        """Wait for a future, but not for ever."""
        try:
            return future.result(timeout=call.limit + HUNG)
        except FlameError:
            raise  # a CallTimeout is a TimeoutError too
        except TimeoutError:
            raise Hung from None


class Hung(Exception):
    """A future did not get an outcome."""


def describe(error: FlameError) -> dict[str, Any]:
    """Say what an error is, by its public type."""
    public = next(c for c in type(error).__mro__ if c.__module__ == "flame_dask.errors")
    detail: str | None = None
    if isinstance(error, RunnerLost):
        detail = error.cause
    elif isinstance(error, CallTimeout):
        detail = error.phase
    return {"error": public.__name__, "detail": detail, "text": str(error)[:300]}


if __name__ == "__main__":
    # A shell that starts the harness in the background has had Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parent = Parent(json.loads(sys.argv[1]))
    try:
        parent.run()
    except KeyboardInterrupt:
        sys.exit(130)

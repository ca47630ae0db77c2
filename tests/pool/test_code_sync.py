"""The parent's code on its runners (J1 to J5, A8, B1)."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flame_dask
from flame_dask import BootError, CallTimeout, FlamePool, SerializationError
from support import Program, runner_pid

Until = Callable[..., Any]
MakePool = Callable[..., FlamePool]

pytestmark = pytest.mark.usefixtures("copies_end")

SYNC_SHOP = {"sync_modules": ["shop"]}


# -- at boot --------------------------------------------------------------------------------------


def test_j2_j4_a_program_works_on_a_runner_that_has_nothing_of_it(
    make_pool: MakePool, program: Program, backend: Any, tmp_path: Path
) -> None:
    program.write("site/__init__.py", "")
    program.write(
        "app/__init__.py",
        """
        import os
        from app.deep.er import table
        started = []
        def start():
            started.append(os.getpid())
            with open(os.environ["APP_LOG"], "a") as file:
                file.write(f"{os.getpid()}\\n")
        async def start_too():
            started.append("async")
        """,
    )
    program.write("app/deep/__init__.py", "")
    program.write(
        "app/deep/er.py",
        """
        import importlib.resources, pathlib, subprocess
        def table():
            data = importlib.resources.files("app") / "data"
            script = pathlib.Path(__file__).parent.parent / "bin" / "run.sh"
            said = subprocess.run([script], capture_output=True, check=True, text=True).stdout
            return (data / "table.csv").read_text(), (data / "link.csv").read_text(), said
        """,
    )
    program.write("app/data/table.csv", "1;2")
    target = tmp_path / "elsewhere.csv"
    target.write_text("3;4")
    (program.folder / "app/data/link.csv").symlink_to(target)
    program.write("app/bin/run.sh", "#!/bin/sh\necho yes\n").chmod(0o755)
    app = program.load("app")
    log = tmp_path / "log"
    env = {"APP_LOG": str(log)}
    without = make_pool(max=1, env=env)
    with pytest.raises(SerializationError, match="No module named 'app'"):
        without.call(app.table)
    without.close()

    sync = {"copy_apps": True, "start_apps": ["app:start", "app:start_too"]}
    pool = make_pool(max=1, min=1, env=env, code_sync=sync)
    assert log.read_text().split() == [str(runner_pid(pool))]  # before the first call
    assert pool.call(app.table) == ("1;2", "3;4", "yes\n")

    def look() -> Any:
        import app

        return app.__file__, app.started

    file, started = pool.call(look)
    assert not file.startswith(str(program.folder))
    assert started == [runner_pid(pool), "async"]
    assert pool.call(app.table)[0] == "1;2"
    assert log.read_text().split() == [str(runner_pid(pool))]


def test_j2_copied_files_have_a_known_place(
    make_pool: MakePool, program: Program, tmp_path: Path
) -> None:
    (tmp_path / "empty/models").mkdir()
    (tmp_path / "empty/models/a.bin").write_bytes(b"a" * 1000)
    elsewhere = program.write("far.txt", "far")

    def read() -> Any:
        parent = flame_dask.parent()
        assert parent is not None
        assert parent.files is not None
        found = (parent.files / "models/a.bin").read_bytes(), (parent.files / "far.txt").read_text()
        return found, str(parent.files)

    base = tmp_path / "base"
    sync = {"copy_paths": ["models", elsewhere], "extract_dir": base, "tmp_dir": tmp_path / "tmp"}
    for isolation in ("thread", "process"):
        pool = make_pool(max=1, code_sync=sync, isolation=isolation)
        (content, text), files = pool.call(read)
        assert (content, text) == (b"a" * 1000, "far")
        assert files.startswith(str(base))
        pool.close()
        assert os.listdir(base) == []
        assert os.listdir(tmp_path / "tmp") == []


def test_j4_all_apps_that_are_declared(
    make_pool: MakePool, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site-packages/declared-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: declared\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[flame_dask.apps]\none = app:start\ntwo = app:App.start [extra]\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(info.parent)])
    program.write(
        "app.py",
        """
        started = []
        def start():
            started.append("one")
        class App:
            @staticmethod
            def start():
                started.append("two")
        """,
    )
    pool = make_pool(max=1, code_sync={"start_apps": True})

    def look() -> list[str]:
        import app

        return sorted(app.started)

    for _ in range(2):
        assert pool.call(look) == ["one", "two"]


def test_j4_d1_the_idle_clock_starts_when_the_apps_have_been_started(
    make_pool: MakePool, program: Program, until: Until, tmp_path: Path
) -> None:
    program.write(
        "app.py",
        f"""
        import os, time
        def start():
            open({str(tmp_path / "begun")!r}, "w").close()
            while not os.path.exists({str(tmp_path / "gate")!r}):
                time.sleep(0.005)
        """,
    )
    sync = {"copy_apps": True, "start_apps": ["app:start"]}
    pool = make_pool(max=1, idle_shutdown_after=0.3, code_sync=sync)
    future = pool.submit(int)
    until((tmp_path / "begun").exists, 20)
    begun = time.monotonic()
    until(lambda: time.monotonic() > begun + 0.6)
    [runner] = pool.status().runners
    assert runner.state == "booting"
    assert not future.done()
    (tmp_path / "gate").touch()
    assert future.result(10) == 0
    until(lambda: not pool.status().runners)


def test_j4_an_app_that_fails(
    make_pool: MakePool, program: Program, backend: Any, flame_log: Any, until: Until
) -> None:
    program.write(
        "app.py",
        """
        def start():
            deeper()
        def deeper():
            raise LookupError("no such port")
        """,
    )
    sync = {"start_apps": ["app:start"], "copy_apps": True}
    with pytest.raises(BootError) as caught:
        make_pool(max=1, min=1, code_sync=sync)
    assert caught.value.phase == "apps"
    assert "app:start raised LookupError: no such port" in str(caught.value)
    tail = "\n".join(caught.value.log_tail)
    assert 'raise LookupError("no such port")' in tail
    assert "deeper()" in tail
    pool = make_pool(max=1, queue_timeout=60, code_sync=sync)
    future = pool.submit(int)
    until(lambda: pool.status().counters["boot_failures"], 30)
    with pytest.raises(CallTimeout, match="no such port"):
        pool.call(int, timeout=0.1)
    future.cancel()


def test_a8_packages_that_do_not_fit(
    make_pool: MakePool, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    flame_log: Any,
) -> None:  # fmt: skip
    installed = tmp_path / "site-packages"
    for name, version in (("fruit", "1.5"), ("toolz", "0.0.1")):
        info = installed / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "top_level.txt").write_text(f"{name}\n")
    (installed / "fruit.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(installed), *sys.path])
    program.write(
        "app.py",
        """
        import fruit, toolz
        try:
            import vegetable
        except ImportError:
            vegetable = None
        def name():
            return "app"
        """,
    )
    app = program.load("app")
    with pytest.raises(BootError) as caught:
        make_pool(max=1, min=1, code_sync={"sync_modules": ["app"]})
    assert "fruit is missing, the parent has 1.5" in str(caught.value)
    assert "the parent has 0.0.1" in str(caught.value)
    pool = make_pool(max=1, code_sync={"sync_modules": ["app"], "packages": "warn"})
    with pytest.raises(SerializationError, match="No module named 'fruit'"):
        pool.call(app.name)


# -- between calls --------------------------------------------------------------------------------


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_j3_an_edit_is_there_at_the_next_call(
    make_pool: MakePool, shop: Program, backend: Any, isolation: str
) -> None:
    basket, prices = shop.load("shop.basket"), shop.load("shop.prices")

    async def price_async() -> Any:
        import shop.prices

        return shop.prices.price()

    def traced() -> str:
        import traceback

        import shop.prices

        try:
            shop.prices.price()
        except ValueError:
            return traceback.format_exc()
        return ""

    pool = make_pool(max=1, isolation=isolation, code_sync={"sync_modules": ["shop"]})
    assert pool.call(basket.total) == 1
    for number in range(2, 8):
        shop.write("shop/prices.py", f"LIMIT = {number}\ndef price(): return LIMIT\n")
        # In turn, so that each of them is the first one to see it: the module itself, one that has
        # a name from it, and the package that hands it on.
        calls = [
            lambda: pool.call(prices.price),
            lambda: pool.call(basket.total),
            lambda: pool.call(lambda: importlib.import_module("shop").LIMIT),
            lambda: pool.call(price_async),
        ]
        turn = number % len(calls)
        assert [call() for call in calls[turn:] + calls[:turn]] == [number] * 4
    shop.write("shop/prices.py", "LIMIT = 9\n\ndef price():\n    raise ValueError('new')  # line\n")
    assert "raise ValueError('new')  # line" in pool.call(traced)
    # What is wrong with new code is told to who calls it, and a runner is none the worse for it.
    shop.write("shop/prices.py", "LIMIT = (\n")
    with pytest.raises(SerializationError, match="SyntaxError"):
        pool.call(prices.price)
    shop.write("shop/prices.py", "LIMIT = 10\ndef price(): return LIMIT\n")
    assert pool.call(prices.price) == 10
    # A new module, and one that goes.
    shop.write("shop/fresh.py", "def name(): return __name__\n")
    fresh = shop.load("shop.fresh")
    assert pool.call(fresh.name) == "shop.fresh"
    where = pool.call(source_on_runner_of_fresh)
    (shop.folder / "shop/fresh.py").unlink()
    with pytest.raises(SerializationError, match="No module named"):
        pool.call(fresh.name)
    assert not os.path.exists(where)


def source_on_runner_of_fresh() -> str:
    return str(importlib.import_module("shop.fresh").__file__)


def test_j3_one_module_of_a_thousand(
    make_pool: MakePool,
    program: Program,
    backend: Any,
    flame_log: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only it is sent, and in no time; also to a runner that was idle when it changed."""
    for number in range(1000):
        text = f"NUMBER = {number}\n" + "# a comment that takes some room\n" * 20
        program.write(f"big/part{number // 100}/m{number}.py", text)
        program.write(f"big/part{number // 100}/__init__.py", "")
    program.write("big/__init__.py", "")
    middle = program.load("big.part5.m555")
    sync = {"sync_modules": ["big"], "verbose": True}
    caplog.set_level(logging.INFO, "flame_dask")

    def number(gate: str) -> tuple[int, int]:
        import time

        import big.part5.m555

        while not os.path.exists(gate):
            time.sleep(0.005)
        return os.getpid(), big.part5.m555.NUMBER

    pool = make_pool(min=2, max=2, max_concurrency=1, code_sync=sync)
    here = str(program.folder)
    both = [pool.submit(number, f"{here}/open") for _ in range(2)]
    program.write("open", "")
    assert len({future.result(20)[0] for future in both}) == 2
    delays = []
    for value in range(5000, 5010):
        text = Path(str(middle.__file__)).read_text().splitlines()
        program.write("big/part5/m555.py", "\n".join([f"NUMBER = {value}", *text[1:]]))
        flame_log.records.clear()
        begun = time.perf_counter()
        assert pool.call(number, here)[1] == value
        changed = time.perf_counter() - begun
        begun = time.perf_counter()
        assert pool.call(number, here)[1] == value
        delays.append(changed - (time.perf_counter() - begun))
        sent = [int(text.split()[-2]) for text in flame_log.texts(0) if "has been sent" in text]
        assert sent
        assert max(sent) < 2000
    assert sorted(delays)[len(delays) // 2] < 0.1
    (program.folder / "open").unlink()
    both = [pool.submit(number, f"{here}/open") for _ in range(2)]
    program.write("open", "")
    answers = [future.result(20) for future in both]
    assert len({pid for pid, _ in answers}) == 2
    assert {value for _, value in answers} == {5009}


def test_j3_what_runs_goes_on_with_what_it_has(
    make_pool: MakePool, shop: Program, tmp_path: Path, until: Until
) -> None:
    prices = shop.load("shop.prices")

    def slow(started: str, gate: str) -> tuple[int, int]:
        import time

        from shop import prices

        first = prices.price()
        Path(started).touch()
        while not os.path.exists(gate):
            time.sleep(0.005)
        return first, prices.price()

    pool = make_pool(max=1, max_concurrency=2, code_sync={"sync_modules": ["shop"]})
    started, gate = tmp_path / "started", tmp_path / "gate"
    future = pool.submit(slow, str(started), str(gate))
    until(started.exists)
    shop.write("shop/prices.py", "LIMIT = 2\ndef price(): return LIMIT\n")
    assert pool.call(prices.price) == 2
    gate.touch()
    assert future.result(10) == (1, 1)


def test_j3_many_calls_at_once_and_edits_between_them(make_pool: MakePool, shop: Program) -> None:
    prices = shop.load("shop.prices")
    pool = make_pool(max=2, max_concurrency=8, code_sync={"sync_modules": ["shop"]})
    pool.call(prices.price)
    for number in range(10, 30):
        shop.write("shop/prices.py", f"LIMIT = {number}\ndef price(): return LIMIT\n")
        futures = [pool.submit(prices.price) for _ in range(16)]
        assert {future.result(20) for future in futures} == {number}


def test_j3_processes_that_are_renewed_say_nothing(
    make_pool: MakePool, shop: Program, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also those that are not up yet, when there is other code already."""
    prices = shop.load("shop.prices")
    pool = make_pool(max=1, max_concurrency=4, isolation="process", code_sync=SYNC_SHOP)
    for number in range(30):
        shop.write("shop/prices.py", f"LIMIT = {number}\ndef price(): return LIMIT\n")
        futures = [pool.submit(prices.price) for _ in range(4)]
        assert {future.result(20) for future in futures} == {number}
    pool.close()
    assert "Traceback" not in capfd.readouterr().err


def test_j3_objects_of_classes_that_have_changed(make_pool: MakePool, shop: Program) -> None:
    """What travels has its class by name, so that both sides make of it what they have."""
    template = "class Basket:\n    def size(self): return {}\n"
    shop.write("shop/bags.py", template.format(1))
    bags = shop.load("shop.bags")
    pool = make_pool(max=1, code_sync=SYNC_SHOP)
    basket = pool.call(bags.Basket)
    assert type(basket) is bags.Basket

    def look(basket: Any) -> tuple[int, bool]:
        import shop.bags

        return basket.size(), type(basket) is shop.bags.Basket

    shop.write("shop/bags.py", template.format(2))
    assert pool.call(look, basket) == (2, True)
    assert type(pool.call(bags.Basket)) is bags.Basket


def test_j3_children_and_streams_begin_with_the_new_code(
    make_pool: MakePool, shop: Program, own: dict[str, Any]
) -> None:
    """And keep what they have, until they end."""
    template = (
        "LIMIT = {0}\ndef price(): return LIMIT\nclass Till:\n    def limit(self): return LIMIT\n"
        "def count():\n    while True: yield LIMIT\n"
    )
    shop.write("shop/prices.py", template.format(1))
    prices = shop.load("shop.prices")
    pool = make_pool(max=1, max_concurrency=4, code_sync=SYNC_SHOP, **own)
    assert pool.call(prices.price) == 1
    shop.write("shop/prices.py", template.format(2))
    child, stream = pool.place_child(prices.Till), pool.stream(prices.count)
    assert (child.limit(), next(stream)) == (2, 2)
    shop.write("shop/prices.py", template.format(3))
    assert pool.call(prices.price) == 3
    assert (child.limit(), next(stream)) == (2, 2)
    other = pool.place_child(prices.Till)
    assert other.limit() == 3
    stream.close()
    child.stop()
    other.stop()


def test_j3_two_pools_with_other_code_each(make_pool: MakePool, shop: Program) -> None:
    shop.write("lone.py", "def name(): return 'lone'\n")
    prices, lone = shop.load("shop.prices"), shop.load("lone")
    one = make_pool(max=1, code_sync=SYNC_SHOP)
    two = make_pool(max=1, code_sync={"sync_modules": ["lone"]})
    assert (one.call(prices.price), two.call(lone.name)) == (1, "lone")
    for pool, function in ((one, lone.name), (two, prices.price)):
        with pytest.raises(SerializationError, match="No module named"):
            pool.call(function)


def test_a4_asynchronous(program: Program, local_backend: Any, fast: dict[str, Any]) -> None:
    program.write("lone.py", "def f(): return 1\n")
    lone = program.load("lone")

    async def main() -> list[int]:
        options = {**fast, "asynchronous": True, "code_sync": {"sync_modules": ["lone"]}}
        async with FlamePool("a", max=1, backend=local_backend, **options) as pool:
            first = await pool.call(lone.f)
            program.write("lone.py", "def f(): return 2\n")
            return [first, await pool.call(lone.f)]

    assert asyncio.run(main()) == [1, 2]


# -- notebooks ------------------------------------------------------------------------------------

CELLS = """
from distributed import LocalCluster
from flame_dask import FlamePool

def cell(text):
    exec(compile(text, "<cell>", "exec"), globals())

if __name__ == "__main__":
    quiet = {"scheduler_kwargs": {"dashboard": False}}
    with FlamePool("p", max=1, backend=(LocalCluster, quiet), isolation=ISOLATION) as pool:
        cell("SCALE = 1\\nclass Shape:\\n    def area(self): return SCALE\\n"
             "def make(): return Shape()\\ndef area(shape): return shape.area(), shape")
        shape = pool.call(make)
        assert type(shape) is Shape, type(shape)
        assert shape.area() == 1
        value, back = pool.call(area, shape)
        assert value == 1 and type(back) is Shape
        # A global, a function, a class; each edited by itself.
        cell("SCALE = 2")
        assert pool.call(area, Shape())[0] == 2
        cell("def area(shape): return shape.area() * 10, shape")
        assert pool.call(area, Shape())[0] == 20
        cell("class Shape:\\n    def area(self): return 5\\n    def __eq__(self, other): return 1")
        value, back = pool.call(area, Shape())
        assert value == 50 and type(back) is Shape
        assert type(pool.call(make)) is Shape
        assert pool.submit(area, Shape()).result()[0] == 50
        print("ok")
"""


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_b1_cells_of_a_notebook(program: Program, isolation: str) -> None:
    """Without any option; what is edited and run again is what runs there."""
    script = program.write("cells.py", CELLS.replace("ISOLATION", repr(isolation)))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.stdout == "ok\n", done.stderr

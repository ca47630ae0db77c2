"""Which modules are loaded anew when code has changed (J3)."""

from __future__ import annotations

import importlib
import queue
import sys
import textwrap
import time

import pytest


@pytest.fixture
def program(tmp_path, connect, monkeypatch):
    """Writes the files of a program, and returns what updates a runner that has it."""
    # A test imports by hand, without what `load` does for a real call.
    here = tmp_path / "here"
    here.mkdir()

    class Program:
        def write(self, **files):
            for path, text in files.items():
                file = here / f"{path.replace('__', '/')}.py"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(textwrap.dedent(text))

        def init(self, package, text=""):
            file = here / package / "__init__.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

        def start(self):
            self.source, self.receiver = connect(sync_modules=[str(here)])
            self.receiver.update()

        def update(self):
            self.source.revision()
            return self.receiver.update()

    program = Program()
    program.folder = here
    return program


IMPORTS = {
    "plain": "import pkg.mod\nX = pkg.mod.X\n",
    "as_": "import pkg.mod as other\nX = other.X\n",
    "from_": "from pkg.mod import X\n",
    "star": "from pkg.mod import *\n",
    "package": "from pkg import mod\nX = mod.X\n",
    "many": "from pkg import (\n    other,\n    mod,\n)\nX = mod.X\n",
    "continued": "from pkg import other, \\\n    mod\nX = mod.X\n",
    "within": "def late():\n    from pkg.mod import X\n    return X\nX = late()\n",
    "by_name": "import importlib\nX = importlib.import_module('pkg.mod').X\n",
    "by_call": "X = __import__('pkg.mod').mod.X\n",
    "attribute": "import pkg\nimport pkg.other\ndef get():\n    return pkg.mod.X\nX = get()\n",
    "twice": "from from_ import X\n",
}


@pytest.mark.parametrize("few", [0, 20])
def test_j3_whoever_imports_it_goes_with_it(program, monkeypatch, few):
    monkeypatch.setattr("flame_dask.code_sync.modules._FEW", few)
    program.init("pkg")
    program.write(pkg__mod="X = 1\n", pkg__other="", **IMPORTS)
    program.write(apart="X = 'modern, model, mod'  # mod\nmodern = 1\n")
    program.start()
    apart = importlib.import_module("apart")
    for number in (1, 2):
        program.write(pkg__mod=f"X = {number}\n")
        gone = program.update()
        assert (set(gone) == {"pkg.mod", *IMPORTS}) == (number == 2)
        assert {name: importlib.import_module(name).X for name in IMPORTS} == dict.fromkeys(
            IMPORTS, number
        )
    assert importlib.import_module("apart") is apart


def test_j3_names_that_are_not_ascii(program):
    program.write(größe="X = 1\n", user="from größe import X\n")
    program.start()
    importlib.import_module("user")
    program.write(größe="X = 2\n")
    assert program.update() == ["größe", "user"]
    assert importlib.import_module("user").X == 2


def test_j3_modules_that_import_each_other(program):
    program.write(one="import two\nX = 1\n", two="import one\n")
    program.start()
    importlib.import_module("one")
    program.write(one="import two\nX = 2\n")
    assert program.update() == ["one", "two"]
    assert importlib.import_module("one").X == 2
    assert importlib.import_module("two").one.X == 2


def test_j3_a_package_goes_with_all_that_is_in_it(program):
    program.init("pkg", "X = 1\n")
    program.write(pkg__sub__mod="state = []\n", user="import pkg.sub.mod\n")
    program.start()
    importlib.import_module("user")
    program.init("pkg", "X = 2\n")
    assert program.update() == ["pkg", "pkg.sub", "pkg.sub.mod", "user"]
    assert importlib.import_module("user").pkg.X == 2


def test_j3_packages_without_an_init(program):
    program.write(spacious__a="X = 1\n", spacious__b="from spacious.a import X\n")
    program.start()
    assert importlib.import_module("spacious.b").X == 1
    program.write(spacious__a="X = 2\n")
    program.update()
    assert importlib.import_module("spacious.b").X == 2
    (program.folder / "spacious/a.py").unlink()
    (program.folder / "spacious/b.py").unlink()
    program.update()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("spacious")


def test_j3_what_the_runner_runs_on_stays(program):
    """A file may have the name of a module of the standard library, or of the main program."""
    program.write(queue="X = 1\n", user="import queue\n")
    (program.folder / "__main__.py").write_text("import user\n")
    program.start()
    main = sys.modules["__main__"]
    assert sys.modules["queue"] is queue
    importlib.import_module("user")
    program.write(queue="X = 2\n")
    (program.folder / "__main__.py").write_text("import user, sys\n")
    program.update()
    assert sys.modules["queue"] is queue
    assert sys.modules["__main__"] is main
    # Nor is it touched by a folder of the name of an installed package that is emptied.
    program.write(msgpack__mine="")
    program.update()
    there = importlib.import_module("msgpack")
    (program.folder / "msgpack/mine.py").unlink()
    program.update()
    assert sys.modules["msgpack"] is there


def test_j3_an_edit_of_a_large_program_is_there_at_once(program):
    """Also if all of it is loaded, and much of that imports what has changed."""
    program.init("big")
    for number in range(1000):
        before = f"from big.m{number - 1} import X\n" if number % 50 else ""
        text = f"{before}X = 1\n" + "# a comment\ndef f(data): return data\n" * 60
        program.write(**{f"big__m{number}": text})
    program.start()
    for number in range(1000):
        importlib.import_module(f"big.m{number}")
    took = []
    for number in range(5):
        program.write(big__m10=f"from big.m9 import X\nY = {number}\n")
        begun = time.perf_counter()
        gone = program.update()
        took.append(time.perf_counter() - begun)
        assert len(gone) == 40
        importlib.import_module("big.m49")
    assert min(took) < 0.1

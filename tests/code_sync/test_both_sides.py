"""The parent's side and the runner's, without Dask between them (J1 to J5)."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from flame_dask.code_options import CodeSync
from flame_dask.code_sync import receiver as receiving
from flame_dask.code_sync import source as sending
from flame_dask.code_sync.folder import OwnFolder
from flame_dask.code_sync.receiver import NotCopied
from flame_dask.code_sync.source import CodeSource
from flame_dask.errors import PoolOptionsError


@pytest.fixture
def here(tmp_path, write, monkeypatch):
    """A program in the working folder of this process."""
    write("shop/__init__.py", "from shop.prices import LIMIT\n")
    write("shop/prices.py", "LIMIT = 1\ndef price(): return LIMIT\n")
    write("shop/basket.py", "from .prices import LIMIT as top\ndef total(): return top\n")
    write("shop/other.py", "state = []\n")
    write("shop/data/table.csv", "1;2\n")
    write("shop/__pycache__/x.pyc", "no")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def files(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            found[path.relative_to(folder).as_posix()] = path
    return found


def root(receiver):
    return receiver.files.parent


def test_j2_files_and_folders_with_links_followed(here, write, connect, tmp_path):
    write("model/weights.bin", "w")
    script = write("model/run.sh", "#!/bin/sh\necho yes\n")
    script.chmod(0o755)
    (here / "model/empty").mkdir()
    (here / "model/link").symlink_to(write("../elsewhere/target.txt", "target"))
    (here / "model/linked").symlink_to(here / "shop/data")
    (here / "model/loop").symlink_to(here / "model")
    (here / "model/broken").symlink_to(here / "no-such-file")
    outside = tmp_path / "outside.txt"
    outside.write_text("outside")
    _, receiver = connect(copy_paths=["model", str(outside)])
    receiver.update()
    assert set(files(receiver.files)) == {
        *("model/weights.bin", "model/run.sh", "model/link", "model/linked/table.csv"),
        "outside.txt",
    }
    assert (receiver.files / "model/empty").is_dir()
    assert not (receiver.files / "model/link").is_symlink()
    assert (receiver.files / "model/link").read_text() == "target"
    done = subprocess.run([receiver.files / "model/run.sh"], check=True, capture_output=True)
    assert done.stdout == b"yes\n"


def test_j2_two_paths_for_one_place_are_refused(here, tmp_path, write):
    paths = [write("../a/data.txt", "a"), write("../b/data.txt", "b")]
    with pytest.raises(PoolOptionsError, match="would take the place of"):
        CodeSource(CodeSync(copy_paths=paths), "pool")


def test_j3_only_what_changed_and_that_at_once(here, write, connect):
    source, receiver = connect(sync_modules=["./"])
    receiver.update()
    code = root(receiver) / "code/sync-0"
    assert set(files(code)) == {
        *("shop/__init__.py", "shop/prices.py", "shop/basket.py", "shop/other.py"),
        "shop/data/table.csv",
    }
    first = source.revision()
    assert receiver.revision == first
    for round_ in range(20):  # quicker than the clock of the file system
        write("shop/prices.py", f"LIMIT = {round_ % 10}\ndef price(): return LIMIT\n")
        assert source.revision() == first + round_ + 1
        receiver.update()
        assert receiver.revision == first + round_ + 1
        shop = importlib.import_module("shop.prices")
        assert shop.price() == round_ % 10
        assert importlib.import_module("shop.basket").total() == round_ % 10
        assert round_ % 10 == importlib.import_module("shop").LIMIT
    assert receiver.received < 1000
    (here / "shop/prices.py").chmod(0o600)
    assert source.revision() == first + 21
    receiver.update()
    assert (code / "shop/prices.py").stat().st_mode & 0o777 == 0o600


def test_j3_deleted_modules_are_gone(here, write, connect):
    _, receiver = connect(sync_modules=["./"])
    write("shop/extra/one.py", "x = 1\n")
    receiver.update()
    code = root(receiver) / "code/sync-0"
    assert importlib.import_module("shop.extra.one").x == 1
    assert importlib.import_module("shop.other").state == []
    (here / "shop/extra/one.py").unlink()
    (here / "shop/other.py").unlink()
    receiver.update()
    assert not (code / "shop/other.py").exists()
    assert not (code / "shop/extra").exists()
    for name in ("shop.other", "shop.extra.one", "shop.extra"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    # A module that becomes a package, and one again.
    (here / "shop/prices.py").unlink()
    write("shop/prices/__init__.py", "LIMIT = 77\n")
    receiver.update()
    assert importlib.import_module("shop").LIMIT == 77
    (here / "shop/prices/__init__.py").unlink()
    (here / "shop/prices").rmdir()
    write("shop/prices.py", "LIMIT = 78\n")
    receiver.update()
    assert importlib.import_module("shop").LIMIT == 78


def test_j3_modules_that_have_nothing_to_do_with_it_stay(here, write, connect):
    write("lone.py", "import shop.other\ncalls = []\n")
    write("user.py", "from shop.prices import price\n")
    _, receiver = connect(sync_modules=["./"])
    receiver.update()
    lone, user = importlib.import_module("lone"), importlib.import_module("user")
    write("user.py", "from shop.prices import price as new\n")
    assert receiver.update() == ["user"]
    assert importlib.import_module("lone") is lone
    write("shop/data/table.csv", "3;4\n")
    assert receiver.update() == []
    write("shop/other.py", "state = [1]\n")
    assert set(receiver.update()) == {"shop.other", "lone"}
    # What goes on with the old one has all of it.
    assert user.price() == 1
    assert importlib.import_module("lone").shop.other.state == [1]


def test_j3_an_error_in_new_code_is_raised_where_it_is_imported(here, write, connect):
    _, receiver = connect(sync_modules=["./"])
    receiver.update()
    importlib.import_module("shop.basket")
    write("shop/basket.py", "def total(:\n")
    receiver.update()
    with pytest.raises(SyntaxError):
        importlib.import_module("shop.basket")
    write("shop/basket.py", "def total(): return 'mended'\n")
    receiver.update()
    assert importlib.import_module("shop.basket").total() == "mended"


def test_j2_apps_and_what_is_watched_have_one_place(here, write, connect, monkeypatch):
    write("main.py", "import shop\n")
    write("notes.txt", "no code")
    write("environment/pyvenv.cfg", "")
    write("environment/lib.py", "no")
    write("flame_dask/__init__.py", "no")
    monkeypatch.setattr(sys, "path", [str(here), *sys.path])
    _, receiver = connect(copy_apps=True, sync_modules=["shop"])
    receiver.update()
    monkeypatch.undo()
    found = [path.split("/", 2)[1:] for path in files(root(receiver)) if "/shop/" in path]
    assert {place for place, _ in found} == {"sync-0"}
    apps = [path for path in files(root(receiver)) if path.startswith("code/app-0/")]
    assert apps == ["code/app-0/main.py"]
    (here / "shop/other.py").unlink()
    receiver.update()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("shop.other")


def test_j5_a_copy_that_is_cut_or_damaged_is_not_used(here, write, tmp_path):
    write("model.bin", "x" * 100_000)
    source = CodeSource(CodeSync(copy_paths=["model.bin"], chunk_size=1024, compress=False), "p")
    fault = {}

    def ask(since, stream):
        answer = source.answer("r", since, stream)
        if "cut" in fault:
            answer["chunks"] = answer["chunks"][:3]
        if "damaged" in fault:
            answer["chunks"][5] = bytes(1024)
        if "lost" in fault:
            raise NotCopied("the connection is gone")
        return answer

    for kind in ("cut", "damaged", "lost"):
        fault[kind] = True
        receiver = receiving.Receiver(ask, tmp_path / "there")
        with pytest.raises(NotCopied):
            receiver.update()
        assert files(root(receiver)) == {}
        assert receiver.revision == -1
        fault.clear()
        receiver.update()
        assert set(files(root(receiver))) == {"files/model.bin"}
        receiver.close()
        assert os.listdir(tmp_path / "there") == []
    source.close()


def test_j5_files_that_always_change_are_given_up(here, write, tmp_path, monkeypatch):
    monkeypatch.setattr(receiving, "PAUSE", 0)
    file = write("shop/prices.py", "LIMIT = 0\n")
    source = CodeSource(CodeSync(sync_modules=["shop"]), "p")
    receiver = receiving.Receiver(lambda *ask: source.answer("r", *ask), tmp_path / "there")
    changes = 3

    def packed(members):
        nonlocal changes
        members = list(members)
        if changes:
            changes -= 1
            file.write_text(f"LIMIT = {changes}0\n")
        return pack(members)

    pack = sending.pack
    monkeypatch.setattr(sending, "pack", packed)
    receiver.update()
    assert importlib.import_module("shop").LIMIT == 0
    changes = 1000
    write("shop/prices.py", "LIMIT = 5\n")
    with pytest.raises(NotCopied, match="change all the time"):
        receiver.update()
    receiver.close()
    source.close()


def test_j5_what_killed_processes_have_left_goes_with_the_next_start(tmp_path):
    script = (
        "import os, pathlib, sys; from flame_dask.code_sync.folder import OwnFolder;"
        "f = OwnFolder(pathlib.Path(sys.argv[1])); (f.path / 'x').write_text('x');"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert len(os.listdir(tmp_path)) == 2
    one, two = OwnFolder(tmp_path), OwnFolder(tmp_path)
    assert len(os.listdir(tmp_path)) == 4
    assert one.path.is_dir()
    one.remove()
    two.remove()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kernel", [True, False])
def test_j3_with_and_without_the_kernels_help(here, write, connect, monkeypatch, kernel, until):
    if not kernel:

        def refuse(folders):
            raise OSError("no more watches")

        monkeypatch.setattr("flame_dask.code_sync.watch.Inotify", refuse)
    source, _ = connect(sync_modules=["shop"])
    before = source.revision()
    write("shop/new/deep.py", "x = 1\n")
    until(lambda: source.revision() == before + 1)
    write("shop/new/deep.py", "x = 2\n")
    until(lambda: source.revision() == before + 2)
    (here / "shop/new").rename(here / "shop/renamed")
    until(lambda: source.revision() == before + 3)
    write("shop/renamed/deep.py", "x = 3\n")
    until(lambda: source.revision() == before + 4)
    assert source.revision() == before + 4

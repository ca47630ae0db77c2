"""Files as they are found in the world: links, other names for one thing, odd times and modes."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from pathlib import Path

import pytest

from flame_dask.code_options import CodeSync
from flame_dask.code_sync.folder import OwnFolder
from flame_dask.code_sync.receiver import NotCopied, Receiver
from flame_dask.code_sync.source import CodeSource
from flame_dask.code_sync.watch import CodeWatch


def at(receiver, path):
    return receiver.files.parent / "code/sync-0" / path


def age(file):
    """Let a file be old enough for its time to be trusted, and known as such."""
    os.utime(file, (1_000_000, 1_000_000))


@pytest.fixture
def program(tmp_path, write, connect):
    """Watches the folder ``here``; ``update`` is what happens before a call."""
    write("shop/__init__.py", "")
    write("shop/a.py", "x = 1\n")

    def start():
        source, receiver = connect(sync_modules=[str(tmp_path / "here")])

        def update():
            source.revision()
            return receiver.update()

        update()
        return update, receiver

    return start


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_j3_a_file_with_two_paths_changes_in_both(tmp_path, write, program, kind):
    here = tmp_path / "here"
    if kind == "file":
        (here / "other.py").symlink_to(here / "shop/a.py")
    else:
        (here / "other").symlink_to(here / "shop")
    update, receiver = program()
    write("shop/a.py", "x = 2\n")
    update()
    other = "other.py" if kind == "file" else "other/a.py"
    assert at(receiver, "shop/a.py").read_text() == "x = 2\n"
    assert at(receiver, other).read_text() == "x = 2\n"


def test_j3_a_link_to_a_folder_is_watched_where_it_leads_now(tmp_path, write, program):
    for number in "12":
        write(f"../{number}/__init__.py", "")
        write(f"../{number}/a.py", f"x = {number}\n")
    link = tmp_path / "here/linked"
    link.symlink_to(tmp_path / "1")
    update, receiver = program()
    new = tmp_path / "new"
    new.symlink_to(tmp_path / "2")
    new.rename(link)
    update()
    assert at(receiver, "linked/a.py").read_text() == "x = 2\n"
    write("../2/a.py", "x = 3\n")
    update()
    assert at(receiver, "linked/a.py").read_text() == "x = 3\n"


@pytest.mark.parametrize("kernel", [True, False])
def test_j3_another_content_of_the_same_time_and_size(
    tmp_path, write, connect, monkeypatch, until, kernel
):
    if not kernel:

        def refuse(folders):
            raise OSError("no more watches")

        monkeypatch.setattr("flame_dask.code_sync.watch.Inotify", refuse)
    file = write("a.py", "x = 1\n")
    age(file)
    monkeypatch.setattr("flame_dask.code_sync.watch._YOUNG", 0)
    source, _ = connect(sync_modules=[str(tmp_path / "here")])
    before = source.revision()
    file.write_text("x = 2\n")
    age(file)
    until(lambda: source.revision() == before + 1)


def test_j3_a_file_that_an_editor_puts_in_place_of_another(tmp_path, write, program):
    update, receiver = program()
    write("shop/.a.py.swp", "x = 2\n").rename(tmp_path / "here/shop/a.py")
    update()
    assert at(receiver, "shop/a.py").read_text() == "x = 2\n"
    (tmp_path / "here/shop").rename(tmp_path / "here/store")
    update()
    assert not at(receiver, "shop").exists()
    write("store/a.py", "x = 3\n")
    update()
    assert at(receiver, "store/a.py").read_text() == "x = 3\n"


def test_j3_what_is_written_beside_the_code_is_not_looked_at(tmp_path, write, connect, monkeypatch):
    """A log, say: each call would have to look at all files."""
    monkeypatch.setattr("flame_dask.code_sync.watch.LOOK_EVERY", 60)
    looks = []
    look = CodeWatch._look

    def counted(self):
        looks.append(self)
        look(self)

    write("a.py", "x = 1\n")
    log = write("program.log", "begin\n")
    source, _ = connect(sync_modules=[str(tmp_path / "here")])
    before = source.revision()
    monkeypatch.setattr(CodeWatch, "_look", counted)
    with log.open("a") as file:
        print("more", file=file)
    assert (source.revision(), looks) == (before, [])
    write("b.py", "x = 1\n")
    assert (source.revision(), len(looks)) == (before + 1, 1)


def test_j3_a_file_that_can_not_be_read_is_spoken_of_once(
    tmp_path, write, connect, caplog, monkeypatch
):
    write("a.py", "x = 1\n")
    (tmp_path / "here/b.py").symlink_to("/proc/self/mem")  # not even by root
    source, receiver = connect(sync_modules=[str(tmp_path / "here")])
    receiver.update()
    write("a.py", "x = 2\n")
    source.revision()
    assert at(receiver, "a.py").exists()
    assert not at(receiver, "b.py").exists()
    [text] = [record.getMessage() for record in caplog.records]
    assert "b.py can't be read, and so is not on the runners" in text


def test_j3_names_that_are_no_text(tmp_path, write, program):
    update, receiver = program()
    name = os.fsdecode(b"\xff.txt")
    file = write(f"shop/{name}", "x")
    update()
    assert at(receiver, f"shop/{name}").exists()
    file.unlink()
    update()
    assert not at(receiver, f"shop/{name}").exists()


def test_j5_all_that_is_sent_can_be_sent(tmp_path, write, connect):
    """Also what is said of a file whose name is no text: Dask would cut the connection."""
    msgpack = pytest.importorskip("msgpack")
    name = os.fsdecode(b"\xff.py")
    file = write(name, "x")
    folder = str(tmp_path / "here")
    source, receiver = connect(sync_modules=[folder])
    receiver.update()
    file.unlink()
    source.revision()
    assert msgpack.unpackb(msgpack.packb(source.answer("r", receiver.revision)))["deleted"] == []
    write("b.py", "x")
    gone = write(f"{name}.bin", "x")
    refusing, _ = connect(copy_paths=[gone])
    gone.unlink()
    answer = msgpack.unpackb(msgpack.packb(refusing.answer("r", -1)))
    assert "udcff.py.bin can't be copied" in answer["refused"]


def test_j2_folders_keep_their_modes_and_all_files(tmp_path, write, connect):
    write("keys/deep/one.pyc", "no module").chmod(0o400)
    (tmp_path / "here/keys").chmod(0o700)
    (tmp_path / "here/keys/deep").chmod(0o750)
    _, receiver = connect(copy_paths=[tmp_path / "here/keys"])
    receiver.update()
    modes = {path.name: path.stat().st_mode & 0o777 for path in [*receiver.files.rglob("*")]}
    assert modes == {"keys": 0o700, "deep": 0o750, "one.pyc": 0o400}


def test_j2_what_can_not_be_copied_is_said(tmp_path, write, connect):
    """A runner must not begin without a file that it was to have."""
    file = write("model.bin", "x")
    _, receiver = connect(copy_paths=[file])
    file.unlink()
    with pytest.raises(NotCopied, match=r"model\.bin can't be copied: it is gone"):
        receiver.update()
    folder = tmp_path / "here/deep"
    folder.mkdir()
    with contextlib.chdir(folder):
        for _ in range(17):  # longer than a path may be
            os.mkdir("x" * 250)
            os.chdir("x" * 250)
    _, receiver = connect(copy_paths=[folder])
    with pytest.raises(NotCopied, match="File name too long"):
        receiver.update()


def test_j3_files_from_a_temporary_folder_on_another_file_system(tmp_path, write):
    """What reads the old file goes on with it."""
    if not os.path.isdir("/dev/shm") or os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    write("a.py", "x = 1\n")
    source = CodeSource(CodeSync(sync_modules=[str(tmp_path / "here")]), "p")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as tmp:
        ask = lambda *asked: source.answer("r", *asked)  # noqa: E731
        receiver = Receiver(ask, tmp_path / "there", Path(tmp))
        receiver.update()
        with at(receiver, "a.py").open() as file:
            write("a.py", "x = 2 # longer\n")
            source.revision()
            receiver.update()
            assert file.read() == "x = 1\n"
        assert at(receiver, "a.py").read_text() == "x = 2 # longer\n"
        assert os.listdir(at(receiver, "")) == ["a.py"]
        receiver.close()
        assert os.listdir(tmp) == []
    source.close()


def test_j5_what_is_to_be_deleted_or_imported_leads_out(tmp_path, write):
    """A parent that has been taken over deletes nothing of the runner's."""
    write("a.py", "x = 1\n")
    victim = tmp_path / "victim"
    victim.write_text("v")
    source = CodeSource(CodeSync(sync_modules=[str(tmp_path / "here")]), "p")
    for part, path in (
        ("deleted", b"../../victim"),
        ("deleted", os.fsencode(victim)),
        ("on_path", b"../.."),
        ("on_path", b"/etc"),
    ):

        def ask(*asked, part=part, path=path):
            return {**source.answer("r", *asked), part: [path]}

        receiver = Receiver(ask, tmp_path / "there")
        with pytest.raises(NotCopied, match="leads out of the folder"):
            receiver.update()
        receiver.close()
        assert victim.exists()
    source.close()


def test_j5_what_is_written_as_the_runner_closes_is_removed(tmp_path, write):
    """The copy goes on until it notices; what it writes meanwhile would be left for ever."""
    write("large.bin", "x" * 300_000)
    large = str(tmp_path / "here/large.bin")
    source = CodeSource(CodeSync(copy_paths=[large], compress=False, chunk_size=1024), "p")
    begun, go_on = threading.Event(), threading.Event()

    def ask(since, stream):
        answer = source.answer("r", since, stream)
        begun.set()
        go_on.wait(10)
        return answer

    receiver = Receiver(ask, tmp_path / "there")
    failures = []

    def update():
        try:
            receiver.update()
        except NotCopied as error:
            failures.append(str(error))

    copying = threading.Thread(target=update)
    copying.start()
    assert begun.wait(10)
    closing = threading.Thread(target=receiver.close)
    closing.start()
    go_on.set()
    copying.join(10)
    closing.join(10)
    assert failures == ["the runner is closing"]
    assert os.listdir(tmp_path / "there") == []
    source.close()


def test_j5_folders_that_are_made_at_the_same_time_keep_their_locks(tmp_path):
    """Each looks for abandoned ones first, and must not take a new one for such."""
    unlocked = []

    def make_some():
        for _ in range(60):
            folder = OwnFolder(tmp_path)
            if not Path(f"{folder.path}.lock").exists():
                unlocked.append(folder.path)
            folder.remove()

    threads = [threading.Thread(target=make_some) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert unlocked == []
    assert os.listdir(tmp_path) == []


def test_j5_a_relative_place_stays_where_it_is(tmp_path, write, monkeypatch):
    write("a.py", "x = 1\n")
    source = CodeSource(CodeSync(sync_modules=[str(tmp_path / "here")]), "p")
    monkeypatch.chdir(tmp_path)
    receiver = Receiver(lambda *asked: source.answer("r", *asked), Path("there"))
    receiver.update()
    monkeypatch.chdir("/")  # a call may do so
    assert receiver.files.is_dir()
    receiver.close()
    source.close()
    assert os.listdir(tmp_path / "there") == []

"""Streams of files, and what is not taken out of them (J2, J5)."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flame_dask.code_sync.archive import (
    BLOCK,
    ChangedMeanwhile,
    Chunks,
    Interrupted,
    Member,
    Packer,
    Refused,
    checked,
    pack,
    unpack,
)


def through(members, folder, *, compress=True, chunk_size=1000):
    packer = Packer(pack(members), chunk_size=chunk_size, compress=compress)
    chunks = Chunks(lambda: next(packer, b""), compressed=compress)
    folder.mkdir(exist_ok=True)
    paths = unpack(chunks, folder)
    assert chunks.digest == packer.digest
    assert chunks.received == packer.sent
    return paths


names = st.text(st.characters(blacklist_characters="/\0", codec="utf-8"), min_size=1, max_size=40)
names = names.filter(lambda name: name not in {".", ".."})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.dictionaries(names, st.binary(max_size=3000), max_size=5, min_size=1),
    st.booleans(),
    st.integers(1, 2000),
)
def test_j5_what_comes_out_is_what_went_in(tmp_path_factory, files, compress, chunk_size):
    base = tmp_path_factory.mktemp("archive")
    members = []
    for number, (name, content) in enumerate(files.items()):
        source = base / str(number)
        source.write_bytes(content)
        members.append(Member(f"folder/{name}", source))
    paths = through(members, base / "out", compress=compress, chunk_size=chunk_size)
    assert paths == [member.path for member in members]
    for name, content in files.items():
        assert (base / "out" / "folder" / name).read_bytes() == content


def test_j2_modes_and_times_are_kept(tmp_path):
    source = tmp_path / "script"
    source.write_text("#!/bin/sh\necho yes\n")
    source.chmod(0o775)
    os.utime(source, (1_000_000, 1_000_000.25))
    (tmp_path / "folder").mkdir(mode=0o750)
    through([Member("d", tmp_path / "folder"), Member("d/s", source)], tmp_path / "out")
    status = (tmp_path / "out/d/s").stat()
    assert (status.st_mode & 0o777, status.st_mtime) == (0o775, 1_000_000.25)
    assert (tmp_path / "out/d").stat().st_mode & 0o777 == 0o750


def hostile(info: tarfile.TarInfo, content: bytes = b"") -> Chunks:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    stream.seek(0)
    return Chunks(lambda: stream.read(500), compressed=False)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/x", "/", "..", "a/..", "//x", "."])
def test_j5_paths_that_lead_out_are_refused(tmp_path, path):
    (tmp_path / "out").mkdir()
    with pytest.raises(Refused, match="leads out of"):
        unpack(hostile(tarfile.TarInfo(path), b"evil"), tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("kind", "to"),
    [
        (tarfile.SYMTYPE, "../outside"),
        (tarfile.SYMTYPE, "inside"),
        (tarfile.LNKTYPE, "/etc/passwd"),
        (tarfile.CHRTYPE, ""),
        (tarfile.BLKTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_j5_links_and_devices_are_refused(tmp_path, kind, to):
    info = tarfile.TarInfo("member")
    info.type, info.linkname = kind, to
    with pytest.raises(Refused, match="neither a file nor a folder"):
        unpack(hostile(info), tmp_path)
    assert os.listdir(tmp_path) == []


@given(st.text(max_size=30))
def test_j5_no_path_leads_out(path):
    info = tarfile.TarInfo(path)
    try:
        found = checked(info)
    except Refused:
        return
    inside = os.path.normpath(os.path.join("/base", found))
    assert inside.startswith("/base/")


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_j5_a_stream_that_is_cut_is_noticed(tmp_path, compress, part):
    source = tmp_path / "random"
    source.write_bytes(os.urandom(50_000))
    packer = Packer(pack([Member("f", source)]), chunk_size=500, compress=compress)
    sent = list(packer)
    left = iter(sent[: int(len(sent) * part)])
    (tmp_path / "out").mkdir()
    chunks = Chunks(lambda: next(left, b""), compressed=compress)
    try:
        unpack(chunks, tmp_path / "out")
    except Interrupted:
        return
    assert chunks.digest != packer.digest  # just the end was missing


def test_j5_a_file_that_changes_meanwhile(tmp_path):
    source = tmp_path / "file"
    source.write_bytes(b"x" * 3 * BLOCK)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert b"".join(pack([Member("f", source, digest)]))
    with pytest.raises(ChangedMeanwhile, match="written to"):
        list(pack([Member("f", source, "0" * 64)]))
    parts = pack([Member("f", source)])
    next(parts)
    next(parts)
    os.truncate(source, BLOCK)
    with pytest.raises(ChangedMeanwhile, match="cut"):
        list(parts)
    with pytest.raises(ChangedMeanwhile, match="gone"):
        list(pack([Member("f", tmp_path / "no-such-file")]))


def test_j5_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="neither a file nor a folder"):
        list(pack([Member("pipe", tmp_path / "pipe")]))


@pytest.mark.parametrize("compress", [True, False])
def test_j5_memory_does_not_grow_with_what_is_copied(tmp_path, compress):
    """What compresses to nearly nothing is the hardest: a chunk is 60 MB then."""
    source = tmp_path / "zeros"
    with source.open("wb") as file:
        file.truncate(60_000_000)
    tracemalloc.start()
    try:
        through([Member("f", source)], tmp_path / "out", compress=compress, chunk_size=65536)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16_000_000
    assert Path(tmp_path / "out/f").stat().st_size == 60_000_000

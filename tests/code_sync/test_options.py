"""The option ``code_sync``, checked in full before anything starts (A2, J1)."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import dask
import pytest

from flame_dask.code_options import CodeSync
from flame_dask.errors import PoolOptionsError
from flame_dask.options import PoolOptions

J1 = {
    "copy_paths": (),
    "copy_apps": False,
    "sync_modules": (),
    "start_apps": False,
    "compress": True,
    "verbose": False,
    "chunk_size": 65536,
    "extract_dir": None,
    "tmp_dir": None,
}


def refused(**given):
    with pytest.raises(PoolOptionsError) as caught:
        PoolOptions.check("web", max=1, code_sync=given)
    return caught.value


def test_j1_names_and_defaults():
    made = dataclasses.asdict(CodeSync())
    assert made.pop("packages") == "error"
    assert made == J1


def test_j1_an_object_or_a_dict_or_the_configuration(tmp_path):
    made = CodeSync(copy_paths=[tmp_path], sync_modules="json", start_apps=["a.b:c.d"])
    assert made.copy_paths == (str(tmp_path),)
    assert made.sync_modules == ("json",)
    given = {"copy-paths": [tmp_path], "sync_modules": ["json"], "start_apps": ["a.b:c.d"]}
    for value in (made, given):
        assert PoolOptions.check("web", max=1, code_sync=value).code_sync == made
    with dask.config.set({"flame.code-sync": {"copy-apps": True}}):
        assert PoolOptions.check("web", max=1).code_sync == CodeSync(copy_apps=True)
    with dask.config.set({"flame.code-sync": {"copy-apps": 7}}):
        with pytest.raises(PoolOptionsError, match=r"key flame\.code-sync") as caught:
            PoolOptions.check("web", max=1)
        assert caught.value.option == "code_sync.copy_apps"
    assert pickle.loads(pickle.dumps(made)) == made
    assert hash(PoolOptions.check("web", max=1, code_sync=made))


def test_j4_start_apps_true_sets_copy_apps():
    assert CodeSync(start_apps=True).copy_apps
    assert not CodeSync(start_apps=["a:b"]).copy_apps


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [("copy_path", "copy_paths"), ("sync_module", "sync_modules"), ("compres", "compress")],
)
def test_a2_the_nearest_name(typo, nearest):
    error = refused(**{typo: True})
    assert error.option == f"code_sync.{typo}"
    assert f"did you mean {nearest}?" in str(error)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("copy_paths", ["/no/such/file"], "does not exist"),
        ("copy_paths", [""], "not empty"),
        ("copy_paths", 5, "a list of texts"),
        ("copy_paths", ["/dev/null"], "neither a file nor a folder"),
        ("copy_apps", "yes", "True or False"),
        ("sync_modules", [__file__], "is a file"),
        ("sync_modules", ["json.decoder"], "'json'"),
        ("sync_modules", ["a-b"], "name of a module"),
        ("sync_modules", ["./no/such"], "does not exist"),
        ("start_apps", ["app"], "package.module:start"),
        ("start_apps", ["app:"], "package.module:start"),
        ("start_apps", 1, "a list of texts"),
        ("chunk_size", 0, "bytes"),
        ("chunk_size", True, "bytes"),
        ("extract_dir", 7, "a path"),
        ("packages", "maybe", "'warn'"),
        ("compress", None, "True or False"),
    ],
)
def test_a2_a_bad_part_is_named(part, value, words):
    error = refused(**{part: value})
    assert error.option == f"code_sync.{part}"
    assert words in str(error)


def test_a2_the_name_of_a_modules_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lone.py").touch()
    assert "give the module's name, 'lone'" in str(refused(sync_modules=["lone.py"]))


@pytest.mark.parametrize("name", ["no_such_module", "sys", "flame_dask"])
def test_a2_modules_that_can_not_be_sent(name):
    from flame_dask.code_sync.source import CodeSource

    with pytest.raises(PoolOptionsError, match="is no module that can be sent"):
        CodeSource(CodeSync(sync_modules=[name]), "web")


def test_j2_a_relative_path_is_one_of_the_parents_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    assert CodeSync(copy_paths=["data"]).copy_paths == ("data",)

"""Which files of a folder make a model, and the folders that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from buildsys.errors import BuildError
from buildsys.sources.local import Knobs, locate

INDEX = "model.safetensors.index.json"


def model(folder: Path, *names: str, shards: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    if shards is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


def find(folder: Path, path: str = "m") -> dict[str, Path]:
    return dict(locate(Knobs(path=path), folder, folder / "home").files)


def refused(folder: Path, path: str = "m") -> BuildError:
    with pytest.raises(BuildError) as caught:
        find(folder, path)
    assert caught.value.fix
    return caught.value


def test_the_files_of_a_single_file_model(tmp_path: Path) -> None:
    wanted = ["LICENSE.txt", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.model"]
    model(tmp_path / "m", *wanted, "README.md", "modeling_x.py", "optimizer.pt", "training_args.bin", "consolidated.safetensors")
    found = find(tmp_path)
    assert list(found) == wanted
    assert found["config.json"] == tmp_path / "m/config.json"


def test_of_a_sharded_model_the_shards_that_the_index_names(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    model(tmp_path / "m", "config.json", *names, "consolidated.safetensors", shards={"a": names[0], "b": names[1], "c": names[1]})
    assert list(find(tmp_path)) == ["config.json", *names, INDEX]


def test_an_index_of_one_file(tmp_path: Path) -> None:
    model(tmp_path / "m", "config.json", "model.safetensors", shards={"a": "model.safetensors"})
    assert list(find(tmp_path)) == ["config.json", "model.safetensors"], "the index says nothing new"


def test_folder_and_files_may_be_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    blobs = model(tmp_path / "blobs", "c0ffee", "f00d")
    (tmp_path / "snapshots/1").mkdir(parents=True)
    (tmp_path / "snapshots/1/config.json").symlink_to(blobs / "c0ffee")
    (tmp_path / "snapshots/1/model.safetensors").symlink_to("../../blobs/f00d")
    (tmp_path / "m").symlink_to("snapshots/1")
    found = find(tmp_path)
    assert found == {name: tmp_path / "m" / name for name in ("config.json", "model.safetensors")}


def test_paths_up_and_absolute(tmp_path: Path) -> None:
    model(tmp_path / "m", "config.json", "model.safetensors")
    assert find(tmp_path / "recipes/x", "../../m") == find(tmp_path / "elsewhere", str(tmp_path / "m"))


def test_missing_folders_name_close_ones(tmp_path: Path) -> None:
    model(tmp_path / "models/tiny-llama-3m", "config.json")
    error = refused(tmp_path, "models/tiny-lama-3m")
    assert error.where == str(tmp_path / "models/tiny-lama-3m") and error.fix == "did you mean tiny-llama-3m?"
    assert "relative" in refused(tmp_path, "no/such").fix


def test_a_dead_link_and_a_file_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "m").symlink_to("gone")
    assert "link to gone" in refused(tmp_path).what
    (tmp_path / "f").write_text("")
    assert "is a file" in refused(tmp_path, "f").what


def test_a_folder_without_config_or_weights(tmp_path: Path) -> None:
    assert "no config.json" in refused(model(tmp_path / "m").parent).what
    model(tmp_path / "m", "config.json")
    assert "no weights" in refused(tmp_path).what
    model(tmp_path / "m", "other.safetensors")
    assert "other.safetensors" in refused(tmp_path).what


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickle_is_refused_with_the_command_that_converts(tmp_path: Path, name: str) -> None:
    error = refused(model(tmp_path / "m", "config.json", name).parent)
    assert name in error.what and "can run code" in error.what
    assert "safe_serialization=True" in error.fix and str(tmp_path / "m") in error.fix


def test_an_index_that_names_missing_shards(tmp_path: Path) -> None:
    model(tmp_path / "m", "config.json", "a.safetensors", shards={"x": "a.safetensors", "y": "b.safetensors"})
    error = refused(tmp_path)
    assert error.where.endswith(INDEX) and "1 of 2 shards" in error.what and "b.safetensors" in error.what


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 4}', '{"weight_map": {}}', "\xff", '{"weight_map": {"a": ["b"]}}'])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    model(tmp_path / "m", "config.json")
    (tmp_path / "m" / INDEX).write_text(text, encoding="latin1")
    assert refused(tmp_path).where.endswith(INDEX)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors"])
def test_an_index_cannot_point_out_of_its_folder(tmp_path: Path, name: str) -> None:
    model(tmp_path / "m", "config.json", shards={"x": name})
    assert "no file name" in refused(tmp_path).what


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    model(tmp_path / "m", "config.json", "model.safetensors", "a.safetensors", shards={"x": "a.safetensors"})
    assert "both" in refused(tmp_path).what


def test_dead_links_and_lfs_pointers_are_not_weights(tmp_path: Path) -> None:
    model(tmp_path / "m", "config.json", "model.safetensors")
    (tmp_path / "m/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "lfs pull" in refused(tmp_path).fix
    (tmp_path / "m/model.safetensors").unlink()
    (tmp_path / "m/model.safetensors").symlink_to("../blobs/gone")
    assert "../blobs/gone" in refused(tmp_path).what

"""A model of a hub is the model that its files are: planned from headers, then brought here; what makes no model is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import models
import pytest
from hubserver import HubServer
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from buildsys.errors import BuildError
from buildsys.hubs import hub_download, hub_errors
from buildsys.located import Located
from buildsys.sources import local
from buildsys.sources.hf_hub import Knobs, fetch, floats, locate
from buildsys.survey import survey

ID = "org/llama"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    monkeypatch.setattr(hub_errors, "WAITS_S", ())
    monkeypatch.setattr(hub_download, "WAITS_S", ())
    with HubServer() as running:
        running.use(monkeypatch, tmp_path / "hf")
        yield running


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.tiny_llama(tmp_path_factory.mktemp("llama"))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in models.files(folder).items()}


def find(tmp_path: Path, revision: str = "main") -> Located:
    return locate(Knobs(repo=ID, revision=revision), tmp_path / "recipes", tmp_path / "home")


def refused(tmp_path: Path) -> BuildError:
    with pytest.raises(BuildError) as caught:
        find(tmp_path)
    assert caught.value.where and caught.value.what and caught.value.fix
    return caught.value


def test_it_is_planned_as_its_copy_on_a_disk_and_then_comes(server: HubServer, llama: Path, tmp_path: Path) -> None:
    copy = local.locate(local.Knobs(path=str(llama), outside=True), tmp_path, tmp_path)
    extra = {"README.md": b"# A model", "pytorch_model.bin": b"\x80", "modeling_evil.py": b"", "onnx/model.safetensors": b""}
    commit = server.add("model", ID, contents(llama) | extra)
    found = find(tmp_path)
    assert found.names == copy.names and found.pin == f"{ID} at {commit[:12]}"
    assert survey(found.files, found.sizes) == survey(copy.files)
    assert not server.requests("README|evil|bin$|onnx")
    paths = fetch(found.how, found.sha256, lambda *_: None)
    assert {name: path.read_bytes() for name, path in paths.items()} == {name: path.read_bytes() for name, path in copy.files.items()}
    assert survey(paths) == survey(copy.files)


def test_shards(server: HubServer, llama: Path, tmp_path: Path) -> None:
    files = contents(llama)
    tensors = load_file(llama / "model.safetensors")
    shards = {"model-1.safetensors": sorted(tensors)[::2], "model-2.safetensors": sorted(tensors)[1::2]}
    for shard, names in shards.items():
        save_file({name: tensors[name] for name in names}, tmp_path / shard)
        files[shard] = (tmp_path / shard).read_bytes()
    files[INDEX] = json.dumps({"weight_map": {name: shard for shard, names in shards.items() for name in names}}).encode()
    del files["model.safetensors"]
    server.add("model", ID, files, lfs=lambda path, size: path.endswith((".safetensors", INDEX)))
    found = find(tmp_path)
    assert {*shards, INDEX} <= set(found.names) and survey(found.files, found.sizes).architecture.layers == 2
    server.add("model", ID, {"model-2.safetensors": None})
    error = refused(tmp_path)
    assert "1 of 2 shards" in error.what and error.where == f"{ID} at main/{INDEX}"


def test_a_tokenizer_in_large_storage_is_known_and_stays_away(server: HubServer, llama: Path, tmp_path: Path) -> None:
    server.add("model", ID, contents(llama), lfs=lambda path, size: path != "tokenizer_config.json")
    found = find(tmp_path)
    assert "tokenizer.json" in found.names and "tokenizer.json" not in found.files
    assert survey(found.files, found.sizes).tokenizer == "tokenizer.json" and found.files["config.json"].is_file()


def test_what_makes_no_model(server: HubServer, tmp_path: Path) -> None:
    server.add("model", ID, {"README.md": b"#"})
    assert "has no config.json" in refused(tmp_path).what
    server.add("model", ID, {"config.json": b"{}"})
    assert "no weights" in refused(tmp_path).what
    commit = server.add("model", ID, {"pytorch_model.bin": b"\x80"})
    error = refused(tmp_path)
    assert (
        "pickle" in error.what and "safe_serialization=True" in error.fix and f"revision='{commit}'" in error.fix and "local" in error.fix
    )


def test_offline_a_part_of_a_model_is_not_built(server: HubServer, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import snapshot_download

    server.add("model", ID, contents(llama))
    snapshot_download(ID, endpoint=server.url, cache_dir=tmp_path / "hf/hub", ignore_patterns="*.safetensors")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for _ in range(2):
        error = refused(tmp_path)
        assert "nothing tells whether" in error.what and f"hf download {ID} --revision main" in error.fix and "local" in error.fix
        snapshot_download(ID, endpoint=server.url, cache_dir=tmp_path / "hf/hub", ignore_patterns="tokenizer*")  # all but what is optional
    monkeypatch.delenv("HF_HUB_OFFLINE")
    find(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = find(tmp_path)
    assert survey(found.files, found.sizes) == survey(models.files(llama))


def test_only_a_commit_stays() -> None:
    assert floats(Knobs(repo=ID)) == "revision: main may move"
    assert floats(Knobs(repo=ID, revision="v1")) == "revision: v1 may move"
    assert floats(Knobs(repo=ID, revision="0" * 40)) == ""


@pytest.mark.parametrize(
    "knobs", [{}, {"repo": "llama"}, {"repo": "../x"}, {"repo": ID, "revision": ""}, {"repo": ID, "revision": "a/../b"}]
)
def test_knobs_that_name_nothing(knobs: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        Knobs.model_validate(knobs)

"""wikitext2, ptb, c4, pileval, gsm8k: the same text from the hub, from a copy of it, and from the raw files that people have."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hubserver import HubServer
from pydantic import ValidationError

from buildsys.errors import BuildError
from buildsys.located import Located
from buildsys.slots import modules
from tests.datasets import places

MODULES: dict[str, ModuleType] = {name: modules("datasets")[name] for name in places.HUB}
each = pytest.mark.parametrize("name", MODULES)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as running:
        running.use(monkeypatch, tmp_path / "cache")
        yield running


def asked(name: str, **knobs: Any) -> Any:
    return MODULES[name].Knobs(split=places.HUB[name][1], **knobs)


def texts(name: str, knobs: Any, found: Located) -> list[str]:
    """As the steps do it: fetch, where anything is away, then read without the knobs that say where."""
    module = MODULES[name]
    files = module.fetch(found.how, found.sha256, lambda *_: None) if found.how else found.files
    assert not found.how or set(files) == set(found.sha256)
    return list(module.texts(module.Knobs.model_construct(**knobs.model_dump(exclude=set(module.PLACES))), files))


def add(hub: HubServer, name: str, **more: bytes) -> str:
    repo, _, files = places.HUB[name]
    branch = "refs/convert/parquet" if name == "ptb" else "main"
    return hub.add("dataset", repo, {**files, "README.md": b"# Card", **more}, branch=branch)


@each
def test_the_hubs_text(name: str, hub: HubServer, tmp_path: Path) -> None:
    knobs = asked(name, revision=add(hub, name))
    found = MODULES[name].locate(knobs, tmp_path, tmp_path / "home")
    assert set(found.sha256) == set(places.HUB[name][2]) and places.HUB[name][0] in found.pin
    assert not any("/resolve/" in one.path for one in hub.log), "planning brings no data"
    assert texts(name, knobs, found) == places.TEXTS[name]
    asked_before = len(hub.log)
    again = MODULES[name].locate(knobs, tmp_path, tmp_path / "home")
    assert again.sha256 == found.sha256 and len(hub.log) == asked_before, "a commit is asked once"


@each
def test_the_same_text_lies_here(name: str, tmp_path: Path) -> None:
    for number, files in enumerate((places.HUB[name][2], *places.HERE[name])):
        places.write(tmp_path / f"base/{number}", files)
        knobs = asked(name, path=f"./base/{number}/")
        found = MODULES[name].locate(knobs, tmp_path, tmp_path / "home")
        assert not found.how and all(path.is_absolute() for path in found.files.values())
        assert texts(name, knobs, found) == places.TEXTS[name], files.keys()


@each
def test_a_copy_of_the_repository_is_the_same_step(name: str, hub: HubServer, tmp_path: Path) -> None:
    """The fetch step's key is made of names and digests: they must not tell where the files were."""
    there = MODULES[name].locate(asked(name, revision=add(hub, name)), tmp_path, tmp_path / "home")
    places.write(tmp_path / "copy", places.HUB[name][2])
    here = MODULES[name].locate(asked(name, path="copy"), tmp_path, tmp_path / "home")
    assert set(here.files) == set(there.sha256)


@each
def test_a_snapshot_of_the_shared_cache(name: str, tmp_path: Path) -> None:
    """Links to blobs that have no suffix: the names of the links count."""
    for number, (file, raw) in enumerate(places.HUB[name][2].items()):
        link = tmp_path / "snapshots/0a1b" / file
        link.parent.mkdir(parents=True)
        (tmp_path / f"blob{number}").write_bytes(raw)
        link.symlink_to(tmp_path / f"blob{number}")
    knobs = asked(name, path="snapshots/0a1b")
    assert texts(name, knobs, MODULES[name].locate(knobs, tmp_path, tmp_path)) == places.TEXTS[name]


@each
def test_what_is_not_there_is_told_with_what_would_do(name: str, hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, what in (("empty", "has none of"), ("gone", "no such folder")):
        with pytest.raises(BuildError, match=what) as caught:
            MODULES[name].locate(asked(name, path=path), tmp_path, tmp_path)
        assert caught.value.fix and caught.value.where == str(tmp_path / path)
    commit = hub.add("dataset", places.HUB[name][0], {"README.md": b"moved"})
    with pytest.raises(BuildError, match=places.HUB[name][0]) as caught:
        MODULES[name].locate(asked(name, revision=commit), tmp_path, tmp_path)
    assert "path:" in caught.value.fix or "holds" in caught.value.fix


@each
def test_a_dead_link_and_a_pointer_are_told(name: str, tmp_path: Path) -> None:
    (file,) = places.HUB[name][2]
    places.write(tmp_path / "copy", {file: b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 3\n"})
    with pytest.raises(BuildError, match=r"Git LFS pointer.*\n.*lfs pull"):
        MODULES[name].locate(asked(name, path="copy"), tmp_path, tmp_path)
    (tmp_path / "copy" / file).unlink()
    (tmp_path / "copy" / file).symlink_to("gone")
    with pytest.raises(BuildError, match="leads nowhere"):
        MODULES[name].locate(asked(name, path="copy"), tmp_path, tmp_path)


@each
def test_another_table_under_its_name_is_told(name: str, tmp_path: Path) -> None:
    (file,) = places.HUB[name][2]
    raw = places.table([{"body": "x"}]) if file.endswith("parquet") else b'{"body": "x"}'
    packed = {".zst": places.zst, ".gz": gzip.compress}.get(Path(file).suffix, bytes)
    places.write(tmp_path, {file: packed(raw)})
    with pytest.raises(BuildError, match=r"has no field .*its fields: body") as caught:
        texts(name, asked(name), Located({file: tmp_path / file}))
    assert file in caught.value.where and places.HUB[name][0] in caught.value.fix


@each
def test_offline_the_shared_cache_is_enough(name: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    knobs = asked(name, revision=add(hub, name))
    texts(name, knobs, MODULES[name].locate(knobs, tmp_path, tmp_path / "home"))
    hub.stop()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert texts(name, knobs, MODULES[name].locate(knobs, tmp_path, tmp_path / "new home")) == places.TEXTS[name]


@each
def test_only_what_may_move_floats(name: str) -> None:
    module = MODULES[name]
    expected = "revision: refs/convert/parquet may move" if name == "ptb" else ""
    assert module.floats(module.Knobs()) == expected, "the defaults are pinned to a commit where one is known"
    assert module.floats(module.Knobs(revision="main")) == "revision: main may move"
    assert module.floats(module.Knobs(revision="main", path="x")) == ""
    for wrong in ({"split": "valid"}, {"revision": "a b"}, {"path": ""}):
        with pytest.raises(ValidationError):
            module.Knobs(**wrong)


@pytest.mark.parametrize("name", ["c4", "pileval"])
def test_the_big_ones_are_read_from_the_start_alone(name: str, tmp_path: Path) -> None:
    (file,) = places.HUB[name][2]
    places.write(tmp_path, {file: places.HUB[name][2][file]})
    assert texts(name, asked(name, limit=5), Located({file: tmp_path / file})) == places.TEXTS[name][:5]
    assert MODULES[name].Knobs().limit == 10_000
    for limit in (0, -1, 1.5):
        with pytest.raises(ValidationError):
            MODULES[name].Knobs(limit=limit)


def test_wikitext_with_unknown_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.tokens").write_text("<unk>")
    with pytest.raises(BuildError, match=r"replaced by <unk>.*\n.*wiki\.test\.raw"):
        MODULES["wikitext2"].locate(asked("wikitext2", path="."), tmp_path, tmp_path)


def test_ptbs_script_is_no_way_to_its_text(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("dataset", "ptb-text-only/ptb_text_only", {"ptb_text_only.py": b"raise SystemExit", "README.md": b""})
    with pytest.raises(BuildError, match="has none of penn_treebank/test/"):
        MODULES["ptb"].locate(asked("ptb", revision=commit), tmp_path, tmp_path)

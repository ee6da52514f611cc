"""A release is the artifact and what speaks of it: the same one again, and nothing that a killed run left."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from buildsys.release import seal
from buildsys.release.provenance import SUMS, parse_sums
from buildsys.store import Store


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    store = Store(tmp_path / "artifacts")
    stage = store.stage("a" * 64)
    (stage / "config.json").write_text("{}")
    (stage / "model.safetensors").write_bytes(b"weights")
    artifact = store.commit("a" * 64, stage, {})
    monkeypatch.setattr(seal, "card", lambda facts: "# card\n")
    monkeypatch.setattr(seal, "documents", lambda facts, files, sizes: {"provenance/statement.json": json.dumps(files).encode()})
    return SimpleNamespace(name="r", artifact=artifact, store=store)


def test_sums_list_every_other_file(facts: Any) -> None:
    sealed = seal.seal(facts, facts.store, None)
    folder = seal.tree(facts, facts.store, sealed)
    listed = parse_sums((folder / SUMS).read_bytes(), SUMS)
    assert listed == {name: file.sha256 for name, file in sealed.files.items() if name != SUMS}
    assert {"README.md", "config.json", "model.safetensors", "provenance/statement.json"} == set(listed)


def test_the_same_facts_are_the_same_release(facts: Any) -> None:
    first, again = (seal.seal(facts, facts.store, None) for _ in range(2))
    assert first == again and seal.release("r", first, Path("x")).digest == first.digest()


def test_the_tree_knows_the_artifact_that_it_holds(facts: Any) -> None:
    sealed = seal.seal(facts, facts.store, None)
    facts.store.link("r", seal.tree(facts, facts.store, sealed))
    assert facts.store.linked("r") == facts.artifact.digest() != sealed.digest()


def test_what_a_killed_run_left_is_dropped(facts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sealed = seal.seal(facts, facts.store, None)
    card = facts.store.path(sealed, "README.md")
    facts.store.drop(sealed.key)
    stage = facts.store.stage(sealed.key)
    (stage / "README.md").hardlink_to(card)  # as a kill in the middle of a commit leaves it: read-only, and the store's own blob
    (stage / "more.txt").write_text("of another day")
    again = seal.seal(facts, facts.store, None)
    assert again == sealed and card.read_text() == "# card\n"

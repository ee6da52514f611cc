"""Every publisher of the folder: a rerun changes nothing, a dry run sends nothing, what is read back has the artifact's digests."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from buildsys import slots
from buildsys.publishers import Receipt
from buildsys.step import digest

PUBLISHERS = slots.modules("publishers")
KNOBS: dict[str, dict[str, Any]] = {"directory": {"path": "out"}}
"""The least that each must be told."""


def quiet(what: str, done: int, total: int) -> None:
    pass


def tree(folder: Path, text: str) -> dict[str, str]:
    """A deployable folder; its files' hashes."""
    for name in ("config.json", "model.safetensors", "deploy/README.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} {text}")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() for path in files}


def state(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*") if path.name != "lock")


@pytest.fixture(params=PUBLISHERS)
def publisher(request: pytest.FixtureRequest) -> tuple[ModuleType, Any]:
    module = PUBLISHERS[request.param]
    return module, module.Knobs(**KNOBS[request.param])


def test_rerun_is_idempotent(publisher: tuple[ModuleType, Any], tmp_path: Path) -> None:
    module, knobs = publisher
    tree(tmp_path / "tree", "a")
    first = module.publish(knobs, tmp_path / "tree", tmp_path / "to" / "x", quiet)
    before = state(tmp_path / "to")
    assert module.publish(knobs, tmp_path / "tree", tmp_path / "to" / "x", quiet) == first and state(tmp_path / "to") == before


def test_dry_run_sends_nothing(publisher: tuple[ModuleType, Any], tmp_path: Path) -> None:
    module, knobs = publisher
    files = tree(tmp_path / "tree", "a")
    lines = module.plan(knobs, files, tmp_path / "to" / "x")
    assert lines and all(isinstance(line, str) for line in lines) and not (tmp_path / "to").exists()


def test_read_back_digests_match(publisher: tuple[ModuleType, Any], tmp_path: Path) -> None:
    module, knobs = publisher
    for text in ("a", "b"):
        files = tree(tmp_path / "tree", text)
        receipt = module.publish(knobs, tmp_path / "tree", tmp_path / "to" / "x", quiet)
        assert isinstance(receipt, Receipt) and receipt.digest == digest(files) and "://" in receipt.url
        assert module.verify(knobs, files, tmp_path / "to" / "x", quiet) == receipt


def test_modules_are_slots(publisher: tuple[ModuleType, Any]) -> None:
    module, knobs = publisher
    assert isinstance(module.VERSION, int) and isinstance(knobs, slots.Frozen)

"""Bytecode is kept apart where every child would compile torch anew, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from buildsys import disk
from buildsys.bytecode import APART, FORBIDS, kept
from buildsys.workers import _environment


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch whose bytecode is nowhere yet, in front of the real one."""
    package = tmp_path / "site" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def nothing(): pass\n")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package


def test_python_keeps_it_beside_the_sources_where_it_may(installed: Path) -> None:
    assert kept({"A": "b"}) == {"A": "b"}


def test_what_was_compiled_at_installation_is_enough(installed: Path) -> None:
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(installed)], check=True)
    assert kept({FORBIDS: "1"}) == {FORBIDS: "1"}


def test_a_forbidden_one_is_kept_apart(installed: Path, tmp_path: Path) -> None:
    environment = kept({FORBIDS: "1", "A": "b"})
    assert environment.keys() == {"A", APART} and Path(environment[APART]).parent == disk.user_cache() / "bytecode"
    line = [sys.executable, "-c", "import torch; torch.nothing()"]
    subprocess.run(line, check=True, env={**environment, "PYTHONPATH": str(installed.parent)})
    assert [path.name for path in (tmp_path / "cache").rglob("__init__*.pyc") if path.parent.name == "torch"]
    assert [path.name for path in installed.iterdir()] == ["__init__.py"], "an image's own folders stay as they are"


def test_so_is_that_of_packages_of_somebody_else(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != installed)  # root may write everywhere
    assert APART in kept({})


def test_children_of_a_build_get_it(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORBIDS, "1")
    monkeypatch.delenv(APART, raising=False)
    assert FORBIDS not in _environment() and Path(_environment()[APART]).is_dir()


def test_who_names_a_folder_is_asked_for_no_other(installed: Path) -> None:
    assert kept({FORBIDS: "1", APART: "/there"}) == {FORBIDS: "1", APART: "/there"}


def test_other_packages_have_another_folder(installed: Path) -> None:
    """Of one path, one size and one time Python could not tell them apart."""
    one = kept({FORBIDS: "1"})
    (installed.parent / "torch-2.99.dist-info").mkdir()
    assert kept({FORBIDS: "1"})[APART] != one[APART]


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_nobody_else_may_write_there(installed: Path, tmp_path: Path, mode: int) -> None:
    assert APART in kept({FORBIDS: "1"})
    (tmp_path / "cache" / "buildsys" / "bytecode").chmod(mode)
    assert kept({FORBIDS: "1"}) == {FORBIDS: "1"}


def test_a_folder_of_somebody_else_is_not_used(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    assert kept({FORBIDS: "1"}) == {FORBIDS: "1"}


def test_a_cache_that_cannot_be_made_changes_nothing(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert kept({FORBIDS: "1"}) == {FORBIDS: "1"}


def test_who_has_no_home_compiles_each_time(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert kept({FORBIDS: "1"}) == {FORBIDS: "1"}


def test_without_torch_there_is_nothing_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buildsys.bytecode.find_spec", lambda _: None)
    assert kept({FORBIDS: "1"}) == {FORBIDS: "1"}

"""Files that patterns name: the user's own, and those of a repository or of its copy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from buildsys.errors import BuildError
from buildsys.io import globs

NAMES = ("README.md", "data/train-00000-of-00001.parquet", "data/deep/er/x.json", "en/a[1].txt", "en/a1.txt", "en/b.json.gz", "x.json")


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("x.json", ["x.json"]),
        ("./x.json", ["x.json"]),
        ("*.json", ["x.json"]),
        ("**/*.json", ["data/deep/er/x.json", "x.json"]),
        ("data/**", ["data/deep/er/x.json", "data/train-00000-of-00001.parquet"]),
        ("data/*", ["data/train-00000-of-00001.parquet"]),
        ("data/train-[0-9][0-9]*-of-*", ["data/train-00000-of-00001.parquet"]),
        ("en/a[1].txt", ["en/a[1].txt"]),  # a name with the signs of a glob is a name first
        ("en/a[!2].txt", ["en/a1.txt"]),
        ("en/?.json*", ["en/b.json.gz"]),
        ("e*/b*", ["en/b.json.gz"]),
        ("*/b.json", []),
        ("x[.json", []),
        ("x[.]json", ["x.json"]),
        ("[z-a].json", []),
        ("[!z-a].json", ["x.json"]),
        ("[^a-w].json", ["x.json"]),
        ("[^]", []),
        ("x.jso", []),
    ],
)
def test_patterns_over_names(pattern: str, named: list[str]) -> None:
    assert globs.matching(pattern, reversed(NAMES)) == named


@given(st.text("ab/.*?[]!-\\(){}+^$|", max_size=8), st.lists(st.text("ab/.[]-", min_size=1, max_size=6), max_size=4))
def test_any_pattern_is_understood(pattern: str, names: list[str]) -> None:
    found = globs.matching(pattern, names)
    assert set(found) <= set(names) and all(pattern in found for name in names if name == pattern)


def test_a_folder_is_listed_as_a_repository_is(tmp_path: Path) -> None:
    for name in ("b.txt", "data/a.txt", ".git/config", "data/.hidden"):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_text("x")
    (tmp_path / "copy/data/loop").symlink_to("..")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/data").symlink_to(tmp_path / "copy/data")
    (tmp_path / "snapshot/dead.txt").symlink_to("gone")
    assert list(globs.below(tmp_path / "copy")) == ["b.txt", "data/a.txt"]
    assert list(globs.below(tmp_path / "snapshot")) == ["data/a.txt", "data/loop/b.txt", "dead.txt"]


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(BuildError, match=f"is a file, not a folder.*\n.*{tmp_path}"):
        globs.below(tmp_path / "a.txt")
    with pytest.raises(BuildError, match="no such folder"):
        globs.below(tmp_path / "gone")


def test_a_folder_that_holds_everything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(globs, "MAX_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("x")
    with pytest.raises(BuildError, match="more than 3 files"):
        globs.below(tmp_path)

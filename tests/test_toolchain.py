"""The toolchain's lock: each recipe's versions come back, whatever was locked after it, and odd files are told with their line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from buildsys import toolchain
from buildsys.errors import BuildError
from buildsys.toolchain import Toolchain

VERSIONS = some.dictionaries(some.sampled_from(["python", "torch", "numpy of the tool"]), some.sampled_from(["3.11", "2.13.0+cpu", "1e6"]))


@given(builds=some.lists(some.tuples(some.sampled_from(["a", "b@x", "1e6"]), VERSIONS), max_size=5))
def test_each_recipe_has_what_it_was_built_with(builds: list[tuple[str, dict[str, str]]], tmp_path_factory: pytest.TempPathFactory) -> None:
    made = Toolchain()
    for name, versions in builds:
        made = made.having(name, versions)
    assert {name: made.of(name) for name in made.recipes} == dict(builds)
    path = tmp_path_factory.getbasetemp() / "toolchain.lock"
    toolchain.write(path, made)
    assert Toolchain.read(path, "t") == made and not toolchain.write(path, made)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lock: 2\ntools: {}\nrecipes: {}\n", "in format 2"),
        ("lock: 1\ntools: {torch: 2}\nrecipes: {}\n", "t:2  tools does not map"),
        ("lock: 1\ntools: {}\nrecipes: []\n", "t:3  recipes does not map"),
        ("lock: [", "is not YAML"),
    ],
)
def test_odd_files_are_told(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "toolchain.lock").write_text(text)
    with pytest.raises(BuildError) as caught:
        Toolchain.read(tmp_path / "toolchain.lock", "t")
    assert said in str(caught.value)

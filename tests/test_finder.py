"""A finder looks once, answers as looking each time would, and forgets with its command."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs

from buildsys.errors import BuildError
from buildsys.finder import Finder
from buildsys.plan import Plan, plan
from buildsys.store import Store
from buildsys.workspace import Workspace

VARIANTS = """\
target: {gpu: a10, session_len: 64}
matrix:
  kv8: {kv_cache: {policy: int8}, target: {gpu: h200}}
  two: {target: {count: 2}}
  g64: {quantization: {group_size: 64}}
  kept: {quantization: {skip: [lm_head, down_proj]}, format: compressed_tensors}
  rtn: {quantization: {method: [rtn]}, calibration: {samples: 8}}
"""


class Counting(Store):
    """Counts files that are looked at."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[str] = []

    def sha256(self, path: Path) -> str:
        self.asked.append(path.name)
        return super().sha256(path)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = runs.tiny(tmp_path / "workspace")
    path = folder / "recipes/tiny.yaml"
    path.write_text(path.read_text() + VARIANTS)
    return folder


def shown(plan: Plan) -> object:
    """All that planning says, but for what is the same object anyway."""
    return [(step.planned_key, step.hints, step.title) for step in plan.steps], plan.building, plan.serving, plan.notes, plan.layers


def test_a_shared_finder_changes_no_plan(workspace: Path) -> None:
    recipes, store = Workspace(workspace), Store(workspace / "artifacts")
    finder, names = Finder(store), list(recipes.names())
    assert len(names) == 6
    together = [plan(recipes.load(name), store, finder=finder) for name in (*names, *reversed(names))]
    apart = [plan(recipes.load(name), Store(workspace / "artifacts")) for name in (*names, *reversed(names))]
    assert [shown(one) for one in together] == [shown(one) for one in apart]


def test_each_file_is_looked_at_once_in_a_command_and_again_in_the_next(workspace: Path) -> None:
    recipes, store = Workspace(workspace), Counting(workspace / "artifacts")
    finder = Finder(store)
    for name in recipes.names():
        plan(recipes.load(name), store, finder=finder)
    assert len(store.asked) == len(set(store.asked)) == 7, "five of the model, two texts"
    (workspace / "recipes/verify.txt").write_text("other words " * 4000)
    before, after = (plan(recipes.load("tiny"), store, finder=one) for one in (finder, Finder(store)))
    assert dict(before.measures)["kl"].planned_key != dict(after.measures)["kl"].planned_key


def test_what_is_refused_is_refused_again_without_asking_and_told_at_each_line(workspace: Path) -> None:
    (workspace / "recipes/tiny.yaml").rename(workspace / "recipes/first.yaml")
    text = (workspace / "recipes/first.yaml").read_text().partition("target:")[0]
    (workspace / "recipes/first.yaml").write_text(text.replace("path: model", "path: nowhere"))
    (workspace / "recipes/second.yaml").write_text("# moved by a line\n" + text.replace("path: model", "path: nowhere"))
    recipes, finder = Workspace(workspace), Finder(Store(workspace / "artifacts"))
    told = []
    for name in ("first", "second"):
        with pytest.raises(BuildError, match="there is no such folder") as refused:
            plan(recipes.load(name), finder.store, finder=finder)
        told.append(refused.value.where)
    assert told == ["recipes/first.yaml:2", "recipes/second.yaml:3"]


def test_once_asks_once() -> None:
    finder, asked = Finder(Store()), []

    def find() -> int:
        asked.append(1)
        if len(asked) > 1:
            raise BuildError("hub", "does not answer", "wait")
        return 7

    assert [finder.once("a", find) for _ in range(3)] == [7, 7, 7]
    for _ in range(3):
        with pytest.raises(BuildError, match="does not answer"):
            finder.once("b", find)
    assert len(asked) == 2

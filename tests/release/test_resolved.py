"""The recipe that goes into cards and provenance: complete, readable again, and silent about the machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from buildsys.document import read
from buildsys.recipe import Recipe
from buildsys.release.resolved import _Dumper, resolved, text
from buildsys.workspace import Workspace

BASE = """\
quantization: {bits: 4, method: [awq, gptq]}
calibration: {dataset: {text_files: {paths: [../../text/a.txt, b/*.md]}}}
"""
RECIPE = """\
schema: 1
extends: bases/base.yaml
source: {local: {path: models/m}}
format: awq
target: {gpu: a10}
verify:
  text: {text_files: {paths: [held-out.txt], field: "1e5"}}
  kl: {max_nats: 0.05}
publish: {directory: {path: ../published}}
"""


def load(root: Path, text: str = RECIPE) -> Recipe:
    (root / "recipes/bases").mkdir(parents=True, exist_ok=True)
    (root / "recipes/bases/base.yaml").write_text(BASE)
    (root / "recipes/q.yaml").write_text(text)
    return Workspace(root).load("q")


def test_everything_that_decides_the_artifact_is_said(tmp_path: Path) -> None:
    said = resolved(load(tmp_path))
    assert json.loads(json.dumps(said)) == said
    assert said["schema"] == 1 and said["quantization"]["group_size"] == 128 and said["kv_cache"]["policy"] == "none"
    assert [next(iter(method)) for method in said["quantization"]["method"]] == ["awq", "gptq"]
    assert said["verify"]["kl"] == {"max_nats": 0.05} and "agreement" not in said["verify"]
    assert "session_len" not in said["target"], "null is nothing that a recipe can write"


def test_where_it_goes_is_not_said(tmp_path: Path) -> None:
    here = resolved(load(tmp_path / "a"))
    elsewhere = resolved(load(tmp_path / "b", RECIPE.replace("../published", "../other")))
    assert here == elsewhere and "publish" not in here and "report" not in here


def test_paths_are_relative_to_the_recipe_wherever_they_were_written(tmp_path: Path) -> None:
    said = resolved(load(tmp_path))
    assert said["source"]["local"]["path"] == "models/m"
    assert said["calibration"]["dataset"]["text_files"]["paths"] == ["../text/a.txt", "bases/b/*.md"]


def test_paths_out_of_the_workspace_keep_their_last_part(tmp_path: Path) -> None:
    written = RECIPE.replace("{path: models/m}", "{path: /home/somebody/models/m/, outside: true}")
    written = written.replace("[held-out.txt]", "[../../../secret/held-out.txt]").replace('"1e5"', '"1e5", outside: true')
    recipe = load(tmp_path, written)
    assert resolved(recipe)["source"]["local"]["path"] == "m"
    assert resolved(recipe)["verify"]["text"]["text_files"]["paths"] == ["held-out.txt"]
    shown = text(recipe)
    assert not any(word in shown for word in ("somebody", "secret", str(tmp_path), tmp_path.name))


def test_the_text_reads_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path)
    places = [leads_to(recipe, "calibration", "dataset"), leads_to(recipe, "verify", "text")]
    again = load(tmp_path, text(recipe))
    assert resolved(again) == resolved(recipe) and text(again) == text(recipe)
    assert [leads_to(again, "calibration", "dataset"), leads_to(again, "verify", "text")] == places


def leads_to(recipe: Recipe, section: str, key: str) -> list[str]:
    knobs = getattr(getattr(recipe, section), key).knobs
    return [os.path.normpath(recipe.folder(section, key) / path) for path in knobs.paths]


def test_equal_recipes_say_the_same_on_every_machine(tmp_path: Path) -> None:
    assert text(load(tmp_path / "a")) == text(load(tmp_path / "somewhere" / "else"))


def test_the_demo(tmp_path: Path) -> None:
    demo = Workspace(Path(__file__).resolve().parents[2]).load("demo")
    assert resolved(demo)["source"] == {"local": {"path": "model", "outside": False}}


WORDS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufeff\ufffe\uffff"), max_size=20)
HARD = st.sampled_from(
    ["1234e567", "0o17", "1e5", "yes", "null", "~", "", "0x10", "12:30", "# no comment", "a: b", "- a", "1_000", ".5", "<<"]
)


@pytest.mark.parametrize("values", [WORDS, HARD], ids=["any", "hard"])
def test_text_stays_text(values: st.SearchStrategy[str], tmp_path: Path) -> None:
    """Whatever PyYAML would write plain and document.py read as a number."""

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(values)
    def held(value: str) -> None:
        file = tmp_path / "x.yaml"
        file.write_text(yaml.dump({"value": value, "number": 1e-05}, Dumper=_Dumper, allow_unicode=True), encoding="utf-8")
        assert read(file, "x.yaml").data == {"value": value, "number": 1e-05}

    held()

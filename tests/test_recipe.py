"""What a recipe says once it is parsed, where each value stands, and which values do not go together."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pydantic
import pytest
import runs

from buildsys.errors import BuildError, BuildErrors
from buildsys.recipe import Recipe
from buildsys.scheme import Scheme
from buildsys.workspace import Workspace

SELF = """\
schema: 1
source: {local: {path: m}}
calibration: {dataset: self_generated, seed: 3}
quantization:
  bits: 4
  method: [awq, gptq]
format: awq
verify:
  text: self_generated
  kl: {max_nats: 0.1}
"""


def load(root: Path, text: str, name: str = "q") -> Recipe:
    (root / "recipes").mkdir(parents=True, exist_ok=True)
    (root / f"recipes/{name}.yaml").write_text(text)
    return Workspace(root).load(name)


def refused(root: Path, text: str) -> BuildError:
    with pytest.raises(BuildErrors) as caught:
        load(root, text)
    assert len(caught.value.errors) == 1, caught.value
    return caught.value.errors[0]


def test_a_recipe_and_its_defaults(tmp_path: Path) -> None:
    recipe = load(tmp_path, SELF)
    assert recipe.name == "q" and recipe.file == tmp_path / "recipes/q.yaml"
    assert recipe.quantization.scheme == Scheme(4, 128, False)
    assert [method.name for method in recipe.quantization.method] == ["awq", "gptq"]
    assert recipe.quantization.skip == ("lm_head",)
    assert (recipe.source.name, recipe.format.name, recipe.verify.text.name) == ("local", "awq", "self_generated")
    assert list(recipe.verify.checks) == ["kl"] and recipe.publish.publishers == {}
    assert recipe.kv_cache.policy == "none" and recipe.target is None
    assert recipe.calibration.seed != recipe.verify.seed


def test_a_recipe_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(pydantic.ValidationError):
        load(tmp_path, SELF).quantization.bits = 8  # type: ignore[misc]


def test_each_value_knows_its_line(tmp_path: Path) -> None:
    (tmp_path / "recipes/bases").mkdir(parents=True)
    (tmp_path / "recipes/bases/b.yaml").write_text("\n\ntarget:\n  gpu: h200\n")
    recipe = load(tmp_path, SELF + "extends: bases/b.yaml\n")
    assert recipe.at("quantization", "bits") == "recipes/q.yaml:5"
    assert recipe.at("quantization", "group_size") == "recipes/q.yaml:4"  # a default: the mapping that lacks it
    assert recipe.at("target", "gpu") == "recipes/bases/b.yaml:4"
    assert recipe.at("publish") == "recipes/q.yaml:1"


def test_paths_are_relative_to_the_file_that_wrote_them(tmp_path: Path) -> None:
    (tmp_path / "recipes/bases/deep").mkdir(parents=True)
    (tmp_path / "recipes/bases/deep/b.yaml").write_text("source: {local: {path: ../m}}\npublish: {directory: {path: out}}\n")
    text = SELF.replace("source: {local: {path: m}}", "extends: bases/deep/b.yaml\nsource: {local: {outside: true}}")
    recipe = load(tmp_path, text)
    assert recipe.folder("source") == recipe.folder("publish", "directory") == tmp_path / "recipes/bases/deep"
    assert recipe.folder("calibration", "dataset") == tmp_path / "recipes"


@pytest.mark.parametrize("path", ["../../m", "/models/m", "a/../../../m"])
def test_a_path_leaves_the_workspace_only_if_the_recipe_says_so(tmp_path: Path, path: str) -> None:
    error = refused(tmp_path, SELF.replace("path: m", f"path: {path}"))
    assert error.where == "recipes/q.yaml:2" and path in error.what and "outside: true" in error.fix
    assert load(tmp_path, SELF.replace("path: m", f"path: {path}, outside: true")).source.knobs.path == path  # type: ignore[attr-defined]


def test_paths_in_lists_and_publishers_are_held_to_the_same_rule(tmp_path: Path) -> None:
    text = SELF.replace("dataset: self_generated", "dataset: {text_files: {paths: [a.txt, ../../*.txt]}}")
    assert "paths[1]: ../../*.txt leads to" in refused(tmp_path, text).what
    assert "publish.directory.path" in refused(tmp_path, SELF + "publish: {directory: {path: /srv/models}}\n").what


def test_a_path_may_go_through_a_link_inside(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/m").symlink_to("/")
    assert load(tmp_path, SELF).folder("source") == tmp_path / "recipes"


@pytest.mark.parametrize(
    ("old", "new", "line", "what", "fix"),
    [
        ("[awq, gptq]", "[gptq, awq]", 6, "rescaling comes before rounding", "write [awq, gptq]"),
        ("[awq, gptq]", "[awq]", 6, "nothing rounds", "gptq"),
        ("[awq, gptq]", "[rtn, gptq]", 6, "rounds twice, by rtn and by gptq", "keep one"),
        ("[awq, gptq]", "[awq, awq, gptq]", 6, "names awq twice", "name awq once"),
        ("bits: 4", "bits: 3", 7, "format: awq holds 4-bit codes, quantization.bits is 3", "set bits: 4"),
        ("bits: 4", "bits: 4\n  overrides: {down_proj: {bits: 8}}", 8, "awq cannot hold 8-bit g128 asymmetric", "set format: comp"),
        ("bits: 4", "bits: 4\n  overrides: {down_proj: {group_size: 32}}", 8, "format: awq ", "compressed_tensors"),
        ("bits: 4", "bits: 4\n  overrides: {down_proj: {method: awq}}", 6, "overrides.down_proj.method: awq rescales", "gptq or rtn"),
        ("bits: 4", "bits: 4\n  number: fp8\n  group_size: -1\n  symmetric: true", 5, "fp8 goes with bits: 8, bits is 4", "set bits: 8"),
        (
            "bits: 4",
            "bits: 8\n  symmetric: true\n  activations: int8",
            4,
            "goes with group_size: -1, group_size is 128",
            "set group_size: -1",
        ),
        (
            "bits: 4",
            "bits: 8\n  group_size: -1\n  number: fp8",
            4,
            "number: fp8 goes with symmetric: true, symmetric is false",
            "set symmetric",
        ),
        ("format: awq", "format: awq\ntarget: {gpu: a100}", 8, "a100 is not in the table", "a100-40gb"),
        ("format: awq", "format: awq\ntarget: {gpu: abacus}", 8, "abacus is not in the table", "h200"),
        ("seed: 3", "seed: 1", 9, "verify.seed and calibration.seed are both 1", "set verify.seed: 2"),
    ],
)
def test_values_that_do_not_go_together(tmp_path: Path, old: str, new: str, line: int, what: str, fix: str) -> None:
    error = refused(tmp_path, SELF.replace(old, new))
    assert what in error.what and fix in error.fix
    assert error.where == f"recipes/q.yaml:{8 if 'verify.seed' in what else line}"  # a default stands at the mapping that lacks it


def test_self_generated_text_under_two_seeds_is_two_texts(tmp_path: Path) -> None:
    assert load(tmp_path, SELF.replace("seed: 3", "seed: 1").replace("verify:", "verify:\n  seed: 9")).verify.seed == 9


def test_parsing_loads_no_torch() -> None:
    lines = ["import sys", "from pathlib import Path", "from buildsys.workspace import Workspace", "Workspace(Path()).check()"]
    code = "; ".join([*lines, "print('torch' in sys.modules)"])
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("mixed", "what", "fix"),
    [
        ("{budget_bits: 4.5, bits: [3, 8]}", "bits is 4, and mixed chooses from 3, 8", "add 4 to mixed.bits"),
        ("{budget_bits: 9.5, bits: [4, 8]}", "budget_bits is 9.5; bits from 4 to 8 leave nothing to choose", "between 4 and 8"),
    ],
)
def test_budgets_that_choose_nothing(tmp_path: Path, mixed: str, what: str, fix: str) -> None:
    text = SELF.replace("format: awq", "format: gptq").replace("bits: 4", f"bits: 4\n  mixed: {mixed}")
    with pytest.raises(BuildErrors) as caught:
        load(tmp_path, text)
    assert any(what in error.what and fix in error.fix for error in caught.value.errors)


def test_overrides_and_what_they_come_to(tmp_path: Path) -> None:
    text = SELF.replace("format: awq", "format: compressed_tensors").replace(
        "bits: 4", "bits: 4\n  symmetric: true\n  overrides:\n    down_proj: {bits: 8}"
    )
    recipe = load(tmp_path, text)
    assert recipe.quantization.kinds == (Scheme(4, 128, True), Scheme(8, 128, True))
    assert recipe.at("quantization", "overrides", "down_proj") == "recipes/q.yaml:8"


def test_fp8_cannot_be_rounded_by_gptq(tmp_path: Path) -> None:
    fp8 = "bits: 8\n  group_size: -1\n  symmetric: true\n  number: fp8"
    error = refused(tmp_path, SELF.replace("bits: 4", fp8).replace("format: awq", "format: compressed_tensors"))
    assert "method gptq" in error.what and "rtn" in error.fix


@pytest.mark.parametrize(
    ("serve", "waive", "said"),
    (
        ("serve: {}", "[serve]", None),
        ("kl: {}", "[kl]", "no check of this recipe that can be skipped"),
        ("kl: {}", "[serve]", "no check of this recipe that can be skipped"),
        ("serve: {required: always}", "[serve]", "required is always"),
    ),
)
def test_only_what_can_be_skipped_is_waived(serve: str, waive: str, said: str | None, tmp_path: Path) -> None:
    workspace = runs.tiny(tmp_path / "workspace")
    recipe = workspace / "recipes" / "tiny.yaml"
    runs.edit(recipe, "  kl: {max_nats: 9.0}\n", f"  {serve}\n")
    runs.edit(recipe, "publish: {", f"publish: {{waive: {waive}, ")
    found = [str(error) for error in Workspace(workspace).check()]
    assert found == [] if said is None else any(said in error and "tiny.yaml:" in error for error in found), found

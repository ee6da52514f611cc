"""Finding, loading and checking the recipes of a workspace."""

from __future__ import annotations

from pathlib import Path

import pytest

from buildsys.errors import BuildError, BuildErrors
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
MATRIX = SELF + "matrix:\n  int8: {kv_cache: {policy: int8}}\n  g64:\n    quantization:\n      group_size: 64\n"


def workspace(root: Path, files: dict[str, str]) -> Workspace:
    for name, text in files.items():
        path = root / "recipes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Workspace(root)


def refused(found: Workspace, spec: str) -> BuildError:
    with pytest.raises(BuildError) as caught:
        found.find(spec)
    return caught.value


def test_names_are_stems_and_variants(tmp_path: Path) -> None:
    found = workspace(
        tmp_path,
        {"b.yaml": MATRIX, "deep/er/a.yaml": SELF, "bases/f.yaml": "format: awq\n", ".hidden/x.yaml": "", "m/config.json": "{}"},
    )
    assert list(found.names()) == ["a", "b", "b@g64", "b@int8"]
    assert found.names()["b@g64"] == tmp_path / "recipes/b.yaml"


def test_a_variant_is_laid_over_its_file_and_keeps_its_lines(tmp_path: Path) -> None:
    found = workspace(tmp_path, {"q.yaml": MATRIX})
    assert found.load("q").kv_cache.policy == "none" and found.load("q@int8").kv_cache.policy == "int8"
    variant = found.load("q@g64")
    assert variant.name == "q@g64" and variant.quantization.group_size == 64 and variant.quantization.bits == 4
    assert variant.at("quantization", "group_size") == "recipes/q.yaml:15"
    assert variant.at("quantization", "bits") == "recipes/q.yaml:5"


def test_variants_are_not_inherited(tmp_path: Path) -> None:
    found = workspace(tmp_path, {"q.yaml": MATRIX, "child.yaml": "extends: q.yaml\nkv_cache: {policy: int4}\n"})
    assert list(found.names()) == ["child", "q", "q@g64", "q@int8"]
    assert found.load("child").kv_cache.policy == "int4"


def test_two_files_of_one_name_are_refused_by_both_names(tmp_path: Path) -> None:
    found = workspace(tmp_path, {"a/q.yaml": SELF, "b/q.yaml": SELF})
    with pytest.raises(BuildErrors) as caught:
        found.names()
    assert "recipes/a/q.yaml" in str(caught.value) and "recipes/b/q.yaml" in str(caught.value)
    assert [error.where for error in found.check()] == ["recipes/b/q.yaml"]


@pytest.mark.parametrize("name", ["my recipe.yaml", "-x.yaml", "q@v.yaml", "ü.yaml"])
def test_file_names_that_are_no_recipe_names(tmp_path: Path, name: str) -> None:
    assert "rename it" in workspace(tmp_path, {name: SELF}).check()[0].fix


def test_find_takes_names_globs_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = workspace(tmp_path, {"q.yaml": MATRIX, "sub/r1.yaml": SELF, "sub/r2.yaml": SELF})
    monkeypatch.chdir(tmp_path)
    assert found.find("r2,q") == ["r2", "q"]
    assert found.find(" q , q@* ,q") == ["q", "q@g64", "q@int8"]
    assert found.find("*") == ["q", "q@g64", "q@int8", "r1", "r2"]
    assert found.find("recipes/sub/*.yaml") == ["r1", "r2"]
    assert found.find("recipes/sub/r1.yaml") == ["r1"]
    assert found.find(str(tmp_path / "recipes/q.yaml")) == ["q"]
    monkeypatch.chdir(tmp_path / "recipes")
    assert found.find("sub/../q.yaml") == ["q"]


@pytest.mark.parametrize(
    ("spec", "what", "fix"),
    [
        ("dmeo", "is no recipe", "did you mean demo?"),
        ("demo,demo@itn8", "is no recipe", "did you mean demo@int8?"),
        ("zzzzzz", "is no recipe", "doit list"),
        ("x*", "matches none", "doit list"),
        ("recipes/none.yaml", "is no file", "correct the path"),
        ("recipes/bases/f.yaml", "is a fragment", "name a recipe"),
        ("", "names no recipe", "recipe=NAME"),
        (" , ", "names no recipe", "recipe=NAME"),
    ],
)
def test_find_refuses_what_it_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, what: str, fix: str) -> None:
    found = workspace(tmp_path, {"demo.yaml": MATRIX, "bases/f.yaml": "format: awq\n"})
    monkeypatch.chdir(tmp_path)
    error = refused(found, spec)
    assert what in error.what and fix in error.fix


def test_a_folder_without_recipes(tmp_path: Path) -> None:
    assert "no recipes in" in refused(Workspace(tmp_path), "demo").what
    assert Workspace(tmp_path).check() == []


def test_load_of_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="is no recipe"):
        workspace(tmp_path, {"demo.yaml": SELF}).load("dem")


def test_a_broken_file_hinders_no_other(tmp_path: Path) -> None:
    found = workspace(tmp_path, {"good.yaml": SELF, "bad.yaml": "matrix: {a: [}\n"})
    assert list(found.names()) == ["bad", "good"]
    assert found.load("good").name == "good"
    assert [error.where for error in found.check()] == ["recipes/bad.yaml:1"]


def test_fragments_may_be_incomplete_and_not_wrong(tmp_path: Path) -> None:
    found = workspace(
        tmp_path,
        {
            "bases/good.yaml": "quantization: {bits: 3}\ntarget: null\nverify: {kl: {max_nats: 1}}\nsource: {local: {outside: true}}\n",
            "bases/wrong.yaml": "quantization:\n  bitz: 3\n  group_size: 7\nformat: nope\n",
            "bases/variants.yaml": "matrix: {a: {}}\n",
            "bases/broken.yaml": "a: [\n",
        },
    )
    assert found.names() == {}
    told = {error.where.removeprefix("recipes/bases/"): error.what for error in found.check()}
    assert sorted(told) == ["broken.yaml:2", "variants.yaml:1", "wrong.yaml:2", "wrong.yaml:3", "wrong.yaml:4"]
    assert "matrix is not inherited" in told["variants.yaml:1"]
    assert "quantization.bitz is an unknown key" in told["wrong.yaml:2"]


@pytest.mark.parametrize(
    ("matrix", "what"),
    [
        ("[a]", "not a mapping of variant names"),
        ("{a: 1}", "matrix.a is not a mapping"),
        ("{a: }", "matrix.a is not a mapping"),
        ("{'a b': {}}", "the variant's name is 'a b'"),
        ("{a: {extends: x.yaml}}", "matrix.a has extends"),
        ("{a: {matrix: {}}}", "matrix.a has matrix"),
        ("{a: {formt: awq}}", "formt is an unknown key"),
        ("{a: {quantization: {bits: 3}}}", "format: awq holds 4-bit codes, quantization.bits is 3"),
        ("{a: {target: null}}", "target is empty (null)"),
    ],
)
def test_what_is_wrong_with_a_matrix(tmp_path: Path, matrix: str, what: str) -> None:
    found = workspace(tmp_path, {"q.yaml": f"{SELF}matrix: {matrix}\n"}).check()
    assert len(found) == 1 and what in found[0].what, found


def test_the_shipped_recipes_are_valid_and_point_editors_at_the_schema() -> None:
    root = Path(__file__).parents[1]
    assert Workspace(root).check() == []
    files = sorted((root / "recipes").rglob("*.yaml"))
    assert files
    for file in files:
        mark, _, target = file.read_text().partition("\n")[0].partition("$schema=")
        assert mark == "# yaml-language-server: "
        assert (file.parent / target).resolve() == root / "recipes/recipe.schema.json", file

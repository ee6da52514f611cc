"""`doit compare`: builds side by side; paired where source and text are the same, and nothing is built for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import runs
from safetensors.torch import load_file

from buildsys.quant.bootstrap import interval
from buildsys.store import Store

pytestmark = pytest.mark.slow


def scores(workspace: Path, recipe: str) -> dict[str, object]:
    """What `score` kept of a recipe, read by hand."""
    made, store = runs.planned(workspace, recipe), Store(workspace / "artifacts")
    step = next(step for step in made.steps if step.kind == "score")
    artifact = store.walk(made.steps)[step.planned_key].artifact
    assert artifact is not None
    return dict(load_file(store.path(artifact, "scores.safetensors")))


def row(ran: runs.Ran, name: str) -> str:
    """The line of the table that begins with `name`."""
    return next(line for line in ran.out.splitlines() if line.startswith(name))


def test_the_difference_is_that_of_the_same_tokens(schemes: tuple[Path, runs.Ran], tmp_path: Path) -> None:
    workspace = runs.copy(schemes[0], tmp_path / "copy")
    before = runs.manifests(workspace).keys()
    ran = runs.doit(workspace, "compare", "recipes=schemes@overrides,schemes@w8a8").fine()
    ours, theirs = (scores(workspace, f"schemes@{name}")["kl"].double() for name in ("overrides", "w8a8"))  # type: ignore[attr-defined]
    found = interval(theirs - ours)
    said = f"better: {found.value:+.3g} nats, {found.low:+.3g} to {found.high:+.3g}"
    assert said in row(ran, "KL against schemes@overrides"), "eight bits are closer than four"
    page = (workspace / "artifacts" / "compare-schemes@overrides+schemes@w8a8.html").read_text()
    assert page.count(">better<") == 1 and "smoothquant + rtn" in page
    assert runs.manifests(workspace).keys() == before, "nothing was built"


def test_the_same_without_doit(schemes: tuple[Path, runs.Ran], tmp_path: Path) -> None:
    workspace, names = runs.copy(schemes[0], tmp_path / "copy"), ["schemes@mixed", "schemes@overrides"]
    command = [sys.executable, "-m", "buildsys", "compare", *names]
    said = subprocess.run(command, cwd=workspace, env=runs.environment(), capture_output=True, text=True, check=True)
    assert said.stdout == runs.doit(workspace, "compare", f"recipes={','.join(names)}").fine().out


def test_what_is_not_comparable_stands_side_by_side(tiny: Path, tmp_path: Path) -> None:
    """Another text for one; another model for the other."""
    workspace = runs.copy(tiny, tmp_path / "copy")
    recipes = workspace / "recipes"
    text = (recipes / "tiny.yaml").read_text()
    (recipes / "other-text.yaml").write_text(text.replace("  kl:", "  seed: 7\n  kl:"))
    (recipes / "other-model.yaml").write_text(text.replace("path: model}", "path: other}"))
    (recipes / "same.yaml").write_text(text)
    import models

    models.tiny_llama(recipes / "other", seed=3)
    runs.doit(workspace, "build", "recipe=other-text,other-model,same").fine()
    ran = runs.doit(workspace, "compare", "recipes=tiny,other-text,other-model,same").fine()
    said = row(ran, "KL against tiny")
    assert [said.count(each) for each in ("not the same text as tiny", "not the same source as tiny")] == [1, 1]
    assert "within noise: 0 nats, 0 to 0" in said


def test_what_is_not_built_is_told_with_its_command(tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "copy")
    for name in ("one", "two"):
        text = (workspace / "recipes" / "tiny.yaml").read_text()
        (workspace / "recipes" / f"{name}.yaml").write_text(text.replace("samples: 4", "samples: 3"))
    ran = runs.doit(workspace, "compare", "recipes=tiny,one,two")
    assert ran.status != 0 and "Traceback" not in ran.err + ran.out
    said = ran.out + ran.err
    assert "run `doit build recipe=one`" in said and "run `doit build recipe=two`" in said and "recipe=tiny`" not in said
    assert not list((workspace / "artifacts").glob("compare-*"))


def test_one_alone_and_crowds_are_refused(tiny: Path) -> None:
    for line in ("recipes=tiny", "recipes=tiny,tiny"):
        ran = runs.doit(tiny, "compare", line)
        assert ran.status != 0 and "names 1; from 2 to 8 are compared" in ran.out + ran.err
    assert "write doit compare recipes=tiny" in runs.doit(tiny, "compare").err
    assert "says nothing to compare" in runs.doit(tiny, "compare", "recipe=tiny").err


def test_buildsys_against_lmdeploy(backends: tuple[Path, runs.Ran], tmp_path: Path) -> None:
    """The same scheme and tokens by both: quality, size, seconds and memory of each."""
    backends[1].fine()
    workspace = runs.copy(backends[0], tmp_path / "copy")
    names = [f"both@{name}" for name in ("native", "lmdeploy", "native8", "lmdeploy8")]
    ran = runs.doit(workspace, "compare", f"recipes={','.join(names)}").fine()
    built = {one["meta"]["built"]["title"]: one["meta"]["built"] for one in runs.manifests(workspace).values()}
    lite = built["4-bit g128 asymmetric, awq + rtn by lmdeploy 0.18.0"]
    assert f"{lite['seconds']:.1f} s, {lite['peak_rss_bytes'] / 1e6:.0f} MB at most" in row(ran, "  quantize")
    assert row(ran, "  calibrate").split()[-1] == "-", "LMDeploy has no such step"
    made = runs.planned(workspace, "both@lmdeploy")
    artifact = Store(workspace / "artifacts").walk(made.steps)[made.artifact.planned_key].artifact
    assert artifact is not None and row(ran, "size").count(f"{artifact.size / 1e6:.1f} MB") == 2, "one scheme, one size"
    assert all("nats" in row(ran, what) for what in ("KL, nats", "KL against both@native"))
    measured = json.loads((workspace / "artifacts" / "both@lmdeploy" / "provenance" / "measurements.json").read_text())
    (kl,) = measured["checks"]["kl"]["measurements"]
    assert f"{kl['value']:.4g} ({kl['low']:.4g} to {kl['high']:.4g})" in row(ran, "KL, nats")
    page = (workspace / "artifacts" / f"compare-{'+'.join(names)}.html").read_text()
    assert "by lmdeploy 0.18.0" in page and "no such step" in page and "Time and memory" in page

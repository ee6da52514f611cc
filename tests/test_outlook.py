"""What `doit plan` says: a bar and its numbers, the remedies of what does not fit, and which machine builds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import runs

from buildsys import footprint, gpus, plan
from buildsys.errors import BuildErrors
from buildsys.gpus import GPU
from buildsys.outlook import BAR, outlook
from buildsys.plan import Plan
from buildsys.store import Store
from buildsys.workspace import Workspace

TARGET = "format: awq\ntarget: {gpu: %s}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny(tmp_path_factory.mktemp("base") / "workspace", num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture
def workspace(base: Path, tmp_path: Path) -> Path:
    return runs.copy(base, tmp_path / "workspace")


def planned(workspace: Path, target: str, device: str = "cpu", **edits: str) -> Plan:
    runs.edit(workspace / "recipes/tiny.yaml", "format: awq", target)
    for before, after in edits.items():
        runs.edit(workspace / "recipes/tiny.yaml", f"{before}: none", f"{before}: {after}")
    store = Store(workspace / "artifacts")
    return plan.plan(Workspace(workspace).load("tiny"), store, 2, device=device)  # type: ignore[arg-type]


def test_parts_and_their_bar(workspace: Path) -> None:
    made = planned(workspace, TARGET % "a10", policy="int8")
    assert made.serving is not None
    text = "\n".join(outlook(made))
    bar = text[text.index("[") + 1 : text.index("]")]
    assert len(bar) == BAR and bar.count("=") == round(BAR * made.serving.pool_bytes / made.serving.memory_bytes)
    sizes = [float(size) for size in re.findall(r"[.#=+] [A-Za-z ]+ ([\d.]+) GiB", text)]
    held = (made.serving.context_bytes, made.serving.weights_bytes, made.serving.pool_bytes, made.serving.workspace_bytes)
    assert sizes == [pytest.approx(size / footprint.GIB, abs=0.006) for size in held]
    for part in ("embeddings", "output head", "attention", "MLP", "norms and biases"):
        assert re.search(rf"weights: .*{part} [\d.]+ GiB", text), part
    other = {policy: footprint.kv_bytes_per_token(made.survey.architecture, policy) for policy in footprint.KV_BITS}
    assert f"{other['int8']:,} bytes of KV a token with policy int8 (none {other['none']:,}, int4 {other['int4']:,})" in text
    assert f"{made.serving.pool_tokens:,} tokens in the pool, {made.serving.sessions} full sessions of 256 tokens at once" in text


def test_speed_beside_the_source(workspace: Path) -> None:
    made = planned(workspace, TARGET % "a10")
    assert made.serving is not None
    text = "\n".join(outlook(made))
    first, last = made.serving.decode
    assert f"in each session: {first.tokens_per_s:,.0f} tokens/s at batch 1, {last.tokens_per_s:,.0f} tokens/s at batch 32\n" in text
    theirs = re.search(r"source fp16 would: ([\d,]+) and ([\d,]+) tokens/s$", text, re.MULTILINE)
    assert theirs is not None and int(theirs[1].replace(",", "")) < first.tokens_per_s
    assert not any("slower" in line for line in outlook(made))


def test_where_few_bits_are_slower_it_is_said(workspace: Path) -> None:
    assert any(line.strip().startswith("slower than its source on h200") for line in outlook(planned(workspace, TARGET % "h200")))


def test_a_source_that_has_no_room(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned(workspace, TARGET % "a10")
    monkeypatch.setattr(footprint, "CONTEXT_BYTES", int(30 * footprint.GIB))
    assert any(line.endswith("if it had room") for line in outlook(made))


def test_what_does_not_fit_says_its_parts_and_what_would(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpus.GPUS, "small", GPU("small", 80, 0.2, 300, 60, "a GPU that does not exist"))
    with pytest.raises(BuildErrors) as raised:
        planned(workspace, "format: awq\ntarget: {gpu: small}")
    (error,) = raised.value.errors
    assert re.search(r"needs [\d.]+ GiB \(context 0\.9, weights 0\.0, workspace 0\.1, one session of 256 tokens 0\.0\)", error.what)
    assert error.fix == "set target.gpu: t4 | v100 | a10"


def test_heads_that_gpus_cannot_share(workspace: Path) -> None:
    with pytest.raises(BuildErrors) as raised:
        planned(workspace, "format: awq\ntarget: {gpu: a10, count: 3}")
    (error,) = raised.value.errors
    assert "2 attention heads are not shared out evenly over 3 GPUs" in error.what and error.fix == "set count to 1 or 2"


def test_the_machine_that_builds_is_named(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def first(made: Plan) -> str:
        return next(outlook(made))

    monkeypatch.setattr(gpus, "here", lambda: None)
    made = planned(workspace, TARGET % "a10")
    assert "(CPU, roughly)" in first(made)
    store, recipe = Store(workspace / "artifacts"), Workspace(workspace).load("tiny")
    assert "(CPU, roughly)" in first(plan.plan(recipe, store, 2, device="auto"))
    assert "(a10, roughly)" in first(plan.plan(recipe, store, 2, device="cuda")), "none is here: the target's"
    monkeypatch.setattr(gpus, "here", lambda: gpus.GPUS["h200"])
    assert "(h200, roughly)" in first(plan.plan(recipe, store, 2, device="auto"))
    assert "of the GPU's" in first(plan.plan(recipe, store, 2, device="cuda"))
    assert "(CPU, roughly)" in first(plan.plan(recipe, store, 2, device="cpu"))

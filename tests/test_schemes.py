"""Models held in more ways than one, from recipe to release: overrides, W8A8, mixed bits, another architecture's names, experts.

Each through `doit`, and each read again by a program that is none of ours.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import models
import pytest
import readers
import released
import runs
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from buildsys.release.audit import audit
from buildsys.release.card import card
from buildsys.slots import modules
from buildsys.store import Store

VARIANTS = ("overrides", "w8a8", "mixed", "relaid", "experts")
FAMILY = {"relaid": "internlm2", "experts": "mixtral"}  # the others are Llamas
RECIPE = Path("recipes/schemes.yaml")

Built = tuple[Path, runs.Ran]


def artifact(workspace: Path, variant: str) -> Path:
    return workspace / "artifacts" / f"schemes@{variant}"


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def output(workspace: Path, variant: str, kind: str, name: str) -> Path:
    """A file that the one step of this kind wrote; of measure, the check `name` has one."""
    plan, store = runs.planned(workspace, f"schemes@{variant}"), Store(workspace / "artifacts")
    steps = [step for step in plan.steps if step.kind == kind]
    step = dict(plan.measures)[name] if kind == "measure" else steps[-1]
    found = store.walk(plan.steps)[step.planned_key].artifact
    assert found is not None
    return store.path(found, "measurements.json" if kind == "measure" else name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_gate_passes(schemes: Built, variant: str) -> None:
    workspace, ran = schemes
    ran.fine()
    said = [line.split()[1:3] for line in ran.out.splitlines() if line.startswith(f"schemes@{variant}: ") and "limit: " in line]
    assert said == [["passed", check] for check in ("codes", "codes", "kl", "lint")]
    assert artifact(workspace, variant).is_symlink()


def test_what_is_equal_is_built_once(schemes: Built) -> None:
    built = [kind for kind, _ in schemes[1].rows("built")]
    assert {kind: built.count(kind) for kind in ("fetch", "calibrate", "allocate", "quantize", "pack", "assemble")} == {
        "fetch": 5,  # three models, two texts
        "calibrate": 3,
        "allocate": 1,
        "quantize": 5,
        "pack": 5,
        "assemble": 5,
    }


def test_second_build_is_cached(schemes: Built, tmp_path: Path) -> None:
    workspace = runs.copy(schemes[0], tmp_path / "workspace")
    again = runs.doit(workspace, "build", "recipe=schemes@*").fine()
    assert not again.rows("built") and len(again.rows("cached")) >= len(schemes[1].rows("built"))
    assert runs.outputs(workspace) == runs.outputs(schemes[0])


# What the artifacts say


def test_config_tells_the_schemes(schemes: Built) -> None:
    for variant in VARIANTS:
        plan, said = runs.planned(schemes[0], f"schemes@{variant}"), config(artifact(schemes[0], variant))["quantization_config"]
        told = plan.recipe.format.module.schemes_of(said)
        assert told.default == plan.recipe.quantization.scheme
        if variant == "overrides":
            assert told.own == plan.layers.schemes.own and told.left_float == {"lm_head", "model.layers.0.self_attn.o_proj"}
            assert {str(scheme) for scheme in told.own.values()} == {"8-bit g64 symmetric"}
        if variant == "mixed":
            chosen = json.loads(output(schemes[0], variant, "allocate", "schemes.json").read_text())
            assert {name: told.of(name).bits for name in chosen} == {name: scheme["bits"] for name, scheme in chosen.items()}
            assert len({scheme["bits"] for scheme in chosen.values()}) > 1 and len(chosen) == 14


def test_mixed_keeps_its_budget(schemes: Built) -> None:
    stored = load_file(artifact(schemes[0], "mixed") / "model.safetensors")
    held = {name: value for name, value in stored.items() if name.endswith((".qweight", ".qzeros", ".scales"))}
    weights = sum(len(stored[f"{name.removesuffix('.scales')}.g_idx"]) * value.shape[1] for name, value in held.items() if "scales" in name)
    bits = 8 * sum(value.numel() * value.element_size() for value in held.values()) / weights
    assert 4.2 < bits <= 4.4
    manifests = runs.manifests(schemes[0]).values()
    assert [one["meta"]["average_bits"] for one in manifests if "average_bits" in one["meta"]] == [round(bits, 4)]


@pytest.mark.parametrize(("variant", "backend"), [("overrides", None), ("w8a8", "pytorch"), ("mixed", None), ("relaid", "pytorch")])
def test_a_profile_is_there_where_an_engine_is(schemes: Built, variant: str, backend: str | None) -> None:
    profile = artifact(schemes[0], variant) / "deploy" / "lmdeploy.yaml"
    assert profile.exists() == (backend is not None)
    assert backend is None or yaml.safe_load(profile.read_text())["backend"] == backend


def test_a_model_written_as_a_llama_asks_for_no_code(schemes: Built) -> None:
    source, written = config(schemes[0] / "recipes" / "internlm2"), config(artifact(schemes[0], "relaid"))
    assert source["architectures"] == ["InternLM2ForCausalLM"] and "auto_map" in source
    assert written["architectures"] == ["LlamaForCausalLM"] and "auto_map" not in written
    shown = card(released.facts(schemes[0], "schemes@relaid"))
    assert "InternLM2ForCausalLM, written as LlamaForCausalLM" in shown and "library_name: transformers" in shown


# What others read


def theirs(folder: Path, variant: str, rounds: bool, scratch: Path) -> nn.Module:
    """The artifact as transformers computes it: what its own compressed-tensors reader unpacks, or readers.py."""
    from transformers import AutoModelForCausalLM

    whole = folder if variant == "overrides" else readers.as_float(folder, scratch / "float")
    model: nn.Module = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32)
    for name, module in model.named_modules():
        if rounds and isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda _, inputs: (to_int8(inputs[0]),))
    return model


def to_int8(x: Tensor) -> Tensor:
    """Each token by its largest magnitude, halves away from zero."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).sign() * torch.floor((x / scale).abs() + 0.5) * scale


@pytest.mark.parametrize("variant", VARIANTS)
def test_kl_of_an_independent_reader_is_verifys(schemes: Built, variant: str, tmp_path: Path) -> None:
    workspace, _ = schemes
    tokens = load_file(output(workspace, variant, "tokens", "tokens.safetensors"))["tokens"]
    source = models.streamed(models.opened(workspace / "recipes" / FAMILY.get(variant, "llama")), tokens)
    model = theirs(artifact(workspace, variant), variant, variant == "w8a8", tmp_path)
    with torch.inference_mode():
        p, q = (logits[:, :-1].double().log_softmax(-1) for logits in (source, model(tokens.long()).logits))
    (measured,) = json.loads(output(workspace, variant, "measure", "kl").read_text())
    assert measured["value"] > 1e-5
    assert float((p.exp() * (p - q)).sum(-1).mean()) == pytest.approx(measured["value"], rel=0.02)


def test_verify_finds_nothing_wrong(schemes: Built) -> None:
    """`doit verify` for one; for the others what it calls, in this process."""
    for variant, linears in {"overrides": 13, "w8a8": 14, "mixed": 14, "relaid": 14, "experts": 32}.items():
        seen = audit(artifact(schemes[0], variant), None, lambda what, done, total: None)
        assert not seen.findings and any(f" {linears} packed linears are sound" in line for line in seen.lines), variant
    assert "nothing wrong was found" in runs.doit(schemes[0], "verify", "path=artifacts/schemes@relaid").fine().out


def test_report_of_experts_and_of_a_model_under_other_names(schemes: Built, tmp_path: Path) -> None:
    workspace = runs.copy(schemes[0], tmp_path / "workspace")
    ran = runs.doit(workspace, "report", "recipe=schemes@experts,schemes@relaid,schemes@mixed").fine()
    for variant in ("experts", "relaid", "mixed"):
        assert f"artifacts/schemes@{variant}.html" in ran.out
        page = (workspace / "artifacts" / f"schemes@{variant}.html").read_text()
        assert "Passed: all 4 gates hold." in page and ("<strong>4-bit g32 asymmetric, mixed, " in page) == (variant == "mixed")
        assert "layer 1, down: " in page and "</html>" in page


# Changes


def test_a_changed_override_runs_quantize_again_and_what_follows(schemes: Built, tmp_path: Path) -> None:
    workspace = runs.copy(schemes[0], tmp_path / "workspace")
    runs.edit(workspace / RECIPE, "down_proj: {bits: 8, group_size: 64}", "down_proj: {bits: 8}")
    before = os.readlink(artifact(workspace, "overrides"))
    ran = runs.doit(workspace, "build", "recipe=schemes@overrides").fine()
    again = [kind for kind, _ in ran.rows("built")]
    checks = [name for name, module in modules("checks").items() if module.ALWAYS]
    assert sorted(again) == sorted(["quantize", "pack", "assemble", "score", *["measure"] * len({*checks, "kl"})])
    assert os.readlink(artifact(workspace, "overrides")) != before

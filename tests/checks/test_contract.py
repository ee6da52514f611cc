"""Every check of the folder: identical models pass, a corrupted one fails, and the module offers what judge reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from buildsys import slots
from buildsys.formats import awq
from buildsys.io import checkpoint
from buildsys.measurement import Limit
from buildsys.quant.blocks import save_block
from buildsys.quant.linear import QuantizedLinear

CHECKS = slots.modules("checks")
READABLE = {"packed", "blocks", "scores", "kv_scores", "served", "source", "plan"}

LIMITS: dict[str, dict[str, float]] = {
    "agreement": {"min_share": 0.99},
    "kl": {"max_nats": 0.01},
    "kv": {"max_nats": 0.01, "max_increase_nats": 0.01},
    "memory": {"max_gib": 4.0},
    "perplexity": {"max_ratio": 1.01},
    "serve": {"min_speedup": 1.5, "max_vram_gib": 10.0, "min_agreement": 0.95},
}
"""Bounds that a sound model keeps by a margin; a check that is not named here has none to set."""

Inputs = tuple[Mapping[str, Any], Any]


def scored(made: Any, folder: Path, harm: float) -> Inputs:
    plain, with_kv = made.random(harm=harm), made.random(harm=2 * harm)
    inputs = {"scores": made.write(folder / "plain", plain), "kv_scores": made.write(folder / "kv", with_kv, "int4")}
    return inputs, made.Context({"kv_cache": {"policy": "int4"}})


def planned(made: Any, _: Path, harm: float) -> Inputs:
    target = {"gpu": "t4", "count": 1, "session_len": 1_000_000_000 if harm else 1024, "max_batch_size": 4}
    return {}, made.Context({"target": target, "kv_cache": {"policy": "none", "max_entry_count": 0.5}})


def packed(made: Any, folder: Path, harm: float) -> Inputs:
    """Two blocks as quantize writes them, and the model that pack makes of them; harmed: a layer's scales are lost on the way."""
    context, generator = made.Context(format=awq), torch.Generator().manual_seed(0)
    architecture, scheme = context.architecture, context.schemes.default
    model: dict[str, torch.Tensor] = {}
    blocks: dict[str, Path] = {}
    folder.mkdir()
    for name, shape in architecture.tensors().items():
        model[name] = torch.rand(shape, generator=generator).half()
    for layer in range(architecture.layers):
        linears = {}
        for linear in architecture.linears:
            name, shape = architecture.prefix(layer) + linear.name, (linear.out_features, scheme.groups(linear.in_features))
            codes = torch.randint(16, (linear.out_features, linear.in_features), generator=generator).to(torch.uint8)
            scale = (torch.rand(shape, generator=generator) + 0.5).half()
            linears[linear.name] = QuantizedLinear(codes, scale, torch.randint(16, shape, generator=generator).to(torch.uint8), scheme)
            del model[f"{name}.weight"]
            model |= {f"{name}.{part}": tensor for part, tensor in awq.pack(linears[linear.name]).items()}
        floats = {name: model[architecture.prefix(layer) + name] for name in (architecture.attn_norm, architecture.mlp_norm)}
        blocks[f"block-{layer:05}.safetensors"] = folder / f"block-{layer:05}.safetensors"
        save_block(blocks[f"block-{layer:05}.safetensors"], linears, floats)
    if harm:
        model["model.layers.1.mlp.down_proj.scales"].zero_()
    checkpoint.save(folder / "model.safetensors", model)
    return {"packed": made.Files({"model.safetensors": folder / "model.safetensors"}), "blocks": made.Files(blocks)}, context


def served(made: Any, folder: Path, harm: float) -> Inputs:
    """Two servers; harmed: ours writes other tokens than the model would."""
    gaps = [[0.0, 0.01, 1.0 if harm else 0.0]] * 64
    ours, theirs = (
        {
            "name": name,
            "engine": "turbomind",
            "failures": [],
            "load_s": 5.0,
            "loaded_bytes": 4 << 30,
            "vram_bytes": 5 << 30,
            "pool_tokens": 1000,
            "rates": [{"batch": 1, "prompt_tokens": 8, "new_tokens": 8, "tokens_per_s": speeds, "first_token_s": [0.1, 0.2]}],
            "gaps": gaps,
        }
        for name, speeds in (("artifact", [200.0, 210.0]), ("source", [100.0, 101.0]))
    )
    folder.mkdir()
    (folder / "served.json").write_text(json.dumps({"trials": [ours, theirs]}))
    return {"served": made.Files({"served.json": folder / "served.json"})}, made.Context()


def maker(module: ModuleType) -> Callable[[Any, Path, float], Inputs]:
    reads = set(module.READS)
    if "served" in reads:
        return served
    return scored if "scores" in reads else planned if "plan" in reads else packed


def holds(module: ModuleType, name: str, inputs: Inputs) -> bool:
    """Judged as verdict does, with the recipe's bounds and the check's own."""
    found = {each.name: each for each in module.measure(module.Knobs(**LIMITS.get(name, {})), *inputs)}
    gates = [(module.LIMITS[knob], bound) for knob, bound in LIMITS.get(name, {}).items()] + list(module.FIXED.values())
    assert gates, f"{name} can fail nothing"
    return all(limit.holds(found[limit.measurement], bound) for limit, bound in gates)


@pytest.mark.parametrize("name", CHECKS)
def test_identical_models_pass(name: str, made: Any, tmp_path: Path) -> None:
    assert holds(CHECKS[name], name, maker(CHECKS[name])(made, tmp_path / "in", 0.0))


@pytest.mark.parametrize("name", CHECKS)
def test_a_corrupted_one_fails(name: str, made: Any, tmp_path: Path) -> None:
    assert not holds(CHECKS[name], name, maker(CHECKS[name])(made, tmp_path / "in", 0.3))


@pytest.mark.parametrize("name", CHECKS)
def test_what_a_module_offers(name: str, made: Any, tmp_path: Path) -> None:
    module = CHECKS[name]
    assert isinstance(module.VERSION, int) and isinstance(module.ALWAYS, bool) and set(module.READS) <= READABLE
    assert all(module.Knobs.model_fields[knob].default is None for knob in module.LIMITS), "a limit is a knob, and no gate by default"
    found = module.measure(module.Knobs(), *maker(module)(made, tmp_path / "in", 0.0))
    assert len({each.name for each in found}) == len(found) and all(each.low <= each.value <= each.high for each in found)
    limits: list[Limit] = [*module.LIMITS.values(), *(limit for limit, _ in module.FIXED.values())]
    assert {limit.measurement for limit in limits} <= {each.name for each in found}
    assert all(key == limit.measurement for key, (limit, _) in module.FIXED.items())


@pytest.mark.parametrize("name", CHECKS)
def test_measuring_twice_says_the_same(name: str, made: Any, tmp_path: Path) -> None:
    module = CHECKS[name]
    inputs = maker(module)(made, tmp_path / "in", 0.05)
    assert module.measure(module.Knobs(), *inputs) == module.measure(module.Knobs(), *inputs)


def test_the_tiny_model_is_whole(made: Any) -> None:
    assert all(made.Context().schemes.default.divides(linear.in_features) for linear in made.tiny().linears)

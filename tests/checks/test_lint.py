"""Lint: a sound packed model has no findings, and each kind of damage is found and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from buildsys.architecture import Architecture, Linear, Rope
from buildsys.checks import lint
from buildsys.formats import awq
from buildsys.io.checkpoint import save
from buildsys.io.headers import SINGLE
from buildsys.quant.linear import QuantizedLinear
from buildsys.scheme import Scheme

Q, DOWN, KEPT = "model.layers.0.attn.q", "model.layers.1.mlp.down", "model.layers.1.attn.q"
ARCHITECTURE = Architecture(
    model_type="toy",
    layers=2,
    hidden_size=64,
    intermediate_size=128,
    heads=2,
    kv_heads=2,
    head_dim=32,
    vocab_size=96,
    rms_norm_eps=1e-5,
    rope=Rope(10000.0),
    max_positions=64,
    linears=(Linear("attn.q", "q", "attn_in", 64, 64, bias=True), Linear("mlp.down", "down", "down_in", 128, 64)),
    block_prefix="model.layers.{}.",
    attn_norm="norm1.weight",
    mlp_norm="norm2.weight",
    embed="model.embed.weight",
    final_norm="model.norm.weight",
    lm_head="lm_head.weight",
)


@dataclass(frozen=True)
class Packed:
    files: Mapping[str, Path]


def quantized(scheme: Scheme, linear: Linear, seed: int) -> QuantizedLinear:
    random = torch.Generator().manual_seed(seed)
    groups = (linear.out_features, scheme.groups(linear.in_features))
    zero = torch.randint(0, 16, groups, dtype=torch.uint8, generator=random)
    return QuantizedLinear(
        torch.randint(0, 16, (linear.out_features, linear.in_features), dtype=torch.uint8, generator=random),
        (torch.rand(groups, generator=random) * 0.01 + 0.001).half(),
        torch.full_like(zero, 8) if scheme.symmetric else zero,
        scheme,
    )


def sound(scheme: Scheme) -> dict[str, Tensor]:
    """A packed model in which layer 1's attn.q stays float."""
    random = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=random).half() for name, shape in ARCHITECTURE.tensors().items()}
    for layer in range(2):
        for linear in ARCHITECTURE.linears:
            name = ARCHITECTURE.prefix(layer) + linear.name
            if name != KEPT:
                del tensors[f"{name}.weight"]
                tensors |= {f"{name}.{part}": tensor for part, tensor in awq.pack(quantized(scheme, linear, layer)).items()}
    return tensors


def findings(tensors: Mapping[str, Tensor], folder: Path, scheme: Scheme) -> tuple[int, str]:
    save(folder / SINGLE, tensors)
    seen: list[Any] = []
    context = SimpleNamespace(
        device="cpu", architecture=ARCHITECTURE, scheme=scheme, format=awq, skipped=[KEPT], progress=lambda *step: seen.append(step)
    )
    (found,) = lint.measure(lint.Knobs(), {"packed": Packed({SINGLE: folder / SINGLE})}, context)
    assert found.name == "findings" and found.value == found.low == found.high and seen[-1] == ("lint", 3, 3)
    limit, bound = lint.FIXED["findings"]
    assert limit.holds(found, bound) == (found.value == 0)
    return int(found.value), found.detail


SCHEMES = [Scheme(4, 32), Scheme(4, 64, True), Scheme(4, -1)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_sound_model_has_no_findings(scheme: Scheme, tmp_path: Path) -> None:
    assert findings(sound(scheme), tmp_path, scheme) == (0, "")


def changed(name: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].clone()
        change(tensors[name])

    return apply


def put(at: Any, value: float) -> Callable[[Tensor], Any]:
    return lambda tensor: tensor.__setitem__(at, value)


def float_instead(tensors: dict[str, Tensor]) -> None:
    for part in ("qweight", "qzeros", "scales"):
        del tensors[f"{Q}.{part}"]
    tensors[f"{Q}.weight"] = torch.randn(64, 64).half()


def quantized_instead(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{KEPT}.weight"]
    tensors |= {f"{KEPT}.{part}": tensor for part, tensor in awq.pack(quantized(Scheme(4, 32), ARCHITECTURE.linears[0], 5)).items()}


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "not quantized": (float_instead, f"{Q} holds a float weight; it was to be quantized"),
    "quantized": (quantized_instead, f"{KEPT} is quantized; it was to stay float"),
    "missing part": (lambda tensors: tensors.pop(f"{Q}.qzeros"), f"{Q}.qzeros is missing"),
    "missing norm": (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight is missing"),
    "missing bias": (lambda tensors: tensors.pop(f"{Q}.bias"), f"{Q}.bias is missing"),
    "stray": (lambda tensors: tensors.update({"model.extra": torch.ones(2)}), "model.extra belongs to no layer"),
    "wrong shape": (
        lambda tensors: tensors.update({f"{Q}.scales": torch.ones(3, 64).half()}),
        f"{Q}.scales is F16 [3, 64]; it was to be F16 [2, 64]",
    ),
    "wrong type": (lambda tensors: tensors.update({f"{Q}.scales": torch.ones(2, 64)}), f"{Q}.scales is F32 [2, 64]"),
    "float as codes": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
        "model.norm.weight is I8 [64]",
    ),
    "constant words": (changed(f"{Q}.qweight", lambda tensor: tensor.fill_(0x33333333)), f"{Q} holds the one code 3 everywhere"),
    "hole": (changed(f"{DOWN}.qweight", put(slice(9, 12), 0)), f"{DOWN} holds one code throughout in 3 of 128 input channels"),
    "scale of zero": (changed(f"{Q}.scales", put((0, 3), 0.0)), f"{Q} has 1 scales of zero"),
    "negative scale": (changed(f"{Q}.scales", put((1, 3), -0.1)), f"{Q} has 1 negative scales"),
    "subnormal scale": (changed(f"{Q}.scales", put((1, slice(0, 2)), 3e-5)), f"{Q} has 2 scales below the least normal"),
    "NaN scale": (changed(f"{Q}.scales", put((1, 3), float("nan"))), f"{Q} has 1 scales that are NaN or Inf"),
    "infinite scale": (changed(f"{Q}.scales", put((1, 3), float("inf"))), f"{Q} has 1 scales that are NaN or Inf"),
    "huge scale": (changed(f"{Q}.scales", put((1, 3), 6e4)), f"{Q} has 1 scales under which weights leave float16"),
    "NaN norm": (changed("model.norm.weight", put(3, float("nan"))), "model.norm.weight holds 1 NaN or Inf"),
    "infinite embedding": (changed("model.embed.weight", put((3, 3), float("-inf"))), "model.embed.weight holds 1 NaN or Inf"),
    "empty head": (changed("lm_head.weight", lambda tensor: tensor.zero_()), "lm_head.weight is 0.0 everywhere"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_each_damage_is_found_once_and_named(damage: Callable[[dict[str, Tensor]], Any], said: str, tmp_path: Path) -> None:
    tensors = sound(Scheme(4, 32))
    damage(tensors)
    count, detail = findings(tensors, tmp_path, Scheme(4, 32))
    assert said in detail and count == 1


def test_a_moved_zero_under_a_symmetric_scheme(tmp_path: Path) -> None:
    tensors = sound(Scheme(4, 64, True))
    tensors[f"{Q}.qzeros"] = tensors[f"{Q}.qzeros"] ^ 1
    count, detail = findings(tensors, tmp_path, Scheme(4, 64, True))
    assert count == 1 and f"{Q} has 8 zeros that are not 8" in detail


@pytest.mark.parametrize("symmetric", [False, True])
def test_pruned_channels_are_sound(symmetric: bool, tmp_path: Path) -> None:
    """A channel of zero weights has one code throughout, the code that means zero."""
    scheme = Scheme(4, 32, symmetric)
    linear = quantized(scheme, ARCHITECTURE.linears[0], 3)
    codes = linear.codes.clone()
    codes[:, 5] = linear.zero[:, 0]
    codes[7] = linear.zero[7].repeat_interleave(32)
    tensors = sound(scheme)
    tensors |= {f"{Q}.{part}": tensor for part, tensor in awq.pack(QuantizedLinear(codes, linear.scale, linear.zero, scheme)).items()}
    assert findings(tensors, tmp_path, scheme) == (0, "")


def test_codes_and_zeros_beyond_the_scheme() -> None:
    linear = quantized(Scheme(4, 32), ARCHITECTURE.linears[0], 0)
    wide = QuantizedLinear(linear.codes, linear.scale, linear.zero, Scheme(3, 32))
    said = list(lint.codes_findings(wide))
    assert any("zeros above 7" in what for what in said) and any("has a code of 15, above 7" in what for what in said)


def test_the_first_three_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    tensors = sound(Scheme(4, 32))
    for name in ("model.norm.weight", "model.embed.weight", "lm_head.weight", f"{Q}.bias", f"{KEPT}.bias"):
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    count, detail = findings(tensors, tmp_path, Scheme(4, 32))
    assert count == 5 and detail.count(";") == 2 and detail.endswith("and 2 more")

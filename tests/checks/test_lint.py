"""Lint: a sound packed model has no findings, and each kind of damage is found and named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from buildsys.architecture import Architecture, Linear, Rope
from buildsys.checks import lint
from buildsys.formats import awq, compressed_tensors, gptq, smooth_quant
from buildsys.io.checkpoint import save
from buildsys.io.headers import SINGLE
from buildsys.quant.linear import QuantizedLinear
from buildsys.scheme import Scheme, Schemes
from buildsys.slots import modules

INT8, FP8 = Scheme(8, -1, True, "int", "int8"), Scheme(8, -1, True, "fp8", "fp8")
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
    zero = torch.randint(0, scheme.top + 1, groups, dtype=torch.uint8, generator=random)
    codes = torch.randint(0, scheme.top + 1, (linear.out_features, linear.in_features), dtype=torch.uint8, generator=random)
    if scheme.number == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    return QuantizedLinear(
        codes,
        (torch.rand(groups, generator=random) * 0.01 + 0.001).half(),
        torch.full_like(zero, scheme.middle) if scheme.symmetric else zero,
        scheme,
    )


def sound(schemes: Schemes, format: ModuleType = awq) -> dict[str, Tensor]:
    """A packed model."""
    random = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=random).half() for name, shape in ARCHITECTURE.tensors().items()}
    for layer in range(2):
        for linear in ARCHITECTURE.linears:
            name = ARCHITECTURE.prefix(layer) + linear.name
            scheme = schemes.of(name)
            if scheme is not None:
                del tensors[f"{name}.weight"]
                tensors |= {f"{name}.{part}": tensor for part, tensor in format.pack(quantized(scheme, linear, layer)).items()}
    return tensors


def findings(tensors: Mapping[str, Tensor], folder: Path, schemes: Schemes, format: ModuleType = awq) -> tuple[int, str]:
    save(folder / SINGLE, tensors)
    seen: list[Any] = []
    context = SimpleNamespace(
        device="cpu", architecture=ARCHITECTURE, schemes=schemes, format=format, progress=lambda *step: seen.append(step)
    )
    (found,) = lint.measure(lint.Knobs(), {"packed": Packed({SINGLE: folder / SINGLE})}, context)
    count = 4 - len(schemes.left_float)
    assert found.name == "findings" and found.value == found.low == found.high and seen[-1] == ("lint", count, count)
    limit, bound = lint.FIXED["findings"]
    assert limit.holds(found, bound) == (found.value == 0)
    return int(found.value), found.detail


def leaving(scheme: Scheme) -> Schemes:
    """Layer 1's attn.q stays float."""
    return Schemes(scheme, frozenset([KEPT]))


HELD = [Scheme(4, 32), Scheme(4, 64, True), Scheme(4, -1), Scheme(2, 32), Scheme(3, 64), Scheme(8, -1, True)]
EVERY = [(format, scheme) for format in modules("formats").values() for scheme in [*HELD, INT8, FP8] if format.accepts(scheme) is None]

each_pair = pytest.mark.parametrize(("format", "scheme"), EVERY, ids=lambda value: str(getattr(value, "QUANT_METHOD", value)))


@each_pair
def test_a_sound_model_has_no_findings(format: ModuleType, scheme: Scheme, tmp_path: Path) -> None:
    assert findings(sound(leaving(scheme), format), tmp_path, leaving(scheme), format) == (0, "")


@each_pair
def test_a_layer_in_the_wrong_form_is_one_finding(format: ModuleType, scheme: Scheme, tmp_path: Path) -> None:
    tensors = sound(Schemes(scheme), format)
    assert findings(tensors, tmp_path, leaving(scheme), format) == (1, f"{KEPT} is quantized; it was to stay float")
    tensors = sound(leaving(scheme), format)
    assert findings(tensors, tmp_path, Schemes(scheme), format) == (1, f"{KEPT} holds a float weight; it was to be quantized")


def test_linears_with_schemes_of_their_own(tmp_path: Path) -> None:
    schemes = Schemes(Scheme(4, 32, True), frozenset([KEPT]), {DOWN: Scheme(8, 64, True)})
    assert findings(sound(schemes, gptq), tmp_path, schemes, gptq) == (0, "")
    count, detail = findings(sound(leaving(Scheme(4, 32, True)), gptq), tmp_path, schemes, gptq)
    assert count == 3 and f"{DOWN}.qweight is I32 [16, 64]; it was to be I32 [32, 64]" in detail


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


SCHEMES = leaving(Scheme(4, 32))
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
    tensors = sound(SCHEMES)
    damage(tensors)
    count, detail = findings(tensors, tmp_path, SCHEMES)
    assert said in detail and count == 1


def test_a_moved_zero_under_a_symmetric_scheme(tmp_path: Path) -> None:
    tensors = sound(leaving(Scheme(4, 64, True)))
    tensors[f"{Q}.qzeros"] = tensors[f"{Q}.qzeros"] ^ 1
    count, detail = findings(tensors, tmp_path, leaving(Scheme(4, 64, True)))
    assert count == 1 and f"{Q} has 8 zeros that are not 8" in detail


@pytest.mark.parametrize("symmetric", [False, True])
def test_pruned_channels_are_sound(symmetric: bool, tmp_path: Path) -> None:
    """A channel of zero weights has one code throughout, the code that means zero."""
    scheme = Scheme(4, 32, symmetric)
    linear = quantized(scheme, ARCHITECTURE.linears[0], 3)
    codes = linear.codes.clone()
    codes[:, 5] = linear.zero[:, 0]
    codes[7] = linear.zero[7].repeat_interleave(32)
    tensors = sound(leaving(scheme))
    tensors |= {f"{Q}.{part}": tensor for part, tensor in awq.pack(QuantizedLinear(codes, linear.scale, linear.zero, scheme)).items()}
    assert findings(tensors, tmp_path, leaving(scheme)) == (0, "")


def test_codes_and_zeros_beyond_the_scheme() -> None:
    linear = quantized(Scheme(4, 32), ARCHITECTURE.linears[0], 0)
    wide = QuantizedLinear(linear.codes, linear.scale, linear.zero, Scheme(3, 32))
    said = list(lint.codes_findings(wide))
    assert any("zeros above 7" in what for what in said) and any("has a code of 15, above 7" in what for what in said)


def set_byte(value: int) -> Callable[[Tensor], Any]:
    return lambda tensor: tensor.view(torch.uint8).__setitem__((3, slice(0, 2)), value)


EIGHT_BIT_DAMAGES: dict[str, tuple[Scheme, str, Callable[[Tensor], Any], str]] = {
    "NaN": (FP8, "weight", set_byte(0x7F), "has 2 codes that are NaN"),
    "-NaN": (FP8, "weight", set_byte(0xFF), "has 2 codes that are NaN"),
    "hole": (INT8, "weight", lambda tensor: tensor[9].fill_(-128), "holds one code throughout in 1 of 64 output channels"),
    "fp8 hole": (FP8, "weight", lambda tensor: tensor[:, 3].fill_(1.0), "holds one code throughout in 1 of 64 input channels"),
    "huge scale": (FP8, "scale", put((5, 0), 147.0), "has 1 scales under which weights leave float16"),
    "lost scale": (INT8, "scale", put((5, 0), 0.0), "has 1 scales of zero"),
}


@pytest.mark.parametrize(("scheme", "part", "damage", "said"), EIGHT_BIT_DAMAGES.values(), ids=EIGHT_BIT_DAMAGES)
def test_damage_of_eight_bit_numbers(scheme: Scheme, part: str, damage: Callable[[Tensor], Any], said: str, tmp_path: Path) -> None:
    tensors = sound(Schemes(scheme), smooth_quant)
    changed(f"{Q}.{part}", damage)(tensors)
    assert findings(tensors, tmp_path, Schemes(scheme), smooth_quant) == (1, f"{Q} {said}")


def test_scales_that_only_float32_holds_are_sound(tmp_path: Path) -> None:
    """LMDeploy's own tool writes such; ours are float16 numbers, and `codes` compares them with the blocks."""
    tensors = sound(Schemes(INT8), smooth_quant)
    changed(f"{Q}.scale", put((5, 0), 0.1))(tensors)
    assert findings(tensors, tmp_path, Schemes(INT8), smooth_quant) == (0, "")


@pytest.mark.parametrize("byte", [0x00, 0x80])
def test_pruned_channels_of_floats_are_sound(byte: int, tmp_path: Path) -> None:
    """Zero has two signs."""
    tensors = sound(Schemes(FP8), smooth_quant)
    changed(f"{Q}.weight", lambda tensor: tensor.view(torch.uint8)[5].fill_(byte))(tensors)
    assert findings(tensors, tmp_path, Schemes(FP8), smooth_quant) == (0, "")


@pytest.mark.parametrize(
    ("format", "part", "at"), [(gptq, "g_idx", 7), (compressed_tensors, "weight_shape", 0)], ids=["a group's index", "a shape"]
)
def test_what_is_stored_beside_codes_goes_with_them(format: ModuleType, part: str, at: int, tmp_path: Path) -> None:
    schemes = Schemes(Scheme(4, 32, True))
    tensors = sound(schemes, format)
    tensors[f"{Q}.{part}"][at] += 1
    assert findings(tensors, tmp_path, schemes, format) == (1, f"{Q} has a {part} that does not go with its codes")


def test_the_first_three_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    tensors = sound(SCHEMES)
    for name in ("model.norm.weight", "model.embed.weight", "lm_head.weight", f"{Q}.bias", f"{KEPT}.bias"):
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    count, detail = findings(tensors, tmp_path, SCHEMES)
    assert count == 5 and detail.count(";") == 2 and detail.endswith("and 2 more")

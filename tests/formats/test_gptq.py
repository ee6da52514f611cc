"""GPTQ's layout, code for code: against an independent loop, and against what each reader makes of config.json."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch

from buildsys.errors import BuildError
from buildsys.formats import gptq
from buildsys.quant.linear import QuantizedLinear
from buildsys.scheme import Bits, Scheme, Schemes

OUT, IN = 32, 64


def example(scheme: Scheme) -> QuantizedLinear:
    random = torch.Generator().manual_seed(0)
    groups = (OUT, scheme.groups(IN))
    zero = torch.randint(0, scheme.top + 1, groups, dtype=torch.uint8, generator=random)
    zero[0, 0] = 0  # what stored less one would wrap around
    return QuantizedLinear(
        torch.randint(0, scheme.top + 1, (OUT, IN), dtype=torch.uint8, generator=random),
        torch.rand(groups, generator=random).half(),
        torch.full_like(zero, scheme.middle) if scheme.symmetric else zero,
        scheme,
    )


def code(words: list[int], at: int, bits: int) -> int:
    """The oracle: words end to end are one long number, and each code `bits` of it."""
    number = sum((word % 2**32) << (32 * place) for place, word in enumerate(words))
    return (number >> (at * bits)) % 2**bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_as_a_reader_computes_it(bits: Bits, symmetric: bool) -> None:
    linear = example(Scheme(bits, 32, symmetric))
    packed, expected = gptq.pack(linear), linear.dequantize()
    said = gptq.config(Schemes(linear.scheme), [])
    offset = {"gptq": 1, "gptq_v2": 0}[said["checkpoint_format"]]
    columns, zeros = packed["qweight"].t().tolist(), packed["qzeros"].tolist()
    for row in range(OUT):
        for column in range(IN):
            group = int(packed["g_idx"][column])
            zero = code(zeros[group], row, bits) + offset  # as readers do: no wrapping back
            weight = (code(columns[row], column, bits) - zero) * float(packed["scales"][group, row])
            assert weight == float(expected[row, column])


def test_a_symmetric_zero_is_stored_less_one() -> None:
    packed = gptq.pack(example(Scheme(4, 32, True)))
    assert set(packed["qzeros"].flatten().tolist()) == {0x77777777}
    assert packed["g_idx"].tolist() == [0] * 32 + [1] * 32
    assert set(gptq.pack(example(Scheme(4, -1, True)))["g_idx"].tolist()) == {0}


def test_layout_of_a_seven_billion_layer() -> None:
    assert gptq.layout("down", Scheme(4, 128), 11008, 4096) == {
        "down.qweight": ("I32", (1376, 4096)),
        "down.qzeros": ("I32", (86, 512)),
        "down.scales": ("F16", (86, 4096)),
        "down.g_idx": ("I32", (11008,)),
    }
    assert gptq.layout("down", Scheme(3, 128), 11008, 4096)["down.qweight"] == ("I32", (1032, 4096))


def test_what_does_not_fit() -> None:
    assert gptq.fits(Scheme(4, -1), 100, 64) == "packs input channels in whole 32-bit words, 100 4-bit codes do not fill them"
    assert gptq.fits(Scheme(3, 32), 64, 40) == "packs output channels in whole 32-bit words, 40 3-bit codes do not fill them"
    assert gptq.fits(Scheme(4, 128), 192, 64) == "groups of 128 input channels do not divide 192"
    assert gptq.fits(Scheme(3, 32), 96, 64) is None


def test_what_it_cannot_hold() -> None:
    assert gptq.accepts(Scheme(8, -1, True, "fp8")) == "holds whole numbers, quantization.number is fp8"
    assert gptq.accepts(Scheme(8, -1, True, "int", "int8")) == "is for float activations, quantization.activations is int8"
    assert gptq.mixes([Scheme(4, 128, True), Scheme(8, 128, True), Scheme(3, -1, True)]) is None
    assert "all symmetric or all asymmetric" in (gptq.mixes([Scheme(4, 128, True), Scheme(4, 128)]) or "")


Q, K, V = (f"model.layers.1.self_attn.{part}_proj" for part in "qkv")
DOWN, KEPT = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"
MIXED = Schemes(Scheme(4, 128, True), frozenset([KEPT]), {Q: Scheme(8, 64, True), K: Scheme(8, 64, True), V: Scheme(8, 64, True)})


def test_config_is_what_readers_ask_for() -> None:
    assert gptq.config(MIXED, ["lm_head", KEPT]) == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": {
            "-:^(lm_head)$": {},
            r"-:^model\.layers\.1\.mlp\.(up_proj)$": {},
            r"+:^model\.layers\.1\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)$": {"bits": 8, "group_size": 64},
        },
    }


def dynamic(config: dict[str, Any], module: str) -> dict[str, Any] | None:
    """The oracle, from GPTQModel's documentation: the first expression that matches from the start counts; -: leaves the module float."""
    for pattern, said in config["dynamic"].items():
        if re.match(pattern[2:], module):
            return None if pattern.startswith("-:") else said
    return {}


def test_readers_find_each_module_by_its_name_and_by_what_they_fuse() -> None:
    config = json.loads(json.dumps(gptq.config(MIXED, ["lm_head", KEPT])))
    for module in (Q, K, V, "model.layers.1.self_attn.qkv_proj"):
        assert dynamic(config, module) == {"bits": 8, "group_size": 64}
    for module in (DOWN, "model.layers.11.mlp.up_proj", "model.layers.11.self_attn.q_proj", "model.layers.1.self_attn.qkv_proj_x"):
        assert dynamic(config, module) == {}
    assert dynamic(config, KEPT) is None and dynamic(config, "lm_head") is None


def test_transformers_reads_the_config() -> None:
    from transformers import GPTQConfig

    read = GPTQConfig.from_dict(gptq.config(MIXED, ["lm_head"]))
    assert (read.bits, read.group_size, read.sym, read.desc_act) == (4, 128, True, False)
    assert GPTQConfig.from_dict(gptq.config(Schemes(Scheme(3, 64)), [])).format == "gptq_v2"


@pytest.mark.parametrize(
    "change",
    [
        {"desc_act": True},
        {"bits": 5},
        {"group_size": 16},
        {"checkpoint_format": "marlin"},
        {"sym": False},  # zeros less one, and some of them 0
        {"dynamic": {"+:^(a)$": {"bits": 8, "desc_act": True}}},
        {"dynamic": {"+:.*mlp.*": {"bits": 8}}},
        {"dynamic": ["-:^(a)$"]},
    ],
    ids=str,
)
def test_another_layout_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BuildError, match=r"config.json.*quantization_config"):
        gptq.schemes_of(gptq.config(MIXED, []) | change)


def test_autogptq_models_have_no_checkpoint_format() -> None:
    config = gptq.config(Schemes(Scheme(4, 128, True)), [])
    assert gptq.schemes_of({key: config[key] for key in ("quant_method", "bits", "group_size", "desc_act", "sym")}).default == Scheme(
        4, 128, True
    )

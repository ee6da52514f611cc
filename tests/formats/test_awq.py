"""The AWQ layout, word for word: against an independent loop, and against what each reader demands of config.json."""

from __future__ import annotations

import pytest
import torch

from buildsys.errors import BuildError
from buildsys.formats import awq
from buildsys.quant.linear import QuantizedLinear
from buildsys.scheme import Scheme, Schemes

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def example(scheme: Scheme, out_features: int = 16, in_features: int = 64) -> QuantizedLinear:
    random = torch.Generator().manual_seed(0)
    groups = (out_features, scheme.groups(in_features))
    return QuantizedLinear(
        torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8, generator=random),
        torch.rand(groups, generator=random).half(),
        torch.full(groups, 8, dtype=torch.uint8) if scheme.symmetric else torch.randint(0, 16, groups, dtype=torch.uint8, generator=random),
        scheme,
    )


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(4, 64, True), Scheme(4, -1)], ids=str)
def test_every_weight_as_a_reader_computes_it(scheme: Scheme) -> None:
    """The oracle: one weight at a time from the words, as AutoAWQ documents them."""
    linear = example(scheme)
    packed, expected = awq.pack(linear), linear.dequantize()
    group = scheme.group(64)
    for column in range(64):
        for row in range(16):
            shift = 4 * ORDER.index(row % 8)
            code = (int(packed["qweight"][column, row // 8]) >> shift) & 15
            zero = (int(packed["qzeros"][column // group, row // 8]) >> shift) & 15
            assert (code - zero) * float(packed["scales"][column // group, row]) == float(expected[row, column])


def test_a_word_by_hand() -> None:
    linear = QuantizedLinear(
        torch.arange(8, dtype=torch.uint8)[:, None].expand(8, 32).contiguous(),
        torch.arange(8)[:, None].half(),
        torch.arange(8, dtype=torch.uint8).flip(0)[:, None],
        Scheme(4, 32),
    )
    packed = awq.pack(linear)
    assert set(packed["qweight"].flatten().tolist()) == {0x75316420}
    assert packed["qzeros"].tolist() == [[0x02461357]]  # zeros as they are, no minus one
    assert packed["scales"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_layout_of_a_seven_billion_layer() -> None:
    assert awq.layout("model.layers.0.mlp.down_proj", Scheme(4, 128), 11008, 4096) == {
        "model.layers.0.mlp.down_proj.qweight": ("I32", (11008, 512)),
        "model.layers.0.mlp.down_proj.qzeros": ("I32", (86, 512)),
        "model.layers.0.mlp.down_proj.scales": ("F16", (86, 4096)),
    }


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_other_bits_are_refused(bits: int) -> None:
    assert awq.accepts(Scheme(bits, 128)) == f"holds 4-bit codes, quantization.bits is {bits}"  # type: ignore[arg-type]
    assert awq.accepts(Scheme(4, 128)) is None


def test_other_numbers_and_several_schemes_are_refused() -> None:
    assert awq.accepts(Scheme(8, -1, True, "fp8")) == "holds whole numbers, quantization.number is fp8"
    assert awq.accepts(Scheme(8, -1, True, "int", "int8")) == "is for float activations, quantization.activations is int8"
    several = awq.mixes([Scheme(4, 128), Scheme(4, 64)])
    assert several == "holds one scheme for all linears, asked are 4-bit g128 asymmetric, 4-bit g64 asymmetric"
    assert awq.mixes([Scheme(4, 128)]) is None and awq.keeps_float(["model.layers.0.mlp.down_proj"]) is None


def test_what_does_not_fit() -> None:
    assert awq.fits(Scheme(4, 128), 256, 100) == "packs 8 output channels a word, 100 channels do not divide by 8"
    assert awq.fits(Scheme(4, 128), 192, 64) == "groups of 128 input channels do not divide 192"
    assert awq.fits(Scheme(4, -1), 100, 64) is None and awq.fits(Scheme(4, 64), 192, 64) is None


def test_config_is_what_readers_ask_for() -> None:
    assert awq.config(Schemes(Scheme(4, 128)), ["lm_head", "a.b"]) == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 128,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["a.b", "lm_head"],
    }
    assert awq.config(Schemes(Scheme(4, 128)), [])["modules_to_not_convert"] is None


def test_transformers_reads_the_config() -> None:
    from transformers import AwqConfig

    read = AwqConfig.from_dict(awq.config(Schemes(Scheme(4, 64)), ["lm_head"]))
    assert (read.bits, read.group_size, read.zero_point, read.format) == (4, 64, True, "gemm")
    assert read.modules_to_not_convert == ["lm_head"]


def test_whole_names_stay_float_exactly() -> None:
    """transformers matches names as regular expressions, vLLM as substrings: layer 1 must not take layer 11 with it."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = awq.config(Schemes(Scheme(4, 128)), ["model.layers.1.mlp.up_proj"])["modules_to_not_convert"]
    assert not should_convert_module("model.layers.1.mlp.up_proj", kept)
    for other in ("model.layers.11.mlp.up_proj", "model.layers.1.mlp.gate_proj", "model.layers.10.mlp.up_proj"):
        assert should_convert_module(other, kept) and not any(name in other for name in kept)


@pytest.mark.parametrize(
    "change", [{"quant_method": "gptq"}, {"version": "gemv"}, {"bits": 8}, {"group_size": 16}, {"group_size": None}], ids=str
)
def test_another_layout_is_refused(change: dict[str, object]) -> None:
    key, value = next(iter(change.items()))
    with pytest.raises(BuildError, match=f"quantization_config has {key}: {value!r}"):
        awq.scheme_of(awq.config(Schemes(Scheme(4, 128)), []) | change)

"""The layout of LMDeploy's eight-bit linears: what its engine computes from the tensors, and what it reads in config.json."""

from __future__ import annotations

import pytest
import torch

from buildsys.errors import BuildError
from buildsys.formats import smooth_quant
from buildsys.quant.activations import fake_quantize
from buildsys.quant.linear import QuantizedLinear
from buildsys.scheme import Scheme, Schemes

INT8, FP8 = Scheme(8, -1, True, "int", "int8"), Scheme(8, -1, True, "fp8", "fp8")


def example(scheme: Scheme) -> QuantizedLinear:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (16, 64), dtype=torch.uint8, generator=random)
    if scheme.number == "fp8":
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    codes[0, 0] = 0  # -128
    scale = (torch.rand(16, 1, generator=random) + 0.01).half()
    return QuantizedLinear(codes, scale, torch.full((16, 1), scheme.middle, dtype=torch.uint8), scheme)


@pytest.mark.parametrize("scheme", [INT8, FP8], ids=str)
def test_products_as_the_engine_takes_them(scheme: Scheme) -> None:
    """Whole products of eight-bit numbers, then a scale a token and a scale a channel: what the float weights give on rounded tokens."""
    linear = example(scheme)
    packed = smooth_quant.pack(linear)
    assert torch.equal(packed["weight"].float() * packed["scale"], linear.dequantize())
    tokens = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    token_scale = tokens.abs().amax(1, keepdim=True) / (127 if scheme == INT8 else 448)
    rounded = tokens / token_scale
    numbers = rounded.round().to(torch.int8) if scheme == INT8 else rounded.to(torch.float8_e4m3fn)
    found = (numbers.double() @ packed["weight"].double().t()) * token_scale.double() * packed["scale"].double().t()
    wanted = fake_quantize(tokens, scheme.activations).double() @ linear.dequantize(torch.float64).t()
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_types_and_shapes_that_the_engine_declares() -> None:
    assert smooth_quant.layout("q", INT8, 4096, 1024) == {"q.weight": ("I8", (1024, 4096)), "q.scale": ("F32", (1024, 1))}
    assert smooth_quant.layout("q", FP8, 4096, 1024)["q.weight"] == ("F8_E4M3", (1024, 4096))
    packed = smooth_quant.pack(example(INT8))
    assert packed["weight"].dtype == torch.int8 and int(packed["weight"][0, 0]) == -128 and packed["scale"].dtype == torch.float32


@pytest.mark.parametrize(
    "scheme", [Scheme(8, -1, True), Scheme(8, 128, True, "int", "int8"), Scheme(8, -1, True, "fp8"), Scheme(4, 128)], ids=str
)
def test_other_schemes_are_refused_with_both_values(scheme: Scheme) -> None:
    said = smooth_quant.accepts(scheme)
    assert said is not None and str(INT8) in said and str(FP8) in said and said.endswith(f"quantization is {scheme}")


def test_one_kind_for_all_linears_and_none_left_float() -> None:
    assert "asked are" in (smooth_quant.mixes([INT8, FP8]) or "")
    said = smooth_quant.keeps_float(["model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"])
    assert said is not None and "2 are to stay float, model.layers.0.mlp.down_proj the first" in said


def test_config_is_what_the_engine_reads() -> None:
    assert smooth_quant.config(Schemes(INT8), []) == {"quant_method": "smooth_quant", "quant_dtype": "int8"}
    assert smooth_quant.config(Schemes(FP8), ["lm_head", "a"]) == {
        "quant_method": "smooth_quant",
        "quant_dtype": "float8_e4m3fn",
        "modules_to_not_convert": ["a", "lm_head"],
    }
    assert isinstance(getattr(torch, smooth_quant.config(Schemes(FP8), [])["quant_dtype"]), torch.dtype)  # how the engine looks it up


def test_the_engine_asks_whether_its_name_lies_in_one_that_stays_float() -> None:
    kept = smooth_quant.config(Schemes(INT8), ["lm_head", "model.layers.11.self_attn.q_norm"])["modules_to_not_convert"]
    for prefix in ("model.layers.1.self_attn.q_norm", "model.layers.11.self_attn.qkv_proj", "model.layers.11.input_layernorm"):
        assert not any(prefix in name for name in kept)


@pytest.mark.parametrize("change", [{"quant_dtype": "float8_e5m2"}, {"quant_dtype": None}, {"modules_to_not_convert": "lm_head"}], ids=str)
def test_another_layout_is_refused(change: dict[str, object]) -> None:
    key, value = next(iter(change.items()))
    with pytest.raises(BuildError, match=f"quantization_config has {key}: .*{value}"):
        smooth_quant.schemes_of(smooth_quant.config(Schemes(INT8), []) | change)

"""W8A8 as LMDeploy's PyTorch engine reads it: eight-bit weights, int8 or e4m3, for linears that round what they read token by token.

Xiao et al. 2022, arXiv:2211.10438; the layout is LMDeploy's `quant_method: smooth_quant` (0.18: pytorch/nn/linear/w8a8.py). A linear
becomes weight [out, in] of its eight-bit type and scale float32 [out, 1], one a row; its bias, if any, stays beside them. Queries, keys and
values are stored apart, and the engine joins them. Nothing is stored for the norms: from quant_method alone the engine makes those in
front of quantized linears write eight bits, which saves a pass, and leaves the last norm and those of queries and keys float (the latter
two of Qwen3-MoE only where `modules_to_not_convert` names them).

An int8 weight may be -128 here, where LMDeploy's own tool stops at -127: products are summed in int32, so kernels take either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from buildsys.formats import Layout, expect, names_said, one_for_all, unknown
from buildsys.scheme import Scheme, Schemes

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.quant.linear import QuantizedLinear

VERSION = 1

QUANT_METHOD = "smooth_quant"
INT8: Final = Scheme(8, -1, True, "int", "int8")
FP8: Final = Scheme(8, -1, True, "fp8", "fp8")
FLOATS = "F16"
"""Type of every tensor that stays float: the engine computes in the type that config.json names."""

_DTYPES: Final = {INT8: ("int8", "I8"), FP8: ("float8_e4m3fn", "F8_E4M3")}  # scheme -> torch's name, safetensors' name


class Knobs(Layout):
    """The layout leaves nothing else to choose."""


def accepts(scheme: Scheme) -> str | None:
    """Why the format cannot hold a scheme; None where it can."""
    return None if scheme in _DTYPES else f"holds {INT8}, or {FP8}; quantization is {scheme}"


def mixes(kinds: Sequence[Scheme]) -> str | None:
    """`quantization_config` has one quant_dtype for all."""
    return one_for_all(kinds)


def keeps_float(names: Sequence[str]) -> str | None:
    """The engine builds every linear of a block for eight bits, whatever the checkpoint holds: most of its models look at no names."""
    if not names:
        return None
    some = f"{len(names)} are to stay float, {min(names)} the first"
    return f"is for an engine that reads every linear of a block in eight bits; {some}"


def fits(scheme: Scheme, in_features: int, out_features: int) -> str | None:
    """Every shape can be stored."""
    return None


def layout(name: str, scheme: Scheme, in_features: int, out_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that stand for the weight of the linear `name`: safetensors type and shape of each."""
    return {f"{name}.weight": (_DTYPES[scheme][1], (out_features, in_features)), f"{name}.scale": ("F32", (out_features, 1))}


def pack(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The linear's tensors by the last part of their names, as in `layout`."""
    from buildsys.quant.pack import to_numbers

    return {"weight": to_numbers(linear.codes, linear.scheme.number), "scale": linear.scale.float()}


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """The inverse of `pack`. Our scales are float16 numbers; those of LMDeploy's own tool are not, and stay what they are."""
    import torch

    from buildsys.quant.linear import QuantizedLinear
    from buildsys.quant.pack import from_numbers

    half = tensors["scale"].half()
    scale = half if torch.equal(half.float(), tensors["scale"]) else tensors["scale"]
    return QuantizedLinear(from_numbers(tensors["weight"]), scale, torch.full_like(scale, scheme.middle, dtype=torch.uint8), scheme)


def config(schemes: Schemes, not_converted: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. `not_converted`: whole names of modules that stay float.

    The engine looks for each module's name inside of these.
    """
    said = {"quant_method": QUANT_METHOD, "quant_dtype": _DTYPES[schemes.default][0]}
    return said | ({"modules_to_not_convert": sorted(not_converted)} if not_converted else {})


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme that a model's `quantization_config` tells."""
    expect(config, quant_method=QUANT_METHOD)
    told = config.get("quant_dtype", "int8")
    for scheme, (name, _) in _DTYPES.items():
        if told == name:
            return scheme
    raise unknown(f"has quant_dtype: {told!r}; known are {', '.join(name for name, _ in _DTYPES.values())}")


def schemes_of(config: Mapping[str, Any]) -> Schemes:
    """The inverse of `config`."""
    return Schemes(scheme_of(config), names_said(config, "modules_to_not_convert"))

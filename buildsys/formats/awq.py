"""AWQ's `gemm` layout: four-bit codes as LMDeploy (both engines), vLLM, transformers and AutoAWQ read them.

Lin et al. 2023, arXiv:2306.00978; the layout is AutoAWQ's `WQLinear_GEMM`. A linear becomes qweight int32 [in, out/8], qzeros int32
[in/g, out/8] and scales float16 [in/g, out], transposed from our [out, in]; its bias, if any, stays beside them as float16. Eight codes
share a word, lane i (from the lowest bits) holding output channel (0 2 4 6 1 3 5 7)[i] of its eight. Zeros are stored as they are (GPTQ's
are one less).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from buildsys.formats import Layout, expect, names_said, one_for_all, weights_alone, weights_said
from buildsys.scheme import Scheme, Schemes

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.quant.linear import QuantizedLinear

VERSION = 1

QUANT_METHOD = "awq"
BITS: Final = 4
LANES = 8  # codes a word
FLOATS = "F16"
"""Type of every tensor that stays float: AWQ kernels compute in half precision, and transformers casts the rest to it."""


class Knobs(Layout):
    """The layout leaves nothing else to choose."""


def accepts(scheme: Scheme) -> str | None:
    """Why the format cannot hold a scheme; None where it can. Every group size fits the layout; engines may take fewer."""
    return weights_alone(scheme) or (None if scheme.bits == BITS else f"holds {BITS}-bit codes, quantization.bits is {scheme.bits}")


def mixes(kinds: Sequence[Scheme]) -> str | None:
    """`quantization_config` has one group_size for all, and says nothing of single layers."""
    return one_for_all(kinds)


def keeps_float(names: Sequence[str]) -> str | None:
    """Any linear may stay float: TurboMind looks at which tensors are there, the others at `modules_to_not_convert`."""
    return None


def fits(scheme: Scheme, in_features: int, out_features: int) -> str | None:
    """Why a linear of this shape cannot be stored; None where it can."""
    if out_features % LANES:
        return f"packs {LANES} output channels a word, {out_features} channels do not divide by {LANES}"
    if not scheme.divides(in_features):
        return f"groups of {scheme.group_size} input channels do not divide {in_features}"
    return None


def layout(name: str, scheme: Scheme, in_features: int, out_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that stand for the weight of the linear `name`: safetensors type and shape of each."""
    groups, words = scheme.groups(in_features), out_features // LANES
    return {
        f"{name}.qweight": ("I32", (in_features, words)),
        f"{name}.qzeros": ("I32", (groups, words)),
        f"{name}.scales": ("F16", (groups, out_features)),
    }


def pack(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The linear's tensors by the last part of their names, as in `layout`."""
    from buildsys.quant.pack import AWQ_ORDER, pack_int32

    return {
        "qweight": pack_int32(linear.codes.t(), BITS, AWQ_ORDER),  # [out, in] -> [in, out/8]
        "qzeros": pack_int32(linear.zero.t(), BITS, AWQ_ORDER),  # [out, groups] -> [groups, out/8]
        "scales": linear.scale.t().contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """The inverse of `pack`."""
    from buildsys.quant.linear import QuantizedLinear
    from buildsys.quant.pack import AWQ_ORDER, unpack_int32

    return QuantizedLinear(
        codes=unpack_int32(tensors["qweight"], BITS, AWQ_ORDER).t().contiguous(),
        scale=tensors["scales"].t().contiguous(),
        zero=unpack_int32(tensors["qzeros"], BITS, AWQ_ORDER).t().contiguous(),
        scheme=scheme,
    )


def config(schemes: Schemes, not_converted: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. `not_converted`: whole names of the linears that stay float.

    zero_point is always true, also where a symmetric scheme fixes every zero at 8: TurboMind refuses a layer without qzeros, and vLLM
    picks its fast kernel only where zero_point is true. Readers match the names as parts of module names (vLLM) or as regular
    expressions from the start (transformers), for which whole names are exact.
    """
    return {
        "quant_method": QUANT_METHOD,
        "bits": BITS,
        "group_size": schemes.default.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": sorted(not_converted) or None,
    }


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme that a model's `quantization_config` tells; whether every zero is 8 it cannot tell."""
    expect(config, quant_method=QUANT_METHOD, version="gemm", bits=BITS)
    return weights_said(config, "bits", symmetric=False)


def schemes_of(config: Mapping[str, Any]) -> Schemes:
    """The inverse of `config`. Other writers' models may give parts of names."""
    return Schemes(scheme_of(config), names_said(config, "modules_to_not_convert"))

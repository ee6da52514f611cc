"""GPTQ's layout: codes of 2, 3, 4 or 8 bits, a scheme for each linear where wanted, as vLLM, GPTQModel and transformers read them.

Frantar et al. 2022, arXiv:2210.17323; the layout is AutoGPTQ's, the config GPTQModel's. A linear becomes qweight int32 [in*bits/32, out],
packed along its input, qzeros int32 [groups, out*bits/32], scales float16 [groups, out] and g_idx int32 [in], the group of each input
channel. Codes run on from word to word, which shows in those of three bits only.

The first kind of this layout ("gptq") stores zeros less one. A zero of 0 then wraps around to the largest code, and readers disagree about
what that is: LMDeploy and AutoGPTQ add one and find 16, others 0. So only symmetric schemes, whose zeros are all mid-range, are written
that way. Asymmetric ones are written as "gptq_v2", with zeros as they are, which vLLM and GPTQModel read. LMDeploy's TurboMind takes
symmetric four-bit codes in groups of 128, one scheme for all, and looks at which tensors are there, not at `dynamic`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from buildsys.formats import Layout, by_scheme, expect, named, patterns, unknown, weights_alone, weights_said
from buildsys.scheme import Scheme, Schemes

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.quant.linear import QuantizedLinear

VERSION = 1

QUANT_METHOD = "gptq"
FLOATS = "F16"
"""Type of every tensor that stays float: kernels for all four widths compute in half precision."""

_QUANTIZED, _FLOAT = "+:", "-:"  # what GPTQModel writes before a pattern of `dynamic`


class Knobs(Layout):
    """The layout leaves nothing else to choose."""


def accepts(scheme: Scheme) -> str | None:
    """Why the format cannot hold a scheme; None where it can. Every group size fits the layout; engines may take fewer."""
    return weights_alone(scheme)


def mixes(kinds: Sequence[Scheme]) -> str | None:
    """Bits and group size may differ from linear to linear: `dynamic` says how, to vLLM and GPTQModel. transformers (5.23) and LMDeploy do
    not read it. Linears that vLLM fuses (queries, keys, values; gate, up) need one scheme there."""
    if len({scheme.symmetric for scheme in kinds}) > 1:
        return "stores zeros less one for a whole model or for none of it: schemes of one model are all symmetric or all asymmetric"
    return None


def keeps_float(names: Sequence[str]) -> str | None:
    """Any linear may stay float. TurboMind looks at which tensors are there, vLLM and GPTQModel at `dynamic`; transformers does neither."""
    return None


def fits(scheme: Scheme, in_features: int, out_features: int) -> str | None:
    """Why a linear of this shape cannot be stored; None where it can."""
    for what, count in (("input", in_features), ("output", out_features)):
        if count * scheme.bits % 32:
            return f"packs {what} channels in whole 32-bit words, {count} {scheme.bits}-bit codes do not fill them"
    if not scheme.divides(in_features):
        return f"groups of {scheme.group_size} input channels do not divide {in_features}"
    return None


def layout(name: str, scheme: Scheme, in_features: int, out_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that stand for the weight of the linear `name`: safetensors type and shape of each."""
    groups = scheme.groups(in_features)
    return {
        f"{name}.qweight": ("I32", (in_features * scheme.bits // 32, out_features)),
        f"{name}.qzeros": ("I32", (groups, out_features * scheme.bits // 32)),
        f"{name}.scales": ("F16", (groups, out_features)),
        f"{name}.g_idx": ("I32", (in_features,)),
    }


def pack(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The linear's tensors by the last part of their names, as in `layout`."""
    import torch

    from buildsys.quant.pack import pack_int32

    scheme, in_features = linear.scheme, linear.codes.shape[1]
    zero = linear.zero - 1 if scheme.symmetric else linear.zero
    return {
        "qweight": pack_int32(linear.codes, scheme.bits).t().contiguous(),  # [out, in*bits/32] -> [in*bits/32, out]
        "qzeros": pack_int32(zero.t(), scheme.bits),  # [out, groups] -> [groups, out*bits/32]
        "scales": linear.scale.t().contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32, device=linear.codes.device) // scheme.group(in_features),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """The inverse of `pack`."""
    from buildsys.quant.linear import QuantizedLinear
    from buildsys.quant.pack import unpack_int32

    zero = unpack_int32(tensors["qzeros"], scheme.bits).t().contiguous()
    return QuantizedLinear(
        codes=unpack_int32(tensors["qweight"].t(), scheme.bits),
        scale=tensors["scales"].t().contiguous(),
        zero=zero + 1 if scheme.symmetric else zero,
        scheme=scheme,
    )


def config(schemes: Schemes, not_converted: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. `not_converted`: whole names of the linears that stay float.

    `dynamic` maps patterns to what is other there; the first match counts. sym tells TurboMind, which refuses a model without it, and vLLM
    that every zero is mid-range.
    """
    default = schemes.default
    dynamic: dict[str, dict[str, Any]] = {_FLOAT + pattern: {} for pattern in patterns(not_converted)}
    for scheme, names in by_scheme(schemes):
        dynamic |= {_QUANTIZED + pattern: {"bits": scheme.bits, "group_size": scheme.group_size} for pattern in patterns(names)}
    return {
        "quant_method": QUANT_METHOD,
        "bits": default.bits,
        "group_size": default.group_size,
        "desc_act": False,
        "sym": default.symmetric,
        "checkpoint_format": _kind(default.symmetric),
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": dynamic,
    }


def _kind(symmetric: bool) -> str:
    return "gptq" if symmetric else "gptq_v2"


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme that a model's `quantization_config` tells of linears without one of their own."""
    symmetric = config.get("sym", True) is True
    expect(config, quant_method=QUANT_METHOD, desc_act=False)
    expect({"checkpoint_format": "gptq", **config}, checkpoint_format=_kind(symmetric))
    return weights_said(config, "bits", symmetric=symmetric)


def schemes_of(config: Mapping[str, Any]) -> Schemes:
    """The inverse of `config`."""
    default, dynamic = scheme_of(config), config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping) or not all(isinstance(said, Mapping) for said in dynamic.values()):
        raise unknown(f"has dynamic: {dynamic!r}, not a mapping from patterns")
    left_float, own = set[str](), dict[str, Scheme]()
    for pattern, said in dynamic.items():
        names = named(pattern.removeprefix(_FLOAT).removeprefix(_QUANTIZED))
        if pattern.startswith(_FLOAT):
            left_float.update(names)
            continue
        if not said.keys() <= {"bits", "group_size"}:
            raise unknown(f"has dynamic: {pattern[:200]!r} changes {', '.join(map(str, said))}; known are bits, group_size")
        told = weights_said({"bits": default.bits, "group_size": default.group_size, **said}, "bits", symmetric=default.symmetric)
        own |= dict.fromkeys(names, replace(default, bits=told.bits, group_size=told.group_size))
    return Schemes(default, frozenset(left_float), own)

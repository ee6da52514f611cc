"""compressed-tensors: packed int4 and int8, plain int8 and e4m3, and a scheme for each linear where wanted; vLLM and transformers read it.

The layout is that of the library of this name (0.20), which is its oracle in the tests. A linear is stored in one of three ways:
- pack-quantized, weights alone: weight_packed int32 [out, in*bits/32], weight_scale float16 [out, groups], weight_shape int64 [2] and,
  where zeros are not all mid-range, weight_zero_point int32 [out*bits/32, groups], packed along its output;
- int-quantized, float-quantized: weight [out, in] as int8 or e4m3 numbers, weight_scale float16 [out, 1]; activations, where they are
  rounded, get a scale a token at run time.

LMDeploy's TurboMind takes four-bit pack-quantized models, symmetric or not, with one group size of 32 or 128 for all; it looks at which
tensors are there, not at `ignore` or at targets. Its PyTorch engine takes this format for experts alone (Kimi K2's). transformers 5.23
loads packed zeros only where it is told to dequantize (`CompressedTensorsConfig(dequantize=True)`): elsewhere it expects them unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, get_args

from buildsys.formats import Layout, by_scheme, expect, named, names_said, patterns, unknown
from buildsys.scheme import GroupSize, Scheme, Schemes

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.quant.linear import QuantizedLinear

VERSION = 1

QUANT_METHOD = "compressed-tensors"
LIBRARY = "0.20.0"  # whose layout this is; readers may look at it
FLOATS = "F16"
"""Type of every tensor that stays float."""

PACKED, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
_NUMBERS: Final = {INT: "I8", FLOAT: "F8_E4M3"}
_REGEX = "re:"

_EVERY: Final = (
    *(Scheme(bits, size, even) for bits in (4, 8) for size in get_args(GroupSize) for even in (False, True)),
    Scheme(8, -1, True, "int", "int8"),
    *(Scheme(8, -1, True, "fp8", reads) for reads in ("none", "fp8")),
)
"""Each scheme that the format holds."""


class Knobs(Layout):
    """The layout leaves nothing else to choose."""


def _way(scheme: Scheme) -> str:
    """Which of the three ways a scheme is stored in."""
    return FLOAT if scheme.number == "fp8" else PACKED if scheme.activations == "none" else INT


def accepts(scheme: Scheme) -> str | None:
    """Why the format cannot hold a scheme; None where it can. The library packs other bits too, which engines do not read."""
    if scheme in _EVERY:
        return None
    rest = "fp8, and int8 with activations int8, in one group a row (-1) and symmetric"
    return f"holds 4- and 8-bit codes, {rest}; quantization is {scheme}"


def mixes(kinds: Sequence[Scheme]) -> str | None:
    """Any: each scheme is a group of its own in `config_groups`, to vLLM and transformers; LMDeploy reads the first alone. Linears that
    vLLM fuses (queries, keys, values; gate, up) need one scheme there."""
    return None


def keeps_float(names: Sequence[str]) -> str | None:
    """Any linear may stay float."""
    return None


def fits(scheme: Scheme, in_features: int, out_features: int) -> str | None:
    """Why a linear of this shape cannot be stored; None where it can."""
    if _way(scheme) == PACKED and in_features * scheme.bits % 32:
        return f"packs input channels in whole 32-bit words, {in_features} {scheme.bits}-bit codes do not fill them"
    if _way(scheme) == PACKED and not scheme.symmetric and out_features * scheme.bits % 32:
        return f"packs zeros of output channels in whole 32-bit words, {out_features} {scheme.bits}-bit codes do not fill them"
    if not scheme.divides(in_features):
        return f"groups of {scheme.group_size} input channels do not divide {in_features}"
    return None


def layout(name: str, scheme: Scheme, in_features: int, out_features: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors that stand for the weight of the linear `name`: safetensors type and shape of each."""
    groups, scale = scheme.groups(in_features), f"{name}.weight_scale"
    if _way(scheme) != PACKED:
        return {f"{name}.weight": (_NUMBERS[_way(scheme)], (out_features, in_features)), scale: ("F16", (out_features, 1))}
    packed: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{name}.weight_packed": ("I32", (out_features, in_features * scheme.bits // 32)),
        scale: ("F16", (out_features, groups)),
        f"{name}.weight_shape": ("I64", (2,)),
    }
    zeros: dict[str, tuple[str, tuple[int, ...]]] = {f"{name}.weight_zero_point": ("I32", (out_features * scheme.bits // 32, groups))}
    return packed if scheme.symmetric else packed | zeros


def pack(linear: QuantizedLinear) -> dict[str, Tensor]:
    """The linear's tensors by the last part of their names, as in `layout`."""
    import torch

    from buildsys.quant.pack import pack_int32, to_numbers

    scheme = linear.scheme
    if _way(scheme) != PACKED:
        return {"weight": to_numbers(linear.codes, scheme.number), "weight_scale": linear.scale.contiguous()}
    packed = {
        "weight_packed": pack_int32(linear.codes, scheme.bits),
        "weight_scale": linear.scale.contiguous(),
        "weight_shape": torch.tensor(linear.codes.shape, device=linear.codes.device),
    }
    if scheme.symmetric:
        return packed
    return packed | {"weight_zero_point": pack_int32(linear.zero.t(), scheme.bits).t().contiguous()}  # [groups, words] -> [words, groups]


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> QuantizedLinear:
    """The inverse of `pack`."""
    import torch

    from buildsys.quant.linear import QuantizedLinear
    from buildsys.quant.pack import from_numbers, unpack_int32

    scale = tensors["weight_scale"]
    codes = unpack_int32(tensors["weight_packed"], scheme.bits) if _way(scheme) == PACKED else from_numbers(tensors["weight"])
    if scheme.symmetric:
        zero = torch.full_like(scale, scheme.middle, dtype=torch.uint8)
    else:
        zero = unpack_int32(tensors["weight_zero_point"].t(), scheme.bits).t().contiguous()
    return QuantizedLinear(codes, scale, zero, scheme)


def config(schemes: Schemes, not_converted: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. `not_converted`: whole names of the linears that stay float.

    Group 0 is for a class, the others are for names, which readers prefer. It comes last, or the library would warn of each name that it
    found a class before. vLLM asks for linears that it fuses by the name of the whole before it looks at parts, so targets name that too.
    """
    own = [_group(scheme, [_REGEX + pattern for pattern in patterns(names)]) for scheme, names in by_scheme(schemes)]
    groups = {f"group_{at}": group for at, group in enumerate(own, 1)} | {"group_0": _group(schemes.default, ["Linear"])}
    ways = {group["format"] for group in groups.values()}
    return {
        "quant_method": QUANT_METHOD,
        "version": LIBRARY,
        "quantization_status": "compressed",
        "format": ways.pop() if len(ways) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": sorted(not_converted),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    numbers = "float" if scheme.number == "fp8" else "int"
    size = None if scheme.group_size == -1 else scheme.group_size
    grouped = {"strategy": "channel" if size is None else "group", "group_size": size}
    token = {"num_bits": 8, "type": numbers, "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
    return {
        "targets": targets,
        "weights": {"num_bits": scheme.bits, "type": numbers, "symmetric": scheme.symmetric, **grouped, "dynamic": False},
        "input_activations": None if scheme.activations == "none" else token,
        "output_activations": None,
        "format": _way(scheme),
    }


def scheme_of(config: Mapping[str, Any]) -> Scheme:
    """The scheme that a model's `quantization_config` tells of linears without one of their own."""
    expect(config, quant_method=QUANT_METHOD, quantization_status="compressed")
    return _groups(config)[0][0]


def _groups(config: Mapping[str, Any]) -> list[tuple[Scheme, list[str]]]:
    """Each group's scheme and targets, the default's first."""
    groups = config.get("config_groups")
    names = [f"group_{at}" for at in range(len(groups))] if isinstance(groups, Mapping) and groups else ["group_0"]
    if not isinstance(groups, Mapping) or groups.keys() != set(names):
        raise unknown(f"has no config_groups {', '.join(names)}")
    found = [(_scheme(name, groups[name]), sorted(names_said(groups[name], "targets"))) for name in names]
    if found[0][1] != ["Linear"]:
        raise unknown(f"has targets {', '.join(found[0][1])[:200]} in group_0, not Linear")
    return found


def _scheme(name: str, group: Any) -> Scheme:
    """The inverse of `_group`; keys that it does not write (observers, say) change nothing of the layout."""
    said = group if isinstance(group, Mapping) else {}
    for scheme in _EVERY:
        ours = _group(scheme, [])
        if all(_says(said.get(part), ours[part]) for part in ("weights", "input_activations", "output_activations", "format")):
            return scheme
    parts = ", ".join(f"{part} {said.get(part)!r}" for part in ("weights", "input_activations", "format"))
    raise unknown(f"describes {name} as no scheme that format compressed_tensors holds: {parts}")


def _says(said: Any, wanted: Any) -> bool:
    if not isinstance(said, Mapping) or wanted is None:
        return bool(said == wanted)
    return all(key in said and said[key] == value for key, value in wanted.items())


def schemes_of(config: Mapping[str, Any]) -> Schemes:
    """The inverse of `config`."""
    default = scheme_of(config)
    own = {name: scheme for scheme, targets in _groups(config)[1:] for target in targets for name in _named(target)}
    return Schemes(default, frozenset(name for entry in names_said(config, "ignore") for name in _named(entry)), own)


def _named(entry: str) -> tuple[str, ...]:
    return named(entry.removeprefix(_REGEX)) if entry.startswith(_REGEX) else (entry,)

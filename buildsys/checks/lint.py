"""Looks at every tensor of the packed model as a server would get it, and says what no sound model holds.

What users of quantized models report as "it loads and writes nonsense": layers that were to be quantized and are not (or the reverse),
damaged or never written stretches of codes, scales of zero, NaN. Format-generic: names, shapes and unpacking are the format's own.
What a format stores beside codes, scales and zeros (shapes, indices) follows from these, so packing them again has to give it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from buildsys.measurement import Limit, Measurement
from buildsys.slots import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.architecture import Architecture
    from buildsys.io.checkpoint import Checkpoint
    from buildsys.quant.linear import QuantizedLinear
    from buildsys.scheme import Scheme, Schemes

VERSION = 2
READS = ("packed",)
LIMITS: dict[str, Limit] = {}
FIXED: dict[str, tuple[Limit, float]] = {"findings": (Limit("findings", "max"), 0.0)}  # no recipe may serve a damaged model
OPTIONAL: frozenset[str] = frozenset()
ALWAYS = True
ASIDE: frozenset[str] = frozenset()

FLOATS = ("F16", "BF16", "F32")
HALF_MAX = 65504.0
HALF_MIN_NORMAL = 2.0**-14
FP8_MAGNITUDE = 0x7F  # an e4m3 number without its sign; with every one of these bits set it is NaN
WIDE = 64  # so many equal codes in a line of trained weights are no chance
SHOWN = 3

Layout = dict[str, tuple[tuple[str, ...], tuple[int, ...]]]
"""Tensor name -> (types that it may have, shape)."""


class Knobs(Frozen):
    """Nothing to set: what it looks for is never right."""


def measure(knobs: Knobs, inputs: Mapping[str, Any], context: Any) -> list[Measurement]:
    """How many things are wrong; the first of them by name."""
    from buildsys.io.checkpoint import Checkpoint

    checkpoint, format, schemes = Checkpoint(inputs["packed"].files), context.format, context.schemes
    floats, linears = expected(context.architecture, schemes, format)
    swapped = dict(_swapped(checkpoint, floats, linears))
    told = frozenset(tensor for tensors in swapped.values() for tensor in tensors)
    found = [*swapped, *_misplaced(checkpoint, [*floats, *(part for layout in linears.values() for part in layout)], told)]
    for done, (name, layout) in enumerate(linears.items()):
        found.extend(_shapes(checkpoint, layout, told))
        if all(part in checkpoint and _as_laid_out(checkpoint, part, held) for part, held in layout.items()):
            tensors = {part.removeprefix(f"{name}."): checkpoint.load(part, None, context.device, finite=False) for part in layout}
            found.extend(f"{name} {what}" for what in tensors_findings(tensors, format, schemes.of(name)))
        context.progress("lint", done + 1, len(linears))
    found.extend(_shapes(checkpoint, floats, told))
    for name in floats:
        if name in checkpoint and checkpoint.entry(name).dtype in FLOATS:
            found.extend(f"{name} {what}" for what in float_findings(checkpoint.load(name, None, context.device, finite=False)))
    more = f" … and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return [Measurement.exact("findings", float(len(found)), "findings", "; ".join(found[:SHOWN]) + more)]


def expected(architecture: Architecture, schemes: Schemes, format: Any) -> tuple[Layout, dict[str, Layout]]:
    """What the model must hold: its float tensors, and for each quantized linear the tensors that stand for its weight."""
    linears: dict[str, Layout] = {}
    for layer in range(architecture.layers):
        for linear in architecture.linears:
            name = architecture.prefix(layer) + linear.name
            scheme = schemes.of(name)
            if scheme is not None:
                layout = format.layout(name, scheme, linear.in_features, linear.out_features)
                linears[name] = {part: ((dtype,), shape) for part, (dtype, shape) in layout.items()}
    stands = {f"{name}.weight" for name in linears}
    return {name: (FLOATS, shape) for name, shape in architecture.tensors().items() if name not in stands}, linears


def _swapped(checkpoint: Checkpoint, floats: Layout, linears: Mapping[str, Layout]) -> Iterator[tuple[str, list[str]]]:
    """Layers that are whole and in the wrong form, each with the tensors that this tells of."""
    for name in linears:
        if _is_float(checkpoint, f"{name}.weight"):
            yield f"{name} holds a float weight; it was to be quantized", [f"{name}.weight", *linears[name]]
    for name in floats:
        parts = [found for found in _siblings(checkpoint, name) if found not in floats]
        if name.endswith(".weight") and parts:
            yield f"{name.removesuffix('.weight')} is quantized; it was to stay float", [name, *parts]


def _misplaced(checkpoint: Checkpoint, wanted: list[str], told: frozenset[str]) -> Iterator[str]:
    """Tensors that are not there and should be, and the reverse."""
    for name in wanted:
        if name not in checkpoint and name not in told:
            yield f"{name} is missing"
    known = told.union(wanted)
    yield from (f"{name} belongs to no layer of the architecture" for name in checkpoint.names() if name not in known)


def _siblings(checkpoint: Checkpoint, name: str) -> list[str]:
    """The tensors of the module whose float weight is not there, or there as codes."""
    if _is_float(checkpoint, name):
        return []
    module = name.rsplit(".", 1)[0] + "."
    return [found for found in checkpoint.names() if found.startswith(module) and "." not in found[len(module) :]]


def _is_float(checkpoint: Checkpoint, name: str) -> bool:
    return name in checkpoint and checkpoint.entry(name).dtype in FLOATS


def _as_laid_out(checkpoint: Checkpoint, name: str, held: tuple[tuple[str, ...], tuple[int, ...]]) -> bool:
    entry = checkpoint.entry(name)
    return entry.dtype in held[0] and entry.shape == held[1]


def _shapes(checkpoint: Checkpoint, layout: Layout, told: frozenset[str]) -> Iterator[str]:
    for name, (dtypes, shape) in layout.items():
        if name in checkpoint and name not in told and not _as_laid_out(checkpoint, name, (dtypes, shape)):
            entry = checkpoint.entry(name)
            yield f"{name} is {entry.dtype} {list(entry.shape)}; it was to be {' or '.join(dtypes)} {list(shape)}"


def float_findings(values: Tensor) -> Iterator[str]:
    """What is wrong with a tensor that stays float."""
    count = int((~values.isfinite()).sum())
    if count:
        yield f"holds {count} NaN or Inf"
    elif values.dim() == 2 and values.numel() > WIDE and bool((values == values[0, 0]).all()):
        yield f"is {float(values[0, 0])} everywhere"


def tensors_findings(tensors: Mapping[str, Tensor], format: Any, scheme: Scheme | None) -> Iterator[str]:
    """What is wrong with the tensors that stand for a linear."""
    linear = format.unpack(tensors, scheme)
    found = list(codes_findings(linear))
    yield from found
    if not found:
        packed = format.pack(linear)
        yield from (f"has a {part} that does not go with its codes" for part in tensors if differ(tensors[part], packed[part]))


def differ(one: Tensor, other: Tensor) -> bool:
    """Bit by bit: as numbers -0 equals 0, and NaN nothing."""
    import torch

    return not torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (one, other)))


def codes_findings(linear: QuantizedLinear) -> Iterator[str]:
    """What is wrong with a quantized linear."""
    from buildsys.quant.grid import FP8_MAX

    scale, scheme, fp8 = linear.scale.float(), linear.scheme, linear.scheme.number == "fp8"
    largest, half = FP8_MAX if fp8 else scheme.top, linear.scale.element_size() == 2
    for what, bad in (
        ("scales that are NaN or Inf", ~scale.isfinite()),
        ("negative scales", scale < 0),
        ("scales of zero", scale == 0),
        ("scales below the least normal float16, which kernels flush to zero", (scale > 0) & (scale < HALF_MIN_NORMAL) & half),
        ("scales under which weights leave float16", scale.isfinite() & (scale * largest > HALF_MAX)),
        (f"zeros above {scheme.top}", linear.zero > scheme.top),
        (f"zeros that are not {scheme.middle}, in a symmetric scheme", (linear.zero != scheme.middle) & scheme.symmetric),
        ("codes that are NaN", ((linear.codes & FP8_MAGNITUDE) == FP8_MAGNITUDE) & fp8),
    ):
        if count := int(bad.sum()):
            yield f"has {count} {what}"
    if int(linear.codes.amax()) > scheme.top:
        yield f"has a code of {int(linear.codes.amax())}, above {scheme.top}"
    yield from _constant(linear)


def _constant(linear: QuantizedLinear) -> Iterator[str]:
    """Lines of one single code that does not mean zero: what a hole in a file looks like. A pruned line is all zeros, and may be."""
    codes = linear.codes
    if bool((codes == codes[0, 0]).all()):
        yield f"holds the one code {int(codes[0, 0])} everywhere"
        return
    dead = _means_zero(linear)
    for what, dim in (("output channels", 1), ("input channels", 0)):
        same = codes.amin(dim) == codes.amax(dim)
        stuck = int((same & ~dead.all(dim)).sum())
        if codes.shape[dim] >= WIDE and stuck:
            yield f"holds one code throughout in {stuck} of {len(same)} {what}"


def _means_zero(linear: QuantizedLinear) -> Tensor:  # -> bool [out, in]
    if linear.scheme.number == "fp8":
        return (linear.codes & FP8_MAGNITUDE) == 0  # of either sign
    group = linear.scheme.group(linear.codes.shape[1])
    return (linear.codes.reshape(len(linear.codes), -1, group) == linear.zero.unsqueeze(-1)).reshape(linear.codes.shape)

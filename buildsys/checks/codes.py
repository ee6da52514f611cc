"""Whether the packed model says exactly what the quantize step decided: unpack == codes, scale and zero, to the bit.

A layout can be wrong in a lane and still load; this is where that would show. Norms, biases and other floats of a block are compared
too: a norm without the scales that were folded into it ruins a model as surely as a wrong code. Each linear is read in the scheme that
its block was quantized in, which has to be the one that config.json will tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from buildsys.errors import BuildError
from buildsys.measurement import Limit, Measurement
from buildsys.slots import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.io.checkpoint import Checkpoint
    from buildsys.quant.linear import QuantizedLinear

VERSION = 2
READS = ("packed", "blocks")
LIMITS: dict[str, Limit] = {}
FIXED: dict[str, tuple[Limit, float]] = {
    "mismatched_codes": (Limit("mismatched_codes", "max"), 0.0),
    "mismatched_floats": (Limit("mismatched_floats", "max"), 0.0),
}
OPTIONAL: frozenset[str] = frozenset()
ALWAYS = True
ASIDE: frozenset[str] = frozenset()


class Knobs(Frozen):
    """Nothing to set: equal is equal."""


def measure(knobs: Knobs, inputs: Mapping[str, Any], context: Any) -> list[Measurement]:
    """How many codes (with scales and zeros) and how many floats differ, with the worst layer of each."""
    from buildsys.io.checkpoint import Checkpoint
    from buildsys.quant.blocks import load_block
    from buildsys.quant.rows import relay

    checkpoint, architecture = Checkpoint(inputs["packed"].files), context.architecture
    codes: dict[str, int] = {}
    floats: dict[str, int] = {}
    for layer in range(architecture.layers):
        file, prefix = f"block-{layer:05}.safetensors", architecture.prefix(layer)
        if file not in inputs["blocks"].files:
            raise BuildError(file, f"is not among the {architecture.layers} blocks that quantize writes", "build the recipe again")
        linears, others = relay(context.relayout, *load_block(inputs["blocks"].files[file], context.device))
        for linear in architecture.linears:
            name = prefix + linear.name
            found, scheme = linears.get(linear.name), context.schemes.of(name)
            if found is not None and found.scheme == scheme:
                codes[name] = differing_codes(checkpoint, name, found, context.format)
            elif found is not None or scheme is not None:
                codes[name] = linear.in_features * linear.out_features
        for name, tensor in others.items():
            floats[prefix + name] = differing_floats(checkpoint, prefix + name, tensor)
        context.progress("codes", layer + 1, architecture.layers)
    return [_measured("mismatched_codes", "codes", codes), _measured("mismatched_floats", "values", floats)]


def _measured(name: str, unit: str, counts: Mapping[str, int]) -> Measurement:
    total = sum(counts.values())
    worst = max(counts, key=lambda layer: counts[layer], default="")
    detail = f"{sum(map(bool, counts.values()))} of {len(counts)} tensors differ; worst: {worst}, {counts[worst]}" if total else ""
    return Measurement.exact(name, float(total), unit, detail)


def differing_codes(checkpoint: Checkpoint, name: str, linear: QuantizedLinear, format: Any) -> int:
    """Codes, scales and zeros of the packed linear that are not the block's; all of them where the packed tensors have another form.

    Where these agree, bytes that do not: a format may store more than they say (shapes, indices), or say it in wider numbers.
    """
    import torch

    out_features, in_features = linear.codes.shape
    layout = format.layout(name, linear.scheme, in_features, out_features)
    for part, (dtype, shape) in layout.items():
        if part not in checkpoint or checkpoint.entry(part).dtype != dtype or checkpoint.shape(part) != shape:
            return linear.codes.numel()
    device = str(linear.codes.device)
    tensors = {part.removeprefix(f"{name}."): checkpoint.load(part, None, device, finite=False) for part in layout}
    found = format.unpack(tensors, linear.scheme)
    if found.scale.dtype != linear.scale.dtype:
        return linear.codes.numel()
    bits = torch.int16 if linear.scale.dtype == torch.float16 else torch.int32
    scales = found.scale.view(bits), linear.scale.view(bits)  # as numbers -0 equals 0, and NaN nothing
    pairs = ((found.codes, linear.codes), scales, (found.zero, linear.zero))
    count = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
    return count or sum(_differing_bytes(tensors[part], packed) for part, packed in format.pack(linear).items())


def _differing_bytes(one: Tensor, other: Tensor) -> int:
    import torch

    return int((one.reshape(-1).view(torch.uint8) != other.reshape(-1).view(torch.uint8)).sum())


def differing_floats(checkpoint: Checkpoint, name: str, tensor: Tensor) -> int:
    """Values of a float tensor that are not the block's in the packed model's type; all where its form differs."""
    if name not in checkpoint or checkpoint.shape(name) != tuple(tensor.shape):
        return tensor.numel()
    found = checkpoint.load(name, None, str(tensor.device), finite=False)
    return int((found != tensor.to(found.dtype)).sum())

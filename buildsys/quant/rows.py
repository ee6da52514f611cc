"""Cutting a block's linears by rows, as `buildsys.relayout` says: codes, scales, zeros and biases of a row stay together, to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from buildsys.quant.linear import QuantizedLinear
from buildsys.relayout import Part, Relayout


def take(tensor: Tensor, part: Part) -> Tensor:  # [out, ...] -> [rows, ...]
    """The rows of a matrix, of a bias, or of whatever else holds something for each output channel."""
    return tensor if part.rows is None else torch.cat([tensor[rows.start : rows.stop] for rows in part.rows])


def split(linear: QuantizedLinear, part: Part) -> QuantizedLinear:
    """The linear of these rows. Cutting and dequantizing commute."""
    return replace(linear, codes=take(linear.codes, part), scale=take(linear.scale, part), zero=take(linear.zero, part))


def relay(
    relayout: Relayout, linears: Mapping[str, QuantizedLinear], floats: Mapping[str, Tensor]
) -> tuple[dict[str, QuantizedLinear], dict[str, Tensor]]:
    """A block's linears and floats (norms, biases, weights that stay float), all by their names in the block, as the layout names them."""
    found = {name: split(linears[part.name], part) for name, part in relayout.parts.items() if part.name in linears}
    others = {new: floats[old] for new, old in relayout.norms().items() if old in floats}
    for name, part in relayout.parts.items():
        for kind in ("weight", "bias"):
            if (old := f"{part.name}.{kind}") in floats:
                others[f"{name}.{kind}"] = take(floats[old], part)
    return found, others

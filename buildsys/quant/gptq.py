"""GPTQ from its parts: a factor that all rows share, a grid, codes that pay for each other's errors, and sweeps that make both better."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from buildsys.quant.compensate import compensated, factored
from buildsys.quant.grid import least_error, min_max
from buildsys.quant.linear import QuantizedLinear, Rounding
from buildsys.quant.parallel import on_each, shares
from buildsys.quant.refine import refined
from buildsys.quant.search import output_norms
from buildsys.scheme import Scheme


def gptq(
    weight: Tensor,
    gram: Tensor,
    scheme: Scheme,
    devices: Sequence[str],
    *,
    damping: float,
    activation_order: bool,
    least_error_grid: bool,
    sweeps: int,
) -> Rounding:
    """Codes for `weight` [out, in] given `gram` [in, in], the second moments of its inputs.

    Rows are independent of one another: `devices`, of which the first holds the matrices, share them."""
    whole, devices = factored(gram, damping, activation_order), devices or (str(weight.device),)
    dealt = zip(devices, shares(len(weight), len(devices)), strict=True)
    # Sent before the first device is given work that a copy from it would wait for.
    held = {device: (weight[rows.start : rows.stop].to(device), whole.to(device)) for device, rows in dealt}

    def share(device: str, rows: range) -> tuple[QuantizedLinear, Tensor]:
        part, by = held[device]
        grid = least_error(part, scheme, by.h.gram.diagonal()) if least_error_grid else min_max(part, scheme)
        grid, codes = refined(part, by.h, grid, compensated(part, by, grid), sweeps)
        return grid.linear(codes), output_norms(part, grid.dequantize(codes), by.h.gram)

    parts, norms = zip(*on_each(share, len(weight), devices), strict=True)
    codes, scale, zero = (
        torch.cat([part.to(weight.device) for part in each])
        for each in zip(*((part.codes, part.scale, part.zero) for part in parts), strict=True)
    )
    notes = {"damping": whole.h.damping, "unseen_channels": whole.h.unseen}
    return Rounding(QuantizedLinear(codes, scale, zero, scheme), notes, torch.cat([part.to(weight.device) for part in norms], 1))

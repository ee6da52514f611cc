"""GPTQ: round column by column, each error paid back by the columns not yet rounded (Frantar et al., arXiv:2210.17323, algorithm 1).

Columns go in the order of falling diag(H), on grids fixed beforehand ("static groups"), so that order costs nothing at inference. Sweeps of
coordinate descent over scales and codes follow (quant/refine.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from buildsys.slots import Frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from buildsys.quant.linear import Rounding
    from buildsys.scheme import Scheme

VERSION = 4
KIND = "round"
SEES_TOKENS = True


class Knobs(Frozen):
    damping: float = Field(0.01, gt=0, le=1, description="share of H's mean diagonal that is added to it before it is factored")
    activation_order: bool = Field(True, description="round the columns of largest activation first")
    least_error_grid: bool = Field(True, description="choose each group's range by least squared error instead of min-max")
    sweeps: int = Field(2, ge=0, le=20, description="passes of coordinate descent over scales and codes afterwards; 0: none")


def accepts(scheme: Scheme) -> str | None:
    """Why these codes cannot be had, or None."""
    return "rounds to whole numbers, quantization.number is fp8" if scheme.number == "fp8" else None


def round_weights(weight: Tensor, gram: Tensor, scheme: Scheme, knobs: Knobs, devices: Sequence[str] = ()) -> Rounding:
    """Codes for `weight` [out, in] given `gram` [in, in], the second moments of its inputs under the quantized blocks before it.

    Rows are independent of one another: `devices`, of which the first holds the matrices, share them."""
    import torch

    from buildsys.quant.compensate import compensated, factored
    from buildsys.quant.grid import least_error, min_max
    from buildsys.quant.linear import QuantizedLinear, Rounding
    from buildsys.quant.parallel import on_each, shares
    from buildsys.quant.refine import refined
    from buildsys.quant.search import output_norms

    whole, devices = factored(gram, knobs.damping, knobs.activation_order), devices or (str(weight.device),)
    dealt = zip(devices, shares(len(weight), len(devices)), strict=True)
    # Sent before the first device is given work that a copy from it would wait for.
    held = {device: (weight[rows.start : rows.stop].to(device), whole.to(device)) for device, rows in dealt}

    def share(device: str, rows: range) -> tuple[QuantizedLinear, Tensor]:
        part, by = held[device]
        grid = least_error(part, scheme, by.h.gram.diagonal()) if knobs.least_error_grid else min_max(part, scheme)
        grid, codes = refined(part, by.h, grid, compensated(part, by, grid), knobs.sweeps)
        return grid.linear(codes), output_norms(part, grid.dequantize(codes), by.h.gram)

    parts, norms = zip(*on_each(share, len(weight), devices), strict=True)
    codes, scale, zero = (
        torch.cat([part.to(weight.device) for part in each])
        for each in zip(*((part.codes, part.scale, part.zero) for part in parts), strict=True)
    )
    notes = {"damping": whole.h.damping, "unseen_channels": whole.h.unseen}
    return Rounding(QuantizedLinear(codes, scale, zero, scheme), notes, torch.cat([part.to(weight.device) for part in norms], 1))

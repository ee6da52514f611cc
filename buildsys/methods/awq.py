"""AWQ: scale salient input channels up before rounding (Lin et al., arXiv:2306.00978, section 3.2, eq. 4-5).

The ratio is searched on the calibration Gram matrix instead of by forward passes: the squared output error of rounding is tr(E G E^T).
"""

from __future__ import annotations

from math import inf, isfinite
from typing import TYPE_CHECKING

from pydantic import Field

from buildsys.slots import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.quant.observe import SiteStats
    from buildsys.scheme import Scheme

VERSION = 1
KIND = "rescale"


class Knobs(Frozen):
    ratios: int = Field(20, ge=2, le=100, description="steps of the search for the exponent of the activation scale, from 0 to 1")


def rescale(weights: list[Tensor], stats: SiteStats, tied: Tensor | None, scheme: Scheme, knobs: Knobs) -> Tensor:
    """The scale [in] for the linears (each [out, in]) that read at one site; channels with one entry in `tied` share theirs."""
    import torch

    from buildsys.quant.search import rounding_errors

    absmean = stats.absmean
    if tied is not None:
        shared = torch.zeros(int(tied.max()) + 1, device=absmean.device).index_add_(0, tied.to(absmean.device), absmean)
        absmean = shared[tied.to(absmean.device)] / (len(tied) / len(shared))
    scales = torch.stack([absmean.clamp(min=1e-4).pow(step / knobs.ratios) for step in range(knobs.ratios + 1)])
    scales = scales / (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()
    errors = rounding_errors(weights, stats, scales, scheme)
    # The first is all ones: it stays where an overflow leaves no number to compare.
    return scales[min(range(len(errors)), key=lambda at: errors[at] if isfinite(errors[at]) else inf)]

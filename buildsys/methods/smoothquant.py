"""SmoothQuant: divide the loud channels of activations, multiply the weights that read them (Xiao et al., arXiv:2211.10438, eq. 3-4).

s_j = max|x_j|^alpha / max|w_j|^(1 - alpha). The paper sets one alpha a model; here each site has its own, that of the least predicted
error of rounding both its weights and what they read. On all four sites, where LMDeploy's own smooth_quant takes the two behind a norm.
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

STEPS = 10  # of the search for alpha, from 0 to 1
FLOOR = 1e-4  # of the loudest channel: one that is never active has no say, and no scale leaves the range of float16


class Knobs(Frozen):
    alpha: float | None = Field(
        None, ge=0, le=1, description="how much of the activations' range moves into the weights; left out, it is searched for each site"
    )


def accepts(scheme: Scheme) -> str | None:
    """Why the method has nothing to do in a scheme, or None."""
    return "moves outliers out of activations, and quantization.activations is none" if scheme.activations == "none" else None


def rescale(weights: list[Tensor], stats: SiteStats, tied: Tensor | None, scheme: Scheme, knobs: Knobs) -> Tensor:
    """The scale [in] for the linears (each [out, in]) that read at one site; channels with one entry in `tied` share theirs."""
    import torch

    from buildsys.quant.search import rounding_errors

    loud = _floored(_shared(stats.absmax, tied))
    wide = _floored(_shared(torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).float(), tied))
    alphas = [step / STEPS for step in range(STEPS + 1)] if knobs.alpha is None else [knobs.alpha]
    scales = torch.stack([loud.pow(alpha) / wide.pow(1 - alpha) for alpha in alphas])
    # A common factor changes nothing that is rounded; this one keeps both sides of it within float16.
    scales = scales / (scales.amax(1, keepdim=True) * scales.amin(1, keepdim=True)).sqrt()
    if knobs.alpha is not None:
        return scales[0]
    scales = torch.cat([torch.ones_like(scales[:1]), scales])  # the first stays where nothing is better, or an overflow leaves no number
    by_weights = rounding_errors(weights, stats, scales, scheme)
    by_activations = activation_errors(weights, stats, scales, scheme)
    errors = [one + other for one, other in zip(by_weights, by_activations, strict=True)]
    return scales[min(range(len(errors)), key=lambda at: errors[at] if isfinite(errors[at]) else inf)]


def activation_errors(weights: list[Tensor], stats: SiteStats, scales: Tensor, scheme: Scheme) -> list[float]:
    """For each row of `scales` [candidates, in] the mean squared output error of rounding what the `weights` read, divided by it before.

    Errors of different channels hardly correlate, so each weighs by the squared norm of the weights' column.
    """
    from buildsys.quant.activations import rounding_noise

    squares = stats.gram.diagonal(dim1=1, dim2=2).flatten()[: scales.shape[1]]
    columns = sum(weight.float().square().sum(0) for weight in weights)
    return [float((columns * scale.square() * rounding_noise(squares / scale.square(), scheme.activations)).sum()) for scale in scales]


def _shared(largest: Tensor, tied: Tensor | None) -> Tensor:  # [in] -> [in]
    """The largest among tied channels, for each of them."""
    if tied is None:
        return largest
    tied = tied.to(largest.device)
    return largest.new_zeros(int(tied.max()) + 1).scatter_reduce_(0, tied, largest, "amax")[tied]


def _floored(largest: Tensor) -> Tensor:  # [in] -> [in], above zero
    return largest.maximum(largest.amax() * FLOOR).clamp(min=1e-8)

"""AWQ: scale salient input channels up before rounding (Lin et al., arXiv:2306.00978, section 3.2, eq. 4-5).

A channel's scale is (its mean |x|)^a / (the length of its column of weights)^b. The paper has b = 0; with b, a channel that is loud because
its weights are small, as outlier channels are, can be brought back whole. Both exponents are searched on the calibration Gram matrix
instead of by forward passes: the squared output error of rounding is tr(E G E^T).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from math import inf, isfinite
from typing import TYPE_CHECKING

from pydantic import Field

from buildsys.slots import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.quant.observe import SiteStats
    from buildsys.scheme import Scheme

VERSION = 3
KIND = "rescale"

COARSE = 4  # steps from 0 to 1 that are tried first, of both exponents
JUDGES = 512  # outputs, evenly spread, whose error a choice is judged by: their sum ranks scales as that of all does (docs/LOG.md)
FLOOR = 1e-4  # of the mean length: a column of zeros must not spread the scales beyond what float16 holds

Exponents = tuple[float, float]  # of activations, of weights


class Knobs(Frozen):
    ratios: int = Field(
        20, ge=2, le=100, description="the exponents of activations and of weights, from 0 to 1, are searched down to steps of 1/ratios"
    )


def accepts(scheme: Scheme) -> str | None:
    """Why the method cannot work in a scheme, or None: it can in every one."""
    return None


def rescale(weights: list[Tensor], stats: SiteStats, tied: Tensor | None, scheme: Scheme, knobs: Knobs) -> Tensor:
    """The scale [in] for the linears (each [out, in]) that read at one site; channels with one entry in `tied` share theirs."""
    import torch

    from buildsys.quant.search import rounding_errors

    loud = _shared(stats.absmean, tied).clamp(min=1e-4)
    lengths = torch.stack([torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32) for weight in weights])  # [weights, in]
    heavy = _shared(lengths.square().sum(0), tied).sqrt()
    heavy = heavy.clamp(min=max(float(heavy.mean()) * FLOOR, torch.finfo(heavy.dtype).tiny))

    def scales(at: Sequence[Exponents]) -> Tensor:  # -> [candidates, in]
        powers = torch.tensor(at, dtype=loud.dtype, device=loud.device)
        raw = loud.pow(powers[:, :1]) / heavy.pow(powers[:, 1:])
        return raw / (raw.amax(1, keepdim=True) * raw.amin(1, keepdim=True)).sqrt()

    apart = -(-sum(map(len, weights)) // JUDGES)
    judges = [torch.cat([weight[::apart] for weight in weights])]
    errors: dict[Exponents, float] = {}
    step, best = 1 / COARSE, (0.0, 0.0)  # all ones: it stays where an overflow leaves no number to compare
    grid = [at * step for at in range(COARSE + 1)]
    tried: Iterable[Exponents] = product(grid, grid)
    while new := [at for at in tried if at not in errors]:
        found = rounding_errors(judges, stats, scales(new), scheme)
        errors |= {at: error if isfinite(error) else inf for at, error in zip(new, found, strict=True)}
        best = min(errors, key=errors.__getitem__)
        step /= 2
        tried = _around(best, step) if step >= 1 / knobs.ratios else ()
    return scales([best])[0]


def _around(at: Exponents, step: float) -> list[Exponents]:
    """The neighbours of a pair of exponents, none below 0 or above 1."""
    a, b = ([value for value in (one - step, one, one + step) if 0 <= value <= 1] for one in at)
    return list(product(a, b))


def _shared(values: Tensor, tied: Tensor | None) -> Tensor:  # [in] -> [in]
    """The mean of each set of tied channels, at each of them."""
    if tied is None:
        return values
    tied = tied.to(values.device)
    sums = values.new_zeros(int(tied.max()) + 1).index_add_(0, tied, values)
    return sums[tied] / (len(tied) / len(sums))

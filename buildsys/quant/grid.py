"""Where the codes of a group lie: the scale and zero of a uniform grid, and rounding to it.

Min-max grids as in arXiv:1712.05877; the search for a tighter range by squared error as in OCTAV/GPTQ's `mse` option
(arXiv:2210.17323's code), here weighted by each input channel's mean square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from buildsys.quant.linear import QuantizedLinear
from buildsys.scheme import Scheme

SHRINKS = tuple(1.0 - 0.02 * step for step in range(26))  # 1.00, 0.98 … 0.50 of the min-max range
SMALLEST_SCALE = 2.0**-14  # the least normal float16: below it a kernel may flush to zero
TILE, ROWS = 1 << 17, 256  # weights that are tried on every grid while a processor's cache holds them, and outputs of them
FP8_MAX = 448.0  # of e4m3: arXiv:2209.05433, table 1


@dataclass(frozen=True)
class Grid:
    """scale: float32 [out, groups], each a float16 number; zero: float32 [out, groups], each a whole number of codes.

    A float code is a code as a float32, so that it may be computed with; of fp8 it is the number itself."""

    scale: Tensor
    zero: Tensor
    scheme: Scheme

    def spread(self, in_features: int) -> tuple[Tensor, Tensor]:  # -> scale, zero: [out, in]
        group = self.scheme.group(in_features)
        return self.scale.repeat_interleave(group, 1), self.zero.repeat_interleave(group, 1)

    def round(self, weight: Tensor) -> Tensor:  # [out, in] -> float codes [out, in]
        """The nearest codes."""
        scale, zero = self.spread(weight.shape[1])
        if self.scheme.number == "fp8":
            return (weight / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()
        return (torch.round(weight / scale) + zero).clamp_(0, self.scheme.top)

    def dequantize(self, codes: Tensor) -> Tensor:  # float codes [out, in] -> [out, in]
        scale, zero = self.spread(codes.shape[1])
        return (codes - zero) * scale

    def linear(self, codes: Tensor) -> QuantizedLinear:  # float codes [out, in]
        stored = codes.to(torch.float8_e4m3fn).view(torch.uint8) if self.scheme.number == "fp8" else codes.to(torch.uint8)
        return QuantizedLinear(stored, self.scale.half(), self.zero.to(torch.uint8), self.scheme)


def min_max(weight: Tensor, scheme: Scheme, shrink: float | Tensor = 1.0) -> Grid:
    """The grid that just covers `weight` [out, in] and zero, its range multiplied by `shrink` (a number, or [out, groups])."""
    by_group = torch.unflatten(weight, 1, (-1, scheme.group(weight.shape[1])))
    return covering(by_group.amin(2).clamp(max=0) * shrink, by_group.amax(2).clamp(min=0) * shrink, scheme)


def covering(low: Tensor, high: Tensor, scheme: Scheme) -> Grid:
    """The grid from `low` to `high`, [out, groups] each."""
    if scheme.number == "fp8":
        scale = torch.maximum(high, -low) / FP8_MAX
    elif scheme.symmetric:
        scale = torch.maximum(high / (scheme.top - scheme.middle), -low / scheme.middle)
    else:
        scale = (high - low) / scheme.top
    # Rounded before any code is chosen, so that codes answer to the scale that is stored.
    scale = scale.half().float().clamp(min=SMALLEST_SCALE)
    zero = torch.full_like(scale, float(scheme.middle)) if scheme.symmetric else torch.round(-low / scale).clamp(0, scheme.top)
    return Grid(scale, zero, scheme)


def least_error(weight: Tensor, scheme: Scheme, importance: Tensor) -> Grid:
    """For each group the shrunken min-max grid of least squared error, each input channel weighted by `importance` [in]."""
    group = scheme.group(weight.shape[1])
    if weight.is_cuda:
        from buildsys.quant import kernels

        if kernels.searchable(scheme, weight.shape[1]):
            return min_max(weight, scheme, kernels.least_error_shrinks(weight.contiguous(), scheme, importance.contiguous(), SHRINKS))
    channels = max(TILE // ROWS // group, 1) * group
    rows = max(min(TILE // channels, ROWS), 1)

    def shrinks(some: Tensor) -> Tensor:  # [out, in] -> [out, groups]
        tiles = zip(torch.split(some, channels, 1), torch.split(importance, channels), strict=True)
        return torch.cat([_best_shrink(tile, scheme, weights) for tile, weights in tiles], 1)

    return min_max(weight, scheme, torch.cat([shrinks(some) for some in torch.split(weight, rows)]))


def _best_shrink(weight: Tensor, scheme: Scheme, importance: Tensor) -> Tensor:  # [out, in], [in] -> [out, groups]
    """The shrink of least error of each group of a tile, which a processor's cache holds with what is made of it."""
    by_group = (-1, scheme.group(weight.shape[1]))
    tile, weights = torch.unflatten(weight.t().contiguous(), 0, by_group), torch.unflatten(importance, 0, by_group)[..., None]
    low, high = tile.amin(1, keepdim=True).clamp_(max=0), tile.amax(1, keepdim=True).clamp_(min=0)  # [groups, 1, out]
    best_error, best, off = torch.full_like(low, torch.inf), torch.ones_like(low), torch.empty_like(tile)
    for shrink in SHRINKS:
        grid = covering(low * shrink, high * shrink, scheme)
        torch.mul(tile, grid.scale.reciprocal(), out=off)
        torch.addcmul(tile, to_nearest(off, grid), grid.scale, value=-1, out=off)
        error = off.square_().mul_(weights).sum(1, keepdim=True)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), best.masked_fill_(better, shrink)
    return best[:, 0].t()


def to_nearest(scaled: Tensor, grid: Grid) -> Tensor:
    """In place: what stands in units of the grid's scale to the nearest code, less the zero; whatever dimensions grid and weights share."""
    if grid.scheme.number == "fp8":
        return scaled.copy_(scaled.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn))
    return scaled.round_().clamp_(-grid.zero, grid.scheme.top - grid.zero)

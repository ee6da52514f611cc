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


@dataclass(frozen=True)
class Grid:
    """scale: float32 [out, groups], each a float16 number; zero: float32 [out, groups], each a whole number of codes."""

    scale: Tensor
    zero: Tensor
    scheme: Scheme

    def spread(self, in_features: int) -> tuple[Tensor, Tensor]:  # -> scale, zero: [out, in]
        group = self.scheme.group(in_features)
        return self.scale.repeat_interleave(group, 1), self.zero.repeat_interleave(group, 1)

    def round(self, weight: Tensor) -> Tensor:  # [out, in] -> float codes [out, in]
        """The nearest codes."""
        scale, zero = self.spread(weight.shape[1])
        return (torch.round(weight / scale) + zero).clamp_(0, self.scheme.top)

    def dequantize(self, codes: Tensor) -> Tensor:  # float codes [out, in] -> [out, in]
        scale, zero = self.spread(codes.shape[1])
        return (codes - zero) * scale

    def linear(self, codes: Tensor) -> QuantizedLinear:  # float codes [out, in]
        return QuantizedLinear(codes.to(torch.uint8), self.scale.half(), self.zero.to(torch.uint8), self.scheme)


def min_max(weight: Tensor, scheme: Scheme, shrink: float | Tensor = 1.0) -> Grid:
    """The grid that just covers `weight` [out, in] and zero, its range multiplied by `shrink` (a number, or [out, groups])."""
    by_group = torch.unflatten(weight, 1, (-1, scheme.group(weight.shape[1])))
    low, high = by_group.amin(2).clamp(max=0) * shrink, by_group.amax(2).clamp(min=0) * shrink
    both = torch.maximum(high / (scheme.top - scheme.middle), -low / scheme.middle)
    scale = both if scheme.symmetric else (high - low) / scheme.top
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
    best_error = torch.full((weight.shape[0], scheme.groups(weight.shape[1])), torch.inf, device=weight.device)
    best = torch.ones_like(best_error)
    for shrink in SHRINKS:
        grid = min_max(weight, scheme, shrink)
        squares = (grid.dequantize(grid.round(weight)) - weight).square_().mul_(importance)
        error = torch.unflatten(squares, 1, (-1, group)).sum(2)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, torch.full_like(best, shrink), best)
    return min_max(weight, scheme, best)

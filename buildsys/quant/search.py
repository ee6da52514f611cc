"""What a choice of scales costs, from the Gram matrix alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from buildsys.quant.grid import min_max
from buildsys.quant.observe import GRAM_BLOCK, SiteStats
from buildsys.scheme import Scheme


def gram_norm(error: Tensor, stats: SiteStats) -> float:  # [out, in] -> mean over tokens of ||E x||^2
    """tr(E G E^T) over the kept blocks of G."""
    padded = torch.nn.functional.pad(error, (0, -error.shape[1] % GRAM_BLOCK))
    blocks = torch.unflatten(padded, 1, (-1, GRAM_BLOCK)).transpose(0, 1)  # [blocks, out, 128]
    return float(((blocks @ stats.gram) * blocks).sum())


def rounding_errors(weights: Sequence[Tensor], stats: SiteStats, scales: Tensor, scheme: Scheme) -> list[float]:
    """For each row of `scales` [candidates, in] the mean squared output error of rounding the `weights` (each [out, in], all reading the
    same inputs) to nearest after their input channels were multiplied by it."""
    if scales.is_cuda:
        from buildsys.quant import kernels

        if kernels.searchable(scheme, scales.shape[1]):
            found = [kernels.rounding_errors(weight.contiguous(), stats.gram.contiguous(), scales, scheme) for weight in weights]
            errors: list[float] = torch.stack(found).sum(0).tolist()
            return errors
    return [sum(rounding_error(weight, stats, scale, scheme) for weight in weights) for scale in scales]


def rounding_error(weight: Tensor, stats: SiteStats, scale: Tensor, scheme: Scheme) -> float:
    """The mean squared output error of rounding `weight` [out, in] to nearest after its input channels were multiplied by `scale` [in]."""
    grid = min_max(weight * scale, scheme)
    return gram_norm(grid.dequantize(grid.round(weight * scale)) / scale - weight, stats)

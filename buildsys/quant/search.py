"""What a choice of scales costs, from the Gram matrix alone: tr(E G E^T), which is tr(G E^T E) since a trace may be turned round.

The search of AWQ (arXiv:2306.00978, section 3.2) with its forward passes replaced, as observe.py explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from buildsys.quant.grid import FP8_MAX, min_max
from buildsys.quant.observe import GRAM_BLOCK, SiteStats
from buildsys.scheme import Scheme

ROWS, CHANNELS = 256, 512  # outputs and inputs of the tile that a core keeps in its own cache while it tries every candidate


def gram_norm(error: Tensor, stats: SiteStats) -> float:  # [out, in] -> mean over tokens of ||E x||^2
    """tr(E G E^T) over the kept blocks of G."""
    padded = torch.nn.functional.pad(error, (0, -error.shape[1] % GRAM_BLOCK))
    blocks = torch.unflatten(padded, 1, (-1, GRAM_BLOCK)).transpose(0, 1)  # [blocks, out, 128]
    return float(((blocks @ stats.gram) * blocks).sum())


def rounding_errors(weights: Sequence[Tensor], stats: SiteStats, scales: Tensor, scheme: Scheme) -> list[float]:
    """For each row of `scales` [candidates, in] the mean squared output error of rounding the `weights` (each [out, in], all reading the
    same inputs) to nearest after their input channels were multiplied by it."""
    width = scales.shape[1]
    if scales.is_cuda:
        from buildsys.quant import kernels

        if kernels.searchable(scheme, width):
            found = [kernels.rounding_errors(weight.contiguous(), stats.gram.contiguous(), scales, scheme) for weight in weights]
            return _listed(torch.stack(found).sum(0))
    step = CHANNELS if scheme.group(width) <= GRAM_BLOCK else width  # no group is cut
    errors = torch.zeros(len(scales), dtype=torch.float64, device=scales.device)
    for start in range(0, width, step):
        channels = slice(start, min(start + step, width))
        gram = stats.gram[start // GRAM_BLOCK : -(-channels.stop // GRAM_BLOCK)]
        errors += _tile_errors([weight[:, channels] for weight in weights], gram, scales[:, channels], scheme)
    return _listed(errors)


def _listed(errors: Tensor) -> list[float]:
    found: list[float] = errors.tolist()
    return found


def _tile_errors(weights: Sequence[Tensor], gram: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:  # -> float64 [candidates]
    """`rounding_errors` of a few blocks of input channels; `gram` [blocks, 128, 128]."""
    squares = torch.zeros(len(scales), *gram.shape, device=gram.device)  # E^T E of each candidate, by blocks
    for weight in weights:
        for rows in torch.split(weight, ROWS):
            _add_squares(squares, rows.float().t().contiguous(), scales, scheme)
    padded = torch.nn.functional.pad(scales, (0, -scales.shape[1] % GRAM_BLOCK), value=1.0)
    by_block = torch.unflatten(padded, 1, (-1, GRAM_BLOCK))
    moments = gram / (by_block[..., :, None] * by_block[..., None, :])  # of inputs divided by the candidate's scale
    errors: Tensor = (squares * moments).sum((1, 2, 3), dtype=torch.float64)
    return errors


def _add_squares(squares: Tensor, weight: Tensor, scales: Tensor, scheme: Scheme) -> None:
    """Adds E E^T to `squares` [candidates, blocks, 128, 128], E [in, out] being the error of rounding `weight` times each row of `scales`.

    Few passes over memory: what is done to a weight is done in place, on rows that are long enough for a processor's vectors."""
    width, outs = weight.shape
    by_group = (-1, scheme.group(width))
    scaled, padded = torch.empty_like(weight), torch.zeros(squares.shape[1] * GRAM_BLOCK, outs, device=weight.device)
    groups, error = torch.unflatten(scaled, 0, by_group), torch.unflatten(padded[:width], 0, by_group)
    blocks = torch.unflatten(padded, 0, (-1, GRAM_BLOCK))
    sizes, zeros = _grids(weight, scales, scheme)
    for square, scale, size, zero in zip(squares, scales, sizes, zeros, strict=True):
        torch.mul(weight, scale[:, None], out=scaled)
        torch.div(groups, size, out=error)
        if scheme.number == "fp8":
            error.copy_(error.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn))
        else:
            error.round_().add_(zero).clamp_(0, scheme.top).sub_(zero)
        error.mul_(size).sub_(groups)
        square.baddbmm_(blocks, blocks.transpose(1, 2))


def _grids(weight: Tensor, scales: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:  # -> scale, zero: [candidates, groups, 1, out]
    """The min-max grids of `weight` [in, out] times each row of `scales`. What covers a group is what covers its least and its largest."""
    ends = []
    for scale in scales:
        groups = torch.unflatten(weight * scale[:, None], 0, (-1, scheme.group(len(weight))))
        ends.append(torch.stack((groups.amin(1), groups.amax(1)), -1))
    low_high = torch.stack(ends)  # [candidates, groups, out, 2]
    grid = min_max(low_high.flatten(0, -2), replace(scheme, group_size=-1))
    shape = (*low_high.shape[:2], 1, low_high.shape[2])
    return grid.scale.view(shape), grid.zero.view(shape)


def rounding_error(weight: Tensor, stats: SiteStats, scale: Tensor, scheme: Scheme) -> float:
    """The same of one `weight` [out, in] and one `scale` [in], written as it is meant: what `rounding_errors` is held to."""
    grid = min_max(weight * scale, scheme)
    return gram_norm(grid.dequantize(grid.round(weight * scale)) / scale - weight, stats)

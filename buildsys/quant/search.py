"""What a choice of scales costs, from the Gram matrix alone: tr(E G E^T), which is tr(G E^T E) since a trace may be turned round.

The search of AWQ (arXiv:2306.00978, section 3.2) with its forward passes replaced, as observe.py explains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from buildsys.quant.grid import covering, min_max, to_nearest
from buildsys.quant.observe import GRAM_BLOCK, SiteStats
from buildsys.scheme import Scheme

OUTPUTS = 4096  # whose norms are weighed at a time: the product is as large as they are
ROWS, CHANNELS = 256, 512  # outputs and inputs of the tile that a core keeps in its own cache while it tries every candidate


def gram_norm(error: Tensor, stats: SiteStats) -> Tensor:  # [out, in] -> 0-dim: mean over tokens of ||E x||^2
    """tr(E G E^T) over the kept blocks of G."""
    padded = torch.nn.functional.pad(error, (0, -error.shape[1] % GRAM_BLOCK))
    blocks = torch.unflatten(padded, 1, (-1, GRAM_BLOCK)).transpose(0, 1)  # [blocks, out, 128]
    return ((blocks @ stats.gram) * blocks).sum()


def output_norms(weight: Tensor, rounded: Tensor, gram: Tensor) -> Tensor:  # [out, in], [out, in], [in, in] -> [2, out]
    """The mean over tokens of the squared error of each output, and of its square."""
    tiles = zip(torch.split(weight, OUTPUTS), torch.split(rounded, OUTPUTS), strict=True)
    return torch.cat([torch.stack([((w @ gram) * w).sum(1) for w in (made - held, held)]) for held, made in tiles], 1)


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
        for weight in weights:
            for rows in torch.split(weight[:, channels], ROWS):
                errors += _tile_errors(rows.float().t().contiguous(), gram, scales[:, channels], scheme)
    return _listed(errors)


def _listed(errors: Tensor) -> list[float]:
    found: list[float] = errors.tolist()
    return found


def _tile_errors(weight: Tensor, gram: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:  # [in, out], [blocks, 128, 128] -> [candidates]
    """`rounding_errors` of a few outputs and blocks of input channels.

    Few passes over memory: what is done to a weight is done in place, on rows that are long enough for a processor's vectors."""
    width, outs = weight.shape
    padded = weight.new_zeros(len(gram) * GRAM_BLOCK, outs)
    scaled, error, blocks = torch.empty_like(weight), padded[:width], torch.unflatten(padded, 0, (-1, GRAM_BLOCK))
    groups, by_group = (torch.unflatten(part, 0, (-1, scheme.group(width))) for part in (scaled, error))
    squares, found = torch.empty_like(gram), []
    for scale, back in zip(scales[:, :, None], scales.reciprocal()[:, :, None], strict=True):
        torch.mul(weight, scale, out=scaled)
        grid = covering(groups.amin(1, keepdim=True).clamp_(max=0), groups.amax(1, keepdim=True).clamp_(min=0), scheme)
        torch.mul(groups, grid.scale.reciprocal(), out=by_group)
        to_nearest(by_group, grid).mul_(grid.scale)
        error.mul_(back).sub_(weight)
        torch.bmm(blocks, blocks.transpose(1, 2), out=squares)
        found.append(squares.mul_(gram).sum())
    return torch.stack(found).double()


def rounding_error(weight: Tensor, stats: SiteStats, scale: Tensor, scheme: Scheme) -> float:
    """The same of one `weight` [out, in] and one `scale` [in], written as it is meant: what `rounding_errors` is held to."""
    grid = min_max(weight * scale, scheme)
    return float(gram_norm(grid.dequantize(grid.round(weight * scale)) / scale - weight, stats))

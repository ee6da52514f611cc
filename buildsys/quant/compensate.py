"""Error-compensated rounding: GPTQ's codes on a fixed grid, without an inverse (arXiv:2210.17323, algorithm 1; arXiv:2507.18553).

With the damped second moments H = R^T R (R upper triangular) the output error of E = W - Q is ||R E^T||^2, and row j of R E^T knows only
columns j and after it. So from the last column to the first, each is rounded where the errors made so far leave it: Babai's nearest
plane, which gives GPTQ's codes for the opposite order. One Cholesky factor is enough; GPTQ's own way inverts H and factors it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.quant.grid import Grid

BLOCK = 128  # columns whose errors are applied together


def unit_factor(gram: Tensor, damping: float) -> Tensor:  # [in, in] -> upper triangular [in, in], ones on its diagonal
    """R with each row divided by its diagonal; `gram` is used up. Damping grows tenfold while H is too near singular to factor."""
    if not bool(torch.isfinite(gram).all()):  # no damping mends it
        fix = "look whether the model computes in float32 at all; skip this layer"
        raise BuildError("quantize", "activations of the calibration text are NaN or infinite", fix)
    diagonal = gram.diagonal().clone()
    mean = diagonal.mean().clamp(min=torch.finfo(gram.dtype).tiny)
    while True:
        gram.diagonal().copy_(diagonal + torch.where(diagonal > 0, damping * mean, mean))  # a channel never seen is rounded to nearest
        lower, failed = torch.linalg.cholesky_ex(gram)
        if not failed:
            factor: Tensor = lower.div_(lower.diagonal().clone()).t()
            return factor
        damping *= 10


def compensated(weight: Tensor, gram: Tensor, grid: Grid, damping: float, activation_order: bool) -> Tensor:  # -> float codes [out, in]
    """Rounds `weight` [out, in] to `grid`, each column where the errors of those rounded before it leave it."""
    in_features = weight.shape[1]
    order = torch.arange(in_features - 1, -1, -1, device=weight.device)  # the last is rounded first
    if activation_order:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True).flip(0)
    factor = unit_factor(gram[order][:, order], damping)  # indexing makes a copy
    group = order // grid.scheme.group(in_features)
    scale, zero = grid.scale.t().contiguous(), grid.zero.t().contiguous()  # [groups, out]: a column is a contiguous row
    wanted = weight.t()[order].contiguous()  # [in, out]
    codes, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    for stop in range(in_features, 0, -BLOCK):
        now = slice(max(stop - BLOCK, 0), stop)
        target = torch.addmm(wanted[now], factor[now, stop:], errors[stop:])
        _round_block(target, wanted[now], factor[now, now], group[now], scale, zero, codes[now], errors[now], grid.scheme.top)
    del factor, wanted, errors, target  # each as large as the weight, or larger
    back = torch.empty_like(weight)
    back[:, order] = codes.t()
    return back


def _round_block(
    target: Tensor, wanted: Tensor, factor: Tensor, group: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, errors: Tensor, top: int
) -> None:
    """Rounds the columns (rows of `target`, which is used up) from the last to the first; writes `codes` and `errors`."""
    if target.is_cuda and target.dtype == torch.float32:
        from buildsys.quant import kernels

        kernels.round_block(target, wanted, factor, group, scale, zero, codes, errors, top)
        return
    scale, zero = scale[group], zero[group]
    for column in range(target.shape[0] - 1, -1, -1):
        codes[column] = (torch.round(target[column] / scale[column]) + zero[column]).clamp_(0, top)
        errors[column] = wanted[column] - (codes[column] - zero[column]) * scale[column]
        target[:column] += factor[:column, column, None] * errors[column]

"""Error-compensated rounding: the column loop of GPTQ on a fixed grid (arXiv:2210.17323, algorithm 1, with blocks of 128 columns)."""

from __future__ import annotations

import torch
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.quant.grid import Grid

BLOCK = 128  # columns whose updates are applied together


def inverse_factor(gram: Tensor, damping: float) -> Tensor:  # [in, in] -> upper triangular [in, in]
    """The Cholesky factor U of the damped inverse: H^-1 = U^T U. Damping grows tenfold while H is too near singular to factor."""
    if not bool(torch.isfinite(gram).all()):  # no damping mends it
        fix = "look whether the model computes in float32 at all; skip this layer"
        raise BuildError("quantize", "activations of the calibration text are NaN or infinite", fix)
    diagonal = gram.diagonal()
    mean = diagonal.mean().clamp(min=torch.finfo(gram.dtype).tiny)
    upper: Tensor
    while True:
        damped = gram + torch.diag(torch.where(diagonal > 0, damping * mean, mean))  # a channel never seen is rounded to nearest
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        damping *= 10


def compensated(weight: Tensor, gram: Tensor, grid: Grid, damping: float, activation_order: bool) -> Tensor:  # -> float codes [out, in]
    """Rounds `weight` [out, in] to `grid`, each column's error moved into the columns not yet rounded."""
    in_features = weight.shape[1]
    order = torch.arange(in_features, device=weight.device)
    if activation_order:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    upper = inverse_factor(gram[order][:, order], damping)
    scale, zero = (spread[:, order].t().contiguous() for spread in grid.spread(in_features))  # [in, out]: a column is a contiguous row
    left = weight[:, order].t().contiguous()
    codes = torch.empty_like(left)
    for start in range(0, in_features, BLOCK):
        stop = min(start + BLOCK, in_features)
        now = slice(start, stop)
        errors = _round_columns(left[now], upper[now, now], scale[now], zero[now], codes[now], grid.scheme.top)
        left[stop:] -= upper[now, stop:].t() @ errors
    back = torch.empty_like(codes)
    back[order] = codes
    return back.t().contiguous()


def _round_columns(left: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, top: int) -> Tensor:
    """Rounds the columns (rows of `left`, which is used up) in order, writes `codes`, returns each one's error over its pivot."""
    errors = torch.empty_like(left)
    for column in range(left.shape[0]):
        codes[column] = (torch.round(left[column] / scale[column]) + zero[column]).clamp_(0, top)
        errors[column] = (left[column] - (codes[column] - zero[column]) * scale[column]) / upper[column, column]
        left[column + 1 :] -= upper[column, column + 1 :, None] * errors[column]
    return errors

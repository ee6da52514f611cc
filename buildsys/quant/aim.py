"""What to round instead of a weight, so that its outputs come near the float model's in spite of what was rounded before it.

A linear of a quantized model reads x' where the float model reads x, and adds to a residual stream that is r' instead of r. The weight V of
least E||W x + r - V x' - r'||^2 is W + P H^-1 with H = E[x' x'^T], P = E[(W (x - x') + r - r') x'^T]: GPTAQ's target (arXiv:2504.02692,
section 3.2) and, where the linear writes to the stream, the drift of that too (as Qronos corrects it, arXiv:2505.11695). Rounding V then
pays for the errors of V.

P is a mean over so many tokens, and fits their noise where H is small. How much is added to H's diagonal is what does best on tokens that
P was not made of: each half of the windows is tried on the other's P, with the H of both, and where nothing is gained so, V is W.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from buildsys.quant.compensate import damped_factor, refuse_infinite
from buildsys.quant.stream import Apart

TRIED = 512  # outputs, evenly spread, that a ridge is chosen by
ROWS = 4096  # outputs that are moved at a time


def aimed(weight: Tensor, gram: Tensor, apart: Apart, ridges: Sequence[float]) -> tuple[Tensor, float | None]:
    """The weight to round, [out, in], and what was added to H's diagonal to find it, as a share of its mean; 0 where what one half of the
    windows says does not hold on the other and the weight stays as it is, None where both models read the same and there is nothing to aim
    at. `gram` [in, in] is left alone."""
    refuse_infinite(gram)
    refuse_infinite(apart.crossed)
    if not bool(apart.crossed.any()):
        return weight, None
    if not min(apart.tokens):
        return weight, 0.0
    few = torch.arange(0, len(weight), max(1, len(weight) // TRIED), device=weight.device)
    pulls = _pulls(weight, apart, few)
    gains = [float(_gain(gram, pulls, _factor(gram, ridge)[0])) for ridge in ridges]
    best = max(range(len(ridges)), key=gains.__getitem__)
    if not gains[best] > 0:
        return weight, 0.0
    (factor, ridge), shares = _factor(gram, ridges[best]), [tokens / sum(apart.tokens) for tokens in apart.tokens]
    found = torch.empty_like(weight)
    for rows in torch.split(torch.arange(len(weight), device=weight.device), ROWS):
        first, second = _pulls(weight, apart, rows)
        found[rows] = weight[rows] + torch.cholesky_solve((shares[0] * first + shares[1] * second).t(), factor).t()
    return found, ridge


def _pulls(weight: Tensor, apart: Apart, rows: Tensor) -> Tensor:
    """P of some outputs by each half, [2, rows, in]."""
    return apart.crossed[:, rows] if apart.of_outputs else weight[rows] @ apart.crossed


def _factor(gram: Tensor, ridge: float) -> tuple[Tensor, float]:
    """The Cholesky factor of H, lower triangular, with so much of its mean diagonal added or more, where H is too near singular, and how
    much it was."""
    factor, _, ridge = damped_factor(gram.clone, ridge)
    return factor.t(), ridge


def _gain(gram: Tensor, pulls: Tensor, factor: Tensor) -> Tensor:
    """By how much each half's answer D [rows, in] lowers the squared error of the other half's outputs, whose P it is tried on, with the H
    of both: 2 <D, P> - tr(D H D^T), summed."""
    first, second = (torch.cholesky_solve(pull.t(), factor).t() for pull in pulls)
    told = 2 * ((first * pulls[1]).sum(dtype=torch.float64) + (second * pulls[0]).sum(dtype=torch.float64))
    paid = sum(((moved @ gram) * moved).sum(dtype=torch.float64) for moved in (first, second))
    return told - paid

"""Error-compensated rounding: GPTQ's codes on a fixed grid, without an inverse (arXiv:2210.17323, algorithm 1; arXiv:2507.18553).

With the damped second moments H = R^T R (R upper triangular) the output error of E = W - Q is ||R E^T||^2, and row j of R E^T knows only
columns j and after it. So from the last column to the first, each is rounded where the errors made so far leave it: Babai's nearest
plane, which gives GPTQ's codes for the opposite order. One Cholesky factor is enough; GPTQ's own way inverts H and factors it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.quant.grid import Grid

BLOCK = 128  # columns whose errors are applied together
STRIP = 32  # of them, those that a CPU applies one by one
ROWS = 1024  # of a matrix that are put in another order at a time


@dataclass(frozen=True)
class Curvature:
    """H = gram + diag(added): what an error of the weights costs. `damping` is the share of the mean diagonal that had to be added before
    H could be factored; `unseen` counts the input channels that were zero in every token."""

    gram: Tensor  # [in, in]
    added: Tensor  # [in]
    damping: float
    unseen: int

    def within(self, columns: slice) -> Tensor:  # -> [columns, columns]
        """H between these columns."""
        return self.gram[columns, columns] + self.added[columns].diag()

    def gradient(self, columns: slice, errors: Tensor) -> Tensor:  # [in, out] -> [columns, out]
        """H E^T at these columns."""
        return torch.addcmul(self.gram[columns] @ errors, self.added[columns, None], errors[columns])


@dataclass(frozen=True)
class Factored:
    """`h` ready to round by: the `order` [in] of columns, the last of which is rounded first, and in it the unit `factor` [in, in]."""

    h: Curvature
    order: Tensor
    factor: Tensor

    def to(self, device: torch.device | str) -> Factored:
        h = replace(self.h, gram=self.h.gram.to(device), added=self.h.added.to(device))
        return Factored(h, self.order.to(device), self.factor.to(device))


def unit_factor(gram: Tensor, damping: float, order: Tensor) -> tuple[Tensor, Tensor, float]:
    """R of H = R^T R with each row divided by its diagonal (upper triangular [in, in]), what was added to the diagonal of `gram` [in, in]
    to make it H, [in], and the damping. H, R and what was added are in `order` [in]; `gram` is left alone.

    Damping grows tenfold while H is too near singular to factor."""
    refuse_infinite(gram)
    h, added, damping = damped_factor(lambda: _ordered(gram, order), damping)
    return h.div_(h.diagonal().clone()[:, None]), added, damping


def damped_factor(copied: Callable[[], Tensor], damping: float) -> tuple[Tensor, Tensor, float]:
    """The Cholesky factor R of a second moment matrix's copy with a share of its mean diagonal added, upper triangular [in, in]; what was
    added [in], and the share, which grows tenfold while the matrix is too near singular to factor."""
    while True:
        h = copied()
        diagonal, failed = h.diagonal().clone(), torch.empty((), dtype=torch.int32, device=h.device)
        mean = diagonal.mean().clamp(min=torch.finfo(h.dtype).tiny)
        added = torch.where(diagonal > 0, damping * mean, mean)  # a channel never seen is rounded to nearest
        h.diagonal().add_(added)
        # In place: of a wide layer every copy counts. Factors are kept column by column, which of a symmetric matrix is its transpose.
        torch.linalg.cholesky_ex(h.t(), out=(h.t(), failed))
        if not failed:
            return h, added, damping
        damping *= 10


def refuse_infinite(moments: Tensor) -> None:
    """Sums over activations of which one was NaN or infinite: no damping mends those, and a factorisation only fails."""
    if not bool(torch.isfinite(torch.stack(torch.aminmax(moments))).all()):
        fix = "look whether the model computes in float32 at all; skip this layer"
        raise BuildError("quantize", "activations of the calibration text are NaN or infinite", fix)


def _ordered(gram: Tensor, order: Tensor) -> Tensor:
    """A copy with rows and columns in `order`, made of some rows at a time."""
    found = torch.empty_like(gram)
    for rows, into in zip(torch.split(order, ROWS), torch.split(found, ROWS), strict=True):
        torch.index_select(gram[rows], 1, order, out=into)
    return found


def factored(gram: Tensor, damping: float, activation_order: bool) -> Factored:
    """The part of rounding that all rows share; `gram` [in, in] is left alone."""
    order = torch.arange(len(gram) - 1, -1, -1, device=gram.device)
    if activation_order:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True).flip(0)
    factor, added, damping = unit_factor(gram, damping, order)
    unseen = int((gram.diagonal() <= 0).sum())
    return Factored(Curvature(gram, torch.empty_like(added).index_copy_(0, order, added), damping, unseen), order, factor)


def compensated(weight: Tensor, by: Factored, grid: Grid) -> Tensor:  # -> float codes [out, in]
    """Codes of `weight` [out, in] on `grid`, each column rounded where the errors of those before it leave it."""
    order, factor, solver = by.order, by.factor, fast(weight)
    group = order // grid.scheme.group(weight.shape[1])
    scale, zero = grid.scale.t().contiguous(), grid.zero.t().contiguous()  # [groups, out]: a column is a contiguous row
    wanted = weight.t()[order].contiguous()  # [in, out]
    codes, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    size, solve = (BLOCK, round_block) if solver is None else (solver.BLOCK, solver.round_block)
    for stop in range(len(order), 0, -size):
        now = slice(max(stop - size, 0), stop)
        target = torch.addmm(wanted[now], factor[now, stop:], errors[stop:])
        solve(target, wanted[now], factor[now, now], group[now], scale, zero, codes[now], errors[now], grid.scheme.top)
    del wanted, errors, target  # each as large as the weight, or larger
    back = torch.empty_like(weight)
    back[:, order] = codes.t()
    return back


def fast(weight: Tensor) -> ModuleType | None:
    """The kernels, where there are some that take this matrix."""
    if not weight.is_cuda:
        return None
    from buildsys.quant import kernels

    return kernels if kernels.solvable(weight) else None


def round_block(
    target: Tensor, wanted: Tensor, factor: Tensor, group: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, errors: Tensor, top: int
) -> None:
    """Rounds the columns (rows of `target`) from the last to the first; writes `codes` and `errors`. `target` is used up.

    In numpy, whose calls cost a third of torch's on rows as short as these."""
    if target.is_cuda:  # what no kernel takes
        made = codes.cpu(), errors.cpu()
        round_block(target.cpu(), wanted.cpu(), factor.cpu(), group.cpu(), scale.cpu(), zero.cpu(), *made, top)
        codes.copy_(made[0])
        errors.copy_(made[1])
        return
    aims, want, pays, sizes, least, found, off = (
        part.numpy() for part in (target, wanted, factor.contiguous(), scale, zero.neg(), codes, errors)
    )  # codes are counted from their zero until they are written
    most, paid, groups = least + np.float32(top), np.empty_like(aims[0]), group.tolist()
    for stop in range(len(aims), 0, -STRIP):
        start = max(stop - STRIP, 0)
        for at in range(stop - 1, start - 1, -1):
            code, error, size, low, high = found[at], off[at], sizes[groups[at]], least[groups[at]], most[groups[at]]
            np.add(aims[at], np.dot(pays[at, at + 1 : stop], off[at + 1 : stop], out=paid), out=code)
            np.rint(np.divide(code, size, out=code), out=code)
            np.minimum(np.maximum(code, low, out=code), high, out=code)
            np.subtract(want[at], np.multiply(code, size, out=error), out=error)
            np.subtract(code, low, out=code)
        aims[:start] += pays[:start, start:stop] @ off[start:stop]

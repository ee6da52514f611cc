"""Codes and scales made better together after rounding: coordinate descent on the output error tr(E H E^T), E = W - Q.

Codes go one column at a time as in QuantEase (arXiv:2309.01885, eq. 6); before the columns of a group, its scale becomes the least-squares
answer to the codes that it has and to the errors of all others. Every step lowers the error or leaves it.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from buildsys.quant.compensate import BLOCK, Curvature, fast, round_block
from buildsys.quant.grid import SMALLEST_SCALE, Grid


def refined(weight: Tensor, h: Curvature, grid: Grid, codes: Tensor, sweeps: int) -> tuple[Grid, Tensor]:
    """The grid and the float codes [out, in] after `sweeps` passes over all groups, from the last to the first; zeros stay."""
    if not sweeps:
        return grid, codes
    group = grid.scheme.group(weight.shape[1])
    scale, zero = (part.t().clone(memory_format=torch.contiguous_format) for part in (grid.scale, grid.zero))  # [groups, out]
    centered = codes.t().clone(memory_format=torch.contiguous_format)  # [in, out]
    by_group = torch.unflatten(centered, 0, (-1, group))  # a view; what is as large as a wide weight is not made twice
    by_group.sub_(zero[:, None])
    errors = (by_group * scale[:, None]).flatten(0, 1)
    torch.sub(weight.t(), errors, out=errors)
    solver = fast(weight) if group in (32, 64, 128) else None
    for _ in range(sweeps):
        if solver is not None:
            _sweep(solver, h, scale, zero, centered, errors, grid.scheme.top)
            continue
        for at in range(len(scale) - 1, -1, -1):
            columns = slice(at * group, (at + 1) * group)
            _refit(h, columns, centered[columns], scale[at], errors)
            for stop in range(columns.stop, columns.start, -BLOCK):
                _descend(h, slice(max(stop - BLOCK, columns.start), stop), centered, scale[at], zero[at], errors, grid.scheme.top)
    by_group.add_(zero[:, None])
    return Grid(scale.t().contiguous(), grid.zero, grid.scheme), centered.t().contiguous()


def _sweep(solver: ModuleType, h: Curvature, scale: Tensor, zero: Tensor, centered: Tensor, errors: Tensor, top: int) -> None:
    """The same on a GPU, a launch for many groups."""
    group = len(centered) // len(scale)
    for stop in range(len(centered), 0, -solver.BLOCK):
        now = slice(max(stop - solver.BLOCK, 0), stop)
        groups, gradient = slice(now.start // group, now.stop // group), h.gradient(now, errors)
        solver.refine_block(
            h.gram[now, now], h.added[now], gradient, scale[groups], zero[groups], centered[now], errors[now], top, SMALLEST_SCALE
        )


def _refit(h: Curvature, columns: slice, centered: Tensor, scale: Tensor, errors: Tensor) -> None:
    """Sets a group's `scale` [out] to the float16 number of least error given its codes `centered` [group, out]; keeps `errors` true."""
    seen = h.within(columns) @ centered
    curvature = (centered * seen).sum(0)
    step = (centered * h.gradient(columns, errors)).sum(0) / curvature
    wanted = (scale + step).half().float()
    # A float16 nearest to the least of a parabola is nowhere above the float16 before it. Codes that are all zero have no such least.
    wanted = torch.where((curvature > 0) & (wanted >= SMALLEST_SCALE) & torch.isfinite(wanted), wanted, scale)
    errors[columns] -= centered * (wanted - scale)
    scale.copy_(wanted)


def _descend(h: Curvature, columns: slice, centered: Tensor, scale: Tensor, zero: Tensor, errors: Tensor, top: int) -> None:
    """Gives each of the columns in turn, the last first, its best code while all others stay; updates `centered` and `errors`."""
    within = h.within(columns)
    curvature = within.diagonal().clone()[:, None]
    held = centered[columns] * scale  # what the codes stand for now
    target = held + h.gradient(columns, errors) / curvature
    codes, moved = torch.empty_like(target), torch.empty_like(target)
    group = torch.zeros(len(target), dtype=torch.long, device=target.device)
    # Where a column goes by `moved`, each column before it has its own best code moved by H_ij / H_ii of that.
    round_block(target, held, within / curvature, group, scale[None], zero[None], codes, moved, top)
    centered[columns] = codes - zero
    errors[columns] += moved

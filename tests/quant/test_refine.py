"""Sweeps over scales and codes: against a loop that tries every code of every weight, and the law that no step makes the error larger."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from buildsys.quant.compensate import BLOCK, Curvature, compensated, factored
from buildsys.quant.grid import SMALLEST_SCALE, Grid, min_max
from buildsys.quant.refine import refined
from buildsys.scheme import Bits, GroupSize, Scheme

SCHEMES = [Scheme(bits, size, even) for bits in get_args(Bits) for size in get_args(GroupSize) for even in (False, True)]
WIDTH = 2 * BLOCK


def layer(seed: int, width: int = WIDTH, rows: int = 6) -> tuple[Tensor, Tensor]:  # -> weight [out, in], gram [in, in]
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * width, width, generator=made) @ (torch.eye(width) + torch.randn(width, width, generator=made) / width**0.5)
    x = x * torch.randn(width, generator=made).exp()
    return torch.randn(rows, width, generator=made).double() * 0.05, (x.t() @ x / len(x)).double()


def rounded(weight: Tensor, gram: Tensor, scheme: Scheme) -> tuple[Grid, Tensor, Curvature]:
    grid = min_max(weight.float(), scheme)
    grid = Grid(grid.scale.double(), grid.zero.double(), scheme)
    by = factored(gram, 0.01, True)
    return grid, compensated(weight, by, grid), by.h


def errors(weight: Tensor, h: Curvature, grid: Grid, codes: Tensor) -> Tensor:  # -> [out]
    off = grid.dequantize(codes) - weight
    return ((off @ (h.gram + h.added.diag())) * off).sum(1)


def twin(weight: Tensor, h: Curvature, grid: Grid, codes: Tensor) -> tuple[Grid, Tensor]:
    """One sweep of one row at a time: the scale by a scan of float16 numbers around it, then each code by trying all of them."""
    scheme, scale, codes = grid.scheme, grid.scale.clone(), codes.clone()
    group = scheme.group(weight.shape[1])

    def error(row: int) -> float:
        return float(errors(weight, h, Grid(scale, grid.zero, scheme), codes)[row])

    for row in range(len(weight)):
        for at in range(scale.shape[1] - 1, -1, -1):
            start = float(scale[row, at])
            step = 2.0 ** (torch.tensor(start).log2().floor().item() - 10)  # between neighbours in float16
            tried = {}
            for factor in range(-1000, 301):
                scale[row, at] = float(torch.tensor(start + factor * step).half())
                tried[float(scale[row, at])] = error(row)
            scale[row, at] = min((value for value in tried if value >= SMALLEST_SCALE), key=tried.__getitem__)
            for column in range((at + 1) * group - 1, at * group - 1, -1):
                found = []
                for code in range(scheme.top + 1):
                    codes[row, column] = code
                    found.append(error(row))
                codes[row, column] = found.index(min(found))
    return Grid(scale, grid.zero, scheme), codes


@pytest.mark.parametrize("scheme", [Scheme(3, 32), Scheme(2, 64, True), Scheme(2, -1)], ids=str)
def test_a_sweep_is_that_of_a_loop_over_every_code(scheme: Scheme) -> None:
    weight, gram = layer(0, 64, 2)
    grid, codes, h = rounded(weight, gram, scheme)
    expected_grid, expected = twin(weight, h, grid, codes)
    found_grid, found = refined(weight, h, grid, codes, 1)
    assert torch.equal(found_grid.scale, expected_grid.scale) and torch.equal(found, expected)
    assert not torch.equal(found_grid.scale, grid.scale) and not torch.equal(found, codes), "nothing changed: the test says nothing"


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_no_sweep_makes_a_row_worse_and_what_is_made_can_be_stored(scheme: Scheme) -> None:
    weight, gram = layer(1)
    grid, codes, h = rounded(weight, gram, scheme)
    before = first = errors(weight, h, grid, codes)
    for _ in range(4):
        grid, codes = refined(weight, h, grid, codes, 1)
        after = errors(weight, h, grid, codes)
        assert (after <= before * (1 + 1e-9)).all()
        before = after
    assert float(before.sum()) < 0.99 * float(first.sum())
    assert codes.min() >= 0 and codes.max() <= scheme.top and torch.equal(codes, codes.round())
    assert torch.equal(grid.scale, grid.scale.half().double()) and grid.scale.min() >= SMALLEST_SCALE


def test_two_sweeps_are_one_and_another() -> None:
    weight, gram = layer(2)
    grid, codes, h = rounded(weight, gram, Scheme(4, 64))
    once = refined(weight, h, grid, codes, 1)
    (two_grid, two), (again_grid, again) = refined(weight, h, grid, codes, 2), refined(weight, h, *once, 1)
    assert torch.equal(two, again) and torch.equal(two_grid.scale, again_grid.scale)
    assert refined(weight, h, grid, codes, 0) == (grid, codes)


@pytest.mark.parametrize("size", [32, -1])
def test_rows_of_zeros_and_channels_never_seen_are_left_in_peace(size: GroupSize) -> None:
    weight, gram = layer(3)
    weight[0], weight[1, :32] = 0, 0
    gram[32:64], gram[:, 32:64] = 0, 0
    grid, codes, h = rounded(weight, gram, Scheme(4, size))
    found_grid, found = refined(weight, h, grid, codes, 3)
    assert torch.isfinite(found_grid.scale).all() and torch.equal(found_grid.dequantize(found)[0], weight[0])
    assert (errors(weight, h, found_grid, found) <= errors(weight, h, grid, codes) * (1 + 1e-9)).all()
    off = (found_grid.dequantize(found) - weight)[:, 32:64].abs()
    assert h.unseen == 32 and (off <= 1.001 * found_grid.spread(WIDTH)[0][:, 32:64]).all(), "what is never seen stays near its weight"

"""Grids against plain loops, and the laws of rounding to one."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from buildsys.quant.grid import SHRINKS, SMALLEST_SCALE, Grid, least_error, min_max
from buildsys.scheme import Bits, GroupSize, Scheme

SCHEMES = [Scheme(bits, size, even) for bits in get_args(Bits) for size in get_args(GroupSize) for even in (False, True)]
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def weight(seed: int = 0, rows: int = 6, width: int = 128, spread: float = 0.05) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=made) * spread + torch.randn(rows, 1, generator=made) * spread / 2


def half(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32).half())


def slow(row: list[float], scheme: Scheme, shrink: float = 1.0) -> tuple[float, int]:
    """Scale and zero of one group."""
    low, high = min(0.0, *row) * shrink, max(0.0, *row) * shrink
    if scheme.symmetric:
        middle = 2 ** (scheme.bits - 1)
        return max(half(max(high / (middle - 1), -low / middle)), SMALLEST_SCALE), middle
    scale = max(half((high - low) / (2**scheme.bits - 1)), SMALLEST_SCALE)
    return scale, min(max(round(-low / scale), 0), 2**scheme.bits - 1)


@each_scheme
def test_min_max_is_the_loops(scheme: Scheme) -> None:
    w = weight()
    grid = min_max(w, scheme)
    for out, row in enumerate(w):
        for at, group in enumerate(row.split(scheme.group(128))):
            scale, zero = slow(group.tolist(), scheme)
            # float32 and float64 may round a quotient to different halves
            assert float(grid.scale[out, at]) == pytest.approx(scale, rel=2**-10)
            assert abs(float(grid.zero[out, at]) - zero) <= (0 if scheme.bits < 8 or scheme.symmetric else 1)


@each_scheme
def test_rounding_is_off_by_half_a_step_at_most_and_zero_is_exact(scheme: Scheme) -> None:
    w = weight(1)
    w[:, ::5] = 0
    grid = min_max(w, scheme)
    scale, _ = grid.spread(128)
    off = (grid.dequantize(grid.round(w)) - w).abs()
    # Beyond half a step only what the rounding of scale and zero cut off at the ends: the zero moves a range by up to half a step.
    assert (off <= scale * (0.5 if scheme.symmetric else 1.0) * 1.001 + 0.001 * w.abs()).all()
    assert (off[:, ::5] == 0).all()


@each_scheme
def test_what_lies_on_the_grid_comes_back(scheme: Scheme) -> None:
    grid = min_max(weight(2), scheme)
    codes = torch.randint(0, scheme.top + 1, (6, 128), generator=torch.Generator().manual_seed(2)).float()
    on_grid = grid.dequantize(codes)
    assert torch.equal(grid.round(on_grid), codes)
    assert torch.equal(grid.linear(codes).dequantize(), on_grid)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.sampled_from(SCHEMES), st.integers(-6, 3), st.booleans())
def test_codes_stay_in_range_and_scales_are_normal_halves(seed: int, scheme: Scheme, magnitude: int, one_sided: bool) -> None:
    w = weight(seed, spread=10.0**magnitude)
    w = w.abs() if one_sided else w
    for grid in (min_max(w, scheme), least_error(w, scheme, torch.rand(128, generator=torch.Generator().manual_seed(seed)))):
        codes = grid.round(w)
        assert codes.min() >= 0 and codes.max() <= scheme.top and torch.equal(codes, codes.round())
        assert grid.zero.min() >= 0 and grid.zero.max() <= scheme.top and torch.equal(grid.zero, grid.zero.round())
        assert grid.scale.min() >= SMALLEST_SCALE and torch.equal(grid.scale, grid.scale.half().float())


@each_scheme
def test_least_error_is_the_best_of_every_shrink(scheme: Scheme) -> None:
    w, importance = weight(3, rows=3), torch.rand(128, generator=torch.Generator().manual_seed(3)) ** 3

    def errors(grid: Grid) -> Tensor:  # -> [out, groups]
        squares = (grid.dequantize(grid.round(w)) - w).double().square() * importance.double()
        return torch.stack([group.sum(1) for group in squares.split(scheme.group(128), 1)], 1)

    every = torch.stack([errors(min_max(w, scheme, shrink)) for shrink in SHRINKS])
    found = errors(least_error(w, scheme, importance))
    torch.testing.assert_close(found, every.amin(0), rtol=1e-4, atol=0)
    assert (found <= every[0] * (1 + 1e-6)).all()
    if scheme.bits == 2:
        assert (found < every[0]).any()


def test_importance_moves_the_grid_to_what_matters() -> None:
    w = torch.full((1, 32), 0.1)
    w[0, 0], w[0, 1:16] = 1.0, torch.linspace(-0.1, 0.1, 15)
    loud, quiet = torch.ones(32), torch.ones(32)
    loud[0], quiet[0] = 1e6, 0.0
    scheme = Scheme(3, 32)
    assert least_error(w, scheme, loud).scale > least_error(w, scheme, quiet).scale


def test_a_group_of_zeros_has_a_scale() -> None:
    for scheme in SCHEMES:
        w = torch.zeros(2, 128)
        for grid in (min_max(w, scheme), least_error(w, scheme, torch.zeros(128))):
            assert torch.equal(grid.dequantize(grid.round(w)), w) and (grid.scale > 0).all()


@each_scheme
def test_a_tile_knows_nothing_of_the_next(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance = weight(4, rows=11), torch.rand(128, generator=torch.Generator().manual_seed(4))
    whole = least_error(w, scheme, importance)
    monkeypatch.setattr("buildsys.quant.grid.TILE", 3 * 128)  # three tiles of three rows, and one of two
    tiled = least_error(w, scheme, importance)
    assert torch.equal(tiled.scale, whole.scale) and torch.equal(tiled.zero, whole.zero)

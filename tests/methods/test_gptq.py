"""GPTQ against the textbook: optimal brain surgeon with an explicit inverse, one column at a time in float64, no Cholesky, no blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.methods import gptq, rtn
from buildsys.quant.compensate import BLOCK, compensated, factored, unit_factor
from buildsys.quant.grid import Grid, min_max
from buildsys.scheme import Scheme

WIDTH = BLOCK + 64  # more than one block of columns, and a short last one


def layer(seed: int = 0, width: int = WIDTH) -> tuple[Tensor, Tensor]:  # -> weight [16, in], gram [in, in]
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * width, width, generator=made) @ (torch.eye(width) + torch.randn(width, width, generator=made) / width**0.5)
    x = x * torch.randn(width, generator=made).exp()
    return torch.randn(16, width, generator=made) * 0.05, x.t() @ x / len(x)


def textbook(weight: Tensor, gram: Tensor, grid: Grid, damping: float, by_activation: bool) -> Tensor:  # -> codes [out, in]
    """arXiv:2210.17323, equations 2 and 3: round one column, pay its error into those left, eliminate it from the inverse."""
    left, hessian = weight.double().clone(), gram.double().clone()
    scale, zero = (spread.double() for spread in grid.spread(weight.shape[1]))
    columns = list(range(weight.shape[1]))
    mean = hessian.diagonal().mean()
    for at in columns:
        hessian[at, at] += damping * mean if hessian[at, at] > 0 else mean
    if by_activation:
        columns.sort(key=lambda at: -float(gram[at, at]))
    inverse, codes = torch.linalg.inv(hessian), torch.zeros_like(left)
    for at in columns:
        codes[:, at] = (torch.round(left[:, at] / scale[:, at]) + zero[:, at]).clamp(0, grid.scheme.top)
        error = (left[:, at] - (codes[:, at] - zero[:, at]) * scale[:, at]) / inverse[at, at]
        left -= error[:, None] * inverse[at][None, :]
        inverse = inverse - torch.outer(inverse[:, at], inverse[at]) / inverse[at, at]
    return codes


def wide(grid: Grid) -> Grid:
    return Grid(grid.scale.double(), grid.zero.double(), grid.scheme)


@pytest.mark.parametrize("by_activation", [True, False])
@pytest.mark.parametrize("scheme", [Scheme(4, 64), Scheme(3, 32, True), Scheme(2, -1), Scheme(8, 64, True)], ids=str)
def test_the_codes_are_the_textbooks(scheme: Scheme, by_activation: bool) -> None:
    weight, gram = layer()
    grid = min_max(weight, scheme)
    found = compensated(weight.double(), factored(gram.double(), 0.01, by_activation), wide(grid))
    expected = textbook(weight, gram, grid, 0.01, by_activation)
    assert torch.equal(found, expected)
    assert not torch.equal(expected, grid.round(weight).double()), "nothing was compensated: the test says nothing"


def test_float32_differs_from_the_textbook_by_ties_at_most() -> None:
    weight, gram = layer(1)
    knobs = gptq.Knobs(least_error_grid=False, sweeps=0)
    found = gptq.round_weights(weight, gram, Scheme(4, 64), knobs).linear
    expected = textbook(weight, gram, min_max(weight, Scheme(4, 64)), knobs.damping, True)
    assert (found.codes != expected).float().mean() < 0.01


def test_the_order_of_activations_changes_codes_and_groups_stay_where_they_are() -> None:
    weight, gram = layer(2)
    both = (gptq.Knobs(activation_order=order, sweeps=0) for order in (True, False))
    one, other = (gptq.round_weights(weight, gram, Scheme(4, 64), knobs).linear for knobs in both)
    assert torch.equal(one.scale, other.scale) and torch.equal(one.zero, other.zero)
    assert not torch.equal(one.codes, other.codes)


def test_the_factor_is_that_of_the_damped_moments() -> None:
    _, gram = layer(3, 48)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    upper, added, damping = unit_factor(gram.double(), 0.05, order)
    damped = (gram.double() + 0.05 * gram.double().diagonal().mean() * torch.eye(48, dtype=torch.float64))[order][:, order]
    pivots = torch.linalg.cholesky(damped).diagonal()
    torch.testing.assert_close((upper.t() * pivots.square()) @ upper, damped, rtol=0, atol=1e-8)
    assert damping == 0.05 and torch.allclose(added, (0.05 * gram.double().diagonal().mean()).expand(48))
    assert torch.equal(upper, upper.triu()) and torch.equal(upper.diagonal(), torch.ones(48, dtype=torch.float64))


def test_without_correlation_it_is_rounding_to_nearest() -> None:
    weight, gram = layer(4)
    knobs = gptq.Knobs(least_error_grid=False, sweeps=0)
    nearest = rtn.round_weights(weight, gram, Scheme(4, 32), rtn.Knobs()).linear
    for flat in (gram.diagonal().diag(), torch.eye(WIDTH), torch.zeros(WIDTH, WIDTH)):
        found = gptq.round_weights(weight, flat, Scheme(4, 32), knobs).linear
        assert torch.equal(found.codes, nearest.codes) and torch.equal(found.scale, nearest.scale)


def test_a_channel_never_seen_is_rounded_to_nearest_and_disturbs_no_other() -> None:
    weight, gram = layer(5)
    dead = torch.tensor([0, 7, 130, WIDTH - 1])
    alive = torch.ones(WIDTH, dtype=torch.bool)
    alive[dead] = False
    gram[dead], gram[:, dead] = 0, 0
    grid = min_max(weight, Scheme(4, 64))
    by = factored(gram, 0.01, True)
    codes, h = compensated(weight, by, grid), by.h
    assert torch.equal(codes[:, dead], grid.round(weight)[:, dead])
    assert h.unseen == 4 and h.damping == 0.01
    expected = textbook(weight, gram, grid, 0.01, True)
    assert (codes != expected).float().mean() < 0.01


@pytest.mark.parametrize("damping", [0.01, 1e-12])
@pytest.mark.parametrize("kind", ["one token", "copies", "negative"])
def test_a_singular_hessian_is_damped_until_it_can_be_inverted(kind: str, damping: float) -> None:
    weight, gram = layer(6)
    if kind == "one token":
        x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
        gram = x.t() @ x
    elif kind == "copies":
        gram = torch.ones(WIDTH, WIDTH)
    else:  # what rounding in float32 can do to a matrix that is nearly singular
        gram = gram - 1e-3 * gram.diagonal().mean() * torch.eye(WIDTH)
    rounding = gptq.round_weights(weight, gram, Scheme(4, 64), gptq.Knobs(damping=damping))
    found, nearest = rounding.linear, rtn.round_weights(weight, gram, Scheme(4, 64), rtn.Knobs()).linear

    def error(linear: Tensor) -> float:
        return float((((linear - weight) @ gram) * (linear - weight)).sum())

    assert rounding.notes["damping"] >= damping and rounding.notes["unseen_channels"] == 0
    assert kind == "one token" or damping == 0.01 or rounding.notes["damping"] > damping, "nothing had to be raised"
    assert torch.isfinite(found.dequantize()).all() and error(found.dequantize()) <= error(nearest.dequantize())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_no_numbers_are_an_error_and_no_endless_loop(value: float) -> None:
    weight, gram = layer(7)
    gram[3, 3] = value
    with pytest.raises(BuildError, match="NaN or infinite"):
        gptq.round_weights(weight, gram, Scheme(4, 64), gptq.Knobs())


def test_it_rounds_to_whole_numbers_alone() -> None:
    assert gptq.accepts(Scheme(4, 64)) is None
    assert "fp8" in (gptq.accepts(Scheme(8, -1, True, "fp8", "fp8")) or "")

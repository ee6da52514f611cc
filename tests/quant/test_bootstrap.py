"""Intervals: they cover what they should, they repeat, and few windows never make them tight."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.quant.bootstrap import Interval, _student, interval, wilson


def noise(windows: int, tokens: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(windows, tokens, generator=torch.Generator().manual_seed(seed))


def naive(values: Tensor, resamples: int, seed: int) -> tuple[float, float]:
    """The percentile bootstrap, spelled out."""
    generator, means = torch.Generator().manual_seed(seed), sorted([0.0] * resamples)
    rows = values.double().mean(1).tolist()
    for at in range(resamples):
        means[at] = sum(rows[int(i)] for i in torch.randint(len(rows), (len(rows),), generator=generator)) / len(rows)
    means.sort()
    return means[int(0.025 * resamples)], means[int(0.975 * resamples)]


def test_the_value_is_the_mean_of_all_tokens() -> None:
    values = noise(12)
    assert interval(values).value == pytest.approx(float(values.double().mean()), abs=1e-12)
    assert interval(values, "exp-mean").value == pytest.approx(math.exp(float(values.double().mean())))


def test_many_skewed_windows_match_the_twin() -> None:
    values = noise(60).exp() + noise(60, 1, 3).exp() * 2  # skewed, so that Student's symmetric wing does not hide the percentiles
    found, (low, high) = interval(values), naive(values, 4000, 9)
    assert found.high == pytest.approx(high, rel=0.02) and found.low <= low * 1.02


@pytest.mark.parametrize("windows", [2, 4, 8, 20])
def test_coverage_is_not_below_what_it_says(windows: int) -> None:
    """Windows that differ, of tokens that hang together: the truth 0 lies inside at least 92% of the time (95% less the noise of 300)."""
    held = 0
    for seed in range(300):
        found = interval(noise(windows, 4, seed) * 0.1 + noise(windows, 1, seed + 10_000))
        held += found.low <= 0 <= found.high
    assert held >= 276


def test_one_window_is_never_tighter_than_several() -> None:
    values = noise(8, 64, 5)
    alone, several = interval(values.reshape(1, -1)), interval(values)
    assert alone.high - alone.low > several.high - several.low and alone.value == pytest.approx(several.value)


def test_equal_windows_have_no_spread() -> None:
    assert interval(torch.zeros(6, 10)) == Interval(0.0, 0.0, 0.0)
    assert interval(torch.zeros(1, 10), "exp-mean") == Interval(1.0, 1.0, 1.0)
    assert interval(torch.full((6, 10), 0.1)) == interval(torch.full((9, 10), 0.1)) == Interval(*[float(torch.tensor(0.1))] * 3)


def test_pairing_cancels_what_windows_have_in_common() -> None:
    text, change = noise(20, 1) * 5 + torch.zeros(20, 16), 0.01 + 0.001 * noise(20, 16, 1)
    ratio, alone = interval((text + change) - text, "exp-mean"), interval(text, "exp-mean")
    assert ratio.value == pytest.approx(math.exp(0.01), rel=0.001) and ratio.high < 1.011
    assert alone.high / alone.low > 10


def test_same_again_and_another_seed() -> None:
    values = noise(30).exp()
    assert interval(values, seed=1) == interval(values, seed=1)
    assert interval(values, seed=1).high != interval(values, seed=2).high


def test_order_and_ends() -> None:
    for seed in range(20):
        found = interval(noise(3, 5, seed), "exp-mean")
        assert 0 < found.low <= found.value <= found.high < math.inf
    assert interval(torch.tensor([[-500.0, -500.0], [900.0, 900.0]]), "exp-mean").high < math.inf
    assert Interval(0.5, -0.2, 1.3).clipped(0.0, 1.0) == Interval(0.5, 0.0, 1.0)


def test_quantiles_of_student() -> None:
    for freedom, known in ((1, 12.7062), (30, 2.0423), (31, 2.0395), (60, 2.0003), (1000, 1.9623)):
        assert _student(freedom) == pytest.approx(known, abs=2e-4)


@pytest.mark.parametrize(
    "values", [torch.tensor([[1.0, math.nan]]), torch.tensor([[1.0, math.inf]]), torch.zeros(0, 3), torch.zeros(1, 1), torch.zeros(3)]
)
def test_refuses_what_has_no_interval(values: Tensor) -> None:
    with pytest.raises(BuildError):
        interval(values)


@pytest.mark.parametrize(("share", "count", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (0.9, 20, 0.6990, 0.9721)])
def test_wilson_against_tables(share: float, count: int, low: float, high: float) -> None:
    assert wilson(share, count) == pytest.approx((low, high), abs=5e-4)

"""AWQ's search on the Gram matrix against a twin that runs every ratio forward on the activations themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buildsys.methods import awq
from buildsys.quant.observe import GRAM_BLOCK, SiteStats, gram_blocks
from buildsys.quant.search import rounding_errors
from buildsys.scheme import Scheme


def activations(width: int, seed: int) -> Tensor:  # -> [tokens, in], a few channels loud
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(200, width, generator=made) @ (torch.eye(width) + torch.randn(width, width, generator=made) / width**0.5)
    x[:, ::17] *= 9
    return x


def stats(x: Tensor) -> SiteStats:
    return SiteStats(x.abs().mean(0), x.abs().amax(0), gram_blocks(x) / len(x))


def rounded(row: Tensor, scheme: Scheme) -> Tensor:  # [in] -> [in], group by group
    found = []
    for group in row.split(scheme.group(len(row))):
        low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
        if scheme.symmetric:
            scale, zero = max(high / (scheme.top - scheme.middle), -low / scheme.middle), scheme.middle
        else:
            scale = (high - low) / scheme.top
            zero = 0
        scale = max(float(torch.tensor(scale).half()), 2.0**-14)
        if not scheme.symmetric:
            zero = min(max(round(-low / scale), 0), scheme.top)
        found += [(min(max(round(float(w) / scale) + zero, 0), scheme.top) - zero) * scale for w in group]
    return torch.tensor(found, dtype=torch.float64)


def twin(weights: list[Tensor], x: Tensor, tied: list[int] | None, scheme: Scheme, ratios: int) -> tuple[Tensor, tuple[float, float]]:
    """The scale of least output error and its exponents: all of 0, 1/4 ... 1 first, then around the best by half the step."""
    mean, squares = x.abs().mean(0), torch.cat(weights).square().sum(0)
    if tied is not None:
        mates = [[at for at in range(len(tied)) if tied[at] == tied[channel]] for channel in range(len(tied))]
        mean, squares = (torch.stack([values[mate].mean() for mate in mates]) for values in (mean, squares))
    scales: dict[tuple[float, float], Tensor] = {}
    errors: dict[tuple[float, float], float] = {}

    def measure(a: float, b: float) -> None:
        scale = mean**a / squares.sqrt() ** b
        scales[a, b] = scale / (scale.max() * scale.min()).sqrt()
        errors[a, b] = 0.0
        for weight in weights:
            for row in weight:
                off = rounded(row * scales[a, b], scheme) / scales[a, b].double() - row.double()
                errors[a, b] += float((x.double() @ off).square().mean())

    for a in range(5):
        for b in range(5):
            measure(a / 4, b / 4)
    step = 1 / 8
    while step >= 1 / ratios:
        a, b = min(errors, key=errors.__getitem__)
        for here in (a - step, a, a + step):
            for there in (b - step, b, b + step):
                if (here, there) not in errors and 0 <= here <= 1 and 0 <= there <= 1:
                    measure(here, there)
        step /= 2
    best = min(errors, key=errors.__getitem__)
    return scales[best], best


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, -1), Scheme(4, 64, True)], ids=str)
def test_the_choice_is_that_of_real_forwards(scheme: Scheme) -> None:
    x = activations(64, 1)  # within one block of the Gram matrix: exact
    weights = [torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in (6, 3)]
    expected, exponents = twin(weights, x, None, scheme, 8)
    found = awq.rescale(weights, stats(x), None, scheme, awq.Knobs(ratios=8))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert min(exponents) > 0, "an end of the search: the test says little"


def test_two_blocks_that_do_not_correlate_are_exact_too() -> None:
    x = torch.zeros(80, GRAM_BLOCK + 32)
    x[:40, :GRAM_BLOCK], x[40:, GRAM_BLOCK:] = activations(GRAM_BLOCK, 2)[:40], activations(32, 3)[:40]
    weights = [torch.randn(4, GRAM_BLOCK + 32, generator=torch.Generator().manual_seed(4))]
    expected, _ = twin(weights, x, None, Scheme(4, 32), 6)
    torch.testing.assert_close(awq.rescale(weights, stats(x), None, Scheme(4, 32), awq.Knobs(ratios=6)), expected, rtol=1e-5, atol=0)


def test_tied_channels_are_searched_by_their_common_mean() -> None:
    x = activations(64, 5)
    tied = [at % 16 + 16 * (at // 32) for at in range(64)]
    weights = [torch.randn(5, 64, generator=torch.Generator().manual_seed(5))]
    expected, _ = twin(weights, x, tied, Scheme(3, 32), 8)
    found = awq.rescale(weights, stats(x), torch.tensor(tied), Scheme(3, 32), awq.Knobs(ratios=8))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_more_ratios_are_no_worse() -> None:
    x, scheme = activations(128, 6), Scheme(3, 128)
    weight, seen = torch.randn(16, 128, generator=torch.Generator().manual_seed(6)), stats(x)
    scales = torch.stack([awq.rescale([weight], seen, None, scheme, awq.Knobs(ratios=ratios)) for ratios in (4, 20)])
    coarse, fine = rounding_errors([weight], seen, scales, scheme)
    assert fine <= coarse * (1 + 1e-6)


def test_a_few_outputs_judge_as_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x, scheme = activations(128, 9), Scheme(4, 128)
    rows = torch.randn(4 * awq.JUDGES + 60, 128, generator=torch.Generator().manual_seed(9))
    weights, seen = [rows[:60], rows[60:] * torch.linspace(0.5, 2, len(rows) - 60)[:, None]], stats(x)  # no two outputs weigh the same
    by_some = awq.rescale(weights, seen, None, scheme, awq.Knobs())
    monkeypatch.setattr(awq, "JUDGES", len(rows))
    by_all = awq.rescale(weights, seen, None, scheme, awq.Knobs())
    some, every, none = rounding_errors(weights, seen, torch.stack([by_some, by_all, torch.ones(128)]), scheme)
    assert every <= some * (1 + 1e-6) and some - every < 0.02 * (none - every)


def test_a_channel_scaled_up_whose_weights_are_scaled_down_is_rounded_as_well() -> None:
    x, scheme = activations(64, 7), Scheme(4, 32)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(7))
    loud = torch.ones(64)
    loud[[3, 20, 41]] = 16.0
    errors = []
    for factor in (torch.ones(64), loud):
        narrow, seen = weight / factor, stats(x * factor)
        errors += rounding_errors([narrow], seen, awq.rescale([narrow], seen, None, scheme, awq.Knobs())[None], scheme)
    assert errors[1] <= 1.02 * errors[0]


def test_a_column_of_zeros_spreads_the_scales_within_what_float16_holds() -> None:
    x = activations(64, 8)
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(8))
    weight[:, 5] = 0
    for seen in (stats(x), stats(torch.zeros(4, 64))):
        scale = awq.rescale([weight], seen, None, Scheme(4, 32), awq.Knobs())
        assert float(scale.max()) < 1e3 and float(scale.min()) > 1e-3
    assert torch.isfinite(awq.rescale([torch.zeros(6, 64)], stats(x), None, Scheme(4, 32), awq.Knobs())).all()

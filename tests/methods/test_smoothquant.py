"""SmoothQuant's scales against the paper's formula, and its choice against rounding the activations themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buildsys.methods import smoothquant
from buildsys.quant.activations import fake_quantize
from buildsys.quant.grid import min_max
from buildsys.quant.observe import SiteStats, gram_blocks
from buildsys.quant.search import rounding_errors
from buildsys.scheme import Scheme

INT8, FP8 = Scheme(8, -1, True, "int", "int8"), Scheme(8, -1, True, "fp8", "fp8")


def activations(width: int = 128, seed: int = 0, loud: float = 40) -> Tensor:  # -> [600, in]: a few channels loud
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(600, width, generator=made) * (torch.randn(width, generator=made) / 2).exp()
    x[:, ::31] *= loud
    return x


def readers(width: int = 128, seed: int = 0) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    columns = (torch.randn(width, generator=made) / 2).exp() * 0.03
    return [torch.randn(rows, width, generator=made) * columns for rows in (48, 16)]


def stats(x: Tensor) -> SiteStats:
    return SiteStats(x.abs().mean(0), x.abs().amax(0), gram_blocks(x) / len(x))


def output_error(weights: list[Tensor], x: Tensor, scale: Tensor, scheme: Scheme, round_weights: bool = True) -> float:
    """What rounding costs, measured: the mean over tokens of the squared error of all outputs."""
    total = 0.0
    for weight in weights:
        grid = min_max(weight * scale, scheme)
        stored = grid.dequantize(grid.round(weight * scale)) if round_weights else weight * scale
        off = fake_quantize(x / scale, scheme.activations) @ stored.t() - x @ weight.t()
        total += float(off.double().square().sum(1).mean())
    return total


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_a_given_alpha_is_the_papers_formula(alpha: float) -> None:
    x, weights = activations(), readers()
    found = smoothquant.rescale(weights, stats(x), None, INT8, smoothquant.Knobs(alpha=alpha))
    expected = []
    for channel in range(128):
        w = max(float(weight[:, channel].abs().max()) for weight in weights)
        expected.append(float(x[:, channel].abs().max()) ** alpha / w ** (1 - alpha))
    ratio = found / torch.tensor(expected)
    torch.testing.assert_close(ratio, ratio[:1].expand(128), rtol=1e-4, atol=0)  # one factor for all, which no rounding sees
    assert float(found.max() * found.min()) == pytest.approx(1, rel=1e-4)


def test_at_alpha_one_every_channel_is_as_loud() -> None:
    x = activations()
    scale = smoothquant.rescale(readers(), stats(x), None, INT8, smoothquant.Knobs(alpha=1.0))
    peaks = (x / scale).abs().amax(0)
    torch.testing.assert_close(peaks, peaks[:1].expand(128), rtol=1e-4, atol=0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_search_finds_the_alpha_of_least_error(seed: int) -> None:
    x, weights = activations(seed=seed), readers(seed=seed)
    seen = stats(x)
    given = [smoothquant.rescale(weights, seen, None, INT8, smoothquant.Knobs(alpha=step / 10)) for step in range(11)]
    errors = [output_error(weights, x, scale, INT8) for scale in given]
    found = output_error(weights, x, smoothquant.rescale(weights, seen, None, INT8, smoothquant.Knobs()), INT8)
    assert found <= 1.05 * min(errors)
    assert found < 0.05 * output_error(weights, x, torch.ones(128), INT8), "the loud channels are still there"
    assert max(errors[0], errors[10]) > 1.2 * found, "an end of the search is as good: the test says little"


def test_the_predicted_errors_are_those_that_are_measured() -> None:
    x, weights = activations(512, seed=4), readers(512, seed=4)
    seen = stats(x)
    scales = torch.stack([smoothquant.rescale(weights, seen, None, INT8, smoothquant.Knobs(alpha=alpha)) for alpha in (0.2, 0.5, 0.8)])
    scales = torch.cat([torch.ones(1, 512), scales])
    predicted = smoothquant.activation_errors(weights, seen, scales, INT8)
    measured = [output_error(weights, x, scale, INT8, round_weights=False) for scale in scales]
    assert predicted == pytest.approx(measured, rel=0.35)  # above them where few are loud: a token's loudest channel is exact
    both = [one + other for one, other in zip(predicted, rounding_errors(weights, seen, scales, INT8), strict=True)]
    assert both == pytest.approx([output_error(weights, x, scale, INT8) for scale in scales], rel=0.35)


def test_where_nothing_is_loud_nothing_moves_far() -> None:
    made = torch.Generator().manual_seed(5)
    x, weights = torch.randn(600, 128, generator=made), [torch.randn(64, 128, generator=made)]
    scale = smoothquant.rescale(weights, stats(x), None, INT8, smoothquant.Knobs())
    assert float(scale.max() / scale.min()) < 2


def test_fp8_is_no_worse_for_it() -> None:
    x, weights = activations(seed=6), readers(seed=6)
    scale = smoothquant.rescale(weights, stats(x), None, FP8, smoothquant.Knobs())
    assert output_error(weights, x, scale, FP8) <= 1.15 * output_error(weights, x, torch.ones(128), FP8)


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5, 1.0])
@pytest.mark.parametrize("scheme", [INT8, FP8], ids=str)
def test_dead_channels_and_columns_have_a_scale_that_float16_holds(scheme: Scheme, alpha: float | None) -> None:
    x, weights = activations(), readers()
    x[:, 3], x[:, 64:] = 0, 0
    for weight in weights:
        weight[:, 5], weight[:, 70] = 0, 0
    for seen, read in ((stats(x), weights), (stats(torch.zeros(9, 128)), weights), (stats(x), [torch.zeros(8, 128)])):
        scale = smoothquant.rescale(read, seen, None, scheme, smoothquant.Knobs(alpha=alpha))
        assert torch.isfinite(scale).all() and float(scale.max()) <= 1e4 and float(scale.min()) >= 1e-4


def test_weights_in_half_precision_are_searched_as_in_float32() -> None:
    x, weights = activations(), [weight.bfloat16() for weight in readers()]
    found = smoothquant.rescale(weights, stats(x), None, INT8, smoothquant.Knobs())
    torch.testing.assert_close(found, smoothquant.rescale([w.float() for w in weights], stats(x), None, INT8, smoothquant.Knobs()))


def test_float_activations_are_refused_with_both_values() -> None:
    for scheme in (Scheme(4, 128), Scheme(8, -1, True), Scheme(8, -1, True, "fp8")):
        assert smoothquant.accepts(scheme) == "moves outliers out of activations, and quantization.activations is none"
    assert smoothquant.accepts(INT8) is None and smoothquant.accepts(FP8) is None

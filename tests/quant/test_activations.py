"""Activations as engines round them, against one number at a time; the noise that is predicted, against noise that is measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from buildsys.quant.activations import expected_peak, fake_quantize, rounding_noise
from buildsys.scheme import Activations

E4M3 = sorted({(m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8) if (e, m) != (15, 7)})
"""Every magnitude of arXiv:2209.05433, table 1: sign apart, 4 bits of exponent (bias 7), 3 of mantissa; the last code is NaN."""


def tokens(seed: int = 0, width: int = 96) -> Tensor:  # -> [40, in], loud and quiet ones
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(40, width, generator=made) * torch.randn(width, generator=made).exp()
    return x * torch.logspace(-6, 4, 40)[:, None]


def nearest_whole(x: float) -> float:
    return math.copysign(math.floor(abs(x) + 0.5), x)


def nearest_e4m3(x: float) -> float:
    """The nearest magnitude; of two equally near, the one with an even mantissa, which is every second of the list."""
    at = min(range(len(E4M3)), key=lambda i: (abs(E4M3[i] - abs(x)), i % 2))
    return math.copysign(E4M3[at], x)


def slow(token: list[float], to: Activations) -> list[float]:
    largest = max(max(map(abs, token)), 1e-7)
    scale = largest / (127 if to == "int8" else 448)
    return [(nearest_whole if to == "int8" else nearest_e4m3)(value / scale) * scale for value in token]


def test_e4m3_is_torchs() -> None:
    held = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert held.tolist() == E4M3 and E4M3[-1] == 448


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_tokens_are_rounded_as_one_by_one(to: Activations) -> None:
    x = tokens()
    x[3] = 0
    found = fake_quantize(x, to)
    expected = torch.tensor([slow(token.tolist(), to) for token in x])
    # float32 and float64 may fall on different sides of a half; nowhere by more than that step
    off = (found - expected).abs() / x.abs().amax(1, keepdim=True).clamp(min=1e-7)
    assert float((off > 1e-6).float().mean()) < 1e-3 and float(off.max()) < (1 / 120 if to == "int8" else 1 / 13)
    assert torch.equal(found[3], torch.zeros(96))


def test_halves_go_away_from_zero_in_int8_and_to_even_in_fp8() -> None:
    whole = torch.tensor([[127.0, 0.5, -0.5, 1.5, 2.5, -2.5, 126.5, 0.49999997, -63.5]])
    assert fake_quantize(whole, "int8").tolist() == [[127, 1, -1, 2, 3, -3, 127, 0, -64]]
    between = torch.tensor([[448.0, 17.0, 19.0, -17.0, 432.0, 2.0**-10, 3 * 2.0**-10]])  # 16 and 18 and 20; 416 and 448; 0, 2^-9, 2^-8
    assert fake_quantize(between, "fp8").tolist() == [[448, 16, 20, -16, 448, 0, 2.0**-8]]


@pytest.mark.parametrize("to", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_is_kept_and_the_type(to: Activations, dtype: torch.dtype) -> None:
    x = tokens(1)[10:36].to(dtype)
    found = fake_quantize(x, to)
    assert found.dtype == dtype and torch.isfinite(found).all()
    at = x.abs().argmax(1, keepdim=True)
    torch.testing.assert_close(found.gather(1, at), x.gather(1, at))
    assert torch.equal(fake_quantize(x, "none"), x)


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_a_tokens_rounding_knows_no_other_token(to: Activations) -> None:
    x = tokens(2)
    assert torch.equal(fake_quantize(x, to)[7:9], fake_quantize(x[7:9], to))
    assert torch.equal(fake_quantize(x[None], to)[0], fake_quantize(x, to))


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0])
def test_the_expected_peak_is_the_mean_of_peaks(spread: float) -> None:
    made = torch.Generator().manual_seed(1)
    rms = (torch.randn(200, generator=made) * spread).exp()
    x = torch.randn(4000, 200, generator=made) * rms
    assert float(expected_peak(rms.square())) == pytest.approx(float(x.abs().amax(1).square().mean()), rel=0.06)


def test_the_expected_peak_of_little() -> None:
    assert float(expected_peak(torch.tensor([4.0]))) == pytest.approx(4, rel=0.01)  # one channel: its own mean square
    assert float(expected_peak(torch.tensor([4.0, 0.0, 0.0]))) == pytest.approx(4, rel=0.01)
    assert float(expected_peak(torch.zeros(5))) == 0


def test_the_noise_of_int8_is_the_noise_that_is_measured() -> None:
    made = torch.Generator().manual_seed(3)
    rms = torch.linspace(-6, 2, 256).exp()  # the quietest are rounded to nothing
    x = torch.randn(3000, 256, generator=made) * rms
    measured = (fake_quantize(x, "int8") - x).square().mean(0)
    predicted = rounding_noise(rms.square(), "int8")
    assert float(predicted.sum()) == pytest.approx(float(measured.sum()), rel=0.1)
    assert ((predicted / measured - 1).abs() < 0.5).all()
    assert (predicted[:50] == rms[:50].square()).all() and predicted[-1] < 1e-4 * rms[-1].square()


def test_the_noise_of_fp8_is_of_the_numbers_near_zero_alone() -> None:
    rms = torch.tensor([1.0, 1e-2, 1e-6, 1e-7])
    noise = rounding_noise(rms.square(), "fp8")
    assert (noise[:2] < 1e-7 * rms[:2].square()).all() and torch.equal(noise[2:], rms[2:].square())

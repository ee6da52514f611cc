"""AWQ's search on the Gram matrix against a twin that runs every ratio forward on the activations themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buildsys.methods import awq
from buildsys.quant.observe import GRAM_BLOCK, SiteStats, gram_blocks
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


def twin(weights: list[Tensor], x: Tensor, tied: list[int] | None, scheme: Scheme, ratios: int) -> tuple[Tensor, list[float]]:
    """The scale of least output error, and every ratio's error."""
    mean = x.abs().mean(0)
    if tied is not None:
        mean = torch.stack([mean[[at for at in range(len(tied)) if tied[at] == tied[channel]]].mean() for channel in range(len(tied))])
    scales, errors = [], []
    for step in range(ratios + 1):
        scale = mean ** (step / ratios)
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight in weights:
            for row in weight:
                off = rounded(row * scale, scheme) / scale.double() - row.double()
                error += float((x.double() @ off).square().mean())
        scales.append(scale)
        errors.append(error)
    return scales[min(range(len(errors)), key=errors.__getitem__)], errors


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, -1), Scheme(4, 64, True)], ids=str)
def test_the_choice_is_that_of_real_forwards(scheme: Scheme) -> None:
    x = activations(64, 1)  # within one block of the Gram matrix: exact
    weights = [torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)) for rows in (6, 3)]
    expected, errors = twin(weights, x, None, scheme, 8)
    found = awq.rescale(weights, stats(x), None, scheme, awq.Knobs(ratios=8))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert errors.index(min(errors)) not in (0, 8), "the best ratio is an end of the search: the test says little"


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
    from buildsys.quant.search import rounding_error

    x = activations(128, 6)
    weight, seen = torch.randn(16, 128, generator=torch.Generator().manual_seed(6)), stats(x)
    coarse, fine = (awq.rescale([weight], seen, None, Scheme(3, 128), awq.Knobs(ratios=ratios)) for ratios in (4, 20))
    assert rounding_error(weight, seen, fine, Scheme(3, 128)) <= rounding_error(weight, seen, coarse, Scheme(3, 128)) * (1 + 1e-6)

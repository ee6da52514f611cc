"""The search over many scales, in tiles, gives what each scale gives by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buildsys.quant import search
from buildsys.quant.observe import SiteStats, gram_blocks
from buildsys.quant.search import rounding_error, rounding_errors
from buildsys.scheme import Scheme

CASES = [
    (Scheme(4, 128), 640),  # more channels than a tile has
    (Scheme(3, 32, True), 160),  # fewer than a Gram block has left
    (Scheme(4, 64), 192),
    (Scheme(8, -1), 200),
    (Scheme(4, -1), 1100),  # a group wider than a tile
    (Scheme(8, -1, True, "fp8", "fp8"), 96),
]


def searched(width: int, *rows: int) -> tuple[list[Tensor], SiteStats, Tensor]:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(300, width, generator=generator) * torch.randn(width, generator=generator).exp()
    stats = SiteStats(x.abs().mean(0), x.abs().amax(0), gram_blocks(x) / len(x))
    weights = [torch.randn(outs, width, generator=generator) / 50 for outs in rows]
    return weights, stats, torch.stack([stats.absmean**ratio for ratio in (0.0, 0.3, 0.7, 1.0)])


@pytest.mark.parametrize(("scheme", "width"), CASES, ids=str)
def test_every_candidate_costs_what_it_costs_alone(scheme: Scheme, width: int) -> None:
    weights, stats, scales = searched(width, search.ROWS + 40, 24)
    alone = [sum(rounding_error(weight, stats, scale, scheme) for weight in weights) for scale in scales]
    assert rounding_errors(weights, stats, scales, scheme) == pytest.approx(alone, rel=1e-5)


def test_weights_and_scales_are_left_as_they_were() -> None:
    weights, stats, scales = searched(256, 48)
    before = [tensor.clone() for tensor in (*weights, stats.gram, scales)]
    rounding_errors(weights, stats, scales, Scheme(4, 128))
    assert all(torch.equal(one, other) for one, other in zip(before, (*weights, stats.gram, scales), strict=True))


def test_a_scale_that_overflows_costs_no_number_and_spoils_no_other() -> None:
    weights, stats, scales = searched(128, 16)
    sound = rounding_errors(weights, stats, scales, Scheme(4, 128))
    scales[2] = 3e38
    found = rounding_errors(weights, stats, scales, Scheme(4, 128))
    assert not torch.tensor(found[2]).isfinite()
    assert found[:2] + found[3:] == sound[:2] + sound[3:]

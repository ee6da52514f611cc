"""Triton kernels against their twins in torch. They need a GPU and are skipped without one: `pytest -n0 tests/quant` on a GPU host."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from buildsys.quant import compensate, grid, search
from buildsys.quant.observe import SiteStats, gram_blocks
from buildsys.quant.refine import refined
from buildsys.scheme import Scheme

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels do not run here")

SCHEMES = (Scheme(4, 128), Scheme(4, 64), Scheme(4, 32), Scheme(4, 16), Scheme(3, 64, True), Scheme(8, 128), Scheme(2, 128))
each = pytest.mark.parametrize("scheme", SCHEMES, ids=str)


def layer(outs: int, ins: int, seed: int) -> tuple[Tensor, Tensor]:  # -> weight [out, in], inputs [tokens, in]
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * ins, ins, generator=made) * torch.randn(ins, generator=made).exp()
    return torch.randn(outs, ins, generator=made) * 0.05, x


@each
@pytest.mark.parametrize(("outs", "ins"), [(200, 512), (31, 128), (64, 384)])
def test_the_search_finds_what_forwards_of_its_twin_find(scheme: Scheme, outs: int, ins: int) -> None:
    weight, x = layer(outs, ins, 0)
    stats = SiteStats(x.abs().mean(0), x.abs().amax(0), gram_blocks(x) / len(x))
    there = SiteStats(*(part.cuda() for part in (stats.absmean, stats.absmax, stats.gram)))
    scales = torch.stack([stats.absmean.clamp(min=1e-4).pow(step / 20) for step in range(21)])
    slow, fast = (
        search.rounding_errors([weight], stats, scales, scheme),
        search.rounding_errors([weight.cuda()], there, scales.cuda(), scheme),
    )
    assert fast == pytest.approx(slow, rel=2e-3), "products are of TF32"
    assert slow[fast.index(min(fast))] <= 1.002 * min(slow)


@each
def test_grids_are_the_twins(scheme: Scheme) -> None:
    weight, x = layer(200, 512, 1)
    importance = x.square().mean(0)
    slow, fast = grid.least_error(weight, scheme, importance), grid.least_error(weight.cuda(), scheme, importance.cuda())
    same = (slow.scale == fast.scale.cpu()) & (slow.zero == fast.zero.cpu())
    assert same.float().mean() > 0.999, "but for ties"


@each
@pytest.mark.parametrize("ins", [512, 320])
def test_codes_are_the_twins(scheme: Scheme, ins: int) -> None:
    if ins % scheme.group(ins):
        pytest.skip("the group does not divide it")
    weight, x = layer(200, ins, 2)
    gram = x.t() @ x / len(x)
    chosen = grid.min_max(weight, scheme)
    there = grid.Grid(chosen.scale.cuda(), chosen.zero.cuda(), scheme)
    by = compensate.factored(gram, 0.01, True)
    slow, h = compensate.compensated(weight, by, chosen), by.h
    by_there = compensate.factored(gram.cuda(), 0.01, True)
    fast, h_there = compensate.compensated(weight.cuda(), by_there, there), by_there.h

    def error(codes: Tensor, on: grid.Grid) -> float:
        off = on.dequantize(codes) - weight
        return float(((off @ gram) * off).sum())

    assert (slow == fast.cpu()).float().mean() > 0.99 and error(fast.cpu(), chosen) < 1.01 * error(slow, chosen)
    slow_grid, slow = refined(weight, h, chosen, slow, 2)
    fast_grid, fast = refined(weight.cuda(), h_there, there, fast, 2)
    back = grid.Grid(fast_grid.scale.cpu(), fast_grid.zero.cpu(), scheme)
    assert (slow == fast.cpu()).float().mean() > 0.95 and error(fast.cpu(), back) < 1.01 * error(slow, slow_grid)

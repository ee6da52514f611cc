"""Folding any positive scale into a block leaves its function as it is, for every site of every family, routers included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from buildsys.architecture import SITES, Site, scale_site
from buildsys.quant.fold import fold, tied_channels
from buildsys.quant.rotary import tables
from tests import models

BIASED: dict[str, dict[str, Any]] = {"llama": {"attention_bias": True, "mlp_bias": True}, "internlm2": {"bias": True}}
EXPERTS = ("mixtral", "qwen3_moe")
PLACES = [(family, site) for family in models.FAMILIES for site in ((*SITES[:3], "down_in.1") if family in EXPERTS else SITES)]
HEADS = [(4, 4), (4, 2), (8, 1)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(("family", "site"), PLACES)
def test_the_function_stays(family: str, heads: tuple[int, int], site: Site, tmp_path: Path) -> None:
    said: dict[str, Any] = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "num_hidden_layers": 1} | BIASED.get(
        family, {}
    )
    model = models.opened(models.FAMILIES[family](tmp_path, **said))
    a, block = model.architecture, model.block(0)
    made = torch.Generator().manual_seed(1)
    scale = torch.randn(a.width(site), generator=made).exp()
    tied = tied_channels(a, site)
    if tied is not None:
        scale = scale[tied]
    h, rotary = torch.randn(24, 128, generator=made), tables(a, 24)
    changed = fold(a, block.weights, site, scale)
    before, after = block.forward(h, rotary), block.with_weights(changed).forward(h, rotary)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    readers = {f"{linear.name}.weight" for linear in a.linears if scale_site(linear.site) == site}
    if a.experts is not None and site == "mlp_in":
        readers.add(a.experts.router)
    assert all(torch.equal(changed[name], block.weights[name] * scale) for name in readers)
    writers = set(changed) - readers
    assert writers and not any(torch.equal(changed[name], block.weights[name]) for name in writers)
    without = block.with_weights({name: changed[name] for name in readers}).forward(h, rotary)
    assert (without - before).abs().max() > 0.1, "the writers' part says nothing"


@pytest.mark.parametrize("family", ["internlm2", "phi3", "qwen3_moe"])
def test_a_fold_and_its_inverse_are_nothing(family: str, tmp_path: Path) -> None:
    model = models.opened(models.FAMILIES[family](tmp_path, **BIASED.get(family, {})))
    block = model.block(0)
    for site in model.architecture.scale_sites:
        scale = torch.tensor([0.5, 2.0, 4.0, 1.0]).repeat(model.architecture.width(site) // 4)  # powers of two: exact
        there = block.with_weights(fold(model.architecture, block.weights, site, scale))
        back = fold(model.architecture, there.weights, site, 1 / scale)
        assert all(torch.equal(tensor, block.weights[name]) for name, tensor in back.items())


def test_tied_channels_are_those_that_one_value_row_feeds(tmp_path: Path) -> None:
    """Moves each value row in turn and looks which inputs of o_proj change."""
    model = models.opened(models.tiny_llama(tmp_path, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=32))
    a, block = model.architecture, model.block(0)
    tied = tied_channels(a, "o_in")
    assert tied is not None and tied.shape == (32,)
    x, rotary = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), tables(a, 6)
    before = block.o_in(x, rotary)
    for row in range(a.kv_heads * a.head_dim):
        value = block.weights["self_attn.v_proj.weight"].clone()
        value[row] += 1
        moved = block.with_weights({"self_attn.v_proj.weight": value}).o_in(x, rotary)
        changed = (moved != before).any(0).nonzero().flatten().tolist()
        assert changed == (tied == row).nonzero().flatten().tolist()
    assert [tied_channels(a, site) for site in ("attn_in", "mlp_in", "down_in")] == [None] * 3

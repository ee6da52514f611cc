"""The walk of calibration windows through a block: each site's second moments, against whole forwards that remember everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from buildsys.architecture import SITES, Site
from buildsys.quant.block import Block
from buildsys.quant.model import Model
from buildsys.quant.rotary import tables
from buildsys.quant.stream import Walk
from buildsys.step import Resources
from tests import models

LENGTH = 24


def coarse(block: Block, site: Site) -> Block:
    """The block with the linears of one site rounded roughly: what a walk has to notice at the sites after it."""
    names = [f"{linear.name}.weight" for linear in block.architecture.at(site)]
    return block.with_weights({name: (block.weights[name] * 8).round() / 8 for name in names})


def read_at(block: Block, site: Site, h: torch.Tensor) -> torch.Tensor:
    """What is read at `site`, from the block's input, with the weights as they are now."""
    rotary = tables(block.architecture, LENGTH)
    x = block.attn_in(h)
    if site == "attn_in":
        return x
    o_in = block.o_in(x, rotary)
    if site == "o_in":
        return o_in
    x = block.mlp_in(block.after_attention(h, o_in))
    return x if site == "mlp_in" else block.down_in(x)


def model_of(family: str, folder: Path) -> Model:
    return models.opened(models.FAMILIES[family](folder, num_hidden_layers=3))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_each_site_sees_the_linears_rounded_before_it(family: str, threads: int, tmp_path: Path) -> None:
    model, tokens = model_of(family, tmp_path), models.tokens(3, LENGTH)
    walk, done = Walk(model, tokens, Resources(threads, 2)), []
    for layer in range(3):
        block = model.block(layer)
        for site in SITES:
            found = walk.gram(block, site)
            expected = torch.zeros_like(found)
            for h in model.embed(tokens):
                for earlier in done:
                    h = earlier.forward(h, tables(model.architecture, LENGTH))
                x = read_at(block, site, h)
                expected += x.t() @ x
            torch.testing.assert_close(found, expected / tokens.numel(), rtol=1e-5, atol=1e-6)
            block = coarse(block, site)
        walk.finish(block)
        done.append(block)


def test_a_replayed_block_is_a_finished_one(tmp_path: Path) -> None:
    model, tokens = model_of("llama", tmp_path), models.tokens(3, LENGTH)
    walked, replayed = (Walk(model, tokens, Resources()) for _ in range(2))
    block = model.block(0)
    for site in SITES:
        walked.gram(block, site)
        block = coarse(block, site)
    walked.finish(block)
    replayed.replay(block)
    for site in SITES:
        assert torch.equal(walked.gram(model.block(1), site), replayed.gram(model.block(1), site))

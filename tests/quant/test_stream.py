"""The walk of calibration windows through a block: each site's second moments, against whole forwards that remember everything."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from buildsys.architecture import Site
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
    place, _, expert = site.partition(".")
    if not expert:
        return x if place == "mlp_in" else block.down_in(x)
    assert block.architecture.experts is not None
    x = x[block.routed(x, block.architecture.experts)[int(expert)][0]]
    return x if place == "mlp_in" else block.down_in(x, int(expert))


def model_of(family: str, folder: Path) -> Model:
    return models.opened(models.FAMILIES[family](folder, num_hidden_layers=3))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_each_site_sees_the_linears_rounded_before_it(family: str, threads: int, tmp_path: Path) -> None:
    model, tokens = model_of(family, tmp_path), models.tokens(3, LENGTH)
    walk, done = Walk(model, tokens, Resources(threads, 2)), []
    for layer in range(3):
        block = model.block(layer)
        for site in model.architecture.sites:
            found = walk.gram(block, site)
            expected, seen = torch.zeros_like(found.matrix), 0
            for h in model.embed(tokens):
                for earlier in done:
                    h = earlier.forward(h, tables(model.architecture, LENGTH))
                x = read_at(block, site, h)
                expected, seen = expected + x.t() @ x, seen + len(x)
            assert found.sent == (seen if "." in site else None) and seen == (seen if "." in site else tokens.numel())
            torch.testing.assert_close(found.matrix, expected / seen, rtol=1e-5, atol=1e-6)
            block = coarse(block, site)
        walk.finish(block)
        done.append(block)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_float_model_is_walked_beside(family: str, threads: int, tmp_path: Path) -> None:
    """What it reads less what is read here; where a linear writes to the residual stream, that stream behind it with its weights as they
    are. Experts are compared by the tokens that they are sent here."""
    model, tokens = model_of(family, tmp_path), models.tokens(3, LENGTH)
    walk, done, rotary = Walk(model, tokens, Resources(threads, 2), beside=True), [], tables(model.architecture, LENGTH)
    for layer in range(3):
        block = source = model.block(layer)
        for site in model.architecture.sites:
            found = walk.gram(block, site, source).apart
            assert found is not None and found.of_outputs == (site in ("o_in", "down_in"))
            expected, seen = torch.zeros_like(found.crossed), [0, 0]
            for at, h in enumerate(model.embed(tokens)):
                float_h = h
                for earlier, float_earlier in done:
                    h, float_h = earlier.forward(h, rotary), float_earlier.forward(float_h, rotary)
                x, float_x = read_at(block, site, h), read_at(source, site, float_h)
                y = float_x - x if "." not in site else read_by(block, source, site, h, float_h) - x
                if found.of_outputs:
                    y = behind(source, site, float_h, float_x) - behind(block, site, h, x)
                expected[at % 2] += y.t() @ x
                seen[at % 2] += len(x)
            assert found.tokens == tuple(seen)
            torch.testing.assert_close(found.crossed, expected / torch.tensor(seen)[:, None, None].clamp(min=1), rtol=1e-4, atol=1e-6)
            block = coarse(block, site)
        walk.finish(block, source)
        done.append((block, source))


def behind(block: Block, site: Site, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The residual stream behind what reads `x` at o_in or down_in, from the block's input."""
    if site == "o_in":
        return block.after_attention(h, x)
    return block.after_mlp(block.after_attention(h, read_at(block, "o_in", h)), x)


def read_by(block: Block, source: Block, site: Site, h: torch.Tensor, float_h: torch.Tensor) -> torch.Tensor:
    """What the float block reads at an expert's site of the tokens that this expert is sent in the quantized one."""
    assert block.architecture.experts is not None
    place, _, expert = site.partition(".")
    here = block.mlp_in(block.after_attention(h, read_at(block, "o_in", h)))
    x = source.mlp_in(source.after_attention(float_h, read_at(source, "o_in", float_h)))
    x = x[block.routed(here, block.architecture.experts)[int(expert)][0]]
    return x if place == "mlp_in" else source.down_in(x, int(expert))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_replayed_block_is_a_finished_one(family: str, tmp_path: Path) -> None:
    model, tokens = model_of(family, tmp_path), models.tokens(3, LENGTH)
    walked, replayed = (Walk(model, tokens, Resources(), beside=True) for _ in range(2))
    block = source = model.block(0)
    for site in model.architecture.sites:
        walked.gram(block, site, source)
        block = coarse(block, site)
    walked.finish(block, source)
    replayed.replay(block, source)
    block = model.block(1)
    for site in model.architecture.sites:
        one, other = walked.gram(block, site, block), replayed.gram(block, site, block)
        assert torch.equal(one.matrix, other.matrix) and one.apart is not None and other.apart is not None
        assert torch.equal(one.apart.crossed, other.apart.crossed) and one.apart.crossed.any()


def test_all_tokens_stand_in_for_an_expert_that_is_sent_few(tmp_path: Path) -> None:
    model = models.opened(models.starve(models.tiny_mixtral(tmp_path, num_local_experts=5)))
    tokens = models.tokens(3, LENGTH)
    walk, block, rotary = Walk(model, tokens, Resources()), model.block(0), tables(model.architecture, LENGTH)
    found = {site: walk.gram(block, site) for site in model.architecture.sites}
    hidden = [block.after_attention(h, block.o_in(block.attn_in(h), rotary)) for h in model.embed(tokens)]
    x = torch.cat([block.mlp_in(h) for h in hidden])
    for site, read in (("mlp_in.4", x), ("down_in.4", block.down_in(x, 4))):
        assert found[site].sent == 0
        torch.testing.assert_close(found[site].matrix, read.t() @ read / len(x), rtol=1e-5, atol=1e-6)
    told = [found[f"mlp_in.{expert}"].sent for expert in range(5)]
    assert sum(sent or 0 for sent in told) == 2 * tokens.numel() and told == [found[f"down_in.{expert}"].sent for expert in range(5)]


@pytest.mark.parametrize("room", [0, 1 << 30])
def test_memory_is_given_back_before_a_large_sum_where_there_is_no_room_for_it(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[str] = []
    monkeypatch.setattr("buildsys.quant.stream._room", lambda device: room)
    monkeypatch.setattr("buildsys.quant.stream.LARGE_BYTES", 4 * 96 * 96)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: given_back.append(device))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append("all"))
    model = models.opened(models.tiny_llama(tmp_path, hidden_size=64, intermediate_size=96))
    walk, block = Walk(model, models.tokens(2, 8), Resources(device="cpu:0")), model.block(0)
    for site in model.architecture.sites:
        walk.gram(block, site)
    assert given_back == ([] if room else ["cpu:0", "all"]), "once, for down_proj alone"

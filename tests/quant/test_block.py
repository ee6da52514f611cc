"""A mixture of experts against a loop over tokens; half precision; the parts of a block that one expert needs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from buildsys.quant.block import Block
from tests import models


def answered(block: Block, h: Tensor) -> Tensor:  # [tokens, hidden] -> same
    """Token by token: ask the experts of the largest logits, and sum their answers by their shares."""
    a, experts = block.architecture, block.architecture.experts
    assert experts is not None
    found = []
    for x, kept in zip(block.mlp_in(h), h, strict=True):
        logits = (block.weights[experts.router] @ x).tolist()
        chosen = sorted(range(experts.count), key=lambda expert: -logits[expert])[: experts.per_token]
        among = chosen if experts.shares_sum_to_one else range(experts.count)
        total = sum(math.exp(logits[expert]) for expert in among)
        for expert in chosen:
            gate, up, down = (block.weights[f"{linear.name}.weight"] for linear in a.linears if linear.expert == expert)
            kept = kept + math.exp(logits[expert]) / total * (down @ (F.silu(gate @ x) * (up @ x)))
        found.append(kept)
    return torch.stack(found)


def block_of(folder: Path, family: str, **config: object) -> tuple[Block, Tensor]:
    block = models.opened(models.FAMILIES[family](folder, num_hidden_layers=1, **config)).block(0)
    return block, torch.randn(30, 128, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("mixtral", {}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("mixtral", {"num_experts_per_tok": 4}),
        ("qwen3_moe", {}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("qwen3_moe", {"num_experts": 40, "num_experts_per_tok": 2}),
    ],
    ids=str,
)
def test_a_mixture_is_a_loop_over_tokens(family: str, config: dict[str, object], tmp_path: Path) -> None:
    block, h = block_of(tmp_path, family, **config)
    expected = answered(block, h)
    assert (expected - h).abs().mean() > 0.1, "the experts say nothing"
    torch.testing.assert_close(block.mlp(h), expected, rtol=0, atol=1e-5)


def test_every_token_is_sent_to_its_experts_in_order(tmp_path: Path) -> None:
    block, h = block_of(tmp_path, "qwen3_moe")
    experts = block.architecture.experts
    assert experts is not None
    routed = block.routed(block.mlp_in(h), experts)
    assert len(routed) == experts.count and all(tokens.tolist() == sorted(set(tokens.tolist())) for tokens, _ in routed)
    assert torch.cat([tokens for tokens, _ in routed]).bincount().tolist() == [experts.per_token] * len(h)
    shares = torch.zeros(len(h)).index_add(0, torch.cat([t for t, _ in routed]), torch.cat([s for _, s in routed]))
    torch.testing.assert_close(shares, torch.ones(len(h)))


def test_who_answers_does_not_hang_on_the_weights_type(tmp_path: Path) -> None:
    """Logits in bfloat16 would have eight bits: near ties would be decided by rounding."""
    block, h = block_of(tmp_path, "qwen3_moe", num_experts=64, num_experts_per_tok=8)
    half = block.to(torch.bfloat16)
    assert half.mlp(h).dtype == h.dtype
    x, experts = half.mlp_in(h), block.architecture.experts
    assert experts is not None
    wide = block.with_weights({experts.router: half.weights[experts.router].float()})
    for (tokens, shares), (same, alike) in zip(half.routed(x, experts), wide.routed(x.float(), experts), strict=True):
        assert torch.equal(tokens, same) and torch.equal(shares, alike)


def test_an_expert_alone_computes_the_same(tmp_path: Path) -> None:
    block, h = block_of(tmp_path, "qwen3_moe")
    alone = block.alone(4)
    assert len(alone.weights) == 5
    assert torch.equal(alone.down_in(alone.mlp_in(h), 4), block.down_in(block.mlp_in(h), 4))
    with pytest.raises(KeyError):
        alone.down_in(h, 3)


def test_what_is_read_is_seen_once_at_each_site_that_is_sent_a_token(tmp_path: Path) -> None:
    model = models.opened(models.starve(models.tiny_mixtral(tmp_path, num_local_experts=5)))
    block, seen = model.block(0), list[tuple[str, int]]()
    block.mlp(torch.randn(30, 128), lambda site, x: seen.append((site, len(x))))
    sites, sizes = zip(*seen, strict=True)
    assert sites == ("mlp_in", *(site for site in model.architecture.sites[2:] if not site.endswith(".4")))
    assert sizes[0] == 30 and sum(sizes[1::2]) == sum(sizes[2::2]) == 60

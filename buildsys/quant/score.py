"""How far a quantized model's predictions are from its source's: both streamed block by block over the same windows.

One value a predicted token, so that every statistic over them can be paired: KL(source || quantized) in nats over the whole vocabulary
(the measure of arXiv:2407.09141), each model's negative log likelihood of the text, and whether their first choices agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from buildsys.quant.block import Block, Rotary
from buildsys.quant.model import Head, Model, chunks
from buildsys.quant.observe import Progress
from buildsys.quant.parallel import ordered
from buildsys.quant.rotary import tables
from buildsys.step import Resources

SCORES = ("source_nll", "quantized_nll", "kl", "agree")


@dataclass(frozen=True)
class Scores:
    """`tokens`: each of SCORES as float32 [windows, tokens - 1]; position t is about the prediction of token t + 1. `drift`: for each block
    how far its outputs are from those of the source's, both models fed with what came before: squared distance over squared length."""

    tokens: dict[str, Tensor]
    drift: tuple[float, ...]


def score(source: Model, quantized: Model, tokens: Tensor, resources: Resources, progress: Progress) -> Scores:
    """Both models on the windows `tokens` [windows, tokens]."""
    layers = source.architecture.layers
    rotary = tables(source.architecture, tokens.shape[1], resources.device)
    hidden = list(zip(source.embed(tokens), quantized.embed(tokens), strict=True))
    drift = []
    for layer in range(layers):
        blocks = source.block(layer), quantized.block(layer)
        for at, after in enumerate(ordered(partial(_forward, blocks, rotary), hidden, resources)):
            hidden[at] = after
        off, length = (sum(float(part.square().sum(dtype=torch.float64)) for part in parts) for parts in _apart(hidden))
        drift.append(off / max(length, torch.finfo(torch.float32).tiny))
        progress("score", layer + 1, layers + 1)
    heads = source.head(), quantized.head()

    def compare(at: int) -> dict[str, Tensor]:
        one, other = (h.to(resources.device) for h in hidden[at])
        return compare_window(heads, one, other, tokens[at].long().to(resources.device))

    found = list(ordered(compare, range(len(hidden)), resources))
    progress("score", layers + 1, layers + 1)
    return Scores({name: torch.stack([window[name] for window in found]).cpu() for name in SCORES}, tuple(drift))


def _apart(hidden: Sequence[tuple[Tensor, Tensor]]) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """The distances of all windows, and the source's own."""
    return (other - one for one, other in hidden), (one for one, _ in hidden)


def _forward(blocks: tuple[Block, Block], rotary: Rotary, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """One window through the same block of both models."""
    one, other = (block.forward(h.to(rotary[0].device), rotary).cpu() for block, h in zip(blocks, pair, strict=True))
    return one, other


def compare_window(heads: tuple[Head, Head], source: Tensor, quantized: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """SCORES of one window from both models' last hidden states [tokens, hidden]; each [tokens - 1]."""
    parts: dict[str, list[Tensor]] = {name: [] for name in SCORES}
    for chunk in chunks(len(tokens) - 1):
        target = tokens[1:][chunk, None]
        p, q = heads[0].logits(source[:-1][chunk]).log_softmax(-1), heads[1].logits(quantized[:-1][chunk]).log_softmax(-1)
        parts["source_nll"].append(-p.gather(1, target)[:, 0])
        parts["quantized_nll"].append(-q.gather(1, target)[:, 0])
        parts["kl"].append((p.exp() * (p - q)).sum(-1))
        parts["agree"].append((p.argmax(-1) == q.argmax(-1)).float())
    return {name: torch.cat(values) for name, values in parts.items()}

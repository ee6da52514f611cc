"""How far a quantized model's predictions are from its source's: both streamed block by block over the same windows.

One value a predicted token, so that every statistic over them can be paired: KL(source || quantized) in nats over the whole vocabulary
(the measure of arXiv:2407.09141), each model's negative log likelihood of the text, and whether their first choices agree.

The same weights may be scored with several KV caches at once: each is a stream of hidden states of its own beside the source's, through the
same unpacked block. One more cache costs one more forward; the source's, and the unpacking, are paid once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from buildsys.quant.block import Block, Rotary
from buildsys.quant.model import Head, Model, chunks
from buildsys.quant.observe import Progress
from buildsys.quant.parallel import ordered
from buildsys.quant.rotary import tables
from buildsys.step import Resources

AHEAD = 1  # blocks in float32, of each model: four together are what quantizing takes at least
SCORES = ("source_nll", "quantized_nll", "kl", "agree")

Keep = Callable[[Tensor], Tensor] | None
"""What stands in for a KV cache; None: it keeps what it is given."""


@dataclass(frozen=True)
class Scores:
    """`tokens`: each of SCORES as float32 [windows, tokens - 1]; position t is about the prediction of token t + 1. `drift`: for each block
    how far its outputs are from those of the source's, both models fed with what came before: squared distance over squared length."""

    tokens: dict[str, Tensor]
    drift: tuple[float, ...]


def score(source: Model, quantized: Model, tokens: Tensor, resources: Resources, progress: Progress) -> Scores:
    """Both models on the windows `tokens` [windows, tokens]."""
    return score_caches(source, quantized, {"": quantized.keep_kv}, tokens, resources, progress)[""]


def score_caches(
    source: Model, quantized: Model, caches: Mapping[str, Keep], tokens: Tensor, resources: Resources, progress: Progress
) -> dict[str, Scores]:
    """The quantized model with each of `caches` beside the source, to the bit what `score` says of each alone.

    In memory at a time: one block of each model, on a GPU AHEAD more, and of every window the hidden states [tokens, hidden] of the
    source and of each cache.
    """
    layers, keeps = source.architecture.layers, tuple(caches.values())
    rotary = tables(source.architecture, tokens.shape[1], resources.device)
    # windows x streams x [tokens, hidden]: the source first, then a stream for each cache
    hidden = [(one, *(other,) * len(keeps)) for one, other in zip(source.embed(tokens), quantized.embed(tokens), strict=True)]
    drift: list[list[float]] = []
    both = (model.blocks(range(layers), AHEAD) for model in (source, quantized))
    for layer, (float_block, unpacked) in enumerate(zip(*both, strict=True)):
        blocks = float_block, *(replace(unpacked, keep_kv=keep) for keep in keeps)
        for at, after in enumerate(ordered(partial(_forward, blocks, rotary), hidden, resources)):
            hidden[at] = after
        drift.append(_drift(hidden))
        progress("score", layer + 1, layers + 1)
    heads = source.head(), quantized.head()

    def compare(at: int) -> list[dict[str, Tensor]]:
        one, *others = (h.to(resources.device) for h in hidden[at])
        return compare_windows(heads, one, others, tokens[at].long().to(resources.device))

    found = list(ordered(compare, range(len(hidden)), resources))
    progress("score", layers + 1, layers + 1)
    return {
        name: Scores(
            {part: torch.stack([window[at][part] for window in found]).cpu() for part in SCORES}, tuple(each[at] for each in drift)
        )
        for at, name in enumerate(caches)
    }


def _drift(hidden: Sequence[Sequence[Tensor]]) -> list[float]:
    """Of each stream but the source's."""
    length = _squared(source for source, *_ in hidden)
    apart = (_squared(streams[at] - streams[0] for streams in hidden) for at in range(1, len(hidden[0])))
    return [off / max(length, torch.finfo(torch.float32).tiny) for off in apart]


def _squared(parts: Iterator[Tensor]) -> float:
    return sum(float(part.square().sum(dtype=torch.float64)) for part in parts)


def _forward(blocks: Sequence[Block], rotary: Rotary, streams: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each stream of one window through its block."""
    return tuple(block.forward(h.to(rotary[0].device), rotary).cpu() for block, h in zip(blocks, streams, strict=True))


def compare_windows(heads: tuple[Head, Head], source: Tensor, others: Sequence[Tensor], tokens: Tensor) -> list[dict[str, Tensor]]:
    """SCORES of one window for each of `others` from last hidden states [tokens, hidden]; each score [tokens - 1]."""
    found: list[dict[str, list[Tensor]]] = [{name: [] for name in SCORES} for _ in others]
    for chunk in chunks(len(tokens) - 1):
        target = tokens[1:][chunk, None]
        p = heads[0].logits(source[:-1][chunk]).log_softmax(-1)
        for parts, other in zip(found, others, strict=True):
            q = heads[1].logits(other[:-1][chunk]).log_softmax(-1)
            parts["source_nll"].append(-p.gather(1, target)[:, 0])
            parts["quantized_nll"].append(-q.gather(1, target)[:, 0])
            parts["kl"].append((p.exp() * (p - q)).sum(-1))
            parts["agree"].append((p.argmax(-1) == q.argmax(-1)).float())
    return [{name: torch.cat(values) for name, values in parts.items()} for parts in found]


def compare_window(heads: tuple[Head, Head], source: Tensor, quantized: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """`compare_windows` of one."""
    return compare_windows(heads, source, [quantized], tokens)[0]

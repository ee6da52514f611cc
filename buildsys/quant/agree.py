"""Whether what an engine wrote is what a model's arithmetic says: each of its greedy tokens beside the model's own best token there.

Teacher forced: the model reads the engine's text, so that one other choice does not make all that follows another text. One streamed
forward, block by block; greedy decoding here would hold the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from buildsys.quant.block import Block, Rotary
from buildsys.quant.model import Model, chunks
from buildsys.quant.observe import Progress
from buildsys.quant.parallel import ordered
from buildsys.quant.rotary import tables
from buildsys.step import Resources


def gaps(
    model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], resources: Resources, progress: Progress
) -> list[Tensor]:  # answers x [tokens]
    """For each token of each answer by how many nats the model holds its own best token above it: 0 where it would have written it too.

    `prompts` and `answers` are token ids, an answer being what follows its prompt; neither may be empty. A token that the model's
    vocabulary does not have is infinitely far. Float32 on the CPU.
    """
    architecture = model.architecture
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    known = [[token if 0 <= token < architecture.vocab_size else 0 for token in text] for text in texts]
    # One by one, since their lengths differ; and some ways to stretch positions depend on how long a text is.
    rotary = {length: tables(architecture, length, resources.device) for length in {len(text) - 1 for text in texts}}
    hidden = [model.embed(torch.tensor([text[:-1]]))[0] for text in known]
    for layer in range(architecture.layers):
        block = model.block(layer)
        for at, after in enumerate(ordered(partial(_forward, block, rotary), hidden, resources)):
            hidden[at] = after
        progress("agreement", layer + 1, architecture.layers + 1)
    head = model.head()

    def behind(at: int) -> Tensor:
        begin, told = len(prompts[at]), torch.tensor(known[at])
        h, found = hidden[at][begin - 1 :].to(resources.device), []
        for chunk in chunks(len(h)):
            logits = head.logits(h[chunk]).cpu()  # nats above one another: the norm of a softmax falls out of a difference
            found.append(logits.amax(-1) - logits.gather(1, told[begin:][chunk, None])[:, 0])
        strange = [ours != theirs for ours, theirs in zip(texts[at][begin:], known[at][begin:], strict=True)]
        return torch.cat(found).masked_fill(torch.tensor(strange), torch.inf)

    every = list(ordered(behind, range(len(texts)), resources))
    progress("agreement", architecture.layers + 1, architecture.layers + 1)
    return every


def _forward(block: Block, rotary: Mapping[int, Rotary], h: Tensor) -> Tensor:  # [tokens, hidden] -> alike
    cos, sin = rotary[len(h)]
    return block.forward(h.to(cos.device), (cos, sin)).cpu()

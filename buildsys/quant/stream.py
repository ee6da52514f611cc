"""Calibration windows on their way through a model that is being quantized: hidden states in host memory, one block at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from buildsys.architecture import Site
from buildsys.quant.block import Block, Rotary
from buildsys.quant.model import Model
from buildsys.quant.observe import gram
from buildsys.quant.parallel import ordered, within
from buildsys.quant.rotary import tables
from buildsys.step import Resources

LARGE_BYTES = 256 << 20


class Walk:
    """Asked for the Gram matrix of each site of a block in order (architecture.SITES), then finished with the block's final weights.

    Each question runs only the part of the block between the last site and this one, so that a walk costs about one forward.
    """

    def __init__(self, model: Model, tokens: Tensor, resources: Resources) -> None:  # tokens: [windows, tokens]
        self._dtype = model.dtype
        self._architecture = model.architecture
        self._resources = resources
        self._rotary: Rotary = tables(model.architecture, tokens.shape[1], resources.device)
        self._hidden = model.embed(tokens)  # windows x [tokens, hidden]: what enters the block; from mlp_in on, what enters its MLP
        self._attended: list[Tensor] = []  # windows x [tokens, heads * head_dim], between o_in and mlp_in
        self._tokens = tokens.numel()

    def gram(self, block: Block, site: Site) -> Tensor:  # -> [in, in]
        """The mean over all tokens of x x^T, x being what is read at `site` given the block's weights as they are now."""
        width = self._architecture.width(site)
        if self._resources.device != "cpu" and 4 * width * width >= LARGE_BYTES:
            torch.cuda.empty_cache()  # what smaller tensors left in pieces holds no matrix of this size, and would be kept beside it
        total = torch.zeros(width, width, device=self._resources.device)
        block = block.to(self._dtype)
        if site == "o_in":
            self._attended = []
        # Summed window by window in order; the sums of one window are one unit of work.
        resources = within(self._resources, 4 * width * width)
        for at, (squares, keep) in enumerate(ordered(lambda at: self._site(block, site, at), range(len(self._hidden)), resources)):
            total += squares
            if site == "o_in":
                self._attended.append(keep)
            elif site == "mlp_in":  # at once: two copies of all hidden states are more than a GPU should hold
                self._hidden[at], self._attended[at] = keep, keep[:0].clone()
        return total.div_(self._tokens)

    def finish(self, block: Block) -> None:
        """Leave a block whose four sites were asked for."""
        block = block.to(self._dtype)
        self._each(lambda h: block.after_mlp(h, block.down_in(block.mlp_in(h))))

    def replay(self, block: Block) -> None:
        """Pass through a block that was finished earlier."""
        block = block.to(self._dtype)
        self._each(lambda h: block.forward(h, self._rotary))

    def _each(self, work: Callable[[Tensor], Tensor]) -> None:
        device = self._resources.device
        for at, after in enumerate(ordered(lambda h: work(h.to(device)).to(h.device), self._hidden, self._resources)):
            self._hidden[at] = after

    def _site(self, block: Block, site: Site, at: int) -> tuple[Tensor, Tensor]:
        """One window's sum of x x^T at `site`, and what later sites need of it."""
        home = self._hidden[at].device
        h = self._hidden[at].to(self._resources.device)
        keep = h
        if site == "attn_in":
            x = block.attn_in(h)
        elif site == "o_in":
            x = block.o_in(block.attn_in(h), self._rotary)
            keep = x.to(home)
        elif site == "mlp_in":
            h = block.after_attention(h, self._attended[at].to(h.device))
            x, keep = block.mlp_in(h), h.to(home)
        else:
            x = block.down_in(block.mlp_in(h))
        return gram(x), keep

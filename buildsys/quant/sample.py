"""Text that a model writes itself: ancestral sampling with a KV cache (calibration data without data, as in LLM-QAT, arXiv:2305.17888).

Rows are sampled in micro-batches of fixed size, each from a generator of its own, so that what is written depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from buildsys.architecture import Architecture
from buildsys.quant.block import Block
from buildsys.quant.model import Head, Model
from buildsys.quant.observe import Progress
from buildsys.quant.parallel import ordered, within
from buildsys.quant.rotary import tables
from buildsys.step import Resources

MICRO_BATCH = 16  # rows; part of what is sampled, so changing it bumps VERSION


def sample(model: Model, samples: int, seqlen: int, seed: int, temperature: float, resources: Resources, progress: Progress) -> Tensor:
    """int32 tokens [samples, seqlen] in the model's own distribution. The whole model is in memory: every token needs every block."""
    blocks = [model.block(layer) for layer in range(model.architecture.layers)]
    table, head = model.checkpoint.load(model.architecture.embed, torch.float32, resources.device), model.head()
    batches = -(-samples // MICRO_BATCH)
    done: list[Tensor] = []
    step = Sampler(blocks, table, head, seqlen, temperature, resources.device)
    for rows in ordered(lambda batch: step.batch(seed, batch), range(batches), within(resources, step.cache_bytes)):
        done.append(rows)
        progress("sample", len(done), batches)
    return torch.cat(done)[:samples]


class Sampler:
    """Samples micro-batches; what it holds is read only, so that threads share it."""

    def __init__(self, blocks: Sequence[Block], table: Tensor, head: Head, seqlen: int, temperature: float, device: str) -> None:
        self.blocks, self.table, self.head = blocks, table, head
        self.seqlen, self.temperature, self.device = seqlen, temperature, device
        self.architecture: Architecture = blocks[0].architecture
        self.cos, self.sin = tables(self.architecture, seqlen, device)

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values of one micro-batch, in float32."""
        a = self.architecture
        return len(self.blocks) * 2 * MICRO_BATCH * a.kv_heads * self.seqlen * a.head_dim * 4

    def batch(self, seed: int, batch: int) -> Tensor:  # -> int32 [MICRO_BATCH, seqlen]
        """One micro-batch. After an end-of-text token the next one is begin-of-text: documents follow one another."""
        a, generator = self.architecture, torch.Generator().manual_seed(seed * 1_000_003 + batch)
        shape = (len(self.blocks), 2, MICRO_BATCH, a.kv_heads, self.seqlen, a.head_dim)
        cache = torch.zeros(shape, device=self.device)
        tokens = torch.zeros(MICRO_BATCH, self.seqlen, dtype=torch.int64)
        first = torch.randint(a.vocab_size, (MICRO_BATCH,), generator=generator)
        tokens[:, 0] = first if a.bos_token_id is None else a.bos_token_id
        ends = torch.tensor(a.eos_token_ids, dtype=torch.int64)
        for at in range(self.seqlen - 1):
            logits = self._logits(tokens[:, at].to(self.device), cache, at).cpu()
            drawn = torch.multinomial((logits / self.temperature).softmax(-1), 1, generator=generator)[:, 0]
            if a.bos_token_id is not None:
                drawn = torch.where(torch.isin(tokens[:, at], ends), a.bos_token_id, drawn)
            tokens[:, at + 1] = drawn
        return tokens.int()

    def _logits(self, tokens: Tensor, cache: Tensor, at: int) -> Tensor:  # [rows] -> [rows, vocab]
        h = self.table[tokens]
        rotary = self.cos[at], self.sin[at]
        for block, kv in zip(self.blocks, cache, strict=True):
            q, k, v = block.qkv(block.attn_in(h), rotary)  # [heads, rows, head_dim]: rows stand where a window has its tokens
            kv[0, :, :, at], kv[1, :, :, at] = k.transpose(0, 1), v.transpose(0, 1)
            h = block.after_attention(h, self._attend(block, q.transpose(0, 1), kv, at))
            h = block.after_mlp(h, block.down_in(block.mlp_in(h)))
        return self.head.logits(h)

    def _attend(self, block: Block, q: Tensor, kv: Tensor, at: int) -> Tensor:  # q: [rows, heads, head_dim] -> [rows, heads * head_dim]
        a, window = self.architecture, self.architecture.window(block.layer)
        start = 0 if window is None else max(0, at + 1 - window)
        k, v = kv[0, :, :, start : at + 1], kv[1, :, :, start : at + 1]  # [rows, kv_heads, seen, head_dim]
        grouped = torch.unflatten(q, 1, (a.kv_heads, -1))  # [rows, kv_heads, group, head_dim]
        return F.scaled_dot_product_attention(grouped, k, v).flatten(1)

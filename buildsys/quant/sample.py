"""Text that a model writes itself: ancestral sampling with a KV cache (calibration data without data, as in LLM-QAT, arXiv:2305.17888).

Rows are sampled in micro-batches of fixed size, each from a generator of its own, so that what is written depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from buildsys.architecture import Architecture
from buildsys.quant.block import Block
from buildsys.quant.model import Model
from buildsys.quant.observe import Progress
from buildsys.quant.parallel import ordered, within
from buildsys.quant.rotary import tables
from buildsys.step import Resources

MICRO_BATCH = 16  # rows; part of what is sampled, so changing it bumps VERSION


def sample(model: Model, samples: int, seqlen: int, seed: int, temperature: float, resources: Resources, progress: Progress) -> Tensor:
    """int32 tokens [samples, seqlen] in the model's own distribution. The whole model is in memory: every token needs every block."""
    batches = -(-samples // MICRO_BATCH)
    done: list[Tensor] = []
    step = Sampler(model, seqlen, temperature, resources.device)
    for rows in ordered(lambda batch: step.batch(seed, batch), range(batches), within(resources, step.cache_bytes)):
        done.append(rows)
        progress("sample", len(done), batches)
    return torch.cat(done)[:samples]


def greedy(
    model: Model,
    prompts: Sequence[Sequence[int]],
    new: int,
    ends: frozenset[int],
    resources: Resources,
    progress: Callable[[int, int], None],
) -> list[list[int]]:
    """The likeliest next token, up to `new` times after each prompt and not beyond one of `ends`: the answers, without the prompts.

    All prompts run side by side, a position at a time: a row still reads its prompt where another one writes already.
    """
    filled = [list(prompt) or [_first(model.architecture)] for prompt in prompts]
    lengths = [len(prompt) for prompt in filled]
    longest = max(lengths) + new
    step = Sampler(model, longest, 1.0, resources.device)
    cache = step.cache(len(filled))
    for at in range(longest - 1):
        logits = step.logits(torch.tensor([row[at] for row in filled], device=step.device), cache, at)
        drawn = logits.argmax(-1).tolist()
        for row, token in zip(filled, drawn, strict=True):
            if len(row) == at + 1:
                row.append(token)
        progress(at + 1, longest - 1)
        if all(_ended(row, length, new, ends) for row, length in zip(filled, lengths, strict=True)):
            break
    return [_cut(row[length : length + new], ends) for row, length in zip(filled, lengths, strict=True)]


def _first(a: Architecture) -> int:
    return 0 if a.bos_token_id is None else a.bos_token_id


def _ended(row: list[int], length: int, new: int, ends: frozenset[int]) -> bool:
    return len(row) >= length + new or not ends.isdisjoint(row[length:])


def _cut(answer: list[int], ends: frozenset[int]) -> list[int]:
    """Without the end-of-text token and what follows it."""
    return answer[: next((at for at, token in enumerate(answer) if token in ends), len(answer))]


class Sampler:
    """Samples micro-batches; what it holds, the whole model, is read only, so that threads share it."""

    def __init__(self, model: Model, seqlen: int, temperature: float, device: str) -> None:
        self.seqlen, self.temperature, self.device = seqlen, temperature, device
        self.architecture = model.architecture
        self.blocks = [model.block(layer) for layer in range(self.architecture.layers)]
        self.table, self.head = model.checkpoint.load(self.architecture.embed, torch.float32, device), model.head()
        self.cos, self.sin = tables(self.architecture, seqlen, device)

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values of one micro-batch, in float32."""
        a = self.architecture
        return len(self.blocks) * 2 * MICRO_BATCH * a.kv_heads * self.seqlen * a.head_dim * 4

    def cache(self, rows: int) -> Tensor:
        """Keys and values of no token yet."""
        a = self.architecture
        return torch.zeros((len(self.blocks), 2, rows, a.kv_heads, self.seqlen, a.head_dim), device=self.device)

    def batch(self, seed: int, batch: int) -> Tensor:  # -> int32 [MICRO_BATCH, seqlen]
        """One micro-batch. After an end-of-text token the next one is begin-of-text: documents follow one another."""
        a, generator = self.architecture, torch.Generator().manual_seed(seed * 1_000_003 + batch)
        cache = self.cache(MICRO_BATCH)
        tokens = torch.zeros(MICRO_BATCH, self.seqlen, dtype=torch.int64)
        first = torch.randint(a.vocab_size, (MICRO_BATCH,), generator=generator)
        tokens[:, 0] = first if a.bos_token_id is None else a.bos_token_id
        ends = torch.tensor(a.eos_token_ids, dtype=torch.int64)
        for at in range(self.seqlen - 1):
            logits = self.logits(tokens[:, at].to(self.device), cache, at).cpu()
            drawn = torch.multinomial((logits / self.temperature).softmax(-1), 1, generator=generator)[:, 0]
            if a.bos_token_id is not None:
                drawn = torch.where(torch.isin(tokens[:, at], ends), a.bos_token_id, drawn)
            tokens[:, at + 1] = drawn
        return tokens.int()

    def logits(self, tokens: Tensor, cache: Tensor, at: int) -> Tensor:  # [rows] -> [rows, vocab]
        """Of the token after each row's `tokens`, which stand at position `at`; their keys and values join the cache."""
        h = self.table[tokens]
        rotary = self.cos[at], self.sin[at]
        for block, kv in zip(self.blocks, cache, strict=True):
            q, k, v = block.qkv(block.attn_in(h), rotary)  # [heads, rows, head_dim]: rows stand where a window has its tokens
            kv[0, :, :, at], kv[1, :, :, at] = k.transpose(0, 1), v.transpose(0, 1)
            h = block.after_attention(h, self._attend(block, q.transpose(0, 1), kv, at))
            h = block.mlp(h)
        return self.head.logits(h)

    def _attend(self, block: Block, q: Tensor, kv: Tensor, at: int) -> Tensor:  # q: [rows, heads, head_dim] -> [rows, heads * head_dim]
        a, window = self.architecture, self.architecture.window(block.layer)
        start = 0 if window is None else max(0, at + 1 - window)
        k, v = kv[0, :, :, start : at + 1], kv[1, :, :, start : at + 1]  # [rows, kv_heads, seen, head_dim]
        grouped = torch.unflatten(q, 1, (a.kv_heads, -1))  # [rows, kv_heads, group, head_dim]
        return F.scaled_dot_product_attention(grouped, k, v).flatten(1)

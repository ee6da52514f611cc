"""A model as a source of blocks: one at a time from disk, either the float source or an artifact's packed weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from buildsys.architecture import Architecture
from buildsys.io.checkpoint import Checkpoint
from buildsys.quant.block import Block, rms_norm
from buildsys.quant.linear import QuantizedLinear
from buildsys.quant.parallel import has_matrix_units, parts_ahead
from buildsys.scheme import Scheme, Schemes

BLOCKS_AHEAD = 2  # of what a GPU computes with
KEEP_BYTES = 5 << 30  # of hidden states that may stay on a GPU: 128 windows of 2,048 tokens of a model 4,096 wide take 4 GiB
HEAD_CHUNK_TOKENS = 256  # logits of this many tokens at a time: vocabularies are wide


@dataclass(frozen=True)
class Model:
    """Reads what is asked for, when it is asked for, as `dtype` on `device`; keeps nothing."""

    architecture: Architecture
    checkpoint: Checkpoint
    device: str = "cpu"
    unpack: Callable[[Mapping[str, Tensor], Scheme], QuantizedLinear] | None = None  # None: a float model
    schemes: Schemes | None = None  # of a packed model's linears
    keep_kv: Callable[[Tensor], Tensor] | None = None
    dtype: torch.dtype = torch.float32  # of a block's weights, and so of its products

    def at_speed(self) -> Model:
        """The same model as its engine will compute it: on a GPU in the half-precision type that its weights are stored in, with sums in
        float32. Half the memory, and a tensor core's speed; so on a CPU that has matrix units, which know bfloat16. On others, and for
        weights stored in float32, nothing changes."""
        stored = self.checkpoint.dtype(self.architecture.embed)
        half = stored in (torch.float16, torch.bfloat16) if self.device != "cpu" else stored == torch.bfloat16 and has_matrix_units()
        return replace(self, dtype=stored) if half else self

    def blocks(self, layers: Iterable[int], ahead: int = BLOCKS_AHEAD) -> Iterator[Block]:
        """These blocks in turn. Where a GPU computes with one, `ahead` more are on their way there, several tensors at a time."""
        if self.device == "cpu":
            yield from map(self.block, layers)
            return
        layers, asked = itertools.tee(layers)
        yield from map(self._whole, layers, parts_ahead(lambda read: read(), map(self._reads, asked), ahead))  # which holds no block itself

    def block(self, layer: int) -> Block:
        """Block `layer`, its packed linears dequantized."""
        return self._whole(layer, [read() for read in self._reads(layer)])

    def _reads(self, layer: int) -> list[Callable[[], tuple[str, Tensor]]]:
        """What reads each tensor of a block, the largest first, with its name there."""
        prefix, shapes = self.architecture.prefix(layer), self.architecture.block_tensors()
        packed = self._schemes(layer)

        def read(name: str) -> tuple[str, Tensor]:
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module in packed:
                return name, self.linear(prefix + module).dequantize(self.dtype)
            return name, self.checkpoint.load(prefix + name, self.dtype, self.device)

        return [partial(read, name) for name in sorted(shapes, key=lambda name: -math.prod(shapes[name]))]

    def _whole(self, layer: int, weights: Iterable[tuple[str, Tensor]]) -> Block:
        rounded = {name: scheme.activations for name, scheme in self._schemes(layer).items() if scheme.activations != "none"}
        return Block(self.architecture, layer, dict(weights), self.keep_kv, rounded)

    def _schemes(self, layer: int) -> dict[str, Scheme]:
        """Of a block's packed linears, by their names in it."""
        if self.schemes is None:
            return {}
        prefix = self.architecture.prefix(layer)
        found = {linear.name: self.schemes.of(prefix + linear.name) for linear in self.architecture.linears}
        return {name: scheme for name, scheme in found.items() if scheme is not None}

    def linear(self, name: str) -> QuantizedLinear:
        """The codes of one packed linear, by its whole name."""
        assert self.unpack is not None and self.schemes is not None
        scheme = self.schemes.of(name)
        assert scheme is not None
        return self.unpack({part: self.checkpoint.load(f"{name}.{part}", None, self.device) for part in self._parts[name]}, scheme)

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """For each module of the checkpoint the last parts of its tensors' names, biases left out."""
        found: dict[str, list[str]] = {}
        for module, _, part in (name.rpartition(".") for name in self.checkpoint.names()):
            if part != "bias":
                found.setdefault(module, []).append(part)
        return found

    def embed(self, tokens: Tensor) -> list[Tensor]:  # [windows, tokens] -> windows x [tokens, hidden]
        """The rows of the embedding that the tokens name, in float32; on the GPU where all of them have room there."""
        name = self.architecture.embed
        home = self.device if 4 * tokens.numel() * self.architecture.hidden_size <= KEEP_BYTES else "cpu"
        table = self.checkpoint.load(name, self.checkpoint.dtype(name), home)
        return [table[window.long().to(home)].float() for window in tokens]

    def head(self) -> Head:
        a = self.architecture
        norm = self.checkpoint.load(a.final_norm, torch.float32, self.device)
        weight = self.checkpoint.load(a.lm_head or a.embed, torch.float32, self.device)
        return Head(norm, weight, a.rms_norm_eps)


@dataclass(frozen=True)
class Head:
    """The last norm and the output projection."""

    norm: Tensor  # [hidden]
    weight: Tensor  # [vocab, hidden]
    eps: float

    def logits(self, h: Tensor) -> Tensor:  # [tokens, hidden] -> [tokens, vocab]
        return F.linear(rms_norm(h, self.norm, self.eps), self.weight)


def chunks(length: int, step: int = HEAD_CHUNK_TOKENS) -> Sequence[slice]:
    """Consecutive slices that cover range(length)."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]

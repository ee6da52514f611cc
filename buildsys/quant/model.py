"""A model as a source of blocks: one at a time from disk, either the float source or an artifact's packed weights."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from buildsys.architecture import Architecture
from buildsys.io.checkpoint import Checkpoint
from buildsys.quant.block import Block, rms_norm
from buildsys.quant.linear import QuantizedLinear
from buildsys.quant.parallel import has_matrix_units, parts_ahead
from buildsys.scheme import Activations, Scheme, Schemes

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

    def blocks(self, layers: Iterable[int], alone: bool = False) -> Iterator[Block]:
        """These blocks of a float model in turn. While a GPU computes with one, the next is on its way there, unless a block is to be
        `alone` there, and those after it are read into pinned host memory; NaN and Inf are looked for on the GPU."""
        if self.device == "cpu":
            yield from map(self.block, layers)
            return
        there = (block.to(self.device) for block in self._read(layers)) if alone else _uploaded(self._read(layers), self.device)
        yield from map(self._finite, there)  # which holds no block once it is given

    def _read(self, layers: Iterable[int]) -> Iterator[Block]:
        a, names = self.architecture, list(self.architecture.block_tensors())
        layers, asked = itertools.tee(layers)
        parts = ([a.prefix(layer) + name for name in names] for layer in asked)
        for tensors in parts_ahead(lambda name: self.checkpoint.load(name, self.dtype, pinned=True), parts):
            yield Block(a, next(layers), dict(zip(names, tensors, strict=True)), self.keep_kv)

    def _finite(self, block: Block) -> Block:
        named = {self.architecture.prefix(block.layer) + name: tensor for name, tensor in block.weights.items()}
        self.checkpoint.refuse_infinite({name: tensor for name, tensor in named.items() if name in self.checkpoint})
        return block

    def block(self, layer: int) -> Block:
        """Block `layer`, its packed linears dequantized."""
        prefix = self.architecture.prefix(layer)
        weights: dict[str, Tensor] = {}
        rounded: dict[str, Activations] = {}
        for linear in self.architecture.linears:
            scheme = self.schemes.of(prefix + linear.name) if self.schemes is not None else None
            if scheme is not None:
                weights[f"{linear.name}.weight"] = self.linear(prefix + linear.name).dequantize(self.dtype)
                rounded |= {linear.name: scheme.activations} if scheme.activations != "none" else {}
        for name in self.architecture.block_tensors():
            if name not in weights:
                weights[name] = self.checkpoint.load(prefix + name, self.dtype, self.device)
        return Block(self.architecture, layer, weights, self.keep_kv, rounded)

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


def _uploaded(blocks: Iterable[Block], device: str) -> Iterator[Block]:
    """Each block on a GPU; the next one's copy, on a stream of its own, has begun by then."""
    stream, coming = torch.cuda.Stream(device), deque[tuple[Block, torch.cuda.Event]]()  # type: ignore[no-untyped-call]

    def arrived() -> Block:
        block, copied = coming.popleft()
        computes = torch.cuda.current_stream(device)
        computes.wait_event(copied)
        for tensor in block.weights.values():
            tensor.record_stream(computes)  # what frees it may not give it to the next copy before this stream is done with it
        return block

    for block in blocks:
        with torch.cuda.stream(stream):
            coming.append((block.to(device), stream.record_event()))
        if len(coming) > 1:
            yield arrived()
    while coming:
        yield arrived()


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

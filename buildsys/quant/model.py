"""A model as a source of blocks: one at a time from disk, either the float source or an artifact's packed weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from buildsys.architecture import Architecture
from buildsys.io.checkpoint import Checkpoint
from buildsys.quant.block import Block, rms_norm
from buildsys.quant.linear import QuantizedLinear

HEAD_CHUNK_TOKENS = 256  # logits of this many tokens at a time: vocabularies are wide


@dataclass(frozen=True)
class Model:
    """Reads what is asked for, when it is asked for, in float32 on `device`; keeps nothing."""

    architecture: Architecture
    checkpoint: Checkpoint
    device: str = "cpu"
    unpack: Callable[[Mapping[str, Tensor]], QuantizedLinear] | None = None  # None: a float model
    left_float: frozenset[str] = frozenset()  # whole names of linears that the artifact holds unquantized
    keep_kv: Callable[[Tensor], Tensor] | None = None

    def block(self, layer: int) -> Block:
        """Block `layer`, its packed linears dequantized."""
        prefix = self.architecture.prefix(layer)
        weights: dict[str, Tensor] = {}
        packed = {} if self.unpack is None else {linear.name: linear for linear in self.architecture.linears}
        for name in packed:
            if prefix + name not in self.left_float:
                weights[f"{name}.weight"] = self.linear(prefix + name).dequantize()
        for name in self.architecture.block_tensors():
            if name not in weights:
                weights[name] = self.checkpoint.load(prefix + name, torch.float32, self.device)
        return Block(self.architecture, layer, weights, self.keep_kv)

    def linear(self, name: str) -> QuantizedLinear:
        """The codes of one packed linear, by its whole name."""
        assert self.unpack is not None
        return self.unpack({part: self.checkpoint.load(f"{name}.{part}", None, self.device) for part in self._parts[name]})

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """For each module of the checkpoint the last parts of its tensors' names, biases left out."""
        found: dict[str, list[str]] = {}
        for module, _, part in (name.rpartition(".") for name in self.checkpoint.names()):
            if part != "bias":
                found.setdefault(module, []).append(part)
        return found

    def embed(self, tokens: Tensor) -> list[Tensor]:  # [windows, tokens] -> windows x [tokens, hidden]
        """The rows of the embedding that the tokens name, in host memory."""
        name = self.architecture.embed
        table = self.checkpoint.load(name, self.checkpoint.dtype(name), "cpu")
        return [table[window.long()].float() for window in tokens]

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

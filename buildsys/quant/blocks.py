"""The file of one quantized decoder block: codes, scales and zeros of its linears, and the floats that belong to it.

For each linear: `<name>.codes` (uint8 [out, in * bits / 8], packed row by row by `pack_dense`), `<name>.scale` (float16 [out, groups]) and
`<name>.zero` (uint8 [out, groups]). Its scheme stands in the file's notes, since no tensor tells it. Other tensors keep their names.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from buildsys.io import checkpoint, headers
from buildsys.quant.linear import QuantizedLinear
from buildsys.quant.pack import pack_dense, unpack_dense
from buildsys.scheme import Scheme

_NOTE = "linears"
_PARTS = ("codes", "scale", "zero")


@dataclass(frozen=True)
class Packed:
    """A block as its file holds it, on the device that made it: saving brings it to the host."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, str]

    def write(self, path: Path) -> Callable[[], None]:
        """The file is there, whole, when the answer was called, which needs the block no more."""
        return checkpoint.write(path, self.tensors, self.notes)


def packed(linears: Mapping[str, QuantizedLinear], floats: Mapping[str, Tensor]) -> Packed:
    """A block's tensors, packed where they are. Names are as in the block (`self_attn.q_proj`, `input_layernorm.weight`)."""
    tensors: dict[str, Tensor] = {}
    for name, linear in linears.items():
        parts = (pack_dense(linear.codes, linear.scheme.bits), linear.scale, linear.zero)
        tensors |= {f"{name}.{part}": tensor for part, tensor in zip(_PARTS, parts, strict=True)}
    if clash := sorted(tensors.keys() & floats.keys()):
        raise ValueError(f"a float tensor has the name of a part of a linear: {clash[0]}")
    # Widths stand beside the scheme: three codes in three bytes pack like eight.
    note = {name: [dataclasses.asdict(linear.scheme), linear.codes.shape[1]] for name, linear in linears.items()}
    return Packed({**tensors, **floats}, {_NOTE: json.dumps(note, sort_keys=True)})


def save_block(path: Path, linears: Mapping[str, QuantizedLinear], floats: Mapping[str, Tensor]) -> None:
    """Write a block, whole or not at all."""
    packed(linears, floats).write(path)()


def load_block(path: Path, device: str = "cpu") -> tuple[dict[str, QuantizedLinear], dict[str, Tensor]]:
    """The linears and the floats of a block. The inverse of `save_block`."""
    note = json.loads(headers.read(path).metadata[_NOTE])
    tensors = checkpoint.load(path, device)
    linears: dict[str, QuantizedLinear] = {}
    for name, (raw, in_features) in note.items():
        scheme = Scheme(**raw)
        codes, scale, zero = (tensors.pop(f"{name}.{part}") for part in _PARTS)
        linears[name] = QuantizedLinear(unpack_dense(codes, scheme.bits, in_features), scale, zero, scheme)
    return linears, tensors

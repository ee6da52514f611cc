"""Where two files that should be equal part: the first layer and tensor, how many values differ and by how much; the first leaf of JSON.

Files of a step's output alone: what safetensors files hold is told by their headers (io/headers.py), a block's codes by its notes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.history import flat
from buildsys.io import headers
from buildsys.io.headers import Entry

if TYPE_CHECKING:
    from torch import Tensor

PIECE_BYTES = 16 << 20  # read at a time; a multiple of every width
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
BLOCK = re.compile(r"block-(\d+)\.")
WORDS = ("I32", "I64", "U32", "U64")
"""Types of packed weights: codes share a word, so by how much two words differ says nothing."""


def files(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Names of files (name -> sha256) that are not the same on both sides, weights first: what stands beside them follows from them."""
    unequal = [name for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
    return sorted(unequal, key=lambda name: (not name.endswith(".safetensors"), name))


def told(name: str, old: Path, new: Path, order: Sequence[str] = ()) -> str:
    """The first difference in one file, for people. order: parts of tensors' names as a model computes them."""
    if name.endswith(".safetensors"):
        return _tensors(name, old, new, order)
    if name.endswith(".json"):
        return _json(old, new)
    return _bytes(old, new)


def _tensors(name: str, old: Path, new: Path, order: Sequence[str]) -> str:
    before, after = headers.read(old), headers.read(new)
    names = sorted(before.tensors.keys() | after.tensors.keys(), key=lambda tensor: _rank(tensor, order))
    block = BLOCK.match(name)
    first, unequal = "", 0
    for tensor in names:
        if (one := _tensor(tensor, old, new, before, after)) is not None:
            unequal += 1
            first = first or f"{_layer(tensor, block)}{tensor}: {one}"
    if not first:
        return "its tensors are equal; its notes differ" if before.metadata != after.metadata else "its tensors are equal, stored otherwise"
    return first + (f"; {unequal - 1} more of {len(names)} tensors differ" if unequal > 1 else "")


def _rank(tensor: str, order: Sequence[str]) -> tuple[int, int, str]:
    """Layers in their order, and in one the tensors as they are computed."""
    layer = LAYER.search(tensor)
    place = next((at for at, part in enumerate(order) if part in tensor), len(order))
    return (int(layer[1]) if layer else -1), place, tensor


def _layer(tensor: str, block: re.Match[str] | None) -> str:
    layer = LAYER.search(tensor)
    number = layer[1] if layer else block[1] if block else ""
    return f"layer {int(number)}, " if number else ""


def _tensor(name: str, old: Path, new: Path, before: headers.Header, after: headers.Header) -> str | None:
    """How one tensor differs; None: it does not."""
    one, other = before.tensors.get(name), after.tensors.get(name)
    if one is None or other is None:
        return f"is {'new' if one is None else 'gone'}"
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{one.dtype} {list(one.shape)} is {other.dtype} {list(other.shape)} now"
    if all(a == b for a, b in _pieces(old, one, new, other)):
        return None
    bits = _bits(name, before), _bits(name, after)
    if None not in bits:
        if bits[0] != bits[1]:
            return f"codes of {bits[0][0]} bits are of {bits[1][0]} bits now"  # type: ignore[index]
        return _counted(_codes(old, one, new, other, *bits[0]), "codes", " times the scale")  # type: ignore[misc]
    if one.dtype in WORDS:
        return _counted(_values(old, one, new, other), "words", None)
    return _counted(_values(old, one, new, other), "values", "")


def _bits(name: str, header: headers.Header) -> tuple[int, int] | None:
    """Of a block's codes: their bits, and how many stand in a row."""
    linear, part = name.rpartition(".")[::2]
    noted = json.loads(header.metadata.get("linears", "{}"))
    if part != "codes" or linear not in noted:
        return None
    scheme, width = noted[linear]
    return int(scheme["bits"]), int(width)


def _pieces(old: Path, one: Entry, new: Path, other: Entry, row_bytes: int = 1) -> Iterator[tuple[bytes, bytes]]:
    size = max(1, PIECE_BYTES // row_bytes) * row_bytes
    with old.open("rb") as a, new.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        for at in range(0, one.bytes, size):
            length = min(size, one.bytes - at)
            yield a.read(length), b.read(length)


def _codes(old: Path, one: Entry, new: Path, other: Entry, bits: int, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    import torch

    from buildsys.quant.pack import unpack_dense

    for pair in _pieces(old, one, new, other, one.shape[-1]):
        a, b = (unpack_dense(torch.frombuffer(bytearray(raw), dtype=torch.uint8).reshape(-1, one.shape[-1]), bits, width) for raw in pair)
        yield a != b, a.double(), b.double()


def _values(old: Path, one: Entry, new: Path, other: Entry) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Unequal in any bit; and both as numbers."""
    import torch

    from buildsys.io.checkpoint import DTYPES

    width = headers.WIDTHS[one.dtype]
    for pair in _pieces(old, one, new, other):
        raw = [torch.frombuffer(bytearray(part), dtype=torch.uint8).reshape(-1, width) for part in pair]
        a, b = (torch.frombuffer(bytearray(part), dtype=DTYPES[one.dtype]).double() for part in pair)
        yield (raw[0] != raw[1]).any(1), a, b


def _counted(parts: Iterator[tuple[Tensor, Tensor, Tensor]], what: str, unit: str | None) -> str:
    """unit: of the difference, with a space before it; None: how large it is says nothing."""
    import torch

    count = unequal = 0
    most = total = 0.0
    for differs, a, b in parts:
        apart = torch.where(differs, (a - b).abs(), 0.0)
        count, unequal = count + differs.numel(), unequal + int(differs.sum())
        most, total = max(most, float(apart.nan_to_num(torch.inf).max())), total + float(apart.nan_to_num(torch.inf).sum())
    text = f"{unequal:,} of {count:,} {what} {'differs' if unequal == 1 else 'differ'}"
    return text if unit is None else f"{text}, by at most {most:.4g}{unit}, {total / count:.3g} on average over all"


def _json(old: Path, new: Path) -> str:
    try:
        before, after = (dict(flat(json.loads(path.read_bytes()), "")) for path in (old, new))
    except ValueError:
        return _bytes(old, new)
    names = [name for name in {**before, **after} if before.get(name, _none) != after.get(name, _none)]
    if not names:
        return "says the same, written otherwise"
    name = names[0]
    more = f"; {len(names) - 1} more of {len({**before, **after})} entries differ" if len(names) > 1 else ""
    return f"{name or 'its value'} {_shown(before.get(name, '(absent)'))} -> {_shown(after.get(name, '(absent)'))}{more}"


_none = object()


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _bytes(old: Path, new: Path) -> str:
    before, after = old.stat().st_size, new.stat().st_size
    at = unequal = 0
    first = None
    with old.open("rb") as a, new.open("rb") as b:
        while (one := a.read(PIECE_BYTES)) + (other := b.read(PIECE_BYTES)):
            apart = [index for index, (x, y) in enumerate(zip(one, other, strict=False)) if x != y] if one != other else []
            unequal += len(apart)
            first = at + (apart[0] if apart else min(len(one), len(other))) if first is None and one != other else first
            at += max(len(one), len(other))
    sizes = f"{before:,} bytes -> {after:,} bytes; " if before != after else ""
    return f"{sizes}{unequal:,} bytes differ, the first at {first:,}" if first is not None else "its bytes are equal"

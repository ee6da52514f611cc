"""Safetensors headers: what tensors a file holds, read, checked and written without torch, so that planning can ask.

The format: https://github.com/huggingface/safetensors#format. Eight bytes of length (little-endian), a JSON object, then the data
without a gap. A header comes from strangers: nothing in it is believed before it has been checked against the file's size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from buildsys.errors import BuildError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LIMIT_BYTES = 100_000_000  # the reference implementation's bound on a header
WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
"""Bytes an element. Types narrower than a byte (F4, F6) are refused: nothing here reads them."""

_AGAIN = "fetch the file again; it is damaged or was never complete"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Entry:
    """One tensor: the format's name of its type, its shape, and its bytes [start, end) counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A file's tensors in the order of their bytes, and its free-form notes."""

    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str] = field(default_factory=dict)


def size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * WIDTHS[dtype]


def encode(layout: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """The bytes that come before the data, and where each tensor goes; equal layouts give equal bytes. The inverse of `read`.

    Wide types come first, then layout order: with the data's start a multiple of 8, every tensor is aligned to its type, which readers
    that map the file rely on.
    """
    wide_first = sorted(layout, key=lambda name: -WIDTHS[layout[name][0]])  # a stable sort
    offsets: dict[str, tuple[int, int]] = {}
    end = 0
    for name in wide_first:
        start, end = end, end + size(*layout[name])
        offsets[name] = start, end
    listed: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for name, span in offsets.items():
        listed[name] = {"dtype": layout[name][0], "shape": list(layout[name][1]), "data_offsets": list(span)}
    text = json.dumps(listed, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    tensors = {name: Entry(*layout[name], base + start, base + end) for name, (start, end) in offsets.items()}
    return len(text).to_bytes(8, "little") + text, Header(tensors, dict(metadata))


def read(path: Path, where: str = "", whole_bytes: int | None = None) -> Header:
    """The checked header of one file; `where` names the file in errors when its path says little (a blob of the store).

    `whole_bytes`: the size of the file of which `path` holds the header alone, the rest being elsewhere.
    """
    where = where or str(path)
    with path.open("rb") as file:
        here_bytes = file.seek(0, 2)
        file_bytes = here_bytes if whole_bytes is None else whole_bytes
        file.seek(0)
        prefix = file.read(8)
        if prefix == _LFS[:8] and (prefix + file.read(len(_LFS) - 8)) == _LFS:
            raise BuildError(where, "is a pointer that Git LFS left, not the tensors", "run `git lfs pull` in the model's folder")
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes < 2:
            raise BuildError(where, f"is no safetensors file: {file_bytes} bytes, no header", _AGAIN)
        if header_bytes > LIMIT_BYTES:
            what = f"is no safetensors file: its header would have {header_bytes} bytes, the format allows {LIMIT_BYTES}"
            raise BuildError(where, what, _AGAIN)
        if 8 + header_bytes > file_bytes:
            raise BuildError(where, f"is truncated: {file_bytes} bytes, its header alone ends at byte {8 + header_bytes}", _AGAIN)
        text = file.read(header_bytes)
        if len(text) < header_bytes:
            raise BuildError(where, f"is truncated: {here_bytes} bytes of its header are here, it has {8 + header_bytes}", _AGAIN)
    header = _parse(text, 8 + header_bytes, where)
    _check_spans(header, 8 + header_bytes, file_bytes, where)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different and can be written as UTF-8; Python's default keeps the last of two."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        key.encode()  # a lone surrogate raises UnicodeEncodeError, which is a ValueError
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def _json(text: bytes, where: str, of: str) -> dict[str, Any]:
    try:
        found = json.loads(text.decode(), object_pairs_hook=_unique)
    except RecursionError:
        raise BuildError(where, f"{of} is nested too deeply", _AGAIN) from None
    except ValueError as error:
        raise BuildError(where, f"{of} is not valid JSON: {error}", _AGAIN) from None
    if not isinstance(found, dict):
        raise BuildError(where, f"{of} is a JSON {type(found).__name__}, not an object", _AGAIN)
    return found


def _parse(text: bytes, base: int, where: str) -> Header:
    raw = _json(text, where, "the header")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BuildError(where, "the header's __metadata__ does not map strings to strings", _AGAIN)
    found = {name: _entry(name, value, base, where) for name, value in raw.items()}
    by_place = sorted(found.items(), key=lambda item: (item[1].start, item[1].end))
    return Header(dict(by_place), metadata)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _entry(name: str, raw: Any, base: int, where: str) -> Entry:
    if not isinstance(raw, dict) or not {"dtype", "shape", "data_offsets"} <= raw.keys():
        raise BuildError(where, f"tensor {name} lacks one of dtype, shape, data_offsets", _AGAIN)
    dtype, shape, span = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        fix = "convert the model to F16, BF16 or F32 with its publisher's tools"
        raise BuildError(where, f"tensor {name} has type {dtype!r}; known are {', '.join(WIDTHS)}", fix)
    if not _naturals(shape) or not _naturals(span) or len(span) != 2 or span[0] > span[1]:
        raise BuildError(where, f"tensor {name} has shape {shape} at bytes {span}, which cannot be", _AGAIN)
    entry = Entry(dtype, tuple(shape), base + span[0], base + span[1])
    if entry.bytes != size(dtype, entry.shape):
        what = f"tensor {name} has {entry.bytes} bytes, {dtype} {shape} takes {size(dtype, entry.shape)}"
        raise BuildError(where, what, _AGAIN)
    return entry


def _check_spans(header: Header, base: int, file_bytes: int, where: str) -> None:
    """Every byte of the file belongs to exactly one tensor: data can neither be hidden in a gap nor read twice."""
    end, last = base, "the header"
    for name, entry in header.tensors.items():
        if entry.start != end:
            how = "overlaps" if entry.start < end else "leaves a gap after"
            raise BuildError(where, f"tensor {name} starts at byte {entry.start} and {how} {last}, which ends at {end}", _AGAIN)
        end, last = entry.end, name
    if end != file_bytes:
        how = "is truncated" if file_bytes < end else "is longer than its header says"
        raise BuildError(where, f"{how}: {file_bytes} bytes on disk, {end} in the header", _AGAIN)


def place(name: str, path: Path) -> str:
    """How errors call a model's file: its path, with its own name before it where the path does not end in it."""
    return str(path) if path.name == name else f"{name} ({path})"


def describe(files: Mapping[str, Path], sizes: Mapping[str, int] = MappingProxyType({})) -> dict[str, tuple[str, Entry]]:
    """Every tensor of a model, by name, with the file that holds it: of model.safetensors, or of the shards of its index.

    `sizes`: bytes of the files of which only the header is here.
    """
    if SINGLE in files and INDEX in files:
        where = place(INDEX, files[INDEX])
        raise BuildError(where, f"lies beside a {SINGLE}: two sets of weights", f"remove {SINGLE}, or the index with its shards")
    if SINGLE in files:
        header = read(files[SINGLE], place(SINGLE, files[SINGLE]), sizes.get(SINGLE))
        return {name: (SINGLE, entry) for name, entry in header.tensors.items()}
    if INDEX in files:
        return _sharded(files, sizes)
    where = str(next(iter(files.values())).parent) if files else "model"
    pickles = sorted(name for name in files if name.endswith(_PICKLES))
    if pickles:
        fix = "save the model again as safetensors: `model.save_pretrained(folder, safe_serialization=True)`"
        raise BuildError(where, f"has its weights as pickle only ({pickles[0]}), which can run code when it is read", fix)
    raise BuildError(where, f"has neither {SINGLE} nor {INDEX}", "give the folder of a model that is stored as safetensors")


def _sharded(files: Mapping[str, Path], sizes: Mapping[str, int]) -> dict[str, tuple[str, Entry]]:
    where = place(INDEX, files[INDEX])
    mapped = _json(files[INDEX].read_bytes(), where, "the index").get("weight_map")
    if not isinstance(mapped, dict) or not all(isinstance(shard, str) for shard in mapped.values()):
        raise BuildError(where, "has no weight_map from tensor names to file names", _AGAIN)
    shards = sorted(set(mapped.values()))
    absent = [shard for shard in shards if shard not in files]
    if absent:
        raise BuildError(where, f"names {len(shards)} shards, of which {len(absent)} are not there: {', '.join(absent[:3])}", _AGAIN)
    found: dict[str, tuple[str, Entry]] = {}
    for shard in shards:
        for name, entry in read(files[shard], place(shard, files[shard]), sizes.get(shard)).tensors.items():
            if name in found:
                raise BuildError(where, f"tensor {name} is in two shards, {found[name][0]} and {shard}", "remove one of the two")
            found[name] = (shard, entry)
    for name in sorted(found.keys() | mapped.keys()):
        held = found[name][0] if name in found else "no shard"
        if held != mapped.get(name, "no shard"):
            raise BuildError(where, f"says that {mapped.get(name, 'no shard')} holds {name}; {held} does", _AGAIN)
    return found

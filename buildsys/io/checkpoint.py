"""Tensors on disk: a model read one tensor at a time, a sharded model written in any order, and one small file at once.

The format and its checks are in headers.py. Reading goes through pread into fresh memory: a file that is cut short while it is mapped
ends the process with SIGBUS, and mapped pages stay in the process's account.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from buildsys.errors import BuildError
from buildsys.io import headers
from buildsys.io.headers import INDEX, SINGLE, Entry
from buildsys.step import nobody_waits

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

_PIECE_BYTES = 16 << 20
"""A tensor is read in pieces of this size, so that converting its type takes no second copy of the whole. A multiple of every width."""

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (the format's name of its type, shape)."""


class Checkpoint:
    """A model's tensors by name. Every header has been checked before the first tensor is read; files stay closed in between."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._paths = dict(files)
        self._found = headers.describe(files)

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._found))

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def entry(self, name: str) -> Entry:
        return self._find(name)[1]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self.entry(name).dtype]

    def where(self, name: str) -> str:
        """The file that holds a tensor, as errors call it."""
        file = self._find(name)[0]
        return headers.place(file, self._paths[file])

    def load(self, name: str, dtype: torch.dtype | None = torch.float32, device: str = "cpu", *, finite: bool = True) -> Tensor:
        """The tensor in memory of its own; `dtype=None` keeps the stored type.

        NaN and Inf are refused, since arithmetic would spread them, unless `finite` is false: for a check that looks for them itself.
        """
        file, entry = self._find(name)
        where, stored = self.where(name), DTYPES[entry.dtype]
        if dtype is not None and dtype.is_floating_point and not stored.is_floating_point:
            fix = "give the model in F16, BF16 or F32, not one that is quantized already"
            raise BuildError(where, f"tensor {name} holds {entry.dtype}; floating-point numbers are needed", fix)
        return _read(self._paths[file], name, entry, dtype or stored, device, where, finite)

    def _find(self, name: str) -> tuple[str, Entry]:
        if name not in self._found:
            where = next((headers.place(file, self._paths[file]) for file in (INDEX, SINGLE) if file in self._paths), "model")
            raise BuildError(where, f"has no tensor {name}", "check that config.json and the weights are of one model")
        return self._found[name]


def _read(path: Path, name: str, entry: Entry, dtype: torch.dtype, device: str, where: str, finite: bool) -> Tensor:
    """A fresh tensor with the entry's values in `dtype`."""
    sent = _sent(path, entry, dtype, device, where, finite) if device.startswith("cuda") and entry.bytes else None
    if sent is not None:
        return sent
    return _filled(path, name, entry, dtype, where, finite).to(device)  # which tells what is wrong with it, where something is


def _filled(path: Path, name: str, entry: Entry, dtype: torch.dtype, where: str, finite: bool) -> Tensor:
    """In the host's memory, piece by piece."""
    stored = DTYPES[entry.dtype]
    filled = torch.empty(entry.shape, dtype=dtype)
    flat, width = filled.view(-1), headers.WIDTHS[entry.dtype]
    piece = torch.empty(min(_PIECE_BYTES, entry.bytes), dtype=torch.uint8)
    with path.open("rb", buffering=0) as file:
        for start in range(entry.start, entry.end, _PIECE_BYTES):
            raw = piece[: min(_PIECE_BYTES, entry.end - start)]
            _pread(file.fileno(), raw, start, where)
            values, first = raw.view(stored), (start - entry.start) // width
            into = flat[first : first + values.numel()]
            into.copy_(values)
            if finite and stored.is_floating_point and not _is_finite(into):
                what = f"does not fit {dtype}" if _is_finite(values.to(torch.float64)) else "holds NaN or Inf"
                raise BuildError(where, f"tensor {name} {what}", "take the model from its publisher again, or another of its revisions")
    return filled


def _sent(path: Path, entry: Entry, dtype: torch.dtype, device: str, where: str, finite: bool) -> Tensor | None:
    """On a GPU, through two pieces of pinned memory: one is read while the other is copied, and the GPU converts. Nothing here waits for
    what else the GPU was asked to do. None: NaN or Inf, where that is not allowed."""
    reader, stream, width = torch.cuda.current_stream(device), _copies(device), headers.WIDTHS[entry.dtype]
    with path.open("rb", buffering=0) as file, torch.cuda.stream(stream):
        filled = torch.empty(entry.shape, dtype=dtype, device=device)
        flat, size = filled.view(-1), min(_PIECE_BYTES, entry.bytes)
        pieces, fine = [_Piece(size) for _ in range(min(2, -(-entry.bytes // size)))], list[Tensor]()
        for at, start in enumerate(range(entry.start, entry.end, _PIECE_BYTES)):
            piece = pieces[at % 2]
            piece.copied.synchronize()
            raw = piece.held[: entry.end - start]
            _pread(file.fileno(), raw, start, where)
            values, first = raw.view(DTYPES[entry.dtype]), (start - entry.start) // width
            into = flat[first : first + values.numel()]
            into.copy_(values.to(device, non_blocking=True))
            if finite and dtype.is_floating_point:
                fine.append(_finite(into))
            piece.copied.record()
        piece.copied.synchronize()
        allowed = not fine or bool(torch.stack(fine).all())
    filled.record_stream(reader)  # whoever frees it may not give it to the next copy before the reader's work is done
    return filled if allowed else None


class _Piece:
    """Pinned memory, and when a GPU has copied what was last in it."""

    def __init__(self, size: int) -> None:
        self.held = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]


_COPIES: dict[int, torch.cuda.Stream] = {}
_ONCE = threading.Lock()


def _copies(device: str) -> torch.cuda.Stream:
    """Of all copies to a GPU, since each stream has a pool of memory of its own. Of another priority than those for computing, of which
    torch hands out the same 32 again and again."""
    index = torch.device(device).index
    at = torch.cuda.current_device() if index is None else index
    with _ONCE:
        if at not in _COPIES:
            _COPIES[at] = torch.cuda.Stream(at, priority=-1)  # type: ignore[no-untyped-call]
        return _COPIES[at]


def _is_finite(values: Tensor) -> bool:
    return bool(_finite(values))


def _finite(values: Tensor) -> Tensor:
    """Whether all are, [], where they are: NaN and Inf both show in the extremes. One pass over memory, no temporary of the same size."""
    if values.dtype.itemsize == 1:
        values = values.to(torch.float32)
    return torch.isfinite(torch.stack(torch.aminmax(values))).all()


def _pread(file: int, into: Tensor, offset: int, where: str) -> None:  # uint8 [bytes]
    view = into.numpy().data
    while view:
        count = os.preadv(file, [view], offset)
        if count == 0:
            raise BuildError(where, f"became shorter while it was read: no byte {offset}", "leave a model's files alone while it is built")
        view, offset = view[count:], offset + count


SYNCING = 4
"""Files of one model that are synced at a time: a disk takes in several faster than one after the other."""

SYNC_BYTES = 128 << 20
"""Nothing reaches a disk until it is asked for: it begins with what is there of a file while the rest is made."""


class Writer:
    """A model's weights, written as they come: the layout is known first, so each tensor has its place before it exists.

    A file appears under its name as soon as all of it is there, and then `finished` is told of it; until then it is hidden and partial. In
    `close` all of them have reached the disk, and the index comes, without which several files are no model. Equal tensors give equal
    bytes, in whatever order they were added. Tensors may be added from several threads. As a context it leaves no thread behind.

    `beside`: complete files of other tensors of the same model, which come after ours as links, and are in the index.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        metadata: Mapping[str, str],
        max_shard_bytes: int,
        finished: Callable[[Path], None] = nobody_waits,
        beside: Sequence[Path] = (),
    ) -> None:
        self._folder, self._finished = folder, finished
        self._total_bytes = sum(headers.size(*held) for held in layout.values())
        groups = _shards(layout, max_shard_bytes)
        count = len(groups) + len(beside)
        several = [f"model-{at:05}-of-{count:05}.safetensors" for at in range(1, count + 1)]
        self._names = several[: len(groups)] if count > 1 else [SINGLE]
        self._beside = dict(zip(several[len(groups) :], beside, strict=True))
        self._places: dict[str, tuple[str, Entry]] = {}
        self._added: set[str] = set()
        for file, group in zip(self._names, groups, strict=True):
            # transformers asks for "format" before it reads a file
            prefix, header = headers.encode({name: layout[name] for name in group}, {"format": "pt", **metadata})
            self._places |= {name: (file, entry) for name, entry in header.tensors.items()}
            _start(_partial(folder / file), prefix, header.tensors.values())
        self._order = tuple(layout)
        self._left = dict(zip(self._names, map(len, groups), strict=True))  # tensors of each file that are still to come
        self._waiting = dict.fromkeys(self._names, 0)  # bytes of each file that a disk was not told to take yet
        self._counting = threading.Lock()
        self._pool = ThreadPoolExecutor(SYNCING, "writer")
        self._begun: list[Future[None]] = []

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place; its type and shape must be the layout's."""
        file, entry = self._places[name]
        if name in self._added:
            raise ValueError(f"{name} was written before")
        _write_tensor(_partial(self._folder / file), name, entry, tensor)
        with self._counting:
            self._added.add(name)
            self._left[file] -= 1
            self._waiting[file] += entry.bytes
            if not self._left[file]:
                self._show(file)
            elif self._waiting[file] >= SYNC_BYTES:
                self._waiting[file] = 0
                self._begun.append(self._pool.submit(_sync_so_far, _partial(self._folder / file)))

    def close(self) -> list[str]:
        """Wait until all files are there, durable and complete; their names, with the index last where there are several."""
        missing = [name for name in self._order if name not in self._added]
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written: {', '.join(missing[:3])}")
        for file in () if self._order else self._names:  # a model without a tensor
            self._show(file)
        if len(self._names) + len(self._beside) > 1:
            mapped = {name: self._places[name][0] for name in self._order} | self._link()
            text = json.dumps({"metadata": {"total_size": self._total_bytes}, "weight_map": mapped}, indent=2, sort_keys=True) + "\n"
            _partial(self._folder / INDEX).write_text(text)
        self._pool.shutdown()
        for done in self._begun:
            done.result()
        if len(self._names) + len(self._beside) > 1:
            _appear(self._folder / INDEX)
            self._finished(self._folder / INDEX)
            return [*self._names, *self._beside, INDEX]
        _sync(self._folder)
        return list(self._names)

    def _link(self) -> dict[str, str]:
        """The files beside ours under their names here; which tensor is in which."""
        mapped: dict[str, str] = {}
        for file, path in self._beside.items():
            (self._folder / file).unlink(missing_ok=True)
            (self._folder / file).symlink_to(path)
            found = headers.read(path).tensors
            mapped |= dict.fromkeys(found, file)
            self._total_bytes += sum(entry.bytes for entry in found.values())
        return mapped

    def _show(self, file: str) -> None:
        """Whoever wants its bytes has them while a disk takes them in."""
        path = self._folder / file
        _partial(path).replace(path)
        self._finished(path)
        self._begun.append(self._pool.submit(_sync, path))


def _shards(layout: Layout, max_shard_bytes: int) -> list[list[str]]:
    """Names by shard, in layout order; a tensor larger than a shard gets one of its own."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, held in layout.items():
        if groups[-1] and used + headers.size(*held) > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += headers.size(*held)
    return groups


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """One file, whole or not at all; equal tensors give equal bytes. The inverse of `load`."""
    write(path, tensors, metadata)()


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Callable[[], None]:
    """The part of `save` that needs the tensors; the answer does the rest, which waits for a disk."""
    layout = {name: (NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in sorted(tensors)}
    prefix, header = headers.encode(layout, metadata or {})
    partial = _partial(path)
    _start(partial, prefix, header.tensors.values())
    for name, entry in header.tensors.items():
        _write_tensor(partial, name, entry, tensors[name])
    return lambda: _appear(path)


def load(path: Path, device: str = "cpu", only: str | None = None) -> dict[str, Tensor]:
    """Every tensor of one file, or one, in its stored type. The inverse of `save`; its notes are in `headers.read(path).metadata`."""
    found = headers.read(path).tensors
    names = sorted(found) if only is None else [only]
    return {name: _read(path, name, found[name], DTYPES[found[name].dtype], device, str(path), finite=False) for name in names}


def _partial(path: Path) -> Path:
    """Where a file grows: a fixed name, so that what a killed writer left is written over, not left beside."""
    return path.with_name(f".{path.name}.partial")


def _start(partial: Path, prefix: bytes, entries: Iterable[Entry]) -> None:
    with partial.open("wb") as file:
        file.write(prefix)
        file.truncate(max((entry.end for entry in entries), default=len(prefix)))


def _write_tensor(partial: Path, name: str, entry: Entry, tensor: Tensor) -> None:
    if tensor.dtype != DTYPES[entry.dtype] or tuple(tensor.shape) != entry.shape:
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, its place is for {entry.dtype} {list(entry.shape)}")
    if not entry.bytes:
        return
    with partial.open("r+b", buffering=0) as file:
        offset = entry.start
        for view in _pieces(tensor.detach().contiguous().view(-1).view(torch.uint8)):
            while view:
                count = os.pwrite(file.fileno(), view, offset)
                view, offset = view[count:], offset + count


def _pieces(raw: Tensor) -> Iterator[memoryview]:  # uint8 [bytes]
    """The bytes on the host; a GPU's piece by piece through pinned memory, to which it copies many times as fast."""
    if not raw.is_cuda:
        yield raw.cpu().numpy().data
        return
    home = torch.empty(min(_PIECE_BYTES, len(raw)), dtype=torch.uint8, pin_memory=True)
    for piece in torch.split(raw, _PIECE_BYTES):
        yield home[: len(piece)].copy_(piece).numpy().data


def _appear(path: Path) -> None:
    """Rename a finished partial file to its name; both survive a loss of power."""
    partial = _partial(path)
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _sync_so_far(partial: Path) -> None:
    """A file that grows; one that has appeared meanwhile was synced as a whole."""
    with suppress(FileNotFoundError):
        _sync(partial)


def _sync(path: Path) -> None:
    """A file, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

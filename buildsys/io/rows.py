"""Rows of the files that datasets are made of, one at a time: parquet, JSON and text, each also under gzip or zstd.

What a row is follows the hub (huggingface.co/docs/hub/datasets-adding): a line of text or of JSON, an item of a file that is one JSON list.
"""

from __future__ import annotations

import codecs
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from buildsys.errors import BuildError

KINDS = (".parquet", ".jsonl", ".json", ".txt")
PACKED = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = tuple(kind + packed for kind in KINDS for packed in ("", *PACKED))

MAX_ROW_BYTES = 64 << 20  # what is longer is no row, but a file without line ends, or a bomb under gzip
BATCH_ROWS = 1024
BUFFER_BYTES = 1 << 20
PIECE = 1 << 16
SHOWN = 8  # names in an error
_BETWEEN = re.compile(r"\s*(?P<sign>[\[\],])\s*")
AGAIN = "get it again from where it came from"
FIELD = "set `field:` to the one that holds the text"


@dataclass(frozen=True)
class Row:
    """One row, and where it stands: `data/a.jsonl:7`, `data/a.parquet row 7`."""

    where: str
    values: Mapping[str, Any]

    def text(self, field: str, fix: str = FIELD) -> str:
        """The text in `field`; anything else there is an error."""
        if field not in self.values:
            raise _missing(self.where, field, list(self.values), fix)
        return checked(self.values[field], self.where, f"field {field!r}", fix)


def kind(name: str) -> str:
    """ ".jsonl" of "a.jsonl.gz"; "" for what is not read here."""
    plain = name.removesuffix(packing(name))
    return next((suffix for suffix in KINDS if plain.endswith(suffix)), "")


def packing(name: str) -> str:
    """ ".gz", ".zst" or ""."""
    return next((suffix for suffix in PACKED if name.endswith(suffix)), "")


def texts(files: Mapping[str, Path], field: str, fix: str = FIELD) -> Iterator[str]:
    """The text of every row of `files`, in the order of their names."""
    for name in sorted(files):
        yield from (row.text(field, fix) for row in read(name, files[name], (field,), fix))


def read(name: str, path: Path, fields: tuple[str, ...] = (), fix: str = FIELD) -> Iterator[Row]:
    """Rows of a file that had the name `name`, wherever it lies now. `fields`: those that will be asked for, all if none is named."""
    where = shown(name, path)
    with reading(where), unpacked(name, path) as file:
        if kind(name) == ".parquet":
            yield from _parquet(file, where, fields, fix)
        elif kind(name) == ".txt":
            lines = lines_of(file, where)
            yield from (Row(f"{where}:{number}", {"text": line.rstrip("\r\n")}) for number, line in lines)
        elif kind(name) == ".json" and _is_list(file):
            yield from _items(file, where)
        else:
            yield from _objects(file, where)


def shown(name: str, path: Path) -> str:
    """What to call a file in an error: the user's own path, or its name where it is a blob of a store or of a cache."""
    original = path.resolve()
    return str(original) if original.suffix and original.suffix == Path(name).suffix else name


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Around anything that reads `where` through pyarrow, which tells a damaged file by OSError or ArrowException."""
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        if isinstance(error, OSError) and error.errno:
            raise BuildError(where, f"cannot be read: {error.strerror}", "check that the file is there and readable") from None
        raise BuildError(where, f"is damaged or cut short: {' '.join(str(error).split())}", AGAIN) from None


def unpacked(name: str, path: Path) -> BufferedReader:
    """The file's bytes, unpacked while they are read."""
    import pyarrow

    if not packing(name):
        return path.open("rb")
    stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), PACKED[packing(name)])
    return BufferedReader(stream, PIECE)


# Text and JSON


def lines_of(file: BufferedReader, where: str) -> Iterator[tuple[int, str]]:
    """Numbered lines, with their ends."""
    number = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(raw) > MAX_ROW_BYTES:
            what = f"is a line of more than {MAX_ROW_BYTES >> 20} MiB"
            raise BuildError(f"{where}:{number}", what, "write one document a line, shorter than that")
        yield number, decoded(raw, where, number)


def _objects(file: BufferedReader, where: str) -> Iterator[Row]:
    for number, line in lines_of(file, where):
        if line.strip():
            at = f"{where}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BuildError(at, f"is not JSON: {error}", "write one JSON object a line") from None
            yield Row(at, _object(record, at))


def _object(record: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(record, dict):
        raise BuildError(where, f"is {named(record)}, not a JSON object", 'write {"text": "the text"}')
    return record


def _is_list(file: BufferedReader) -> bool:
    """Whether the first sign is a `[`; the file is at its beginning again afterwards."""
    return file.peek().removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _items(file: BufferedReader, where: str) -> Iterator[Row]:
    """The items of one JSON list, of which a few at a time are in memory."""
    decoder, utf8 = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8-sig")()
    text, place, number, ended = "", 0, 0, False
    while True:
        at = f"{where} row {number + 1}"
        try:
            start = _item(text, place, number == 0)
            if start is None:
                return
            record, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            if ended or len(text) - place > MAX_ROW_BYTES:
                said = error.msg if isinstance(error, json.JSONDecodeError) else error  # its position is not the file's
                raise BuildError(at, f"is not JSON: {said}", "write a list of objects, or one object a line") from None
            piece = file.read(max(PIECE, len(text) - place))  # twice as much each time: a long item is not parsed again and again
            text, place, ended = text[place:] + _piece(utf8, piece, at), 0, not piece
        else:
            number += 1
            yield Row(at, _object(record, at))


def _item(text: str, place: int, first: bool) -> int | None:
    """Where the next item begins; None at the list's end. Raises ValueError where `text` does not say."""
    found = _BETWEEN.match(text, place)
    if found is None or (found["sign"] != ("[" if first else ",") and (first or found["sign"] != "]")):
        raise ValueError(f"Expecting {'[' if first else ', or ]'}: {text[place : place + 20]!r}")
    ends = found["sign"] == "]" or (first and text.startswith("]", found.end()))
    return None if ends else found.end()


def _piece(utf8: codecs.IncrementalDecoder, piece: bytes, where: str) -> str:
    try:
        return utf8.decode(piece, final=not piece)
    except UnicodeDecodeError as error:
        raise BuildError(where, f"is not UTF-8: byte 0x{error.object[error.start]:02x}", "save it as UTF-8") from None


def decoded(raw: bytes, shown: str, first_line: int = 1) -> str:
    """UTF-8, or an error that names the line."""
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        fix = "save it as UTF-8, for example: iconv -f latin1 -t utf-8 FILE > NEW"
        raise BuildError(f"{shown}:{line}", f"is not UTF-8: byte 0x{raw[error.start]:02x}", fix) from None


# Parquet


def _parquet(file: BufferedReader, where: str, fields: tuple[str, ...], fix: str) -> Iterator[Row]:
    from pyarrow import parquet

    # Buffered reads in place of reading ahead, which keeps the whole file in memory.
    with _seekable(file) as whole, parquet.ParquetFile(whole, pre_buffer=False, buffer_size=BUFFER_BYTES) as opened:
        there = opened.schema_arrow.names
        for field in fields:
            if field not in there:
                raise _missing(where, field, there, fix)
        number = 0
        for batch in opened.iter_batches(BATCH_ROWS, columns=list(fields) or None, use_threads=False):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{where} row {number}", values)


@contextmanager
def _seekable(file: BufferedReader) -> Iterator[IO[bytes]]:
    """The file itself or, where it is being unpacked, a copy that vanishes: parquet is read from its end."""
    if file.seekable():
        yield file
    else:
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy)
            yield copy


# What a field may hold


def checked(text: Any, where: str, what: str, fix: str = FIELD) -> str:
    """`text` if it is text that can be encoded."""
    if not isinstance(text, str):
        raise BuildError(where, f"{what} is {named(text)}, not text", fix)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        said = f"{what} holds half of a character at position {error.start} (a lone surrogate, as a cut emoji leaves it)"
        raise BuildError(where, said, "remove it, or drop the line") from None
    return text


def named(value: object) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "text", bytes: "bytes", bool: "true or false"}.get(type(value), "a number")


def _missing(where: str, field: str, there: list[str], fix: str) -> BuildError:
    names = ", ".join(there[:SHOWN]) + (" …" if there[SHOWN:] else "") or "none"
    return BuildError(where, f"has no field {field!r}; its fields: {names}", fix)

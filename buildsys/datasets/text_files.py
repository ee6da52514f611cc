"""The user's own text: .txt and .md files, each one document, and .jsonl files, one document a line (jsonlines.org)."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field

from buildsys.errors import BuildError
from buildsys.slots import Frozen

VERSION = 1
READS = "text"

SUFFIXES = (".txt", ".md", ".jsonl")
SHOWN = 8  # names in an error


class Knobs(Frozen):
    paths: tuple[str, ...] = Field(
        min_length=1, description="files or globs (** crosses folders) of .txt, .md or .jsonl, relative to this file"
    )
    field: str = Field(default="text", min_length=1, description="the key of each .jsonl line that holds its text")
    outside: bool = Field(default=False, description="let paths leave the workspace: the recipe then works on this machine only")


def locate(knobs: Knobs, folder: Path) -> dict[str, Path]:
    """The files, in the order of `paths` and by name within a glob; each once, numbered so that their names sort in that order."""
    found: dict[Path, None] = {}
    for written in knobs.paths:
        found |= dict.fromkeys(_matches(written, folder))
    return {f"{number:05d}-{path.name}": path for number, path in enumerate(found)}


def _matches(written: str, folder: Path) -> list[Path]:
    literal = Path(os.path.normpath(folder / written))
    if literal.is_file():
        matches = [literal]
    elif literal.is_dir():
        raise BuildError(str(literal), "is a folder, not a text file", f"write {written.rstrip('/')}/**/*.txt (or .md, .jsonl)")
    else:
        pattern = os.path.normpath(Path(glob.escape(str(folder))) / written)
        found = glob.glob(pattern, recursive=True)  # pathlib's takes no absolute pattern
        files = sorted((path for path in map(Path, found) if not path.is_dir()), key=lambda path: (len(path.parts), path))
        # `**` follows links to folders, so a file may be reached twice: it is one file, by its shortest path.
        matches = sorted({os.path.realpath(path): path for path in reversed(files)}.values())
    if not matches:
        what = f"{written} matches no file" if glob.has_magic(written) else "there is no such file"
        raise BuildError(str(literal), what, "correct the path; it is relative to the folder of the file that wrote it")
    for path in matches:
        if path.suffix not in SUFFIXES:
            fix = "narrow the glob, or convert the file" if glob.has_magic(written) else "convert the file"
            raise BuildError(str(path), f"is {path.suffix or 'without suffix'}; text files are {', '.join(SUFFIXES)}", fix)
        if not path.is_file():
            raise BuildError(str(path), "is a link that leads nowhere, or no regular file", "mend the link, or remove it")
    return matches


def texts(knobs: Knobs, files: Mapping[str, Path]) -> Iterator[str]:
    """Documents one at a time, in the order of the names; empty ones are left out. `files` may lie under other names than they had."""
    for name in sorted(files):
        path = files[name]
        original = path.resolve()  # in a store it lies under a digest, as a link to the user's file
        shown = str(original) if original.suffix in SUFFIXES else name
        documents = _lines(knobs.field, path, shown) if name.endswith(".jsonl") else iter([_decoded(path.read_bytes(), shown)])
        yield from (text for text in documents if text.strip())


def _lines(field: str, path: Path, shown: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            line = _decoded(raw, shown, number)
            if line.strip():
                yield _field(field, line, f"{shown}:{number}")


def _field(field: str, line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise BuildError(where, f"is not JSON: {error}", "write one JSON object a line") from None
    if not isinstance(record, dict):
        raise BuildError(where, f"is {_kind(record)}, not a JSON object", f'write {{"{field}": "the text"}}')
    if field not in record:
        there = ", ".join(list(record)[:SHOWN]) or "none"
        raise BuildError(where, f"has no field {field!r}; its fields: {there}", "set `field:` to the one that holds the text")
    text = record[field]
    if not isinstance(text, str):
        raise BuildError(where, f"field {field!r} is {_kind(text)}, not text", "set `field:` to a field that holds text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"field {field!r} holds half of a character at position {error.start} (a lone surrogate, as a cut emoji leaves it)"
        raise BuildError(where, what, "remove it, or drop the line") from None
    return text


def _kind(value: object) -> str:
    if value is None:
        return "null"
    return {dict: "an object", list: "a list", str: "text", bool: "true or false"}.get(type(value), "a number")


def _decoded(raw: bytes, shown: str, first_line: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        fix = "save it as UTF-8, for example: iconv -f latin1 -t utf-8 FILE > NEW"
        raise BuildError(f"{shown}:{line}", f"is not UTF-8: byte 0x{raw[error.start]:02x}", fix) from None

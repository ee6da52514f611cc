"""The user's own text: .txt and .md files, each one document, and .jsonl files, one document a line (jsonlines.org)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field

from buildsys.io import globs, rows
from buildsys.located import Located
from buildsys.slots import Frozen

VERSION = 1
READS = "text"
PLACES = ("paths", "outside")

SUFFIXES = (".txt", ".md", ".jsonl")


class Knobs(Frozen):
    paths: tuple[str, ...] = Field(
        min_length=1, description="files or globs (** crosses folders) of .txt, .md or .jsonl, relative to this file"
    )
    field: str = Field(default="text", min_length=1, description="the key of each .jsonl line that holds its text")
    outside: bool = Field(default=False, description="let paths leave the workspace: the recipe then works on this machine only")


def locate(knobs: Knobs, folder: Path, home: Path) -> Located:
    """The files, in the order of `paths` and by name within a glob; each once, numbered so that their names sort in that order."""
    return Located(globs.local(knobs.paths, folder, SUFFIXES))


def floats(knobs: Knobs) -> str:
    """Nothing: the content of the files is in the key."""
    return ""


def texts(knobs: Knobs, files: Mapping[str, Path]) -> Iterator[str]:
    """Documents one at a time, in the order of the names; empty ones are left out. `files` may lie under other names than they had."""
    for name in sorted(files):
        path = files[name]
        if name.endswith(".jsonl"):
            documents = rows.texts({name: path}, knobs.field)
        else:
            documents = iter([rows.decoded(path.read_bytes(), rows.shown(name, path))])
        yield from (text for text in documents if text.strip())

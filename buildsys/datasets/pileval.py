"""The Pile's validation split: prose, code, mathematics, papers, mail. What AWQ and SmoothQuant calibrate on.

Gao et al., "The Pile", arXiv:2101.00027; on the hub the copy of AWQ's authors, mit-han-lab/pile-val-backup. A row is a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StrictInt

from buildsys.datasets import PLACED, Placed, Revision, floating, pick
from buildsys.hubs import hub
from buildsys.io import rows
from buildsys.located import Located

VERSION = 1
READS = "text"
PLACES = PLACED

REPO = "mit-han-lab/pile-val-backup"


class Knobs(Placed):
    split: Literal["validation"] = Field(default="validation", description="the only one there is")
    revision: Revision = Field(
        default="2f5e46ae6a69cf0dce4b12f78241c408936ca0e4", description="commit or branch of mit-han-lab/pile-val-backup"
    )
    limit: Annotated[StrictInt, Field(ge=1)] = Field(default=10_000, description="documents that are read, from the start")


def locate(knobs: Knobs, folder: Path, home: Path) -> Located:
    """The file, on the hub or in `path`."""
    patterns = "val.jsonl.zst", "val.jsonl.gz", "val.jsonl"
    return pick(REPO, knobs.revision, patterns, "", knobs, folder, home)


fetch = hub.fetch


def floats(knobs: Knobs) -> str:
    return floating(knobs, knobs.revision)


def texts(knobs: Knobs, files: Mapping[str, Path]) -> Iterator[str]:
    """Documents from the start; empty ones are left out."""
    found = rows.texts(files, "text", f"name a copy of {REPO}")
    yield from islice((text for text in found if text.strip()), knobs.limit)

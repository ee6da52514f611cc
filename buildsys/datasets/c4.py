"""C4, English: web pages, cleaned. The first shard, which the field calibrates on.

Raffel et al., "Exploring the Limits of Transfer Learning", arXiv:1910.10683; on the hub allenai/c4. A row is a document.
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

REPO, FOLDER = "allenai/c4", "en"
SHARD = {"train": "c4-train.00000-of-01024.json", "validation": "c4-validation.00000-of-00008.json"}


class Knobs(Placed):
    split: Literal["train", "validation"] = Field(default="train", description="which part of it")
    revision: Revision = Field(default="1588ec454efa1a09f29cd18ddd04fe05fc8653a2", description="commit or branch of allenai/c4")
    limit: Annotated[StrictInt, Field(ge=1)] = Field(default=10_000, description="documents that are read, from the first shard's start")


def locate(knobs: Knobs, folder: Path, home: Path) -> Located:
    """The split's first shard, on the hub or in `path`."""
    shard = SHARD[knobs.split]
    patterns = tuple(place + shard + packed for place in (f"{FOLDER}/", "") for packed in (".gz", ".zst", ""))
    return pick(REPO, knobs.revision, patterns, FOLDER, knobs, folder, home)


fetch = hub.fetch


def floats(knobs: Knobs) -> str:
    return floating(knobs, knobs.revision)


def texts(knobs: Knobs, files: Mapping[str, Path]) -> Iterator[str]:
    """Documents from the start of the shard; empty ones are left out."""
    found = rows.texts(files, "text", f"name a copy of {REPO}")
    yield from islice((text for text in found if text.strip()), knobs.limit)

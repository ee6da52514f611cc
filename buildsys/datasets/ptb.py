"""Penn Treebank, as prepared for language modelling: news of 1989 in lower case, rare words and numbers replaced.

Marcus et al., 1993; Mikolov et al., INTERSPEECH 2010. A split is one text: its sentences joined by an empty line. The hub's repository,
ptb-text-only/ptb_text_only, is read by a script, which never runs here: its rows come from the hub's own conversion to parquet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from buildsys.datasets import PLACED, Placed, Revision, floating, pick
from buildsys.hubs import hub
from buildsys.io import rows
from buildsys.located import Located

VERSION = 1
READS = "text"
PLACES = PLACED

REPO, CONFIG = "ptb-text-only/ptb_text_only", "penn_treebank"
RAW = {"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"}


class Knobs(Placed):
    split: Literal["train", "validation", "test"] = Field(default="train", description="which part of it")
    revision: Revision = Field(
        default="refs/convert/parquet", description="commit or reference of ptb-text-only/ptb_text_only that holds parquet"
    )


def locate(knobs: Knobs, folder: Path, home: Path) -> Located:
    """The split's files, on the hub or in `path`."""
    raw = RAW[knobs.split]
    shards, converted = f"{knobs.split}-*.parquet", f"{knobs.split}/0000.parquet"
    patterns = f"{CONFIG}/{converted}", f"{CONFIG}/{shards}", converted, shards, raw, f"data/{raw}"
    return pick(REPO, knobs.revision, patterns, "", knobs, folder, home)


fetch = hub.fetch


def floats(knobs: Knobs) -> str:
    return floating(knobs, knobs.revision)


def texts(knobs: Knobs, files: Mapping[str, Path]) -> Iterator[str]:
    """The split, as one document."""
    yield "\n\n".join(row for name in sorted(files) for row in _rows(name, files[name]))


def _rows(name: str, path: Path) -> Iterator[str]:
    """Rows as the hub has them: a line without the space around it."""
    if name.endswith(".txt"):
        yield from (text.strip() for text in rows.texts({name: path}, "text"))
    else:
        yield from rows.texts({name: path}, "sentence", f"name a copy of {REPO}")

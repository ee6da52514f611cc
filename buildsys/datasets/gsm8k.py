"""GSM8K: grade-school problems in words, each with its solution step by step.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv:2110.14168; on the hub openai/gsm8k. A document is a question and its
answer, a line apart.
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

REPO, CONFIG = "openai/gsm8k", "main"


class Knobs(Placed):
    split: Literal["train", "test"] = Field(default="train", description="which part of it")
    revision: Revision = Field(default="740312add88f781978c0658806c59bc2815b9866", description="commit or branch of openai/gsm8k")


def locate(knobs: Knobs, folder: Path, home: Path) -> Located:
    """The split's files, on the hub or in `path`."""
    shards, converted = f"{knobs.split}-*.parquet", f"{knobs.split}/0000.parquet"
    patterns = f"{CONFIG}/{shards}", f"{CONFIG}/{converted}", shards, converted, f"{knobs.split}.jsonl"
    return pick(REPO, knobs.revision, patterns, "", knobs, folder, home)


fetch = hub.fetch


def floats(knobs: Knobs) -> str:
    return floating(knobs, knobs.revision)


def texts(knobs: Knobs, files: Mapping[str, Path]) -> Iterator[str]:
    """Each problem with its solution."""
    fix = f"name a copy of {REPO}"
    for name in sorted(files):
        for row in rows.read(name, files[name], ("question", "answer"), fix):
            yield f"{row.text('question', fix)}\n{row.text('answer', fix)}"

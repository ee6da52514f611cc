"""WikiText-2, raw: Wikipedia's good and featured articles. The text that quantization papers calibrate and score on.

Merity et al., "Pointer Sentinel Mixture Models", arXiv:1609.07843; on the hub Salesforce/wikitext. A split is one text: rows joined by an
empty line, as the loaders of GPTQ and LMDeploy join them, from the hub's parquet and from the original wiki.*.raw alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from buildsys.datasets import PLACED, Placed, Revision, floating, pick, place_of
from buildsys.errors import BuildError
from buildsys.hubs import hub
from buildsys.io import rows
from buildsys.located import Located

VERSION = 1
READS = "text"
PLACES = PLACED

REPO, CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
RAW = {"train": "wiki.train.raw", "validation": "wiki.valid.raw", "test": "wiki.test.raw"}


class Knobs(Placed):
    split: Literal["train", "validation", "test"] = Field(default="train", description="which part of it")
    revision: Revision = Field(
        default="b08601e04326c79dfdd32d625aee71d232d685c3", description="commit, branch or tag of Salesforce/wikitext"
    )


def locate(knobs: Knobs, folder: Path, home: Path) -> Located:
    """The split's files, on the hub or in `path`."""
    raw = RAW[knobs.split]
    shards, converted = f"{knobs.split}-*.parquet", f"{knobs.split}/0000.parquet"
    patterns = f"{CONFIG}/{shards}", f"{CONFIG}/{converted}", shards, converted, raw, f"wikitext-2-raw/{raw}"
    if knobs.path is not None:
        words = place_of(knobs.path, folder) / raw.replace(".raw", ".tokens")
        if words.is_file() and not words.with_name(raw).exists():
            what = "is WikiText-2 with rare words replaced by <unk>, which no model was trained on"
            raise BuildError(str(words), what, f"get the raw text: {raw}, or the parquet files of {REPO}")
    return pick(REPO, knobs.revision, patterns, "", knobs, folder, home)


fetch = hub.fetch


def floats(knobs: Knobs) -> str:
    return floating(knobs, knobs.revision)


def texts(knobs: Knobs, files: Mapping[str, Path]) -> Iterator[str]:
    """The split, as one document."""
    yield "\n\n".join(row for name in sorted(files) for row in _rows(name, files[name]))


def _rows(name: str, path: Path) -> Iterator[str]:
    """Rows as the hub has them: a line with its end; of an empty line nothing."""
    if name.endswith(".raw"):
        with path.open("rb") as file:
            for _, line in rows.lines_of(file, rows.shown(name, path)):
                yield line.replace("\r\n", "\n") if line.strip() else ""
    else:
        yield from rows.texts({name: path}, "text", f"name a copy of {REPO}, {CONFIG}")

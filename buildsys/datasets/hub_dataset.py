"""Any dataset of the hub, or a local copy of one, that is parquet, JSON or text: a row is a document.

Files of a split are chosen as the hub chooses them (buildsys/io/splits.py). A loading script never runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, StrictInt, model_validator

from buildsys.datasets import Placed, Revision, certain, floating, here, place_of, start
from buildsys.errors import BuildError
from buildsys.hubs import hub
from buildsys.io import globs, rows, splits
from buildsys.located import Located

VERSION = 1
READS = "text"
PLACES = ("repo", "revision", "config", "split", "files", "path", "outside")


class Knobs(Placed):
    repo: Annotated[str, AfterValidator(hub.check_id)] | None = Field(default=None, description="the dataset's id on the hub: org/name")
    revision: Revision = Field(default="main", description="commit, branch, tag, or refs/convert/parquet")
    config: str | None = Field(
        default=None, min_length=1, description="which of the dataset's configs (subsets); may be left out if it has one"
    )
    split: str = Field(default="train", min_length=1, description="which part of it")
    files: tuple[str, ...] = Field(default=(), description="globs over the dataset's files, in place of config and split")
    field: str = Field(default="text", min_length=1, description="the column, or the key of each row, that holds its text")
    limit: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="documents that are read, from the start; all if left out"
    )

    @model_validator(mode="after")
    def _placed(self) -> Knobs:
        if self.repo is None and self.path is None:
            raise ValueError("names no dataset: set repo: org/name (on the hub), or path: (a local folder)")
        return self


def locate(knobs: Knobs, folder: Path, home: Path) -> Located:
    """The files of the split, on the hub or in `path`."""
    if knobs.path is not None:
        place = place_of(knobs.path, folder)
        files = globs.below(place)
        readme = files.get(splits.README)
        return here(files, _chosen(knobs, files, readme, str(place)))
    assert knobs.repo is not None
    listed = hub.listing(hub.Repo("dataset", knobs.repo, knobs.revision), home)
    if not listed.whole and not knobs.files and splits.README not in listed.files:
        what = f"offline, and the shared cache holds no {splits.README} of it, which may say what its splits are"
        fix = f"plan once while online (it is remembered), name its files with files:, or while online: {listed.repo.download}"
        raise BuildError(str(listed.repo), what, fix)
    beside = [splits.README] if splits.README in listed.files and not knobs.files else []
    readme = hub.locate(listed, beside, home).files.get(splits.README) if beside else None
    try:
        chosen = _chosen(knobs, listed.files, readme, knobs.repo)
    except BuildError as error:
        if listed.whole:
            raise
        what = f"{error.what} (offline, so this is what the shared cache holds of it)"
        raise BuildError(error.where, what, f"while online: {listed.repo.download}") from None
    return hub.locate(listed, certain(listed, chosen, knobs.files), home)


def _chosen(knobs: Knobs, names: Iterable[str], readme: Path | None, where: str) -> tuple[str, ...]:
    if not knobs.files:
        card = start(readme, splits.MAX_BYTES + 1).decode(errors="replace") if readme is not None else ""
        return splits.choose(names, card, knobs.config, knobs.split, where)
    found: dict[str, None] = {}
    for pattern in knobs.files:
        matches = globs.matching(pattern, names)
        if not matches:
            raise BuildError(where, f"files: {pattern} matches no file of it", "correct the pattern; ** crosses folders")
        found |= dict.fromkeys(matches)
    for name in found:
        if not rows.kind(name):
            what = f"files: {name} is none of {', '.join(rows.KINDS)} (or packed: {', '.join(rows.PACKED)})"
            raise BuildError(where, what, "narrow the pattern, or convert the file")
    return tuple(sorted(found))


fetch = hub.fetch


def floats(knobs: Knobs) -> str:
    return floating(knobs, knobs.revision)


def texts(knobs: Knobs, files: Mapping[str, Path]) -> Iterator[str]:
    """Documents in the order of the files' names; empty ones are left out."""
    found = (text for text in rows.texts(files, knobs.field) if text.strip())
    yield from islice(found, knobs.limit)

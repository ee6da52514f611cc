"""A model on ModelScope (modelscope.cn, or the site that MODELSCOPE_ENDPOINT names), at a branch, a tag or a commit.

How it is asked, remembered and downloaded: hubs/modelscope.py and hubs/modelscope_files.py. Which files make a model: sources/__init__.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from buildsys.hubs import modelscope, modelscope_files
from buildsys.located import Located
from buildsys.slots import Frozen
from buildsys.sources import INDEX, convert_command, model_files

VERSION = 1


class Knobs(Frozen):
    repo: str = Field(description="the model's repository, owner/name")
    revision: str = Field(
        default="master", description="a branch, a tag, or a commit's 40 hexadecimal digits: only a commit stays the same"
    )

    @field_validator("repo")
    @classmethod
    def _repo(cls, repo: str) -> str:
        return modelscope.check_repo(repo)

    @field_validator("revision")
    @classmethod
    def _revision(cls, revision: str) -> str:
        return modelscope.check_revision(revision)


def locate(knobs: Knobs, folder: Path, home: Path) -> Located:
    """The files that make the model at the commit that the revision points to now: small ones here, of the weights the headers."""
    listing = modelscope.listing(knobs.repo, knobs.revision, home)
    there = [name for name in listing.files if "/" not in name]
    chosen = model_files(there, lambda: modelscope_files.locate(listing, [INDEX], home).files[INDEX], listing.where, _convert(listing))
    return modelscope_files.locate(listing, chosen, home)


def _convert(listing: modelscope.Listing) -> str:
    """How to come by safetensors of a model that has pickles only."""
    name = listing.repo.partition("/")[2]
    here = f"{name}-safetensors"
    download = f"modelscope download {listing.repo} --revision {listing.revision} --local-dir {name}"
    return f"{download}; {convert_command(repr(name), here)}; then name the folder: `source: {{local: {{path: {here}}}}}`"


def fetch(how: Mapping[str, Any], expected: Mapping[str, str], progress: Callable[[str, int, int], None]) -> dict[str, Path]:
    """The files, complete, in the cache that everything shares which uses ModelScope's client."""
    return modelscope_files.fetch(how, expected, progress)


def floats(knobs: Knobs) -> str:
    return f"revision: {knobs.revision} may move" if modelscope.floating(knobs.revision) else ""

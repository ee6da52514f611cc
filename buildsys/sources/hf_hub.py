"""A model of the Hugging Face hub, at a branch, a tag or (so that it stays the same) a commit.

How it is asked, remembered and downloaded: hubs/hub.py. Which files make a model: sources/__init__.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from buildsys.errors import BuildError
from buildsys.hubs import hub
from buildsys.located import Located
from buildsys.slots import Frozen
from buildsys.sources import CONFIG, INDEX, convert_command, model_files

VERSION = 1
READ = (CONFIG, INDEX)
"""Planning reads them whole, wherever the hub keeps them."""


class Knobs(Frozen):
    repo: str = Field(description="the model's repository, owner/name")
    revision: str = Field(default="main", description="a branch, a tag, or a commit's 40 hexadecimal digits: only a commit stays the same")

    @field_validator("repo")
    @classmethod
    def _repo(cls, repo: str) -> str:
        return hub.check_id(repo)

    @field_validator("revision")
    @classmethod
    def _revision(cls, revision: str) -> str:
        return hub.check_revision(revision)


def locate(knobs: Knobs, folder: Path, home: Path) -> Located:
    """The files that make the model at the commit that the revision points to now: small ones here, of the weights the headers."""
    repo = hub.Repo("model", knobs.repo, knobs.revision)
    listing = hub.listing(repo, home)
    if not listing.whole:
        # What the cache lacks cannot be told from what the repository does not have: without it this may be another model.
        what = "HF_HUB_OFFLINE is set, and nothing tells whether the shared cache has all of its files"
        local = f"run `{repo.download}` and name the folder that it prints: `source: {{local: {{path: FOLDER, outside: true}}}}`"
        raise BuildError(str(repo), what, f"while online, plan once (it is remembered), or {local}")
    return hub.locate(listing, _model(listing, home), home, READ)


def _model(listing: hub.Listing, home: Path) -> list[str]:
    there = [name for name in listing.files if "/" not in name]
    name = listing.repo.id.partition("/")[2]
    convert = convert_command(f"{listing.repo.id!r}, revision={listing.commit!r}", name)
    convert += f", then name the folder: `source: {{local: {{path: {name}}}}}`"
    return model_files(there, lambda: hub.locate(listing, [INDEX], home, READ).files[INDEX], str(listing.repo), convert)


def fetch(how: Mapping[str, Any], expected: Mapping[str, str], progress: Callable[[str, int, int], None]) -> dict[str, Path]:
    """The files, complete, in the cache that everything shares which uses the hub's client."""
    return hub.fetch(how, expected, progress)


def floats(knobs: Knobs) -> str:
    return "" if hub.is_commit(knobs.revision) else f"revision: {knobs.revision} may move"

"""Where text comes from. A module: Knobs, VERSION, READS, PLACES, `floats(knobs)`, and `generate(...)`, or `locate(...)` and `texts(...)`.

READS says what the tokens step hands over: "text" and "chat" (with the model's chat template) have files, "model" has none and generates.
PLACES are the knobs that say where the text is, not what is made of it: they are in no key, since the content of the files is. `floats`
says which input may be another one tomorrow, or "". A module that can read from a hub has `fetch` too (buildsys/hubs/hub.py).

What follows is shared by the datasets that the field has names for: one repository, a split, and the names its files have here and there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from buildsys.errors import BuildError
from buildsys.hubs import hub
from buildsys.io import globs, splits
from buildsys.located import Located
from buildsys.slots import Frozen

LFS_POINTER = b"version https://git-lfs"

Revision = Annotated[str, AfterValidator(hub.check_revision)]


class Placed(Frozen):
    """Knobs of a dataset that lies on the hub, or in a folder here."""

    path: str | None = Field(default=None, min_length=1, description="a local copy in place of the hub: a folder, relative to this file's")
    outside: bool = Field(default=False, description="let the path leave the workspace: the recipe then works on this machine only")


PLACED = ("split", "path", "outside", "revision")


def pick(repo: str, revision: str, patterns: tuple[str, ...], under: str, knobs: Placed, folder: Path, home: Path) -> Located:
    """The files of the first of `patterns` that names any. `under`: the only folder of the repository on the hub that matters."""
    if knobs.path is not None:
        place = place_of(knobs.path, folder)
        files = globs.below(place)
        return here(files, _first(patterns, files, str(place), "name a folder that holds one of them"))
    listed = hub.listing(hub.Repo("dataset", repo, revision), home, under)
    fix = "set path: to a local copy, or another revision"
    if not listed.whole:
        fix = f"while online: {listed.repo.download}"
    return hub.locate(listed, certain(listed, _first(patterns, listed.files, str(listed.repo), fix), patterns), home)


def certain(listed: hub.Listing, chosen: Sequence[str], literal: tuple[str, ...]) -> Sequence[str]:
    """`chosen`, unless only what the shared cache has is known and more files may belong to them: half a split is another text."""
    if not listed.whole and (open_ := splits.uncertain(chosen, literal)):
        what = f"offline, and nothing tells whether the shared cache has all that belongs to {open_[0]}"
        raise BuildError(str(listed.repo), what, "plan once while online (it is remembered), or set path: to a whole copy")
    return chosen


def _first(patterns: tuple[str, ...], names: Mapping[str, object], where: str, fix: str) -> list[str]:
    for pattern in patterns:
        if found := globs.matching(pattern, names):
            return found
    raise BuildError(where, f"has none of {', '.join(patterns)}", fix)


def place_of(path: str, folder: Path) -> Path:
    """A path knob, made absolute; `folder` is what it is relative to."""
    return Path(os.path.normpath(folder / path))


def here(files: Mapping[str, Path], names: Sequence[str]) -> Located:
    """Those of `files`, each a readable file and no pointer that a clone without Git LFS left."""
    for name in names:
        path = files[name]
        if not path.is_file():
            raise BuildError(str(path), "is a link that leads nowhere, or no regular file", "mend the link, or remove it")
        if start(path, len(LFS_POINTER)) == LFS_POINTER:
            raise BuildError(str(path), "is a Git LFS pointer, not the data", f"run: git -C {path.parent} lfs pull")
    return Located({name: files[name] for name in names})


def start(path: Path, count: int) -> bytes:
    """The first `count` bytes of a file."""
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise BuildError(str(path), f"cannot be read: {error.strerror}", "make it readable for this user") from None


def floating(knobs: Placed, revision: str) -> str:
    """Which input may be another one tomorrow. A local file's content is in the key."""
    return f"revision: {revision} may move" if knobs.path is None and not hub.is_commit(revision) else ""

"""Where an artifact goes. A module: Knobs, VERSION, `destination`, `plan`, `publish`, `verify`, `rollback`.

destination(knobs, folder) -> Path or str    where the recipe says; `folder` is what its relative paths are relative to
plan(knobs, release, to) -> lines            what `publish` would do; sends and writes nothing, may look at the other side
publish(knobs, release, to, progress)        -> Receipt; all of the release or nothing; run again, it changes nothing
verify(knobs, release, to, progress)         -> Receipt of what is read back, or BuildError
rollback(knobs, asked, to, progress)         -> Receipt; makes an earlier release current; `asked`: what `wanted` takes
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from buildsys.errors import BuildError
from buildsys.step import digest

Progress = Callable[[str, int, int], None]
TAG = "sha256-"
_WANTED = re.compile(rf"(?:{TAG}(?=[0-9a-f]{{16}}))?([0-9a-f]{{8,64}})")


@dataclass(frozen=True)
class Release:
    """A judged, sealed folder and what to call it."""

    name: str  # the recipe's
    tree: Path  # the folder; its files are complete and never change
    files: Mapping[str, str]  # every file in it, with slashes -> sha256
    sizes: Mapping[str, int]  # bytes

    @property
    def digest(self) -> str:
        return digest(dict(self.files))

    @property
    def tag(self) -> str:
        """What a hub calls this release."""
        return tag(self.digest)


def tag(whole: str) -> str:
    return TAG + whole[:16]


def wanted(asked: str) -> str:
    """The digits by which a user names a release: 8 or more of its digest's; after a tag's prefix as many as a tag has, or more."""
    found = _WANTED.fullmatch(asked)
    if found is None:
        fix = f"write 8 to 64 hexadecimal digits of its digest, or its tag: {TAG} and 16 digits"
        raise BuildError(f"to={asked}", "names no release: it is neither a digest nor a tag", fix)
    return found[1]


@dataclass(frozen=True)
class Receipt:
    """Proof of a publication: where it can be had, and the digest of what was read back from there."""

    url: str
    digest: str  # step.digest of {name: sha256}, as a release's own

"""A git ref as a second workspace, in a folder that goes when it has been read; index and work tree stay as they are.

What the ref holds otherwise than the work tree is written there; everything else is a link to the work tree, so that a model of many
gigabytes is neither copied nor hashed again. What git does not hold at all (an ignored model folder) is taken as it is now.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from buildsys import disk
from buildsys.document import Document
from buildsys.errors import BuildError
from buildsys.lock import Lock
from buildsys.locked import SUFFIX as LOCK
from buildsys.locking import Locks
from buildsys.overlay import Reader, lexical
from buildsys.recipe import PATH_KNOBS, Recipe
from buildsys.review.git import LINK, SUBMODULE, Entry, Git
from buildsys.toolchain import FILE as TOOLCHAIN
from buildsys.workspace import FOLDER, SUFFIXES, Workspace

POINTER = b"version https://git-lfs"
POINTER_BYTES = 1024  # at most
OWN = (*SUFFIXES, LOCK)  # files under recipes/ that say something by themselves: one that git does not hold is new


@dataclass(frozen=True)
class Base:
    """Recipes as of a commit. `changed`: paths from the workspace that are other in the work tree."""

    ref: str
    commit: str
    workspace: Workspace
    changed: frozenset[str]
    top: Path  # a stand-in for the root of the file system: the workspace lies as deep in it as the real one
    locks: frozenset[str] = frozenset()  # those that are the same now; they are not in its folder, see SharedLocks
    notes: tuple[str, ...] = ()

    def reach(self, recipe: Recipe) -> None:
        """Lets paths that leave the workspace (`outside: true`) lead where they lead in the real one."""
        for folder, written in _outside(recipe):
            place = lexical(written, folder)
            if place.is_relative_to(self.top) and not os.path.lexists(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(Path("/", place.relative_to(self.top)))

    def told(self, text: str) -> str:
        """`text` with places of this folder named as git names them."""
        return text.replace(f"{self.workspace.root}{os.sep}", f"{self.ref}:")

    def error(self, error: BuildError) -> BuildError:
        return BuildError(self.told(error.where), self.told(error.what), self.told(error.fix))


class _Shared(Reader):
    """Reads what did not change once for both workspaces."""

    def __init__(self, root: Path, now: Reader, changed: frozenset[str]) -> None:
        super().__init__(root, now.choices)
        self._now, self._changed = now, changed

    def read(self, path: Path) -> Document:
        name = self.name(path)
        return super().read(path) if name in self._changed else self._now.read(self._now.root / name)


class SharedLocks(Locks):
    """The locks of a base; those that did not change are read once for both workspaces."""

    def __init__(self, base: Base, now: Locks) -> None:
        super().__init__(base.workspace.root)
        self._base, self._now = base, now

    def file(self, path: Path) -> Lock | None:
        name = self.shown(path)
        return self._now.file(self._now.root / name) if name in self._base.locks else super().file(path)


@contextmanager
def at(now: Workspace, ref: str, home: Path) -> Iterator[Base]:
    """The workspace `now` as it was where its branch left `ref`. `home`: where a folder for it may be made, and is gone afterwards."""
    root = now.root
    git = Git(root)
    named = git.commit(ref)
    forked = git.forked(named)
    commit = forked or named
    notes = () if forked else (f"where this branch left {ref} is not known to this clone, so it is compared with {ref} itself",)
    with disk.writing(home):
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".review-", dir=home.absolute(), ignore_cleanup_errors=True) as made:
            top = Path(made)
            folder = top.joinpath(*root.parts[1:])
            folder.mkdir(parents=True)
            changed = git.changed(commit)
            entries = git.entries(commit)
            locks = frozenset(entry.path for entry in entries if _is_lock(entry) and entry.path not in changed)
            _lay(git, [entry for entry in entries if entry.path not in locks], changed, root, folder)
            _lay_untracked(git, root, folder, home)
            (folder / FOLDER).mkdir(exist_ok=True)
            workspace = Workspace(folder)
            workspace.reader = _Shared(folder, now.reader, changed)
            yield Base(ref, commit, workspace, changed, top, locks, notes)


def _is_lock(entry: Entry) -> bool:
    """Whether it is a recipe's, and a file of its own: what a link leads to may have changed where the link has not."""
    return (
        entry.mode != LINK
        and entry.path.startswith(f"{FOLDER}/")
        and entry.path.endswith(LOCK)
        and not entry.path.endswith(f"/{TOOLCHAIN}")
    )


def _lay(git: Git, entries: list[Entry], changed: frozenset[str], root: Path, folder: Path) -> None:
    """The commit's files in `folder`: a folder beside recipes/ is one link where nothing in it differs."""
    differing = {path.partition("/")[0] for path in changed}
    blobs: list[tuple[Entry, Path]] = []
    made: set[str] = set()
    for entry in entries:
        first, _, below = entry.path.partition("/")
        whole = bool(below) and first != FOLDER and first not in differing
        path = first if whole else entry.path
        if whole and path in made:
            continue
        real, place = f"{root}{os.sep}{path}", f"{folder}{os.sep}{path}"
        above = os.path.dirname(path)
        if above not in made:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            made.add(above)
        if entry.path in changed and entry.mode != SUBMODULE:
            blobs.append((entry, Path(place)))
            continue
        os.symlink(os.readlink(real) if not whole and entry.mode == LINK and os.path.islink(real) else real, place)
        made.add(path)
    git.write((entry.blob, place) for entry, place in blobs)
    for entry, file in blobs:
        _settle(git, file, entry.mode == LINK)


def _settle(git: Git, place: Path, link: bool) -> None:
    """A blob that stands for something else becomes that: a link, or what git-lfs has of it."""
    if link:
        to = os.fsdecode(place.read_bytes())
        place.unlink()
        place.symlink_to(to)
    elif place.stat().st_size <= POINTER_BYTES and (said := place.read_bytes()).startswith(POINTER):
        oid = next((line[11:].decode() for line in said.splitlines() if line.startswith(b"oid sha256:")), "")
        if len(oid) == 64 and (content := git.lfs(oid)).is_file():
            place.unlink()
            place.symlink_to(content)


def _lay_untracked(git: Git, root: Path, folder: Path, home: Path) -> None:
    """What git does not hold, as it is now; but no recipe of it, for that one is new."""
    for name in git.untracked():
        real, place = root / name, folder / name
        own = name.startswith(f"{FOLDER}/") and name.endswith(OWN)
        if own or home.absolute().is_relative_to(real) or os.path.lexists(place) or not place.parent.is_dir():
            continue
        place.symlink_to(real)


def _outside(recipe: Recipe) -> Iterator[tuple[Path, str]]:
    """Relative paths of the recipe that may leave the workspace: the folder that they are relative to, and the path."""

    if not any(where[-1:] == ("outside",) for where in recipe.document.origins):
        return

    def below(value: Any, where: tuple[str | int, ...]) -> Iterator[tuple[Path, str]]:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(inner, (dict, list)):
                yield from below(inner, (*where, key))
        if isinstance(value, dict) and value.get("outside") is True:
            for key in PATH_KNOBS:
                written = value.get(key)
                for one in written if isinstance(written, list) else [written]:
                    if isinstance(one, str) and not Path(one).is_absolute():
                        yield recipe.folder(*where), one

    yield from below(recipe.model_dump(mode="json", by_alias=True, exclude_none=True), ())

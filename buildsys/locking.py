"""A workspace's locks: read once, held against plans, and written whole. What `doit lock` does with them is in relock.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys import disk, lockfile
from buildsys.errors import BuildError, BuildErrors
from buildsys.finder import Finder
from buildsys.lock import Drift, Lock, Locked, again, asked, drift, path_of
from buildsys.locktext import Texts
from buildsys.recipe import Recipe
from buildsys.slots import Choice
from buildsys.toolchain import FILE, Toolchain
from buildsys.workspace import FOLDER

if TYPE_CHECKING:
    from buildsys.plan import Plan

SHOWN = 4  # drifts that a line of text names


class Locks:
    """The locks of a workspace, each read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[Path, Lock | None] = {}
        self._texts = Texts()

    def lock(self, recipe: Recipe) -> Lock | None:
        """The lock of the recipe's file; None: there is none. Raises BuildError where it is none, or another recipe's."""
        return self.file(path_of(recipe))

    def file(self, path: Path) -> Lock | None:
        """The lock that the file is, as `lock`."""
        if path not in self._read:
            self._read[path] = Lock.read(path, self.shown(path), self._texts) if path.exists() else None
        return self._read[path]

    def of(self, recipe: Recipe) -> Locked | None:
        """What is locked of this recipe or variant."""
        found = self.lock(recipe)
        return found.recipes.get(recipe.name) if found is not None else None

    @cached_property
    def toolchain(self) -> Toolchain:
        """What the locked builds were made with. Raises BuildError where the file is none."""
        path = self.root / FOLDER / FILE
        return Toolchain.read(path, self.shown(path))

    def shown(self, path: Path) -> str:
        """What errors call it."""
        return path.as_posix().removeprefix(f"{self.root.as_posix().rstrip('/')}/")

    def write(self, recipe: Recipe, locked: Mapping[str, Locked], gone: Iterable[str] = ()) -> bool:
        """These recipes' part of the lock, the rest of it as it is. False: the file holds that already."""
        path = path_of(recipe)
        try:
            before = self.lock(recipe)
        except BuildError:
            before = None  # damaged, or another recipe's: it is written anew
        kept = {name: one for name, one in (before.recipes if before is not None else {}).items() if name not in set(gone)}
        lock = Lock(recipes={**kept, **locked})
        text = lock.text().encode()
        if path.exists() and path.read_bytes() == text:
            return False
        with disk.writing(path):
            disk.write(path, text)
            path.chmod(0o644)
        self._read[path] = lock
        return True


def required(recipe: Recipe, said: str | None) -> bool:
    """Whether nothing may be other than locked: the recipe says so, or whoever runs this."""
    return recipe.locked == "required" or said == "required"


def held(plan: Plan, locks: Locks, locked: Locked | None, must: bool) -> tuple[str, ...]:
    """Notes on a plan that is other than its lock says. Where it `must` be the same, raises BuildErrors with each drift."""
    path = locks.shown(path_of(plan.recipe))
    if locked is None:
        if must:
            raise missing(plan.recipe, path)
        return ()
    found = drift(locked, plan)
    if found and must:
        raise BuildErrors([refusal(plan.name, path, one) for one in found])
    return (f"lock is stale: {told(found)}; {again(plan.name)}",) if found else ()


def missing(recipe: Recipe, path: str) -> BuildError:
    return BuildError(path, f"does not lock {recipe.name}, which has to be locked (locked: required)", f"run `{again(recipe.name)}`")


def refusal(name: str, path: str, one: Drift) -> BuildError:
    fix = f"undo that, or review it and run `{again(name)}`"
    return BuildError(path, f"{name} is other than locked: {one}", fix)


def told(found: list[Drift]) -> str:
    """Drifts in one line."""
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(map(str, found[:SHOWN])) + more


def quick(recipe: Recipe, finder: Finder) -> bool:
    """Whether the recipe is what its lock was made of, known without a hub and without planning. False: it has to be looked at."""
    path = path_of(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    start = lockfile.intact(text)
    if start is None:
        return False
    head = text[start : text.find("\n\n", start)].splitlines()

    def files(where: tuple[str, str], chosen: Choice) -> Mapping[str, str]:
        return finder.digests(finder.located(recipe, tuple(filter(None, where)), chosen))

    line = lockfile.dumped({"asked": {recipe.name: asked(recipe, files)}}).splitlines()[1]
    return line in head and lockfile.dumped({"recipe": path.stem}).rstrip() in head

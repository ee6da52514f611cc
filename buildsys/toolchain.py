"""recipes/toolchain.lock: versions of the tools of the last verified builds, once for all recipes; a recipe says what it had other.

Versions are in no key (see the design page), so nothing rebuilds when they change: here is what the locks' measurements were made with.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys import disk, document, lockfile
from buildsys.errors import BuildError
from buildsys.slots import Frozen

if TYPE_CHECKING:
    from buildsys.release.facts import Facts

FILE = "toolchain.lock"
FORMAT = 1
HEADING = (
    '# Written by `doit lock`: tools of the last verified builds, and what single recipes had other ("": not at all). Do not edit it.\n'
)
FIX = "delete it and run `doit lock` for the recipes that are built here, or take it from git again"


class Toolchain(Frozen):
    """`tools`: tool -> version, of the build locked last. `recipes`: each that is built, with what it had other; "": not at all."""

    tools: Mapping[str, str] = {}
    recipes: Mapping[str, Mapping[str, str]] = {}

    def of(self, name: str) -> dict[str, str] | None:
        """Versions that a recipe was built with; None: no build of it is locked."""
        if name not in self.recipes:
            return None
        return {tool: version for tool, version in {**self.tools, **self.recipes[name]}.items() if version}

    def having(self, name: str, versions: Mapping[str, str]) -> Toolchain:
        """With the build of one recipe that was locked now."""
        all_ = {recipe: self.of(recipe) or {} for recipe in self.recipes} | {name: dict(versions)}
        others = {recipe: _other(versions, all_[recipe]) for recipe in sorted(all_)}
        return Toolchain(tools=dict(sorted(versions.items())), recipes=others)

    def without(self, names: set[str]) -> Toolchain:
        """Without recipes that are no more."""
        return Toolchain(tools=self.tools, recipes={name: other for name, other in self.recipes.items() if name not in names})

    def text(self) -> str:
        """The file's whole content; the inverse of `read`."""
        return HEADING + lockfile.dumped({"lock": FORMAT, "tools": self.tools, "recipes": self.recipes})

    @classmethod
    def read(cls, path: Path, where: str) -> Toolchain:
        """Empty where there is no file. Raises BuildError with file and line on anything odd."""
        if not path.exists():
            return cls()
        try:
            found = document.read(path, where, "lock")
        except BuildError as error:
            raise BuildError(error.where, error.what, FIX) from None
        tools, recipes = found.data.get("tools"), found.data.get("recipes")
        if set(found.data) != {"lock", "tools", "recipes"} or found.data["lock"] != FORMAT:
            what = f"holds {', '.join(found.data)} in format {found.data.get('lock')}; known are lock, tools and recipes in format {FORMAT}"
            raise BuildError(f"{where}:1", what, FIX)
        for key, said in (("tools", {"": tools}), ("recipes", recipes)):
            each = said.values() if isinstance(said, Mapping) else [said]
            if not all(isinstance(one, Mapping) and all(isinstance(version, str) for version in one.values()) for one in each):
                raise BuildError(str(found.origin((key,))), f"{key} does not map tools to versions", FIX)
        assert isinstance(tools, Mapping) and isinstance(recipes, Mapping)
        return cls(tools=tools, recipes=recipes)


def _other(tools: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    return {tool: own.get(tool, "") for tool in sorted({*tools, *own}) if tools.get(tool) != own.get(tool)}


def versions(facts: Facts) -> dict[str, str]:
    """Of a build: what its steps say that they ran with; the latest step of the graph that names a tool is believed."""
    return {tool: str(version) for ran in facts.steps for tool, version in ran.built.get("versions", {}).items()}


def write(path: Path, toolchain: Toolchain) -> bool:
    """False: the file holds that already."""
    text = toolchain.text().encode()
    if path.exists() and path.read_bytes() == text:
        return False
    with disk.writing(path):
        disk.write(path, text)
        path.chmod(0o644)
    return True

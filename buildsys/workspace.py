"""The recipes of a workspace: found by name, glob or path, loaded one by one or checked all at once.

A recipe's name is its file's stem, and `stem@variant` for each variant under `matrix:`. Files in a folder called `bases` are
fragments for `extends`: never recipes by themselves.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from buildsys.document import Document
from buildsys.errors import BuildError, BuildErrors
from buildsys.overlay import Reader, closest, lexical, merge
from buildsys.recipe import CHOICES, Recipe, parse_fragment

FOLDER = "recipes"
FRAGMENTS = "bases"
SUFFIXES = (".yaml", ".yml")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Workspace:
    """A folder with `recipes/` in it, as it was when first read: each file is read once."""

    def __init__(self, root: Path) -> None:
        self.reader = Reader(root, CHOICES)
        self.root = self.reader.root
        self._loaded: dict[str, Recipe] = {}

    # Names

    def names(self) -> dict[str, Path]:
        """Every recipe and variant by name, sorted. Two files of one name, or a name that is none, raise."""
        names, errors = self._scanned
        if errors:
            raise BuildErrors(errors)
        return names

    def find(self, spec: str) -> list[str]:
        """Names for a comma list of names, globs over names or files, and paths; in the order asked for, each once."""
        found: dict[str, None] = {}
        for token in filter(None, (token.strip() for token in spec.split(","))):
            found |= dict.fromkeys(self._matches(token))
        if not found:
            raise BuildError("recipe=", "names no recipe", "write recipe=NAME; `doit list` shows the names")
        return list(found)

    def _matches(self, token: str) -> list[str]:
        names = self.names()
        if token in names:
            return [token]
        shown = {name: self.reader.name(file) for name, file in names.items()}
        if any(character in token for character in "*?["):
            found = [name for name in names if fnmatch.fnmatchcase(name, token) or fnmatch.fnmatchcase(shown[name], token)]
            if not found:
                raise BuildError(f"recipe={token}", f"matches none of {len(names)} recipes", "`doit list` shows the names")
            return found
        if token.endswith(SUFFIXES):
            path = lexical(token, Path.cwd())
            found = [name for name, file in names.items() if file == path and "@" not in name]
            if not found:
                fix = f"name a recipe under {FOLDER}/" if path.is_file() else "correct the path, or write the recipe's name"
                raise BuildError(f"recipe={token}", "is a fragment or lies elsewhere" if path.is_file() else "is no file", fix)
            return found
        raise self._unknown(token, names)

    def _unknown(self, name: str, names: dict[str, Path]) -> BuildError:
        if not names:
            return BuildError(
                f"recipe={name}", f"there are no recipes in {self.root / FOLDER}", "run this in a workspace, where dodo.py is"
            )
        near = closest(name, list(names))
        fix = f"did you mean {near}?" if near else f"`doit list` shows all {len(names)} names"
        return BuildError(f"recipe={name}", "is no recipe", fix)

    # Loading

    def load(self, name: str) -> Recipe:
        """The recipe of that name, composed and validated; all its mistakes raise in one BuildErrors."""
        names = self.names()
        if name not in names:
            raise self._unknown(name, names)
        return self._load(name, names[name])

    def check(self) -> list[BuildError]:
        """What is wrong with any recipe or fragment, each mistake once however many recipes inherit it."""
        names, errors = self._scanned
        found = list(errors)
        for name, file in names.items():
            try:
                self._load(name, file)
            except BuildErrors as several:
                found += several.errors
            except BuildError as error:
                found.append(error)
        for file in self._fragments():
            try:
                if "matrix" in self.reader.read(file).data:
                    where = str(self.reader.read(file).origin(("matrix",)))
                    found.append(BuildError(where, "a fragment has no variants: matrix is not inherited", "move matrix into a recipe"))
                found += parse_fragment(self.reader.compose(file), self.root)
            except BuildError as error:
                found.append(error)
        return list({(error.where, error.what): error for error in found}.values())

    def _load(self, name: str, file: Path) -> Recipe:
        if name not in self._loaded:
            self._loaded[name] = self._read(name, file)
        return self._loaded[name]

    def _read(self, name: str, file: Path) -> Recipe:
        document = self.reader.compose(file)
        own = self.reader.read(file)
        if "matrix" in own.data:
            variants, errors = _variants(own)
            if errors:
                raise BuildErrors(errors)
            variant = name.partition("@")[2]
            if variant:
                document = merge(document, variants[variant], CHOICES)
        return Recipe.parse(name, document, self.root)

    # Files

    def _files(self) -> Iterator[Path]:
        """YAML files under recipes/; hidden folders and links to folders (a model's, as a rule) are not searched."""
        for folder, folders, files in os.walk(self.root / FOLDER):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (Path(folder, name) for name in sorted(files) if name.endswith(SUFFIXES) and not name.startswith("."))

    def _fragments(self) -> Iterator[Path]:
        return (file for file in self._files() if self._is_fragment(file))

    def _is_fragment(self, file: Path) -> bool:
        return f"/{FRAGMENTS}/" in self.reader.name(file)

    @cached_property
    def _scanned(self) -> tuple[dict[str, Path], list[BuildError]]:
        stems: dict[str, Path] = {}
        errors: list[BuildError] = []
        for file in self._files():
            if self._is_fragment(file):
                continue
            where, stem = self.reader.name(file), file.stem
            if NAME.fullmatch(stem) is None:
                fix = "rename it: letters, digits, '.', '_' and '-', with a letter or digit first"
                errors.append(BuildError(where, f"the recipe's name would be {stem!r}", fix))
            elif stem in stems:
                what = f"the name {stem} is taken by {self.reader.name(stems[stem])}; a recipe's name is its file's stem"
                errors.append(BuildError(where, what, "rename one of the two files"))
            else:
                stems[stem] = file
        names = {name: file for stem, file in stems.items() for name in (stem, *self._variant_names(stem, file))}
        return dict(sorted(names.items())), errors

    def _variant_names(self, stem: str, file: Path) -> list[str]:
        """Names of a file's variants; a file without the word `matrix` is not parsed, which keeps listing 1,000 recipes quick."""
        try:
            if b"matrix" not in file.read_bytes():
                return []
            variants, _ = _variants(self.reader.read(file))
        except (BuildError, OSError):
            return []  # loading the recipe says what is wrong
        return [f"{stem}@{variant}" for variant in variants]


def _variants(own: Document) -> tuple[dict[str, Document], list[BuildError]]:
    """What `matrix` lays over the rest of its file, by variant, and what is wrong with it."""
    matrix = own.data.get("matrix", {})
    where = str(own.origin(("matrix",)))
    if not isinstance(matrix, dict):
        return {}, [BuildError(where, "matrix is not a mapping of variant names", "write matrix: {NAME: {kv_cache: {policy: int8}}}")]
    variants: dict[str, Document] = {}
    errors = []
    for name, partial in matrix.items():
        where = str(own.origin(("matrix", name)))
        if NAME.fullmatch(name) is None:
            fix = "rename it: letters, digits, '.', '_' and '-', with a letter or digit first"
            errors.append(BuildError(where, f"matrix: the variant's name is {name!r}", fix))
        elif not isinstance(partial, dict):
            errors.append(BuildError(where, f"matrix.{name} is not a mapping of keys", f"write {name}: {{kv_cache: {{policy: int8}}}}"))
        elif nested := [key for key in ("extends", "matrix") if key in partial]:
            errors.append(
                BuildError(where, f"matrix.{name} has {nested[0]}", "write the variant's own keys; only a file extends or has variants")
            )
        else:
            variants[name] = own.below(("matrix", name))
    return variants, errors

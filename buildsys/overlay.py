"""Files laid over those that they extend: deep merge, null removes, a choice replaces another choice whole.

After RFC 7396, JSON Merge Patch (sections 2 and 3). A value keeps the line that wrote it, so an inherited mistake is reported in the base.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

from buildsys.document import Document, Where, read
from buildsys.errors import BuildError

MAX_CHAIN = 32  # files that extend one another


def merge(base: Document, over: Document, choices: frozenset[Where] = frozenset()) -> Document:
    """`over` laid over `base`: mappings merge, None removes, all else replaces.

    At `choices` stand mappings of one key that names a choice (or the bare name): they merge where both name the same one, and
    otherwise the later replaces the earlier whole, knobs included.
    """
    replaced: list[Where] = []
    removed: set[Where] = set()

    def laid(old: Any, new: Any, where: Where) -> Any:
        if where in choices:
            old, new = _chosen(old), _chosen(new)
        if not (isinstance(old, Mapping) and isinstance(new, Mapping)) or (where in choices and old.keys() != new.keys()):
            if isinstance(old, (Mapping, list)):
                replaced.append(where)
            if new is None and old is not None:
                removed.add(where)
            return new
        return dict(old) | {key: laid(old[key], value, (*where, key)) if key in old else value for key, value in new.items()}

    data = laid(base.data, over.data, ())
    origins = base.origins
    if replaced:  # what lay below a replaced value is gone, and so is who wrote it
        origins = {path: origin for path, origin in origins.items() if not any(path[: len(where)] == where for where in replaced)}
    was_removed = base.removed - {where for where in base.removed if where in over.origins}
    return Document(data, {**origins, **over.origins}, was_removed | over.removed | removed)


def _chosen(value: Any) -> Any:
    """A choice in its long form: `awq` and `{awq: }` are `{awq: {}}`."""
    if isinstance(value, str):
        return {value: {}}
    if isinstance(value, Mapping) and len(value) == 1:
        return {name: {} if knobs is None else knobs for name, knobs in value.items()}
    return value


def settle(document: Document, choices: frozenset[Where] = frozenset()) -> tuple[dict[str, Any], list[Where]]:
    """The data that is left when every None has removed its key, and the Nones that had nothing to remove."""
    idle: list[Where] = []

    def settled(value: Any, where: Where) -> Any:
        if where in choices:
            value = _chosen(value)
        if not isinstance(value, Mapping):
            return value
        kept = {}
        for key, inner in value.items():
            at = (*where, key)
            if inner is not None:
                kept[key] = settled(inner, at)
            elif at not in document.removed:
                idle.append(at)
        return kept

    return settled(document.data, ()), idle


def lexical(text: str, folder: Path | str) -> Path:
    """Where `text`, written in a file of `folder`, leads: absolute, `..` resolved by spelling alone (symlinks are not followed)."""
    return Path(os.path.normpath(os.path.join(folder, text)))


def is_inside(place: Path, root: Path) -> bool:
    """Whether `place` is `root` or lies in it, both absolute and normal; by spelling."""
    return place == root or str(place).startswith(f"{str(root).rstrip(os.sep)}{os.sep}")


class Reader:
    """Reads a workspace's files, each once, and lays those that extend others over them."""

    def __init__(self, root: Path, choices: frozenset[Where] = frozenset()) -> None:
        self.root = lexical(str(root), Path.cwd())
        self.choices = choices
        self._read: dict[Path, Document] = {}
        self._composed: dict[Path, Document] = {}

    def name(self, path: Path) -> str:
        """What errors call a file: its path from the workspace."""
        return os.path.relpath(path, self.root).replace(os.sep, "/") if is_inside(path, self.root) else path.as_posix()

    def read(self, path: Path) -> Document:
        if path not in self._read:
            self._read[path] = read(path, self.name(path))
        return self._read[path]

    def compose(self, path: Path, chain: tuple[Path, ...] = ()) -> Document:
        """The file over all that it extends, less `extends` and `matrix` (variants are not inherited)."""
        if path in self._composed:
            return self._composed[path]
        own = self.read(path)
        layers = [self.compose(parent, (*chain, path)) for parent in self.parents(own, path, chain)]
        layers.append(own.without("extends", "matrix"))
        self._composed[path] = reduce(partial(merge, choices=self.choices), layers)
        return self._composed[path]

    def parents(self, own: Document, path: Path, chain: Sequence[Path]) -> list[Path]:
        """The files that `extends` names, checked."""
        if "extends" not in own.data:
            return []
        written = own.data["extends"]
        where = str(own.origin(("extends",)))
        names = [written] if isinstance(written, str) else written
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise BuildError(where, f"extends is {written!r}, not a path or a list of paths", "write extends: ../bases/w4a16.yaml")
        return [self._parent(name, path, where, chain) for name in names]

    def _parent(self, text: str, path: Path, where: str, chain: Sequence[Path]) -> Path:
        parent = lexical(text, path.parent)
        if Path(text).is_absolute() or not is_inside(parent, self.root):
            what = f"extends {text}, which is not a relative path inside the workspace {self.root}"
            raise BuildError(where, what, "copy that file into recipes/bases/ and extend the copy")
        if parent in (*chain, path):
            cycle = [*(*chain, path)[(*chain, path).index(parent) :], parent]
            raise BuildError(where, "extends forms a cycle: " + " -> ".join(map(self.name, cycle)), "remove one of these `extends:`")
        if len(chain) >= MAX_CHAIN:
            raise BuildError(where, f"extends more than {MAX_CHAIN} files in a row", "let files extend their common base directly")
        if not parent.is_file():
            near = closest(parent.name, [found.name for found in parent.parent.iterdir()] if parent.parent.is_dir() else [])
            fix = "correct the path; it is relative to this file's folder"
            if near is not None:
                fix = f"did you mean {(Path(text).parent / near).as_posix()}?"
            raise BuildError(where, f"extends {text}, but there is no file {self.name(parent)}", fix)
        return parent


def closest(word: str, words: Sequence[str]) -> str | None:
    """The most similar of `words`, if any is similar enough to be a slip of the keyboard."""
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return found[0] if found else None

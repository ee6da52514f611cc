"""A recipe as it was understood, in plain data: bases merged, defaults written out, nothing that tells whose machine it was.

It goes into cards and provenance, and both into a release. So what decides nothing in the artifact (`publish`, `report`) stays out: another
place to publish to would make another release, and it may be a private host. A path that leaves the workspace is cut to its last part; any
other is rewritten relative to the recipe's own file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from buildsys.document import Where, scalar
from buildsys.recipe import PATH_KNOBS, Recipe


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every value that decides the artifact, under the names that a recipe writes. Plain JSON; equal for equal recipes on every machine."""
    # A choice that was not made is None, as is a limit that was not set; no recipe can write None as a value.
    said: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True, exclude_none=True, exclude={"publish", "report", "locked"})
    return {key: _portable(value, (key,), recipe) for key, value in said.items()}


def text(recipe: Recipe) -> str:
    """`resolved` as YAML. Written beside the recipe it reads as the same recipe, but for paths that leave the workspace."""
    return yaml.dump(resolved(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _portable(value: Any, where: Where, recipe: Recipe) -> Any:
    if isinstance(value, list):
        return [_portable(item, (*where, index), recipe) for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    found = {key: _portable(inner, (*where, key), recipe) for key, inner in value.items()}
    leaves = value.get("outside") is True
    for key in PATH_KNOBS:
        if isinstance(written := value.get(key), str):
            found[key] = _path(written, leaves, recipe.folder(*where), recipe)
        elif isinstance(written, list):
            found[key] = [_path(one, leaves, recipe.folder(*where), recipe) for one in written]
    return found


def _path(written: str, leaves: bool, folder: Path, recipe: Recipe) -> str:
    """`written` in a file of `folder`, as the recipe's own file would write it, or the last part where it leaves the workspace."""
    if leaves or Path(written).is_absolute():
        return Path(os.path.normpath(folder / written)).name
    return Path(os.path.relpath(folder / written, recipe.file.parent)).as_posix()


class _Dumper(yaml.SafeDumper):
    """Quotes what document.py would take for a number or a word: PyYAML writes the commit 1234e567 plain, and it would be a float."""


def _quoted_where_needed(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    plain = scalar(value) == value
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, None if plain else '"')


_Dumper.add_representer(str, _quoted_where_needed)

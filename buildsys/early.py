"""A build's child process, begun while its driver is still being imported: to import torch takes it longer than everything before a step.

Nothing is planned yet, so the command line alone is looked at: a recipe that has a file and no artifact will need a child almost surely.
Where none is needed, since the recipe is wrong or all its steps were built for another, the child ends with its driver.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from buildsys.errors import BuildError
from buildsys.workers import Worker


def _child(root: Path, line: list[str]) -> Worker | None:
    if not any(_is_new(root, name) for name in _named(line)):
        return None
    try:
        return Worker(root / "artifacts" / ".store")
    except (BuildError, OSError):  # a disk that is full or not ours, too many processes: told by whoever cannot do without
        return None


def _named(line: list[str]) -> list[str]:
    """What `doit build recipe=...` names."""
    if "build" not in line:
        return []
    return [name for word in line if word.startswith("recipe=") for name in word.removeprefix("recipe=").split(",")]


def _is_new(root: Path, name: str) -> bool:
    """Whether recipes/ or a folder there has a file of this recipe, and artifacts/ nothing; deeper ones are not looked for."""
    file, recipes = f"{name.partition('@')[0]}.yaml", root / "recipes"
    try:
        if (root / "artifacts" / name).is_symlink():
            return False
        folders = [recipes, *(Path(entry.path) for entry in os.scandir(recipes) if entry.is_dir())]
        return any((folder / file).is_file() for folder in folders)
    except (OSError, ValueError):  # no name of a file
        return False


CHILD = _child(Path.cwd(), sys.argv[1:])
"""The one of this process; None where nothing tells that it will be needed."""

"""A model folder on this machine, in the layout of the Hugging Face hub; the folder, or files in it, may be links.

Which files make a model: sources/__init__.py.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from pydantic import Field

from buildsys.errors import BuildError
from buildsys.located import Located
from buildsys.slots import Frozen
from buildsys.sources import INDEX, convert_command, model_files

VERSION = 1

LFS_POINTER = b"version https://git-lfs"


class Knobs(Frozen):
    path: str = Field(min_length=1, description="the model's folder, relative to this file's folder")
    outside: bool = Field(default=False, description="let the path leave the workspace: the recipe then works on this machine only")


def locate(knobs: Knobs, folder: Path, home: Path) -> Located:
    """The files that make the model, where they are. `folder` is what a relative path is relative to."""
    model = Path(os.path.normpath(folder / knobs.path))
    if not model.is_dir():
        raise _no_folder(model)
    there = [entry.name for entry in model.iterdir() if not entry.is_dir()]
    wanted = model_files(there, lambda: model / INDEX, str(model), convert_command(repr(str(model)), str(model)))
    for name in wanted:
        _readable(name, model / name)
    return Located({name: model / name for name in wanted})


def floats(knobs: Knobs) -> str:
    """A folder does not: what lies in it is in the keys."""
    return ""


def _no_folder(model: Path) -> BuildError:
    if model.is_symlink():
        return BuildError(str(model), f"is a link to {model.readlink()}, which is not there", "mend the link, or correct the path")
    if model.exists():
        return BuildError(str(model), "is a file, not a model's folder", f"name its folder: {model.parent}")
    siblings = sorted(entry.name for entry in model.parent.iterdir() if entry.is_dir()) if model.parent.is_dir() else []
    near = difflib.get_close_matches(model.name, siblings, n=3)
    fix = f"did you mean {' or '.join(near)}?" if near else "correct the path; it is relative to the folder of the file that wrote it"
    return BuildError(str(model), "there is no such folder", fix)


def _readable(name: str, path: Path) -> None:
    if not path.is_file():
        what = f"is a link to {path.readlink()}, which is not there" if path.is_symlink() else "is not a file"
        raise BuildError(str(path), what, "mend the link, or copy the file itself into the folder")
    if name.endswith(".safetensors") and path.stat().st_size < 1024:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise BuildError(str(path), "is a Git LFS pointer, not the weights", f"run: git -C {path.parent} lfs pull")

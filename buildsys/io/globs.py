"""Files that patterns name: on this machine, as a recipe writes them, and among the names that a hub's repository holds.

Signs are those of glob(7), and `**` crosses folders, as in fsspec, which the hub's own patterns are written for.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterable
from pathlib import Path

from buildsys.errors import BuildError

MAX_FILES = 100_000  # of one folder that stands for a repository; more is a folder that was not meant


def local(paths: Iterable[str], folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files, in the order of `paths` and by name within a glob; each once, numbered so that their names sort in that order."""
    found: dict[Path, None] = {}
    for written in paths:
        found |= dict.fromkeys(_matches(written, folder, suffixes))
    return {f"{number:05d}-{path.name}": path for number, path in enumerate(found)}


def _matches(written: str, folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    literal = Path(os.path.normpath(folder / written))
    if literal.is_file():
        matches = [literal]
    elif literal.is_dir():
        others = f" (or {', '.join(suffixes[1:])})" if suffixes[1:] else ""
        raise BuildError(str(literal), "is a folder, not a text file", f"write {written.rstrip('/')}/**/*{suffixes[0]}{others}")
    else:
        pattern = os.path.normpath(Path(glob.escape(str(folder))) / written)
        found = glob.glob(pattern, recursive=True)  # pathlib's takes no absolute pattern
        files = sorted((path for path in map(Path, found) if not path.is_dir()), key=lambda path: (len(path.parts), path))
        # `**` follows links to folders, so a file may be reached twice: it is one file, by its shortest path.
        matches = sorted({os.path.realpath(path): path for path in reversed(files)}.values())
    if not matches:
        what = f"{written} matches no file" if glob.has_magic(written) else "there is no such file"
        raise BuildError(str(literal), what, "correct the path; it is relative to the folder of the file that wrote it")
    for path in matches:
        if not path.name.endswith(suffixes):
            fix = "narrow the glob, or convert the file" if glob.has_magic(written) else "convert the file"
            raise BuildError(str(path), f"is {path.suffix or 'without suffix'}; text files are {', '.join(suffixes)}", fix)
        if not path.is_file():
            raise BuildError(str(path), "is a link that leads nowhere, or no regular file", "mend the link, or remove it")
    return matches


def below(folder: Path) -> dict[str, Path]:
    """Every file below `folder` by its name there, links followed, hidden ones left out: a copy of a repository, as the hub lists it."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "there is no such folder"
        fix = f"name its folder: {folder.parent}" if folder.exists() else "correct the path; it is relative to the file that wrote it"
        raise BuildError(str(folder), what, fix)
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for inside, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(inside)
        folders[:] = [] if real in seen else sorted(name for name in folders if not name.startswith("."))
        if real not in seen:
            paths = (Path(inside) / name for name in sorted(names) if not name.startswith("."))
            found |= {path.relative_to(folder).as_posix(): path for path in paths}
        seen.add(real)
        if len(found) > MAX_FILES:
            raise BuildError(str(folder), f"holds more than {MAX_FILES} files", "name the folder that holds the dataset alone")
    return dict(sorted(found.items()))


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that `pattern` names, sorted; a pattern that is a name is that name."""
    known = sorted(names)
    if pattern in known:
        return [pattern]
    compiled = re.compile(_regex(pattern))
    return [name for name in known if compiled.fullmatch(name)]


_SIGNS = re.compile(r"\*\*/|\*\*|\*|\?|\[[!^]?\]?[^\]]*\]|.", re.DOTALL)
_MEANINGS = {"**/": "(?:.+/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def _regex(pattern: str) -> str:
    def meaning(sign: str) -> str:
        if len(sign) > 2 and sign[0] == "[" and sign not in ("[!]", "[^]"):  # those are never closed: they stand for themselves
            return _bracket(f"[!{sign[2:]}" if sign[1] == "^" else sign)
        return _MEANINGS.get(sign) or re.escape(sign)

    return "".join(meaning(sign) for sign in _SIGNS.findall(pattern.removeprefix("./")))


def _bracket(sign: str) -> str:
    """As fnmatch reads it, which knows ranges that run backwards and hold nothing."""
    around, whole = fnmatch.translate(""), fnmatch.translate(sign)
    return whole[around.index(")") : len(whole) - len(around) + around.index(")")]

"""What lies in a folder that comes from strangers: every file by name, and what is no file.

Nothing is followed that leads out of it, nothing is opened that is no regular file (a pipe would wait for ever), and names are data.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from buildsys.errors import BuildError

Progress = Callable[[str, int, int], None]
IGNORED = (".gitattributes", ".git", ".cache/huggingface")
"""What hubs and their clients add to a folder, at its top."""

AGAIN = "download the folder again from where it was published; do not serve this one"
MAX_DIGITS = 18

_LFS, _LFS_BYTES = b"version https://git-lfs", 1024


@dataclass(frozen=True)
class Folder:
    """`files`: name with slashes -> path of everything whose content can be read; `links`: which of them are links, and to what."""

    root: Path
    files: Mapping[str, Path]
    links: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # of IGNORED, those that are there
    findings: tuple[BuildError, ...] = ()


def walk(root: Path) -> Folder:
    """Everything below `root`, hidden files too; empty folders are nothing."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "is a link to what is not there" if root.is_symlink() else "is not there"
        raise BuildError(str(root), f"{what}; a folder was expected", "name the folder that holds config.json and *.safetensors")
    files: dict[str, Path] = {}
    links: dict[str, str] = {}
    ignored, findings, below = [], [], [""]
    while below:
        prefix = below.pop()
        try:
            entries = sorted(os.scandir(root / prefix), key=lambda entry: entry.name)
        except OSError as error:
            findings.append(_unreadable(root / prefix, error))
            continue
        for entry in entries:
            name, path = prefix + entry.name, root / prefix / entry.name
            if name in IGNORED:
                ignored.append(name)
            elif entry.is_dir(follow_symlinks=False):
                below.append(f"{name}/")
            elif (finding := _no_file(path, entry.is_symlink())) is not None:
                findings.append(finding)
            else:
                files[name] = path
                if entry.is_symlink():
                    links[name] = os.readlink(path)
    return Folder(root, dict(sorted(files.items())), links, tuple(sorted(ignored)), tuple(findings))


def _no_file(path: Path, link: bool) -> BuildError | None:
    """Why a name cannot be read as a file: a dead link, a link to a folder, a pipe, a device."""
    to = f"a link to {os.readlink(path)}" if link else ""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        what = f"is {to}, which is not there" if link else f"cannot be read: {error.strerror}"
        return BuildError(str(path), what, "mend the link, or put the file itself there")
    if stat.S_ISREG(mode):
        return None
    what = f"is {to}, a folder" if stat.S_ISDIR(mode) else f"is {to or 'no file'}, but a pipe, a socket or a device"
    return BuildError(str(path), what, "remove it: a model's folder holds plain files")


def in_cache(root: Path, path: Path) -> bool:
    """Whether a link is one of those that the hub's client makes a snapshot of: it leads into the same repository's blobs."""
    top = root.absolute()
    blobs = top.parent.parent / "blobs"
    return top.parent.name == "snapshots" and blobs.resolve() in path.resolve().parents


def hashes(files: Mapping[str, Path], progress: Progress = lambda *step: None) -> tuple[dict[str, str], tuple[BuildError, ...]]:
    """sha256 of each file that can be read, and why the others cannot."""
    found: dict[str, str] = {}
    findings = []
    for done, (name, path) in enumerate(files.items()):
        try:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            findings.append(_unreadable(path, error))
        progress("hash", done + 1, len(files))
    return found, tuple(findings)


def content(path: Path, limit_bytes: int) -> bytes:
    """A small file; refuses one that is not."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit_bytes + 1)
    except OSError as error:
        raise _unreadable(path, error) from None
    if len(raw) > limit_bytes:
        raise BuildError(str(path), f"holds {path.stat().st_size:,} bytes; at most {limit_bytes:,} make sense", AGAIN)
    return raw


def json_object(raw: bytes, where: str) -> dict[str, Any]:
    """A JSON object from a stranger: no key twice, no number and no nesting that a reader further on could choke on."""
    try:
        said = json.loads(raw.decode(), object_pairs_hook=_unique, parse_int=_count)
    except RecursionError:
        raise BuildError(where, "is nested too deeply", AGAIN) from None
    except ValueError as error:
        raise BuildError(where, f"is not valid JSON: {error}", AGAIN) from None
    if not isinstance(said, dict):
        raise BuildError(where, f"is a JSON {type(said).__name__}, not an object", AGAIN)
    return said


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _count(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


class Differs(BuildError):
    """A file that is not what some lists say; those that find the same of it are named in one sentence (see `merged`)."""

    def __init__(self, where: str, how: str, by: tuple[str, ...]) -> None:
        super().__init__(where, how.format(", ".join(name.rpartition("/")[2] for name in by)), AGAIN)
        self.how, self.by = how, by


def differences(listed: Mapping[str, str], there: Mapping[str, str], by: str, root: Path) -> Iterator[Differs]:
    """Where files (name -> sha256) are not those that `by` lists."""
    for name in sorted(listed.keys() | there.keys()):
        if name not in there:
            yield Differs(str(root / name), "is missing (listed in {})", (by,))
        elif name not in listed:
            yield Differs(str(root / name), "was added (not listed in {})", (by,))
        elif listed[name] != there[name]:
            yield Differs(str(root / name), f"was changed ({{}}): sha256 {there[name][:12]}…, not {listed[name][:12]}…", (by,))


def merged(findings: Iterable[BuildError]) -> tuple[BuildError, ...]:
    """One finding a file, which says each thing once."""
    found: dict[str, dict[str, BuildError]] = {}
    for one in findings:
        said = found.setdefault(one.where, {})
        how = one.how if isinstance(one, Differs) else one.what
        before = said.get(how)
        if isinstance(one, Differs) and isinstance(before, Differs):
            said[how] = Differs(one.where, how, tuple(dict.fromkeys((*before.by, *one.by))))
        else:
            said[how] = one
    whole = {where: tuple(said.values()) for where, said in found.items()}
    return tuple(BuildError(where, "; ".join(one.what for one in said), said[0].fix) for where, said in whole.items())


def is_pointer(path: Path) -> bool:
    """Whether Git LFS left a note here in the place of the file."""
    try:
        with path.open("rb") as file:
            return path.stat().st_size <= _LFS_BYTES and file.read(len(_LFS)) == _LFS
    except OSError:
        return False


def _unreadable(path: Path, error: OSError) -> BuildError:
    return BuildError(str(path), f"cannot be read: {error.strerror}", "make it readable for this user, or download it again")

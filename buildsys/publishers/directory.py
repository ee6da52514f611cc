"""Publishes to a folder of this machine or of a mounted share: complete, read back and swapped in at one instant, or not at all.

`<path>` is a symbolic link into `.<name>.published/`, a hidden sibling that holds the version it points at. Replacing a link by rename is
atomic on every POSIX file system, NFS and overlays included. Exchanging two real folders (renameat2, RENAME_EXCHANGE) is not: it is
refused on NFS and on several overlays, and a rename over a folder that is not empty always is. A link also says whose it is: only what
points into `.<name>.published/` is ever replaced, and only what lies in there is ever deleted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from buildsys.errors import BuildError
from buildsys.publishers import Receipt
from buildsys.slots import Frozen
from buildsys.step import digest

VERSION = 1
Progress = Callable[[str, int, int], None]

_PIECE_BYTES = 4 << 20
_INCOMING = "incoming"
_FIX = "remove it, or name another publish.directory.path"


class Knobs(Frozen):
    """`path`: the folder, relative to the recipe's; `outside`: it may leave the repository."""

    path: Annotated[str, Field(min_length=1)]
    outside: bool = False


def destination(knobs: Knobs, folder: Path) -> Path:
    """Where the recipe says, `folder` being what its paths are relative to."""
    return Path(os.path.normpath(folder / knobs.path))


def plan(knobs: Knobs, files: Mapping[str, str], destination: Path) -> tuple[str, ...]:  # files: {name: sha256}
    """What `publish` would do, in lines for people. Writes nothing, reads no file's content; refuses what publish would refuse."""
    version = _published(destination)
    if version is None:
        return (f"publish {len(files)} files to {destination}",)
    if version.name.startswith(digest(dict(files))):
        return (f"{destination} already holds {len(files)} equal files; read them back, copy nothing",)
    held = {name for name, _ in _walk(version)}
    gone = sorted(held - files.keys())
    lines = [f"replace {destination}: {len(held)} files by {len(files)}"]
    return (*lines, *(f"drop {name}" for name in gone))


def publish(knobs: Knobs, tree: Path, destination: Path, progress: Progress) -> Receipt:
    """Copies `tree`, compares every copy's sha256 with the original's, then moves the link. A killed run leaves only files under
    `.<name>.published/incoming`, which the next one removes; a full disk leaves the old version as it was."""
    store = _store(destination)
    _published(destination)
    with _telling_of_full_disks(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _alone(store, destination):
            files = _hashes(tree, "hash", progress)
            whole = digest(files)
            version = _published(destination)  # asked again, now alone: another publish may just have ended
            if version is None or not version.name.startswith(whole) or _differences(version, files, progress):
                version = _bring(tree, files, store, whole, progress)
                _point(destination, version, store)
            _sweep(store, version)
    return Receipt(destination.absolute().as_uri(), whole)


def verify(knobs: Knobs, files: Mapping[str, str], destination: Path, progress: Progress) -> Receipt:
    """Reads the published files back. Raises BuildError where one is missing, different or not of this publication."""
    version = _published(destination)
    found = [f"{destination} is absent"] if version is None else _differences(version, files, progress)
    if found:
        more = f" … and {len(found) - 3} more" if len(found) > 3 else ""
        raise BuildError(str(destination), "; ".join(found[:3]) + more, "publish again")
    return Receipt(destination.absolute().as_uri(), digest(dict(files)))


def _store(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.published"


def _published(destination: Path) -> Path | None:
    """The version that `destination` points at, or None where there is nothing yet. Refuses what this module did not make."""
    if destination.is_symlink():
        target = Path(os.readlink(destination))
        if len(target.parts) == 2 and target.parts[0] == _store(destination).name:
            return destination.parent / target
        raise BuildError(str(destination), f"is a link to {target}, which no publish made", _FIX)
    if destination.exists():
        kind = "folder" if destination.is_dir() else "file"
        raise BuildError(str(destination), f"is a {kind} that no publish made", _FIX)
    return None


@contextlib.contextmanager
def _telling_of_full_disks(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f"the disk is full ({error.strerror}); what was published before is untouched"
        raise BuildError(str(destination), what, "free space there, then publish again") from error


@contextlib.contextmanager
def _alone(store: Path, destination: Path) -> Iterator[None]:
    """One publish to a destination at a time; the kernel lets go of a killed one's lock. Leaves no unfinished copy behind."""
    store.mkdir(exist_ok=True)
    with (store / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BuildError(str(destination), "another publish to it is running", "wait for it to end, then publish again") from error
        _remove(store / _INCOMING)
        try:
            yield
        finally:
            _remove(store / _INCOMING)


def _bring(tree: Path, files: Mapping[str, str], store: Path, whole: str, progress: Progress) -> Path:
    """A new version in `store`, on disk and read back. Its name is the digest; a second one of a damaged version's digest gets a number."""
    incoming = store / _INCOMING
    need_bytes, free_bytes = sum(size for _, size in _walk(tree)), shutil.disk_usage(store).free
    if need_bytes > free_bytes:
        raise OSError(errno.ENOSPC, f"{need_bytes:,} bytes are needed, {free_bytes:,} are free")
    incoming.mkdir()
    for done, name in enumerate(files):
        _copy(tree / name, incoming / name)
        progress("copy", done + 1, len(files))
    for folder, _, _ in os.walk(incoming, topdown=False):
        _sync(Path(folder))
    wrong = _differences(incoming, files, progress)
    if wrong:
        raise BuildError(str(store), f"the copy reads back otherwise: {wrong[0]}", "check that disk, then publish again")
    names = (whole if number == 0 else f"{whole}-{number}" for number in range(1 << 30))
    version = next(store / name for name in names if not (store / name).exists())
    incoming.rename(version)
    _sync(store)
    return version


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, _PIECE_BYTES)
        writer.flush()
        os.fsync(writer.fileno())
        # Reading back must ask the disk, not the pages that were just written.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(writer.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _point(destination: Path, version: Path, store: Path) -> None:
    """Moves the link in one step: a reader sees the old version or the new one."""
    link = store / f"{_INCOMING}.link"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(store.name) / version.name)
    link.replace(destination)
    _sync(destination.parent)


def _sweep(store: Path, keep: Path) -> None:
    """Older versions go, and what a killed publish left. A server that has their files open keeps reading them."""
    for found in store.iterdir():
        if found.name not in (keep.name, "lock"):
            _remove(found)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _walk(tree: Path) -> list[tuple[str, int]]:
    """Every file below `tree` as (name with slashes, bytes), sorted by name."""
    found = [Path(folder) / name for folder, _, names in os.walk(tree) for name in names]
    return sorted((path.relative_to(tree).as_posix(), path.stat().st_size) for path in found)


def _hashes(tree: Path, what: str, progress: Progress) -> dict[str, str]:
    names = [name for name, _ in _walk(tree)]
    hashes = {}
    for done, name in enumerate(names):
        with (tree / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
        progress(what, done + 1, len(names))
    return hashes


def _differences(tree: Path, files: Mapping[str, str], progress: Progress) -> list[str]:
    """What is not as `files` says, in words; a version that has gone lacks all of them."""
    found = _hashes(tree, "read back", progress)
    missing = [f"{name} is missing" for name in files if name not in found]
    changed = [f"{name} has sha256 {found[name][:12]}, not {sha[:12]}" for name, sha in files.items() if found.get(name, sha) != sha]
    return [*missing, *changed, *(f"{name} was not published" for name in found if name not in files)]

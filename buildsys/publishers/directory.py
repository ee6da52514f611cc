"""Publishes to a folder of this machine or of a mounted share: complete, read back and swapped in at one instant, or not at all.

`<path>` is a symbolic link into `.<name>.published/`, a hidden sibling that holds the version it points at. Replacing a link by rename is
atomic on every POSIX file system, NFS and overlays included. Exchanging two real folders (renameat2, RENAME_EXCHANGE) is not: it is
refused on NFS and on several overlays, and a rename over a folder that is not empty always is. A link also says whose it is: only what
points into `.<name>.published/` is ever replaced, and only what lies in there is ever deleted. Earlier versions stay in there for rollback.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import Field

from buildsys import disk
from buildsys.digests import sha256
from buildsys.errors import BuildError
from buildsys.publishers import Progress, Receipt, Release, wanted
from buildsys.slots import Frozen
from buildsys.step import digest

VERSION = 1

_PIECE_BYTES = 4 << 20
_INCOMING = "incoming"
_LOCK = "lock"
_FIX = "name another publish.directory.path"


class Knobs(Frozen):
    path: str = Field(min_length=1, description="the folder, relative to this file's folder")
    outside: bool = Field(default=False, description="let the path leave the workspace")
    keep: int = Field(default=1, ge=0, description="how many earlier versions stay beside the present one, to roll back to")


def destination(knobs: Knobs, folder: Path) -> Path:
    """Where the recipe says, `folder` being what its paths are relative to. What a build reads or keeps is no place for a release."""
    to, folder = Path(os.path.normpath(folder / knobs.path)), Path(os.path.normpath(folder))
    if folder.is_relative_to(to):
        raise BuildError(str(to), "holds the recipe's own folder", _FIX)
    workspace = next((one.parent for one in (folder, *folder.parents) if one.name == "recipes"), None)
    for own in ("recipes", "artifacts"):
        if workspace is not None and to.is_relative_to(workspace / own):
            raise BuildError(str(to), f"lies in the workspace's own folder {own}/", _FIX)
    return to


def plan(knobs: Knobs, release: Release, to: Path) -> tuple[str, ...]:
    """What `publish` would do, in lines for people. Writes nothing, reads no file's content; refuses what publish would refuse."""
    version = _published(to)
    if version is None:
        return (f"publish {len(release.files)} files to {to}",)
    if _digest(version) == release.digest:
        return (f"{to} already holds {len(release.files)} equal files; read them back, copy nothing",)
    held = _names(version)
    lines = [f"replace {to}: {len(held)} files by {len(release.files)}"]
    return (*lines, *(f"drop {name}" for name in held if name not in release.files))


def publish(knobs: Knobs, release: Release, to: Path, progress: Progress) -> Receipt:
    """Copies the release, compares every copy's sha256 with the release's, then moves the link. A killed run leaves only files under
    `.<name>.published/incoming`, which the next one removes; a full disk leaves the old version as it was."""
    _published(to)
    with _telling_of_disks(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        with _alone(to) as store:
            current = _published(to)  # asked again, now alone: another publish may just have ended
            equal = (version for version in _versions(store) if _digest(version) == release.digest)
            whole = next((version for version in equal if not _differences(version, release.files, progress)), None)
            version = whole or _bring(release, store, progress)
            if version != current:
                _point(to, version, store)
            _sweep(store, version, knobs.keep)
    return Receipt(to.absolute().as_uri(), release.digest)


def verify(knobs: Knobs, release: Release, to: Path, progress: Progress) -> Receipt:
    """Reads the published files back. Raises BuildError where one is missing, different or not of this release."""
    version = _published(to)
    found = [f"{to} is absent"] if version is None else _differences(version, release.files, progress)
    if found:
        more = f" … and {len(found) - 3} more" if len(found) > 3 else ""
        raise BuildError(str(to), "; ".join(found[:3]) + more, "publish again")
    return Receipt(to.absolute().as_uri(), release.digest)


def rollback(knobs: Knobs, asked: str, to: Path, progress: Progress) -> Receipt:
    """Moves the link to an earlier version that is still there and still whole. The one that was current becomes an earlier one."""
    digits = wanted(asked)
    if _published(to) is None:
        raise BuildError(str(to), "nothing has been published there", "publish first")
    with _telling_of_disks(to), _alone(to) as store:
        there = _versions(store)
        found = [version for version in there if _digest(version).startswith(digits)]
        if len({_digest(version) for version in found}) != 1:
            held = ", ".join(dict.fromkeys(_digest(version)[:16] for version in there))
            what = f"{'no release' if not found else 'more than one release'} there begins with {digits}; there are {held}"
            raise BuildError(str(to), what, "name one of these; publish.directory.keep says how many earlier ones stay")
        version, whole = found[0], _digest(found[0])
        if (now := digest(_hashes(version, progress))) != whole:
            raise BuildError(str(version), f"is damaged: its files' digest is {now[:16]}, not {whole[:16]}", "build and publish it again")
        if version != _published(to):
            _point(to, version, store)
    return Receipt(to.absolute().as_uri(), whole)


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
def _telling_of_disks(to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in disk.FULL:
            what = f"the disk is full ({error.strerror}); what was published before is untouched"
            raise BuildError(str(to), what, "free space there, then publish again") from error
        known = disk.explained(error, to)
        if known is None:
            raise
        raise known from error


@contextlib.contextmanager
def _alone(to: Path) -> Iterator[Path]:
    """The store of a destination, for one publish at a time; the kernel lets go of a killed one's lock. No unfinished copy stays behind."""
    store = _store(to)
    store.mkdir(exist_ok=True)
    with (store / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuildError(str(to), "another publish to it is running", "wait for that one to end") from None
        _remove(store / _INCOMING)
        try:
            yield store
        finally:
            _remove(store / _INCOMING)


def _bring(release: Release, store: Path, progress: Progress) -> Path:
    """A new version in `store`, on disk and read back. Its name is the digest; a second one of a damaged version's digest gets a number."""
    incoming = store / _INCOMING
    need_bytes, free_bytes = sum(release.sizes.values()), shutil.disk_usage(store).free
    if need_bytes > free_bytes:
        raise OSError(errno.ENOSPC, f"{need_bytes:,} bytes are needed, {free_bytes:,} are free")
    incoming.mkdir()
    for done, name in enumerate(release.files, 1):
        _copy(release.tree / name, incoming / name)
        progress("copy", done, len(release.files))
    for folder, _, _ in os.walk(incoming, topdown=False):
        disk.sync_folder(Path(folder))
    wrong = _differences(incoming, release.files, progress)
    if wrong:
        fix = f"check that disk, and the one of {release.tree}; then publish again"
        raise BuildError(str(store), f"the copy reads back otherwise: {wrong[0]}", fix)
    names = (release.digest if number == 0 else f"{release.digest}-{number}" for number in range(1 << 30))
    version = next(store / name for name in names if not (store / name).exists())
    incoming.rename(version)
    disk.sync_folder(store)
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


def _point(to: Path, version: Path, store: Path) -> None:
    """Moves the link in one step: a reader sees the old version or the new one."""
    os.utime(version)  # the order in which versions were current
    link = store / f"{_INCOMING}.link"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(store.name) / version.name)
    link.replace(to)
    disk.sync_folder(to.parent)


def _versions(store: Path) -> list[Path]:
    """Those that were current, the latest first."""
    found = [path for path in store.iterdir() if path.name != _LOCK and not path.name.startswith(_INCOMING)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _digest(version: Path) -> str:
    return version.name.partition("-")[0]


def _sweep(store: Path, current: Path, keep: int) -> None:
    """Versions before the last `keep` go, a damaged one of the same release, and what a killed publish left. A server that has their files
    open keeps reading them."""
    earlier = [version for version in _versions(store) if _digest(version) != _digest(current)]
    stay = {_LOCK, current.name, *(version.name for version in earlier[:keep])}
    for found in store.iterdir():
        if found.name not in stay:
            _remove(found)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _names(tree: Path) -> list[str]:
    """Every file below `tree`, with slashes, sorted."""
    return sorted((Path(folder) / name).relative_to(tree).as_posix() for folder, _, names in os.walk(tree) for name in names)


def _hashes(tree: Path, progress: Progress) -> dict[str, str]:
    names = _names(tree)
    hashes = {}
    for done, name in enumerate(names, 1):
        hashes[name] = sha256(tree / name)
        progress("read back", done, len(names))
    return hashes


def _differences(tree: Path, files: Mapping[str, str], progress: Progress) -> list[str]:
    """What is not as `files` says, in words; a version that has gone lacks all of them."""
    found = _hashes(tree, progress)
    missing = [f"{name} is missing" for name in files if name not in found]
    changed = [
        f"{name} has sha256 {found[name][:12]}, not {whole[:12]}" for name, whole in files.items() if found.get(name, whole) != whole
    ]
    return [*missing, *changed, *(f"{name} was not published" for name in found if name not in files)]

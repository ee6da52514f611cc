"""Writing so that a half-written file cannot be seen: beside, fsync, rename; and what to tell a user whose disk is full.

After "All File Systems Are Not Created Equal" (Pillai et al., OSDI 2014): contents, then the rename, then the folder reach the disk.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from buildsys.errors import BuildError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
IN_THE_WAY = frozenset({errno.ENOTDIR, errno.EEXIST, errno.ELOOP})


@contextmanager
def writing(where: Path | str) -> Iterator[None]:
    """Around anything that writes at `where`: a full or read-only disk becomes a BuildError."""
    try:
        yield
    except OSError as error:
        known = explained(error, where)
        if known is None:
            raise
        raise known from error


def user_cache() -> Path:
    """What is kept for this user beside all workspaces, and may go at any time. RuntimeError: nobody's home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "buildsys"


def explained(error: BaseException, where: Path | str) -> BuildError | None:
    """The BuildError for a disk that is full or may not be written, also where a library wrapped the OSError; None for anything else."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL | REFUSED | IN_THE_WAY:
            at = str(seen.filename or where)
            reason = os.strerror(seen.errno) if seen.errno is not None else str(seen)
            if seen.errno in FULL:
                return BuildError(at, f"cannot be written: {reason}{_room(where)}", f"{_MAKE_ROOM}; {_AGAIN}")
            if seen.errno in IN_THE_WAY:
                return BuildError(at, f"cannot be used: {reason}", "a file or a dead link stands where a folder belongs: move it away")
            return BuildError(at, f"cannot be used: {reason}", f"make it readable and writable for this user; {_AGAIN}")
        seen = seen.__cause__ or seen.__context__
    return None


_MAKE_ROOM = "make room on that disk, for example with `doit gc` (it drops what no recipe needs)"
_AGAIN = "then run the same command again: finished work is kept"


def _room(where: Path | str) -> str:
    folder = Path(where).absolute()
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return f" ({disk.f_bavail * disk.f_frsize / 2**20:,.1f} MiB free on its disk)"


def write(path: Path, data: bytes) -> None:
    """`path` holds `data`, or what it held before: never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Renames inside `path` survive a power cut once this returns."""
    sync_file(path)

"""Digests of a step's finished files, taken while the step makes others: what was just written is read from memory, beside the work.

A digest is believed at the end only where stat shows what it showed before the file was read, times of change to the nanosecond included.
Two changes within one tick of a file system's clock show the same time (git's "racy" entries, see digests.py): so reading begins after that
clock, asked by changing a file beside, has gone past the file's own time. Whatever is written from then on shows.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys import digests
from buildsys.errors import BuildError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

BESIDE = 4
"""Files that are hashed at a time beside a step. One processor hashes about half as fast as a good disk takes in what a GPU computes."""

TICK_S, TICKS = 0.002, 25
"""How often the clock is asked, and after how many answers a file is left for the end: a clock of seconds is not waited for."""


class Hashing:
    """A step's digests so far. No thread is begun before the first file is finished, and none is left behind when this ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._taken: dict[Path, Future[tuple[str, str] | None]] = {}

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def finished(self, path: Path) -> None:
        """`path` is complete and under its final name: its digest is taken from now on. May be called in any thread."""
        from concurrent.futures import ThreadPoolExecutor  # a command that builds nothing does not pay for it

        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(BESIDE, "hashing")
            self._taken[path] = self._pool.submit(_take, path)

    def of(self, path: Path) -> str | None:
        """The sha256 of what `path` holds now, where it was taken and nothing has changed since; waits for one that is being taken."""
        taken = self._taken.get(path)
        found = taken.result() if taken is not None else None
        if found is None:
            return None
        shown, sha256 = found
        return sha256 if _shown(path) == shown else None


def _take(path: Path) -> tuple[str, str] | None:
    """What stat showed before and after reading, and the digest; None where the file is better read at the end, which tells of errors."""
    try:
        before = path.stat()
        if not _past(path.parent, before.st_ctime_ns):
            return None
        found = digests.sha256(path)
    except (OSError, BuildError):
        return None
    shown = digests.fingerprint(before)
    return (shown, found) if _shown(path) == shown else None


def _shown(path: Path) -> str | None:
    try:
        return digests.fingerprint(path.lstat())
    except OSError:
        return None


def _past(folder: Path, time_ns: int) -> bool:
    """Whether the clock of the folder's file system, which may be another machine's, has gone past that time; waits a few ticks for it."""
    # Where a file system has no files without a name it has one for a moment: a hidden one, which no commit takes for output.
    with tempfile.TemporaryFile(dir=folder, prefix=".", buffering=0) as asked:
        for _ in range(TICKS):
            os.utime(asked.fileno())
            if os.fstat(asked.fileno()).st_ctime_ns > time_ns:
                return True
            time.sleep(TICK_S)
    return False

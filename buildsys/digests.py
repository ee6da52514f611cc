"""sha256 of files, remembered by what stat says of them, so that an unchanged gigabyte is read once.

The rule of "racily clean" entries is git's (Documentation/technical/racy-git.txt): a file whose times lie within the clock's grain of the
moment when it was read may have changed afterwards without showing it, so such an entry is never believed.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import time
from pathlib import Path

from buildsys.errors import BuildError

RACY_NS = 2_000_000_000
"""Coarsest time stamps in use (FAT: 2 s)."""
CHUNK_BYTES = 1 << 20
_TABLE = "CREATE TABLE IF NOT EXISTS digest (path TEXT PRIMARY KEY, stat TEXT NOT NULL, read_ns INTEGER NOT NULL, sha256 TEXT NOT NULL)"


def sha256(path: Path) -> str:
    """Digest of what `path` holds now; refuses a file that somebody writes to meanwhile."""
    try:
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            found = hashlib.sha256()
            while chunk := file.read(CHUNK_BYTES):
                found.update(chunk)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise BuildError(str(path), f"cannot be read: {error.strerror}", "check that the file is there and readable") from error
    if fingerprint(before) != fingerprint(after):
        raise BuildError(str(path), "changed while it was being read", "wait until the file is complete, then run the same command again")
    return found.hexdigest()


def fingerprint(stat: os.stat_result) -> str:
    """What stat shows of a file's content. The change time cannot be set back, so `touch -d` hides nothing."""
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_dev} {stat.st_ino}"


def _racy(shown: str, read_ns: int) -> bool:
    """Whether a file of these times, read then, may have changed afterwards without showing it."""
    _, mtime_ns, ctime_ns, *_ = shown.split()
    return max(int(mtime_ns), int(ctime_ns)) >= read_ns - RACY_NS


class Digests:
    """The index, a sqlite file that may be deleted or damaged at any time: it is a memory of digests, never their source."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._database: sqlite3.Connection | None = None

    def sha256(self, path: Path) -> str:
        """Digest of `path` (symlinks followed), read again only where stat shows a change, or could hide one."""
        real = Path(os.path.realpath(path))
        try:
            shown = fingerprint(real.stat())
        except OSError as error:
            raise BuildError(str(path), f"cannot be read: {error.strerror}", "check that the file is there and readable") from error
        known = self._recall(str(real), shown)
        if known is not None:
            return known
        read_ns = time.time_ns()
        found = sha256(real)
        if not _racy(shown, read_ns):  # else it would never be believed: no transaction for that
            self._remember(str(real), shown, read_ns, found)
        return found

    def _recall(self, path: str, shown: str) -> str | None:
        rows = self._ask("SELECT sha256, read_ns FROM digest WHERE path = ? AND stat = ?", (path, shown))
        if not rows:
            return None
        found, read_ns = rows[0]
        return None if _racy(shown, int(read_ns)) else str(found)

    def _remember(self, path: str, shown: str, read_ns: int, found: str) -> None:
        self._ask("INSERT OR REPLACE INTO digest VALUES (?, ?, ?, ?)", (path, shown, read_ns, found))

    def _ask(self, statement: str, values: tuple[str | int, ...]) -> list[tuple[str, int]]:
        """One statement; an index that cannot be read or written costs time and nothing else."""
        with self._lock:
            try:
                if self._database is None:
                    self._database = self._open()
                with self._database:
                    return self._database.execute(statement, values).fetchall()
            except sqlite3.OperationalError:  # locked for long, or its disk is full
                return []
            except sqlite3.DatabaseError:  # damaged: begin a new one
                self._database = None
                self._path.unlink(missing_ok=True)
                return []

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path, timeout=2, check_same_thread=False)
        database.execute(_TABLE)
        return database

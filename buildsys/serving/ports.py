"""TCP ports of this machine's loopback: a free one, and who listens on one (Linux: proc(5), net/tcp and fd)."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from buildsys.errors import BuildError

LOOPBACK = "127.0.0.1"
LISTENS = "0A"


def free_port() -> int:
    """One that nobody has now. Somebody may take it before you do: what starts on it has to say so."""
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return int(found.getsockname()[1])


def refuse_taken(port: int) -> None:
    """Raises BuildError where a server could not listen on the port."""
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port that was left just now is free
        try:
            tried.bind((LOOPBACK, port))
        except PermissionError:
            raise BuildError(f"port={port}", "is for the system's own servers", "say port=N with another one, from 1024 on") from None
        except OSError:
            raise taken(port) from None


def taken(port: int) -> BuildError:
    """Says who has the port, as far as this user may know."""
    held = [f"process {process} ({_line(process)})" for process in listeners(port)]
    by = " and ".join(held) or "a process of another user, or of another container"
    return BuildError(
        f"port={port}", f"is taken: {by} listens there", f"say port=N with another one ({free_port()} is free), or end that one"
    )


def listeners(port: int) -> list[int]:
    """Processes that listen on the port, of those that this user may look into."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port)}
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*") if sockets and not sockets.isdisjoint(_open(folder))]


def _inodes(port: int) -> set[str]:
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = [line.split() for line in Path(table).read_text().splitlines()[1:]]
        except OSError:
            continue  # no Linux, or no IPv6
        found |= {row[9] for row in rows if row[3] == LISTENS and int(row[1].rpartition(":")[2], 16) == port}
    return found


def _open(folder: Path) -> set[str]:
    """What a process has open; nothing where it is another user's, or has ended."""
    found = set()
    with suppress(OSError):
        for name in os.listdir(folder / "fd"):
            with suppress(OSError):  # closed meanwhile
                found.add(os.readlink(folder / "fd" / name))
    return found


def _line(process: int) -> str:
    """Its command line, short."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return "ended meanwhile"
    return words if len(words) <= 80 else f"{words[:79]}…"

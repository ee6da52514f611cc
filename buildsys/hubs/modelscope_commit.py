"""Changes a ModelScope repository: large objects first, then everything in one commit.

The commit endpoint takes creates and deletes together (modelscope_hub 0.5.1, LegacyClient.create_commit), but no parent: whoever comes last
adds to what is there. What a branch then holds has to be read back.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from buildsys.errors import BuildError
from buildsys.hubs.modelscope import Listing, look, page, passing, theirs

Tick = Callable[[int], None]
TRIES = 3
PIECE_BYTES = 1 << 20


@dataclass(frozen=True)
class Change:
    """A file that a commit adds or replaces. `content` gives its bytes; of a large file they are read only if the hub lacks them."""

    name: str
    size: int
    sha256: str
    content: Callable[[], bytes] | None  # None: large, and known to be there
    path: Path | None = None  # large, and read from here


def is_large(name: str, size: int) -> bool:
    """Whether the hub keeps the file in large storage, as its client decides: what the hub itself reads never goes there."""
    from modelscope_hub import constants

    if PurePosixPath(name).name.upper() in constants.UPLOAD_INLINE_METADATA_PATHS:
        return False
    return size > constants.UPLOAD_LFS_FORCE_THRESHOLD_BYTES or PurePosixPath(name).suffix.lower() in constants.MODEL_LFS_SUFFIX


def from_tree(tree: Path, name: str, size: int, sha256: str) -> Change:
    path = tree / name
    return Change(name, size, sha256, None, path) if is_large(name, size) else Change(name, size, sha256, path.read_bytes)


def from_hub(name: str, size: int, sha256: str, content: Callable[[], bytes]) -> Change:
    """A file that another revision of the same repository holds."""
    return Change(name, size, sha256, None if is_large(name, size) else content)


def commit(api: Any, repo: str, branch: str, changes: Iterable[Change], drop: Iterable[str], message: str) -> None:
    """One commit, asked for again where the server stumbled and the branch does not show it yet."""
    changes, drop = list(changes), list(drop)
    actions = [_action(change) for change in changes] + [_delete(name) for name in drop]
    wanted = {change.name: (change.size, change.sha256) for change in changes}
    for attempt in range(1, TRIES + 1):
        try:
            api.legacy.create_commit(repo, "model", actions, message, branch)
            return
        except theirs() as error:
            if attempt == TRIES or not passing(error):
                raise
        time.sleep(attempt / 2)
        if _shows(look(api, repo, branch), wanted, drop):
            return


def _shows(now: Listing, wanted: Mapping[str, tuple[int, str]], drop: Iterable[str]) -> bool:
    return wanted.items() <= now.contents.items() and not now.files.keys() & set(drop)


def _action(change: Change) -> dict[str, Any]:
    told: dict[str, Any] = {"action": "create", "path": change.name, "size": change.size}
    if change.content is None:
        return {**told, "type": "lfs", "sha256": change.sha256, "content": "", "encoding": ""}
    content = base64.b64encode(change.content()).decode()
    return {**told, "type": "normal", "sha256": "", "content": content, "encoding": "base64"}


def _delete(name: str) -> dict[str, Any]:
    return {"action": "delete", "path": name, "type": "normal", "size": 0, "sha256": "", "content": "", "encoding": ""}


def upload(api: Any, repo: str, changes: Iterable[Change], tick: Tick) -> None:
    """Brings the large objects that the hub lacks. One that an earlier, killed run has sent is there already."""
    large = {change.sha256: change for change in changes if change.content is None}
    addresses = _addresses(api, repo, large.values()) if large else {}
    for oid, change in large.items():
        if addresses.get(oid) is None:
            tick(change.size)
        elif change.path is None:
            what = f"the repository lists {change.name}, but its large storage has lost it"
            raise BuildError(page(repo), what, "build that release again and publish it")
        else:
            _send(api, repo, change, addresses[oid], tick)


def _addresses(api: Any, repo: str, changes: Iterable[Change]) -> dict[str, str | None]:
    """Where to send each object; of what is there already, nothing."""
    found: dict[str, str | None] = api.legacy.validate_blobs(repo, "model", [{"oid": one.sha256, "size": one.size} for one in changes])
    return found


def _send(api: Any, repo: str, change: Change, address: str | None, tick: Tick) -> None:
    assert change.path is not None
    for attempt in range(1, TRIES + 1):
        sent = 0

        def count(more: int) -> None:
            nonlocal sent
            sent += more
            tick(more)

        try:
            with change.path.open("rb") as file:
                api.legacy.upload_blob(address, _Reader(file, change.size, count), change.size)
            return
        except theirs() as error:
            if attempt == TRIES or not passing(error):
                raise
        tick(-sent)
        time.sleep(attempt / 2)
        address = _addresses(api, repo, [change]).get(change.sha256)  # they expire
        if address is None:
            return tick(change.size)


class _Reader:
    """A file of known length that tells what was read of it, in the form that requests streams."""

    def __init__(self, file: Any, size: int, tick: Tick) -> None:
        self._file, self._size, self._tick = file, size, tick

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        while piece := self.read(PIECE_BYTES):
            yield piece

    def tell(self) -> int:
        at: int = self._file.tell()
        return at

    def read(self, size: int = -1) -> bytes:
        piece: bytes = self._file.read(size if size > 0 else PIECE_BYTES)
        self._tick(len(piece))
        return piece

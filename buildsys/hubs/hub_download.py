"""One file of a repository into the shared cache: resumed where it stopped, checked before it has its name, removed where it is wrong.

The hub's client begins a plain download anew when its process was killed, so the bytes come in here, through its session, beside where it
keeps them; it then makes the links. From xet storage its own downloader brings them. Layout and locks are the client's.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from buildsys import disk
from buildsys.errors import BuildError
from buildsys.hubs.hub_errors import TIMEOUT_S, asking, explained, not_here, passing, patiently
from buildsys.hubs.hub_http import opened
from buildsys.hubs.hub_repo import Repo, RepoFile, cache, endpoint, offline, shown_endpoint, snapshot

WAITS_S: Final = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Before each further try to go on; after a try that brought something worth having they are counted anew."""
WORTH_BYTES: Final = 1 << 20
CHUNK_BYTES: Final = 1 << 20

Tick = Callable[[int], None]
"""Told the bytes that came (or, where they have to come again, went); raises Stopped to stop."""


class Stopped(Exception):
    """Another file's download failed, or the user has had enough."""


@dataclass(frozen=True)
class Wanted:
    """A file at one commit, and what it has to be."""

    repo: Repo  # its revision is the commit
    name: str
    file: RepoFile

    @property
    def where(self) -> str:
        return f"{self.name} of {self.repo}"

    @property
    def link(self) -> Path:
        """Where the shared cache shows it."""
        return snapshot(self.repo, self.repo.revision) / self.name

    @property
    def blob(self) -> Path:
        """Where the shared cache keeps it."""
        return cache() / self.repo.folder / "blobs" / self.file.etag

    @property
    def part(self) -> Path:
        """What has come of it so far; named as `hf cache prune` knows what a download left."""
        return self.blob.with_name(f"{self.blob.name}.incomplete")

    @property
    def lock(self) -> Path:
        return cache() / ".locks" / self.repo.folder / f"{self.file.etag}.lock"

    @property
    def missing_bytes(self) -> int:
        if self.link.is_file() or self.blob.is_file():
            return 0
        return self.file.size - (self.part.stat().st_size if self.part.is_file() else 0)


def bring(wanted: Wanted, tick: Tick) -> tuple[Path, str]:
    """The file, complete and as the hub described it, in the shared cache; and its sha256."""
    if not wanted.link.is_file():
        if offline():
            raise not_here(wanted.repo, wanted.where)
        with asking(wanted.repo, wanted.name), disk.writing(cache()):
            if _in_xet(wanted):
                _by_client(wanted, tick)
            else:
                _by_us(wanted, tick)
                _by_client(wanted, lambda count: None)  # finds the content there and links to it
    return wanted.link, _checked(wanted)


def _in_xet(wanted: Wanted) -> bool:
    """Whether the client's own downloader has to bring it; refuses a file that is no longer what was listed."""
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.utils._runtime import is_xet_available

    address = _address(wanted)
    said = patiently(lambda: get_hf_file_metadata(address, timeout=TIMEOUT_S, endpoint=endpoint()))
    listed = (wanted.repo.revision, wanted.file.etag, wanted.file.size)
    found = (said.commit_hash, said.etag, said.size)
    for what, before, now in zip(("commit", "ETag", "size"), listed, found, strict=True):
        if before != now and (what, now) != ("size", None):  # of text that is packed on its way no size is told
            raise _changed(wanted, f"{what} {before} when it was listed, {now} now")
    return said.xet_file_data is not None and is_xet_available()


def _address(wanted: Wanted) -> str:
    from huggingface_hub import hf_hub_url

    return hf_hub_url(wanted.repo.id, wanted.name, repo_type=wanted.repo.kind, revision=wanted.repo.revision, endpoint=endpoint())


def _by_client(wanted: Wanted, tick: Tick) -> None:
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(
            wanted.repo.id,
            wanted.name,
            repo_type=wanted.repo.kind,
            revision=wanted.repo.revision,
            cache_dir=cache(),
            endpoint=endpoint(),
            etag_timeout=TIMEOUT_S,
            tqdm_class=_bar(tick),
        )
    except (RuntimeError, OSError) as error:
        # Xet's downloader raises Python's own errors, and its words may quote an address that is signed.
        what = f"cannot be had from {shown_endpoint()}'s xet storage ({type(error).__name__})"
        xet = BuildError(wanted.where, what, "run the same command again; with HF_HUB_DISABLE_XET=1 if it stays so")
        raise explained(error, wanted.repo, wanted.where) or xet from None


def _bar(tick: Tick) -> Any:
    """What the client calls as its progress bar. Xet counts twice, what the network brought and what was written: the second is told."""

    class Bar:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *error: object) -> None: ...
        def update(self, count: float | None = 1) -> None:
            with suppress(Stopped):  # xet's downloader cannot be stopped from here
                tick(int(count or 0))

        def update_transfer(self, count: float) -> None: ...
        def set_postfix_str(self, *args: Any, **kwargs: Any) -> None: ...
        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None: ...
        def close(self) -> None: ...

    return Bar


def _by_us(wanted: Wanted, tick: Tick) -> None:
    """The content to where the client keeps it, beginning with what a killed run left."""
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    for path in (wanted.blob, wanted.lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(wanted.lock):
        if wanted.blob.exists():
            return
        wanted.part.touch()
        try:
            _complete(wanted, tick)
            _compare(wanted, wanted.part)
        except _Wrong as wrong:
            wanted.part.unlink()
            raise wrong.error from None
        disk.sync_file(wanted.part)
        os.replace(wanted.part, wanted.blob)


def _complete(wanted: Wanted, tick: Tick) -> None:
    """Asks for the rest until nothing is missing; gives up after a row of tries that brought next to nothing."""
    import httpx2

    idle = 0
    while (have := wanted.part.stat().st_size) < wanted.file.size:
        failed: Exception | None = None
        try:
            _append(wanted, have, tick)
        except httpx2.HTTPError as error:
            if not passing(error):
                raise
            failed = error
        idle = 0 if wanted.part.stat().st_size - have >= WORTH_BYTES else idle + 1
        if wanted.part.stat().st_size < wanted.file.size:
            if idle > len(WAITS_S):
                raise failed or BuildError(wanted.where, "comes in pieces that end too early", "run the same command again: it goes on")
            time.sleep(WAITS_S[max(idle, 1) - 1])


def _append(wanted: Wanted, have: int, tick: Tick) -> None:
    with opened(_address(wanted), {"Range": f"bytes={have}-"} if have else {}) as answer, wanted.part.open("r+b") as file:
        if answer.status_code != 206:  # all of it, whatever was asked for
            tick(-have)
            have = 0
            file.truncate(0)
        file.seek(have)
        for chunk in answer.iter_bytes():  # as it comes: a chunk's size would keep back what a cut leaves
            file.write(chunk)
            have += len(chunk)
            if have > wanted.file.size:
                raise _Wrong(_changed(wanted, f"{wanted.file.size} bytes when it was listed, more now"))
            tick(len(chunk))


class _Wrong(Exception):
    """What came is not what was listed: it has to go."""

    def __init__(self, error: BuildError) -> None:
        super().__init__(error)
        self.error = error


def _changed(wanted: Wanted, how: str) -> BuildError:
    fix = "run the same command again; if it stays so, the hub or the mirror (HF_ENDPOINT) serves other files than it lists"
    return BuildError(wanted.where, f"is not what {shown_endpoint()} listed: {how}", fix)


def _compare(wanted: Wanted, path: Path) -> str:
    """sha256 of what lies at `path`; refuses it where the hub's name for it is another."""
    sha256, git = digests(path)
    found = sha256 if wanted.file.sha256 else git
    if found != wanted.file.etag:
        raise _Wrong(_changed(wanted, f"{'sha256' if wanted.file.sha256 else 'git id'} {wanted.file.etag} listed, {found} came"))
    return sha256


def _checked(wanted: Wanted) -> str:
    """sha256 of the file in the shared cache. A wrong one is removed there: the same command then brings it again."""
    try:
        return _compare(wanted, wanted.link)
    except _Wrong as wrong:
        kept = cache()
        with disk.writing(kept):
            for path in (Path(os.path.realpath(wanted.link)), wanted.blob, wanted.link):  # xet's content lies where repositories share it
                if path.is_relative_to(kept) or path.is_relative_to(kept.resolve()):
                    path.unlink(missing_ok=True)
        what = f"{wrong.error.what}; it was removed from {kept}"
        raise BuildError(wrong.error.where, what, wrong.error.fix) from None


def digests(path: Path) -> tuple[str, str]:
    """sha256 of a file and git's id of it, read once."""
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
            git.update(chunk)
    return sha256.hexdigest(), git.hexdigest()


def head(wanted: Wanted, count: int) -> bytes:
    """The first `count` bytes of a file, or all of a shorter one, without the rest: from the shared cache if it is there."""
    if wanted.link.is_file():
        with wanted.link.open("rb") as file:
            return file.read(count)
    if offline():
        raise not_here(wanted.repo, wanted.where)

    def ask() -> bytes:
        came = bytearray()
        with opened(_address(wanted), {"Range": f"bytes=0-{count - 1}"}) as answer:
            for chunk in answer.iter_bytes():
                came += chunk
                if len(came) >= count:  # a server that knows no ranges sends everything
                    break
        return bytes(came[:count])

    with asking(wanted.repo, wanted.name):
        return patiently(ask)

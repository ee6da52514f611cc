"""The Hugging Face hub: which files a repository holds, what planning has to read of them, and bringing them here.

Everything goes through huggingface_hub, so its environment holds here too: HF_ENDPOINT, HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_TOKEN.
The format of a header: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from buildsys import disk
from buildsys.errors import BuildError
from buildsys.hubs.hub_download import Stopped, Wanted, bring, digests, head
from buildsys.hubs.hub_listing import listing
from buildsys.hubs.hub_repo import Listing, Repo, RepoFile, cache, check_id, check_name, check_revision, is_commit
from buildsys.io import headers
from buildsys.located import Located

__all__ = ["Listing", "Repo", "RepoFile", "check_id", "check_revision", "fetch", "is_commit", "listing", "locate"]

Progress = Callable[[str, int, int], None]
AT_ONCE: Final = 4
FIRST_BYTES: Final = 1 << 17
"""Holds the whole header of most files."""
TELL_S: Final = 0.2


def locate(listing: Listing, names: Iterable[str], home: Path, whole: Collection[str] = ()) -> Located:
    """What planning may know of these files; `sha256` has every name.

    Small files (what the hub keeps in git) are brought here, and those in `whole`; of *.safetensors in large storage the header, which
    `sizes` tells. Anything else in large storage stays away: `sizes` and `sha256` have it, `files` has not.
    """
    wanted = sorted(set(names))
    absent = [name for name in wanted if name not in listing.files]
    if absent:
        what = f"has no {', '.join(absent[:3])}{' …' if absent[3:] else ''}"
        raise BuildError(str(listing.repo), what, f"see what it holds: {listing.repo.page}/tree/{listing.commit}")
    with ThreadPoolExecutor(AT_ONCE) as several:
        here = dict(zip(wanted, several.map(lambda name: _here(listing, name, home, whole), wanted), strict=True))
    away = {name: listing.files[name].size for name in wanted if listing.files[name].sha256 and name not in whole}
    return Located(
        files={name: path for name, (path, _) in here.items() if path is not None},
        sha256={name: sha256 for name, (_, sha256) in here.items()},
        sizes=away,
        how=_how(listing, wanted) if away else {},
        commit=listing.commit,
        pin=f"{listing.repo.id} at {listing.commit[:12]}",
    )


def _how(listing: Listing, names: list[str]) -> dict[str, Any]:
    files = {name: asdict(listing.files[name]) for name in names}
    return {"hub": "hf_hub", "kind": listing.repo.kind, "repo": listing.repo.id, "commit": listing.commit, "files": files}


def _here(listing: Listing, name: str, home: Path, whole: Collection[str]) -> tuple[Path | None, str]:
    """What planning may read of a file, and its sha256."""
    wanted = Wanted(listing.at, check_name(name, listing.repo), listing.files[name])
    kept = home / listing.repo.folder / listing.commit / name
    if wanted.file.sha256 is None or name in whole:
        return kept, _whole(wanted, kept)
    if name.endswith(".safetensors"):
        _header(wanted, kept, home / listing.repo.folder / f"{listing.commit}.headers" / name)
        return kept, wanted.file.sha256
    return None, wanted.file.sha256


def _whole(wanted: Wanted, kept: Path) -> str:
    """A file that planning reads; what is remembered is believed while it is what the hub calls it."""
    if kept.is_file():
        sha256, git = digests(kept)
        if wanted.file.etag in (sha256, git):
            return sha256
    path, sha256 = bring(wanted, lambda count: None)
    with disk.writing(kept):
        disk.write(kept, path.read_bytes())
    return sha256


def _header(wanted: Wanted, kept: Path, seal: Path) -> None:
    """A header; what is remembered is believed while it has the digest that lies beside it."""
    try:
        if hashlib.sha256(kept.read_bytes()).hexdigest() == seal.read_text():
            return
    except OSError:
        pass  # not remembered
    first = head(wanted, FIRST_BYTES)
    needed = 8 + int.from_bytes(first[:8], "little")
    if len(first) < needed <= min(8 + headers.LIMIT_BYTES, wanted.file.size):
        first = head(wanted, needed)
    with disk.writing(kept):
        disk.write(kept, first[:needed])
        headers.read(kept, wanted.where, wanted.file.size)
        disk.write(seal, hashlib.sha256(first[:needed]).hexdigest().encode())


def fetch(how: Mapping[str, Any], expected: Mapping[str, str], progress: Progress) -> dict[str, Path]:
    """Every file that `locate` was asked for, complete, in the shared cache; each checked against `expected` (name -> sha256)."""
    repo = Repo(how["kind"], how["repo"], how["commit"])
    wanted = [Wanted(repo, check_name(name, repo), RepoFile(**file)) for name, file in how["files"].items()]
    _room(wanted)
    count = _Count(sum(one.file.size for one in wanted), sum(one.file.size - one.missing_bytes for one in wanted), progress)

    def one(wanted: Wanted) -> Path:
        try:
            path, sha256 = bring(wanted, count.tick)
            if sha256 != expected[wanted.name]:
                what = f"has sha256 {sha256}; the build was planned with {expected[wanted.name]}"
                raise BuildError(wanted.where, what, "run the same command again: it plans with what is there now")
            return path
        except BaseException:
            count.stopped.set()
            raise

    with ThreadPoolExecutor(AT_ONCE) as several:
        running = {file.name: several.submit(one, file) for file in wanted}
        try:
            errors = [error for error in (run.exception() for run in running.values()) if error is not None]
        except KeyboardInterrupt:
            count.stopped.set()  # leaving the pool waits for its threads
            raise
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):  # the one that stopped the others comes first
        raise error
    return {name: run.result() for name, run in running.items()}


def _room(wanted: list[Wanted]) -> None:
    """Refuses before the first byte what the disk cannot hold."""
    folder, missing = cache(), sum(one.missing_bytes for one in wanted)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if missing > free:
        what = f"has {free / 2**30:.1f} GiB free on its disk; {missing / 2**30:.1f} GiB are to be downloaded to it"
        raise BuildError(str(cache()), what, "make room (`hf cache ls` shows what lies there), or set HF_HUB_CACHE to another disk")


@dataclass
class _Count:
    """Bytes of all downloads together, told now and then."""

    total: int
    done: int
    progress: Progress

    def __post_init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._told_s = 0.0

    def tick(self, count: int) -> None:
        if self.stopped.is_set():
            raise Stopped
        with self._lock:
            self.done += count
            if self.done >= self.total or time.monotonic() - self._told_s > TELL_S:
                self._told_s = time.monotonic()
                self.progress("download", min(self.done, self.total), self.total)

"""Files of ModelScope repositories: streams that go on where they were cut, headers for planning, downloads into the shared cache.

The cache is the client's own (MODELSCOPE_CACHE), one folder a revision, so what is there already is not brought again.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from buildsys import digests, disk
from buildsys.errors import BuildError
from buildsys.hubs.modelscope import Listing, RepoFile, connect, passing, pinned, speaking, theirs
from buildsys.io import headers
from buildsys.located import Located

Client = Callable[[], Any]  # made when it is first needed: what is here already needs none
Progress = Callable[[str, int, int], None]

FIRST_BYTES = 256 << 10  # of a safetensors file: more than most headers
WHOLE_BYTES = 64 << 20  # a file that is no weights and no larger is brought whole when planning: a tokenizer is
PIECE_BYTES = 1 << 20
WORKERS = 4
TRIES = 4  # without a byte between them


def stream(api: Any, listing: Listing, name: str, start: int, end: int) -> Iterator[bytes]:
    """Bytes [start, end) of a file; asks again for the rest of what was cut."""
    from modelscope_hub.errors import NetworkError

    failures = 0
    while start < end:
        try:
            for piece in _ranged(api, listing, name, start, end):
                start, failures = start + len(piece), 0
                yield piece
            if start < end:
                raise NetworkError(f"{name} ended at byte {start}")
        except theirs() as error:
            failures += 1
            if failures == TRIES or not passing(error):
                raise
            time.sleep(2**failures / 4)


def _ranged(api: Any, listing: Listing, name: str, start: int, end: int) -> Iterator[bytes]:
    """One request. Files outside large storage are sent from their first byte whatever was asked for."""
    ranged = {"Range": f"bytes={start}-{end - 1}"}
    with api.legacy.download_stream(listing.repo, "model", name, listing.revision, headers=ranged) as response:
        at = start if response.status_code == 206 else 0
        for piece in response.iter_content(PIECE_BYTES):
            here = piece[max(0, start - at) : max(0, end - at)]
            at += len(piece)
            if here:
                yield here
            if at >= end:
                return


def read_back(api: Any, listing: Listing, name: str, tick: Callable[[int], None] = lambda count: None) -> str:
    """sha256 of the file that the server sends, which need not be the one that it lists."""
    found = sha256()
    for piece in stream(api, listing, name, 0, listing.files[name].size):
        found.update(piece)
        tick(len(piece))
    return found.hexdigest()


def whole(api: Any, listing: Listing, name: str) -> bytes:
    """A small file's content, checked against the listing."""
    file = listing.files[name]
    data = b"".join(stream(api, listing, name, 0, file.size))
    if file.sha256 not in ("", sha256(data).hexdigest()):
        raise _other(listing.where, name, file.sha256, sha256(data).hexdigest())
    return data


def _other(where: str, name: str, listed: str, sent: str) -> BuildError:
    fix = "run the same command again, the file is downloaded anew; if it stays so, tell the repository's owner"
    return BuildError(f"{where} {name}", f"the listing says sha256 {listed}, what was sent has {sent}", fix)


# Here


def locate(listing: Listing, names: Iterable[str], home: Path) -> Located:
    """What planning may know of these files; `files` and `sha256` have every name.

    Headers of weights are brought under `home`, small files into the client's cache. What is away is in `sizes`.
    """
    chosen = {name: listing.files[name] for name in sorted(names)}
    away = {name: file.size for name, file in chosen.items() if name.endswith(".safetensors") or file.size > WHOLE_BYTES}
    unknown = [name for name in away if not chosen[name].sha256]
    if unknown:
        what = f"lists no sha256 of {unknown[0]}, so a download of it cannot be checked"
        raise BuildError(listing.where, what, "download it yourself, look at it, and name its folder as the source: local")
    client = cache(connect)
    with speaking(listing.where, pinned(listing.repo, home)), ThreadPoolExecutor(WORKERS) as pool:
        files = dict(zip(chosen, pool.map(lambda name: _readable(client, listing, name, home, name in away), chosen), strict=True))
    found = {name: file.sha256 or digests.sha256(files[name]) for name, file in chosen.items()}
    how = {"repo": listing.repo, "revision": listing.revision, "sizes": {name: file.size for name, file in chosen.items()}}
    pin = f"{listing.repo} at {listing.commit[:12] or listing.asked}"
    return Located(files, found, away, how, commit=listing.commit, pin=pin)


def _readable(client: Client, listing: Listing, name: str, home: Path, away: bool) -> Path:
    """The file that planning reads: its header, itself, or, where it is large and no weights, the place where `fetch` will put it."""
    if away:
        return _header(client, listing, name, home) if name.endswith(".safetensors") else _place(listing, name)
    kept = _kept(listing, name)
    if kept is None:
        kept = _place(listing, name)
        data = whole(client(), listing, name)
        with disk.writing(kept):
            disk.write(kept, data)
    return kept


def _header(client: Client, listing: Listing, name: str, home: Path) -> Path:
    """The safetensors header alone, remembered by the digest of the whole file and its own: a damaged one is asked for again."""
    file, folder = listing.files[name], home / "modelscope" / "headers"
    for known in folder.glob(f"{file.sha256}-*.safetensors"):
        if known.stem.endswith(sha256(known.read_bytes()).hexdigest()):
            return known
    data = b"".join(stream(client(), listing, name, 0, min(FIRST_BYTES, file.size)))
    need = _header_bytes(data, file.size)
    data = data[:need] + b"".join(stream(client(), listing, name, len(data), need))
    here = folder / f"{file.sha256}-{sha256(data).hexdigest()}.safetensors"
    with disk.writing(here):
        disk.write(here, data)
    return here


def _header_bytes(data: bytes, file_bytes: int) -> int:
    """Where the header ends; of what is no header, no more than what is there: the reader of headers says what is wrong."""
    end = 8 + int.from_bytes(data[:8], "little")
    return end if end <= min(file_bytes, 8 + headers.LIMIT_BYTES) else len(data)


def _cache() -> Path:
    return Path(os.environ.get("MODELSCOPE_CACHE") or Path.home() / ".cache" / "modelscope").expanduser().resolve()


def _snapshots(repo: str) -> Path:
    return _cache() / "models" / repo.replace("/", "--") / "snapshots"


def _place(listing: Listing, name: str) -> Path:
    return _snapshots(listing.repo) / listing.revision / name


def _kept(listing: Listing, name: str) -> Path | None:
    """This content in the shared cache: at this revision, at another one, or where clients before 1.37 put it."""
    owner, short = listing.repo.split("/")
    older = Path("models", owner, short.replace(".", "___"), name)
    others = sorted(path / name for path in _snapshots(listing.repo).glob("*"))
    file = listing.files[name]
    for place in (_place(listing, name), *others, _cache() / older, _cache() / "hub" / older):
        if place.is_file() and place.stat().st_size == file.size and digests.sha256(place) == file.sha256:
            return place
    return None


def fetch(how: Mapping[str, Any], expected: Mapping[str, str], progress: Progress) -> dict[str, Path]:
    """Every file that `locate` was asked for, complete, in the shared cache; each checked against `expected` (name -> sha256)."""
    files = {name: RepoFile(size, expected[name]) for name, size in how["sizes"].items()}
    listing = Listing(how["repo"], how["revision"], how["revision"], files)
    found = {name: kept for name in files if (kept := _kept(listing, name)) is not None}
    missing = [name for name in files if name not in found]
    if not missing:
        return found
    _room(sum(files[name].size for name in missing))
    api, done = connect(), _Done(sum(files[name].size for name in missing), progress)
    with speaking(listing.where), ThreadPoolExecutor(WORKERS) as pool:
        futures = {name: pool.submit(_download, api, listing, name, done) for name in missing}
        try:
            found |= {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _room(need_bytes: int) -> None:
    """Refuses before the first byte what the disk cannot hold."""
    folder = _cache()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need_bytes > free:
        what = f"has {free / 2**30:.1f} GiB free on its disk; {need_bytes / 2**30:.1f} GiB are to be downloaded to it"
        raise BuildError(str(_cache()), what, "make room there, or set MODELSCOPE_CACHE to a folder on another disk")


class _Done:
    """Bytes of all downloads together."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._lock = threading.Lock()
        self._done, self._total, self._progress = 0, total, progress

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._progress("download", self._done, self._total)


def _download(api: Any, listing: Listing, name: str, done: _Done) -> Path:
    """One file through the client: it locks, resumes and retries. `local_dir` keeps it from writing over an older client's folder."""

    class Told:  # modelscope_hub.ProgressCallback: the client makes one a file
        def __init__(self, filename: str, file_size: int) -> None:
            pass

        def update(self, size: int) -> None:
            done.add(size)

        def end(self) -> None:
            pass

    file = listing.files[name]
    folder = _snapshots(listing.repo) / listing.revision
    (folder / name).unlink(
        missing_ok=True
    )  # other content of the same size, or it would have been kept: the client looks at the size alone
    path = Path(
        api.downloader.download_file(
            listing.repo,
            "model",
            name,
            revision=listing.revision,
            local_dir=folder,
            file_size=file.size,
            progress_callbacks=[Told],
        )
    )
    sent = digests.sha256(path)
    if sent != file.sha256:
        path.unlink()
        raise _other(listing.where, name, file.sha256, sent)
    return path

"""One repository of an OCI registry: blobs by digest, manifests by digest or tag, uploads that go on where they were cut.

OCI Distribution Specification 1.1 (github.com/opencontainers/distribution-spec, spec.md). Why it is our own: docs/decisions/0006.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, urljoin

import httpx2

from buildsys.errors import BuildError
from buildsys.hubs.registry_http import RETRIED, Ask, Body, Connection, content

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER = ("application/vnd.docker.distribution.manifest.v2+json", "application/vnd.docker.distribution.manifest.list.v2+json")

PIECE_BYTES = 1 << 20
COMMIT_WAIT_S = 900.0  # a registry may copy a large blob once more before it answers

Opened = Callable[[int], Iterator[bytes]]
Sent = Callable[[int], None]


@dataclass(frozen=True)
class Manifest:
    """A manifest as the registry holds it. `digest` was computed from `raw`, here."""

    raw: bytes
    said: Mapping[str, Any]
    digest: str


def digest_of(raw: bytes) -> str:
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def listed(index: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The descriptors in an index."""
    found = index.get("manifests")
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def pieces(path: Path, offset: int) -> Iterator[bytes]:
    """A file's bytes from `offset` on, a piece at a time."""
    with path.open("rb") as file:
        file.seek(offset)
        while piece := file.read(PIECE_BYTES):
            yield piece


class Registry:
    """Open it with `with`."""

    def __init__(self, host: str, repository: str, insecure: bool, waits_s: tuple[float, ...] = (0.5, 2.0, 8.0)) -> None:
        self._connection = Connection(host, repository, insecure, waits_s)
        self._waits_s = waits_s
        self.name = self._connection.name

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._connection.close()

    def _ask(
        self, method: str, where: str, accept: tuple[int, ...], headers: Mapping[str, str] | None = None, **more: Any
    ) -> httpx2.Response:
        return self._connection.ask(Ask(method, where, accept, headers or {}, **more))

    # Blobs

    def has_blob(self, digest: str) -> bool:
        return self._ask("HEAD", f"blobs/{digest}", (200, 404)).status_code == 200

    def blob(self, digest: str) -> Iterator[bytes]:
        """The blob's bytes as they come; a cut connection is taken up where it broke. Comparing the digest is the reader's."""
        done, waits = 0, iter(self._waits_s)
        while True:
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
            with closing(self._connection.opened(Ask("GET", f"blobs/{digest}", (200, 206), headers))) as answer:
                skip = done if answer.status_code == 200 else 0
                try:
                    for piece in answer.iter_raw():
                        fresh, skip = piece[skip:], max(0, skip - len(piece))
                        done += len(fresh)
                        yield fresh
                    return
                except httpx2.RequestError as error:
                    wait_s = next(waits, None)
                    if wait_s is None:
                        raise self._connection.unreachable(error) from None
            time.sleep(wait_s)

    def upload(self, digest: str, size: int, opened: Opened, sent: Sent, chunk_bytes: int | None = None) -> None:
        """Sends a blob that is not there; `opened(offset)` yields it from `offset` on. A cut upload goes on from what has arrived."""
        where, offset, waits = self._begin(), 0, iter(self._waits_s)
        while offset < size:
            end = min(size, offset + chunk_bytes) if chunk_bytes else size
            answer = self._patch(where, offset, end, size, partial(_part, opened, offset, end, sent))
            if isinstance(answer, httpx2.Response) and answer.status_code == 202:
                where = self._connection.location(answer, where)
                before, offset = offset, _arrived(answer, end)
                if offset > before:
                    continue
            wait_s = next(waits, None)
            if wait_s is None:
                raise self._failed(answer) from None
            time.sleep(wait_s)
            where, offset = self._resume(where)
        closing_at = f"{where}{'&' if '?' in where else '?'}digest={quote(digest, safe='')}"
        answer = self._ask("PUT", closing_at, (201,), {"Content-Length": "0"}, wait_s=COMMIT_WAIT_S)
        self._same(answer, digest)

    def _begin(self) -> str:
        answer = self._ask("POST", "blobs/uploads/", (202,), {"Content-Length": "0"})
        return self._connection.location(answer, urljoin(self._connection.base, "blobs/uploads/"))

    def _patch(self, where: str, first: int, end: int, size: int, body: Body) -> httpx2.Response | httpx2.RequestError:
        """Sends bytes `first` to `end`. What may go better another time is returned, everything else raises."""
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(end - first)}
        if first or end < size:  # a whole blob goes without, as docker sends it: not every registry reads ranges
            headers["Content-Range"] = f"{first}-{end - 1}"
        try:
            answer = self._connection.once(Ask("PATCH", where, (202,), headers, body, COMMIT_WAIT_S))
        except httpx2.RequestError as error:
            return error
        if answer.status_code not in (202, 416, *RETRIED):
            raise self._connection.refused("PATCH", answer)
        return answer

    def _resume(self, where: str) -> tuple[str, int]:
        """Where an upload that was cut goes on, and from which byte; what the registry has forgotten starts anew."""
        answer = self._ask("GET", where, (200, 204, 404, 405))
        if answer.status_code in (404, 405):
            return self._begin(), 0
        return self._connection.location(answer, where), _arrived(answer, 0)

    def _failed(self, answer: httpx2.Response | httpx2.RequestError) -> BuildError:
        if isinstance(answer, httpx2.RequestError):
            return self._connection.unreachable(answer)
        return self._connection.refused("PATCH", answer)

    # Manifests and tags

    def manifest(self, reference: str) -> Manifest | None:
        """By digest or tag; None where there is none. Bytes of another digest than was asked for or told are refused."""
        answer = self._ask("GET", f"manifests/{reference}", (200, 404), {"Accept": ", ".join((MANIFEST, INDEX, *DOCKER))})
        if answer.status_code == 404:
            return None
        found = digest_of(answer.content)
        self._same(answer, found)
        if reference.startswith("sha256:") and reference != found:
            raise BuildError(self.name, f"answers {found} when asked for {reference}", "tell the registry's operator: it is damaged")
        said = content(answer)
        if not said:
            raise BuildError(self.name, f"answers no JSON when asked for the manifest {reference}", "check that it is an OCI registry")
        return Manifest(answer.content, said, found)

    def put_manifest(self, reference: str, raw: bytes, media_type: str) -> Mapping[str, str]:
        """Stores a manifest under a digest or a tag, in one step; returns the answer's headers."""
        headers = {"Content-Type": media_type, "Content-Length": str(len(raw))}
        answer = self._ask("PUT", f"manifests/{reference}", (201,), headers, body=lambda: iter((raw,)))
        self._same(answer, digest_of(raw))
        return answer.headers

    def tags(self) -> list[str]:
        """All of the repository's; none where there is no such repository yet."""
        found: list[str] = []
        where: str | None = "tags/list?n=1000"
        asked: set[str] = set()
        while where and where not in asked:
            asked.add(where)
            answer = self._ask("GET", where, (200, 404))
            found += [str(tag) for tag in content(answer).get("tags") or []]
            where = answer.links.get("next", {}).get("url")
        return found

    def referrers(self, digest: str) -> list[Mapping[str, Any]] | None:
        """Descriptors of what names this manifest as its subject; None where the registry has no referrers API."""
        answer = self._ask("GET", f"referrers/{digest}", (200, 400, 404, 405))
        said = content(answer) if answer.status_code == 200 else {}
        return listed(said) if said.get("mediaType") == INDEX else None

    def _same(self, answer: httpx2.Response, digest: str) -> None:
        """A registry that computes another digest of the same bytes is not to be trusted with them."""
        told = answer.headers.get("Docker-Content-Digest", digest)
        if told.startswith("sha256:") and told != digest:
            raise BuildError(self.name, f"calls {told} what is {digest}", "publish again; if it stays so, tell the registry's operator")


def _part(opened: Opened, first: int, end: int, sent: Sent) -> Iterator[bytes]:
    """Bytes `first` to `end`; tells how far the blob is."""
    at = first
    for piece in opened(first):
        wanted = piece[: end - at]
        yield wanted
        at += len(wanted)
        sent(at)
        if at == end:
            return


def _arrived(answer: httpx2.Response, otherwise: int) -> int:
    """How many bytes of an upload the registry has: `Range: 0-1023` are 1,024; `0-0` is what is said of none, and of one."""
    last = answer.headers.get("Range", "").rpartition("-")[2]
    if not last.isdecimal():
        return otherwise
    return int(last) + 1 if int(last) else otherwise

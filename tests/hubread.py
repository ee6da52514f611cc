"""What the hub of hubserver.py answers to who only looks: information, listings, references, files and parts of files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from hubrepo import Refused, entry
from hubwire import Answer, Request, Route, as_json

if TYPE_CHECKING:
    from hubserver import HubServer


def information(hub: HubServer, request: Request, kind: str, id: str, revision: str = "main") -> Answer:
    repo = hub.readable(kind, id, request.user)
    commit = repo.commit(revision or "main")
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
    if request.asks("blobs"):
        for sibling in siblings:
            told = entry(sibling["rfilename"], commit.files[sibling["rfilename"]])
            lfs = {"lfs": {**told["lfs"], "sha256": told["lfs"]["oid"]}} if "lfs" in told else {}
            sibling |= {"size": told["size"], "blobId": told["oid"], **lfs}
    created = repo.history(commit.id)[-1].date
    return as_json(
        {
            "_id": id,
            "id": id,
            "author": id.split("/")[0],
            "sha": commit.id,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "lastModified": commit.date,
            "createdAt": created,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
            "usedStorage": sum(map(len, repo.stored.values())),
        }
    )


def tree(hub: HubServer, request: Request, kind: str, id: str, revision: str, folder: str = "") -> Answer:
    repo = hub.readable(kind, id, request.user)
    entries = repo.listed(repo.commit(revision).files, f"{folder}/" if folder else "", request.asks("recursive"))
    start = int(request.query.get("cursor", ["0"])[0])
    end = start + int(request.query.get("limit", [str(hub.page)])[0])
    more = f"{hub.url}{request.path}?recursive={request.asks('recursive')}&limit={end - start}&cursor={end}"
    return as_json(entries[start:end], **({"Link": f'<{more}>; rel="next"'} if end < len(entries) else {}))


def paths_info(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    repo = hub.readable(kind, id, request.user)
    files = repo.commit(revision).files
    asked = parse_qs(request.body.decode()).get("paths", []) if b"paths=" in request.body else request.json().get("paths", [])
    everything = repo.listed(files, "", recursive=True)
    return as_json([one for one in everything if one["path"] in {path.rstrip("/") for path in asked}])


def references(hub: HubServer, request: Request, kind: str, id: str) -> Answer:
    repo = hub.readable(kind, id, request.user)
    sorts = {"branches": "refs/heads/", "tags": "refs/tags/", "converts": "refs/convert/", "pullRequests": "refs/pr/"}
    if not request.asks("include_prs"):
        del sorts["pullRequests"]
    told = {
        sort: [{"name": ref.removeprefix(start), "ref": ref, "targetCommit": id} for ref, id in repo.refs.items() if ref.startswith(start)]
        for sort, start in sorts.items()
    }
    return as_json(told)


def commits(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    history = hub.readable(kind, id, request.user).history(revision)
    return as_json(
        [{"id": one.id, "authors": [{"user": one.author}], "date": one.date, "title": one.title, "message": one.message} for one in history]
    )


def resolve(hub: HubServer, request: Request, id: str, revision: str, file: str, prefix: str = "") -> Answer:
    """One file: the content of a small one, for a large one where its content is. A HEAD never follows there."""
    repo = hub.opened("dataset" if prefix else "model", id, request.user)
    commit, blob = repo.blob(revision, file)
    said = {"X-Repo-Commit": commit.id, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    if not blob.large:
        return ranged(request, blob.content, {**said, "ETag": f'"{blob.id}"'})
    linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content)), "ETag": f'"{blob.id}"'}
    location = f"{hub.cdn_url}/{repo.kind}/{id}/{blob.sha256}?signed=yes"
    return Answer(f"Found. Redirecting to {location}".encode(), 302, {**said, **linked, "Location": location})


def stored(hub: HubServer, request: Request, kind: str, id: str, oid: str) -> Answer:
    if "authorization" in request.headers:
        raise Refused(400, "Only one auth mechanism allowed; the signed address is one")
    return ranged(request, hub.repos[kind, id].stored[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def ranged(request: Request, content: bytes, headers: Mapping[str, str]) -> Answer:
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not asked or asked[0] == "bytes=-":
        return Answer(content, 200, headers)
    first, last = asked.groups()
    start = int(first) if first else max(0, len(content) - int(last))
    end = min(int(last) + 1, len(content)) if first and last else len(content)
    if start >= end:
        return Answer(b"", 416, {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Answer(content[start:end], 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})


def whoami(hub: HubServer, request: Request) -> Answer:
    if request.user is None:
        raise Refused(401, "Invalid username or password.")
    orgs = [{"name": org, "type": "org"} for org in request.user.orgs]
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write" if request.user.write else "read"}}
    return as_json({"type": "user", "id": request.user.name, "name": request.user.name, "orgs": orgs, "auth": auth})


ID = r"(?P<id>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>model|dataset)s/{ID}"
REVISION = r"(?P<revision>[^/]+|refs/pr/\d+|refs/convert/[^/]+)"
HUB: tuple[Route, ...] = (
    ("GET", r"/api/whoami-v2", whoami),
    ("GET HEAD", API, information),
    ("GET HEAD", rf"{API}/revision/{REVISION}", information),
    ("GET HEAD", rf"{API}/tree/{REVISION}(/(?P<folder>.+))?", tree),
    ("POST", rf"{API}/paths-info/{REVISION}", paths_info),
    ("GET", rf"{API}/refs", references),
    ("GET", rf"{API}/commits/{REVISION}", commits),
    ("GET HEAD", rf"/(?P<prefix>datasets/)?{ID}/resolve/{REVISION}/(?P<file>.+)", resolve),
)
CDN: tuple[Route, ...] = (("GET HEAD", rf"/(?P<kind>model|dataset)/{ID}/(?P<oid>[0-9a-f]{{64}})", stored),)

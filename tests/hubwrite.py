"""What the hub of hubserver.py takes: new repositories, large files, commits, tags, pull requests."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
from typing import TYPE_CHECKING, Any

import yaml
from hubread import API, ID, REVISION
from hubrepo import LARGE, Blob, Discussion, Refused, Repo, is_large
from hubwire import Answer, Request, Route, User, as_json

if TYPE_CHECKING:
    from hubserver import HubServer


def writer(request: Request, repo_id: str) -> User:
    """Who asks, if it may write there."""
    user = request.user
    if user is None:
        raise Refused(401, "Invalid username or password.")
    if not user.write:
        raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
    if not user.owns(repo_id):
        raise Refused(403, "Authorization error.")
    return user


def create(hub: HubServer, request: Request) -> Answer:
    asked = request.json()
    owner = asked.get("organization") or (request.user.name if request.user else "")
    kind, repo_id = asked.get("type") or "model", f"{owner}/{asked['name']}"
    user = request.user
    if user is not None and not user.owns(repo_id):
        raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
    user = writer(request, repo_id)
    url = f"{hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
    if (kind, repo_id) in hub.repos:
        return as_json({"error": f"You already created this {kind} repo", "url": url}, 409)
    repo = hub.repos[kind, repo_id] = Repo(kind, repo_id, private=asked.get("visibility") == "private")
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE).encode()
    repo.record("refs/heads/main", {".gitattributes": Blob(attributes, False)}, "initial commit", user.name)
    return as_json({"url": url, "name": repo_id, "id": repo_id})


def delete(hub: HubServer, request: Request) -> Answer:
    asked = request.json()
    owner = asked.get("organization") or (request.user.name if request.user else "")
    kind, repo_id = asked.get("type") or "model", f"{owner}/{asked['name']}"
    writer(request, repo_id)
    hub.readable(kind, repo_id, request.user)
    del hub.repos[kind, repo_id]
    return as_json({})


def validate_yaml(hub: HubServer, request: Request) -> Answer:
    content = request.json()["content"]
    if not content.startswith("---\n"):
        return as_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    try:
        found = yaml.safe_load(content.split("---\n")[1])
    except yaml.YAMLError as error:
        return as_json({"errors": [{"message": f"Invalid YAML: {error}"}], "warnings": []}, 400)
    errors = [] if isinstance(found, dict) else [{"message": "metadata must be a mapping"}]
    return as_json({"errors": errors, "warnings": []}, 400 if errors else 200)


def preupload(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    """How each file is to come, and what is there under its name."""
    repo = hub.readable(kind, id, request.user)
    if not request.asks("create_pr"):
        writer(request, id)
    held, asked = repo.commit(revision).files, request.json()
    ignore = asked.get("gitIgnore") or (held[".gitignore"].content.decode() if ".gitignore" in held else "")
    globs = [line for line in ignore.split() if not line.startswith("#")]
    told = []
    for file in asked["files"]:
        path, binary = file["path"], b"\0" in base64.b64decode(file["sample"])
        mode = "lfs" if is_large(path, file["size"]) or binary else "regular"
        ignored = any(fnmatch.fnmatch(path.split("/")[-1], glob) for glob in globs)
        oid = {"oid": held[path].etag} if path in held else {}
        told.append({"path": path, "uploadMode": mode, "shouldIgnore": ignored, **oid})
    return as_json({"files": told})


def batch(hub: HubServer, request: Request, id: str, prefix: str = "") -> Answer:
    """Where each large file is to be sent, or nothing where it is here."""
    kind = "dataset" if prefix else "model"
    repo = hub.readable(kind, id, request.user)
    asked = request.json()
    if "ref" in asked:
        writer(request, id)
    return as_json({"transfer": "multipart", "objects": [_transfer(hub, repo, one["oid"], one["size"]) for one in asked["objects"]]})


def _transfer(hub: HubServer, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    if oid in repo.stored:
        return {"oid": oid, "size": size}
    there = f"{repo.kind}/{repo.id}/{oid}"
    upload: dict[str, Any] = {"href": f"{hub.cdn_url}/{there}?signed=yes"}
    if size > hub.part_bytes:
        numbers = range(1, -(-size // hub.part_bytes) + 1)
        header = {"chunk_size": str(hub.part_bytes)} | {str(number): f"{hub.cdn_url}/{there}/{number}?signed=yes" for number in numbers}
        upload = {"href": f"{hub.url}/api/complete/{there}", "header": header}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/api/verify/{there}"}}}


def take(hub: HubServer, request: Request, kind: str, id: str, oid: str, part: str = "") -> Answer:
    """A large file, or one part of it, sent to the store; nothing counts before it is verified."""
    if "authorization" in request.headers:
        raise Refused(400, "Only one auth mechanism allowed; the signed address is one")
    hub.parts.setdefault(oid, {})[int(part or 0)] = request.body
    return Answer(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


def complete(hub: HubServer, request: Request, kind: str, id: str, oid: str) -> Answer:
    parts = hub.parts.get(oid, {})
    named = {one["partNumber"]: one["etag"] for one in request.json()["parts"]}
    if named != {number: f'"{hashlib.md5(part).hexdigest()}"' for number, part in parts.items()}:
        raise Refused(400, "InvalidPart: one of the parts could not be found, or its entity tag is another")
    hub.parts[oid] = {0: b"".join(parts[number] for number in sorted(parts))}
    return as_json({})


def verify(hub: HubServer, request: Request, kind: str, id: str, oid: str) -> Answer:
    content = hub.parts.pop(oid, {}).get(0, b"")
    if hashlib.sha256(content).hexdigest() != oid or len(content) != request.json()["size"]:
        raise Refused(422, f"sha256 or size of {oid} is not as it was said")
    hub.readable(kind, id, request.user).stored[oid] = content
    return as_json({})


def commit(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    """One commit on a branch or a pull request, or as a new pull request; all of it or nothing."""
    repo = hub.readable(kind, id, request.user)
    opens = request.asks("create_pr")
    user = request.user if opens and request.user else writer(request, id)
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    said, head = header["value"], repo.commit(revision)
    parent = said.get("parentCommit", "")
    if opens:
        head = repo.commit(parent or revision)
    elif parent and not head.id.startswith(parent):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(head.files)
    for operation in operations:
        _apply(repo, files, operation["key"], operation["value"])
    ref = repo.ref(revision)
    if not ref.startswith(("refs/heads/", "refs/pr/")):
        raise Refused(404, f"{revision} is no branch", "RevisionNotFound")
    number = len(repo.discussions) + 1
    if opens:
        base, ref = ref.removeprefix("refs/heads/"), f"refs/pr/{number}"
    made = repo.record(ref, files, said["summary"], user.name, head.id, said.get("description", ""))
    page = f"{hub.url}/{repo.prefix}{id}"
    answer = {"success": True, "commitOid": made.id, "commitUrl": f"{page}/commit/{made.id}", "hookOutput": ""}
    if opens:
        repo.discussions.append(Discussion(number, said["summary"], user.name, True, base=base, created=made.date))
        answer |= {"pullRequestUrl": f"{page}/discussions/{number}"}
    return as_json(answer)


def _apply(repo: Repo, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
    path = value["path"]
    if key == "file":
        files[path] = Blob(base64.b64decode(value["content"]), False)
    elif key == "lfsFile":
        if value["oid"] not in repo.stored:
            raise Refused(
                400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {path} {value['oid']}"
            )
        files[path] = Blob(repo.stored[value["oid"]], True)
    elif key == "deletedFile":
        if path not in files:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        del files[path]
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[name]
    else:
        raise Refused(400, f"unknown operation {key}")


def tag(hub: HubServer, request: Request, kind: str, id: str, revision: str) -> Answer:
    repo = hub.readable(kind, id, request.user)
    writer(request, id)
    if request.method == "DELETE":
        if repo.refs.pop(f"refs/tags/{revision}", None) is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return as_json({})
    name = request.json()["tag"]
    if f"refs/tags/{name}" in repo.refs:
        raise Refused(409, f"Tag {name} exists already")
    repo.tag(name, revision)
    return as_json({})


def branch(hub: HubServer, request: Request, kind: str, id: str, name: str) -> Answer:
    repo = hub.readable(kind, id, request.user)
    writer(request, id)
    ref = f"refs/heads/{name}"
    if request.method == "DELETE":
        if name == "main" or repo.refs.pop(ref, None) is None:
            raise Refused(400, f"Cannot delete branch {name}")
        return as_json({})
    if ref in repo.refs:
        raise Refused(409, f"Branch {name} exists already")
    repo.refs[ref] = repo.commit(request.json().get("startingPoint", "main")).id
    return as_json({})


def discussions(hub: HubServer, request: Request, kind: str, id: str) -> Answer:
    repo = hub.readable(kind, id, request.user)
    if request.method == "POST":
        if request.user is None:
            raise Refused(401, "Invalid username or password.")
        return _open(repo, request.json(), request.user)
    sort, status = (request.query.get(name, ["all"])[0] for name in ("type", "status"))
    found = [one for one in repo.discussions if sort == "all" or one.pull_request == (sort == "pull_request")]
    found = [one for one in found if status == "all" or (one.status in ("open", "draft")) == (status == "open")]
    start = 10 * int(request.query.get("p", ["0"])[0])
    newest_first = found[::-1]
    return as_json({"discussions": [_told(repo, one) for one in newest_first[start : start + 10]], "count": len(found), "start": start})


def _open(repo: Repo, asked: dict[str, Any], user: User) -> Answer:
    number, pull = len(repo.discussions) + 1, asked["pullRequest"]
    if pull:
        repo.refs[f"refs/pr/{number}"] = repo.refs["refs/heads/main"]
    made = Discussion(number, asked["title"], user.name, pull, "draft" if pull else "open", created=repo.commit("main").date)
    repo.discussions.append(made)
    return as_json({"num": number, "pullRequest": pull})


def _told(repo: Repo, one: Discussion) -> dict[str, Any]:
    who = {"author": {"name": one.author}, "createdAt": one.created, "repo": {"name": repo.id, "type": repo.kind}}
    return {"num": one.number, "title": one.title, "status": one.status, "isPullRequest": one.pull_request, **who}


def discussion(hub: HubServer, request: Request, kind: str, id: str, number: str) -> Answer:
    repo = hub.readable(kind, id, request.user)
    one = _numbered(repo, number)
    events = []
    if one.pull_request:
        base = {commit.id for commit in repo.history(one.base)}
        for made in reversed(repo.history(f"refs/pr/{number}")):
            if made.id not in base or made.id == one.merged_as:
                data = {"subject": made.title, "oid": made.id}
                events.append({"id": made.id[:12], "type": "commit", "createdAt": made.date, "author": {"name": made.author}, "data": data})
    changes = {"changes": {"base": f"refs/heads/{one.base}", **({"mergeCommitId": one.merged_as} if one.merged_as else {})}}
    return as_json({**_told(repo, one), "events": events, "filesWithConflicts": [], **changes})


def _numbered(repo: Repo, number: str) -> Discussion:
    found = next((one for one in repo.discussions if one.number == int(number)), None)
    if found is None:
        raise Refused(404, "Discussion not found", "EntryNotFound")
    return found


def change(hub: HubServer, request: Request, kind: str, id: str, number: str, act: str) -> Answer:
    """Merges a pull request, or opens and closes any discussion."""
    repo = hub.readable(kind, id, request.user)
    user = writer(request, id)
    one = _numbered(repo, number)
    if act == "status":
        one.status = request.json()["status"]
        event = {"id": f"{number}-{one.status}", "type": "status-change", "createdAt": one.created, "author": {"name": user.name}}
        return as_json({"newStatus": {**event, "data": {"status": one.status}}})
    if not one.pull_request or one.status not in ("open", "draft"):
        raise Refused(400, f"cannot be merged: it is {one.status}")
    head = repo.commit(f"refs/pr/{number}")
    target = repo.commit(one.base)
    ours = {commit.id: commit for commit in repo.history(target.id)}
    base = next(commit for commit in repo.history(head.id) if commit.id in ours).files
    changed = {path for path in {*base, *head.files} if base.get(path) != head.files.get(path)}
    files = {path: blob for path, blob in target.files.items() if path not in changed}
    files |= {path: head.files[path] for path in changed if path in head.files}
    one.merged_as = repo.record(f"refs/heads/{one.base}", files, f"{one.title} (#{number})", user.name).id
    one.status = "merged"
    return as_json({})


OBJECT = rf"(?P<kind>model|dataset)/{ID}/(?P<oid>[0-9a-f]{{64}})"
HUB: tuple[Route, ...] = (
    ("POST", r"/api/repos/create", create),
    ("DELETE", r"/api/repos/delete", delete),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("POST", rf"{API}/preupload/{REVISION}", preupload),
    ("POST", rf"/(?P<prefix>datasets/)?{ID}\.git/info/lfs/objects/batch", batch),
    ("POST", rf"/api/complete/{OBJECT}", complete),
    ("POST", rf"/api/verify/{OBJECT}", verify),
    ("POST", rf"{API}/commit/{REVISION}", commit),
    ("POST DELETE", rf"{API}/tag/{REVISION}", tag),
    ("POST DELETE", rf"{API}/branch/(?P<name>[^/]+)", branch),
    ("GET POST", rf"{API}/discussions", discussions),
    ("GET", rf"{API}/discussions/(?P<number>\d+)", discussion),
    ("POST", rf"{API}/discussions/(?P<number>\d+)/(?P<act>merge|status)", change),
)
CDN: tuple[Route, ...] = (("PUT", rf"/{OBJECT}(/(?P<part>\d+))?", take),)

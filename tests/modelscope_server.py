"""ModelScope on 127.0.0.1, for the real modelscope-hub client over HTTP: repositories of models, and faults on demand.

Endpoints and answers are those that the client's source knows (modelscope_hub 0.5.1: _legacy_api.py, _upload.py, errors.py). A file in
large storage is redirected to another origin, which takes ranges and no token, as the object store does; other files are sent whole.

    with ModelScopeServer() as server:
        commit = server.add("org/name", {"config.json": b"{}", "model.safetensors": b"…"})
        server.fail(r"/objects/", cut=True)                       # once; times=2 for twice
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

WRITER, READER = "ms-writer-5f0c1e9b2d", "ms-reader-77ab41c06e"
OWN = {".gitattributes": b"*.safetensors filter=lfs\n", "configuration.json": b'{"framework":"other"}'}
"""What the hub writes into a new repository."""


class Logged(NamedTuple):
    method: str
    path: str  # without the query
    query: Mapping[str, str]
    headers: Mapping[str, str]  # in lower case
    status: int


@dataclass
class Fault:
    path: str  # searched for in path?query, a regular expression
    status: int = 0  # answer this
    cut: bool = False  # close the connection in the middle of the body
    body: bytes | None = None  # send this in place of the content
    method: str = ""  # any
    act: Callable[[], object] | None = None  # happens first: somebody else's commit
    times: int = 1


@dataclass(frozen=True)
class Blob:
    data: bytes
    large: bool
    commit: str  # that last changed it
    when: int

    @property
    def sha256(self) -> str:
        return sha256(self.data).hexdigest()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> dict[str, Blob] | None:
        return self.commits.get(self.branches.get(revision) or self.tags.get(revision) or revision)

    def commit(self, branch: str, changes: Mapping[str, tuple[bytes, bool] | None], message: str = "") -> str:
        """A commit on top of `branch`; None deletes. The clock is the number of commits."""
        parent, when = self.branches.get(branch, ""), len(self.commits) + 1
        oid = sha1(f"{parent} {when} {message} {sorted(changes)}".encode()).hexdigest()
        tree = dict(self.commits.get(parent, {}))
        for path, change in changes.items():
            tree.pop(path, None)
            if change is not None:
                tree[path] = Blob(*change, oid, when)
        self.commits[oid], self.branches[branch] = tree, oid
        self.messages.append(message)
        return oid


class Refused(Exception):
    def __init__(self, status: int, message: str, code: int = 0) -> None:
        self.status, self.message, self.code = status, message, code


class ModelScopeServer:
    """Repositories and faults may be changed at any time; `lock` is held while a request is answered."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.log: list[Logged] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.commits = True  # whether a listing names the commit of each file
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> ModelScopeServer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def use(self, patch: pytest.MonkeyPatch, folder: Path, token: str = "") -> None:
        """The client's environment: this server, a machine that has never seen one, and nobody's real login."""
        for name in ("MODELSCOPE_DOMAIN", "MODELSCOPE_CLOUD_USERNAME"):
            patch.delenv(name, raising=False)
        patch.setenv("NO_PROXY", "*")
        patch.setenv("MODELSCOPE_ENDPOINT", self.url)
        patch.setenv("MODELSCOPE_CACHE", str(folder / "cache"))
        patch.setenv("MODELSCOPE_HOME", str(folder / "login"))
        patch.setenv("MODELSCOPE_API_TOKEN", token)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def objects_url(self) -> str:
        return f"http://localhost:{self._server.server_port}/objects"

    def add(self, repo: str, files: Mapping[str, bytes], branch: str = "master", private: bool = False, gated: bool = False) -> str:
        """A commit after which `branch` holds these files and no others."""
        with self.lock:
            known = self.repos.setdefault(repo, Repo(private, gated))
            gone = dict.fromkeys(set(known.at(branch) or {}) - files.keys())
            changed = {path: (data, is_large(path, data)) for path, data in files.items() if self.content(repo, path, branch) != data}
            self.objects |= {sha256(data).hexdigest(): data for data, large in changed.values() if large}
            return known.commit(branch, {**gone, **changed})

    def content(self, repo: str, path: str, revision: str = "master") -> bytes | None:
        blob = (self.repos[repo].at(revision) or {}).get(path)
        return blob.data if blob else None

    def fail(self, path: str, **how: Any) -> Fault:
        self.faults.append(Fault(path, **how))
        return self.faults[-1]

    def asked(self, method: str, path: str) -> list[Logged]:
        return [one for one in self.log if one.method == method and re.search(path, one.path)]


def is_large(path: str, data: bytes) -> bool:
    return path.endswith((".safetensors", ".bin", ".model")) or len(data) > 64 << 10


class Handler(BaseHTTPRequestHandler):
    hub: ModelScopeServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # header and body in one packet: two of them wait 40 ms for each other
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.where, self.query = unquote(parts.path), {key: values[0] for key, values in parse_qs(parts.query, True).items()}
        self.sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.fault = next((fault for fault in self.hub.faults if self._meets(fault)), None)
        try:
            if self.fault is not None:
                self.fault.times -= 1
                if self.fault.act:
                    self.fault.act()
                if self.fault.status:
                    raise Refused(self.fault.status, "as the test wants it")
            with self.hub.lock:
                self._route()
        except Refused as error:
            self._json({"Code": error.code or error.status, "Message": error.message, "Success": False}, error.status)

    do_POST = do_PUT = do_DELETE = do_GET

    def _meets(self, fault: Fault) -> bool:
        return bool(fault.times > 0 and fault.method in ("", self.command) and re.search(fault.path, unquote(self.path)))

    def _route(self) -> None:
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, self.where)
            if method == self.command and found:
                return answer(self, *found.groups())
        raise Refused(404, "no such endpoint")

    # Who may

    def _token(self) -> str:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", WRITER, READER):
            raise Refused(401, "user not logged in", 10010103009)
        return token

    def _repo(self, name: str, writes: bool = False) -> Repo:
        repo, token = self.hub.repos.get(name), self._token()
        if writes and token != WRITER:
            raise Refused(403 if token else 401, "no permission")
        if repo is None or (repo.private and token != WRITER):
            raise Refused(404, "模型不存在")
        if repo.gated and not token:
            raise Refused(403, "access denied")
        return repo

    def _tree(self, name: str, revision: str) -> dict[str, Blob]:
        tree = self._repo(name).at(revision)
        if tree is None:
            raise Refused(404, "revision not found")
        return tree

    # Reading

    def files(self, name: str) -> None:
        tree = self._tree(name, self.query["Revision"])
        folders = {path.rpartition("/")[0] for path in tree} - {""}
        entries: list[dict[str, Any]] = [{"Path": folder, "Type": "tree", "Size": 0, "Sha256": ""} for folder in sorted(folders)]
        for path, blob in sorted(tree.items()):
            entry = {"Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(blob.data), "IsLFS": blob.large}
            told = {"Revision": blob.commit, "CommittedDate": blob.when} if self.hub.commits else {}
            entries.append({**entry, "Sha256": blob.sha256, **told})
        self._data({"Files": entries, "LatestCommitter": {"Id": ""}})

    def revisions(self, name: str) -> None:
        repo = self._repo(name)
        named = {"Branches": repo.branches, "Tags": repo.tags}
        self._data({"RevisionMap": {kind: [{"Revision": ref} for ref in refs] for kind, refs in named.items()}})

    def file(self, name: str) -> None:
        blob = self._tree(name, self.query["Revision"]).get(self.query["FilePath"])
        if blob is None:
            raise Refused(404, "file not found")
        if blob.large:
            self._send(302, b"", {"Location": f"{self.hub.objects_url}/{blob.sha256}?Expires=1&Signature=x"})
        else:
            self._send(200, blob.data)

    def object(self, oid: str) -> None:
        if self.headers.get("Authorization") or oid not in self.hub.objects:
            raise Refused(400, "only one auth mechanism allowed")
        data, asked = self.hub.objects[oid], re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return self._send(200, data)
        start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if start >= len(data):
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        self._send(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    # Writing

    def create(self) -> None:
        said = json.loads(self.sent)
        name = f"{said['Path']}/{said['Name']}"
        if self._token() != WRITER:
            raise Refused(401, "user not logged in")
        if name in self.hub.repos:
            raise Refused(400, "model already exists", 10010101001)
        self.hub.repos[name] = Repo(private=said["Visibility"] == 1)
        self.hub.repos[name].commit("master", {path: (data, False) for path, data in OWN.items()}, "initial commit")
        self._data({"Name": said["Name"], "Path": said["Path"]})

    def batch(self, name: str) -> None:
        self._repo(name, writes=True)
        answers = []
        for one in json.loads(self.sent)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}?Signature=x"}}
            answers.append({**one, "actions": {} if one["oid"] in self.hub.objects else upload})
        self._data({"objects": answers})

    def upload(self, oid: str) -> None:
        if sha256(self.sent).hexdigest() != oid:
            raise Refused(400, "the content is not what its name says")
        self.hub.objects[oid] = self.sent
        self._send(200, b"")

    def commit(self, name: str, branch: str) -> None:
        repo, said = self._repo(name, writes=True), json.loads(self.sent)
        if branch not in repo.branches:
            raise Refused(404, "branch not found")
        tree, changes = repo.at(branch) or {}, dict[str, tuple[bytes, bool] | None]()
        for action in said["actions"]:
            path, large = action["path"], action["type"] == "lfs"
            if action["action"] == "delete":
                if path not in tree:
                    raise Refused(400, f"no such file {path}")
                changes[path] = None
            elif large and action["sha256"] not in self.hub.objects:
                raise Refused(422, "object was not uploaded")
            else:
                changes[path] = (self.hub.objects[action["sha256"]] if large else base64.b64decode(action["content"]), large)
        self._data({"oid": repo.commit(branch, changes, said["commit_message"])})

    def tag(self, name: str) -> None:
        repo, said = self._repo(name, writes=True), json.loads(self.sent)
        commit = repo.branches.get(said["Ref"]) or (said["Ref"] if said["Ref"] in repo.commits else None)
        if commit is None or said["TagName"] in repo.tags:
            raise Refused(400, "tag exists or ref not found")
        repo.tags[said["TagName"]] = commit
        self._data({})

    # Answers

    def _data(self, data: Any) -> None:
        self._json({"Code": 200, "Data": data, "Success": True}, 200)

    def _json(self, body: Mapping[str, Any], status: int) -> None:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        fault, self.fault = self.fault, None
        if fault is not None and fault.body is not None:
            body = fault.body
        lower = {key.lower(): value for key, value in self.headers.items()}
        self.hub.log.append(Logged(self.command, self.where, self.query, lower, status))
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if fault is not None and fault.cut:
            self.close_connection = True
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


MODEL = r"/api/v1/models/([^/]+/[^/]+)"
ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("GET", f"{MODEL}/repo/files", Handler.files),
    ("GET", f"{MODEL}/revisions", Handler.revisions),
    ("GET", f"{MODEL}/repo", Handler.file),
    ("GET", r"/objects/(\w+)", Handler.object),
    ("POST", r"/api/v1/models", Handler.create),
    ("POST", r"/api/v1/repos/models/([^/]+/[^/]+)/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/upload/(\w+)", Handler.upload),
    ("POST", r"/api/v1/repos/models/([^/]+/[^/]+)/commit/(.+)", Handler.commit),
    ("POST", f"{MODEL}/repo/tag", Handler.tag),
)

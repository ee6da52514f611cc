"""A hub on 127.0.0.1 that the real huggingface_hub client talks to over HTTP: what it answers when asked, and faults on demand.

Endpoints, headers and error codes are those of huggingface_hub's own source (hf_api.py, file_download.py, lfs.py, utils/_http.py, 2.4).
A large file is redirected to another origin, as the hub does to its CDN, and that origin refuses a token as S3 does. hubrepo.py keeps the
repositories, hubread.py and hubwrite.py hold the endpoints.

    with HubServer() as hub:
        commit = hub.add("model", "org/name", {"config.json": b"{}", "model.safetensors": b"…"})
        hub.fail(r"/resolve/.*safetensors", cut=True)           # once; times=2 for twice
        HfApi(endpoint=hub.url).model_info("org/name")
        assert hub.log[0].path == "/api/models/org/name"
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import hubread
import hubwrite
from hubrepo import Refused, Repo, is_large
from hubwire import Answer, Request, User, as_json

if TYPE_CHECKING:
    import pytest

WRITER, READER = "hf_writerWRITERwriterWRITERwriterWRITER", "hf_readerREADERreaderREADERreaderREADER"
KEPT = ("authorization", "range", "content-length", "content-type", "user-agent")


class Logged(NamedTuple):
    """One request and what it was answered. `path` has no query; `headers` are those of KEPT, in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    status: int


@dataclass
class Fault:
    """What happens in place of, or around, the next `times` answers to requests whose path matches, after the first `skip` of them."""

    path: str  # searched for in the unquoted path, a regular expression
    method: str = ""  # any
    status: int = 0  # answer this instead
    cut: bool = False  # close the connection in the middle of the body
    body: bytes | None = None  # send this content, under the headers of the right one unless `headers` says otherwise
    headers: Mapping[str, str] = field(default_factory=dict)  # over those of the answer
    wait_s: float = 0  # be slow
    act: Callable[[], object] | None = None  # happens first: somebody else's commit, a file that changes
    skip: int = 0
    times: int = 1

    def takes(self, method: str, path: str) -> bool:
        if self.times <= 0 or self.method not in ("", method) or not re.search(self.path, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


class HubServer:
    """Repositories, users and faults may be changed at any time; `lock` is held while a request is answered."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.tokens = {WRITER: User("me", ("my-org",)), READER: User("reader", write=False)}
        self.log: list[Logged] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.page = 1000  # entries of one page of a listing
        self.part_bytes = 5 << 20  # a larger upload comes in parts of this size
        self.parts: dict[str, dict[int, bytes]] = {}  # of unfinished uploads
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, cdn)) for cdn in (False, True)]
        for server in self._servers:
            server.daemon_threads = True
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on nobody answers at `url`."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, token: str = "") -> dict[str, str]:
        """For a process that is to use this hub and no other."""
        told = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return told | ({"HF_TOKEN": token} if token else {})

    def use(self, patch: pytest.MonkeyPatch, home: Path, token: str = "") -> None:
        """The same for this process, whose huggingface_hub may have read its environment already. Its cache is in `home`."""
        from huggingface_hub import constants

        patch.delenv("HF_TOKEN", raising=False)
        for name, value in {**self.environment(token), "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub")}.items():
            patch.setenv(name, value)
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the server speaks plain HTTP and Git LFS
        patch.setattr(constants, "HF_HOME", str(home))
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what a cut leaves are whole chunks: of 10 MB, a small file leaves none

    def add(
        self,
        kind: str,
        repo_id: str,
        files: Mapping[str, bytes | None],
        branch: str = "main",
        lfs: Callable[[str, int], bool] = is_large,
        title: str = "",
    ) -> str:
        """`files` over those of the branch (made where it is not there; so is the repository), None to delete -> the new commit's id.
        A branch may be written refs/convert/parquet or refs/pr/1 too."""
        with self.lock:
            return self.repos.setdefault((kind, repo_id), Repo(kind, repo_id)).put(files, branch, lfs, title)

    def repo(self, kind: str, repo_id: str) -> Repo:
        return self.repos[kind, repo_id]

    def fail(self, path: str, method: str = "", **how: Any) -> None:
        """See Fault. `status=500, times=2`, `cut=True`, `body=b"…"`, `headers={…}`, `act=…`, `wait_s=…`."""
        self.faults.append(Fault(path, method, **how))

    def requests(self, pattern: str, *methods: str) -> list[Logged]:
        return [one for one in self.log if re.search(pattern, one.path) and (not methods or one.method in methods)]

    @property
    def changes(self) -> list[Logged]:
        """Every request that could have changed something."""
        return [one for one in self.log if one.method not in ("GET", "HEAD") and "/paths-info/" not in one.path]

    def answer(self, request: Request, cdn: bool) -> Answer:
        try:
            if request.user is None and request.headers.get("authorization", ""):
                raise Refused(401, "Invalid credentials in Authorization header")
            for methods, pattern, act in hubread.CDN + hubwrite.CDN if cdn else hubread.HUB + hubwrite.HUB:
                if request.method in methods and (found := re.fullmatch(pattern, request.path)):
                    groups = {name: unquote(value or "") for name, value in found.groupdict().items()}
                    answered: Answer = act(self, request, **groups)
                    return answered
            raise Refused(404, f"no such endpoint: {request.method} {request.path}")
        except Refused as refusal:
            headers = {"X-Error-Message": refusal.message, **refusal.headers} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            return as_json({"error": refusal.message}, refusal.status, **headers)

    def readable(self, kind: str, repo_id: str, user: User | None) -> Repo:
        """The repository; to who may not see it, it is not there."""
        repo = self.repos.get((kind, repo_id))
        if repo is None or (repo.private and not (user and user.owns(repo_id))):
            if user is None:
                raise Refused(401, "Invalid username or password.", "RepoNotFound")
            raise Refused(404, "Repository not found", "RepoNotFound")
        return repo

    def opened(self, kind: str, repo_id: str, user: User | None) -> Repo:
        """A repository whose files may be read."""
        repo = self.readable(kind, repo_id, user)
        if repo.gated and not (user and (user.owns(repo_id) or repo_id in user.gates)):
            what = f"Access to {kind} {repo_id} is restricted" + ("." if user is None else " and you are not in the authorized list.")
            raise Refused(403 if user else 401, f"{what} Visit {self.url}/{repo.prefix}{repo_id} to ask for access.", "GatedRepo")
        return repo


def _handler(hub: HubServer, cdn: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two writes; the second would wait 40 ms for the client

        def setup(self) -> None:
            super().setup()
            self.request.settimeout(30)

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _serve(self) -> None:
            split = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self._body(headers)
            user = hub.tokens.get(headers.get("authorization", "").removeprefix("Bearer "))
            request = Request(self.command, split.path, parse_qs(split.query), headers, body, user)
            with hub.lock:
                fault = next((one for one in hub.faults if one.takes(self.command, unquote(split.path))), None)
            if fault and fault.act:
                fault.act()
            if fault and fault.wait_s:
                time.sleep(fault.wait_s)
            with hub.lock:
                refused = fault is not None and fault.status
                answer = as_json({"error": "a fault that a test asked for"}, refused) if refused else hub.answer(request, cdn)
                kept = {name: value for name, value in headers.items() if name in KEPT}
                hub.log.append(Logged(self.command, unquote(split.path), kept, answer.status))
            self._send(answer, fault)

        def _body(self, headers: Mapping[str, str]) -> bytes:
            if headers.get("transfer-encoding", "") != "chunked":
                return self.rfile.read(int(headers.get("content-length", 0)))
            pieces = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def _send(self, answer: Answer, fault: Fault | None) -> None:
            body = answer.body if fault is None or fault.body is None else fault.body
            headers = {"Content-Length": str(len(body)), **answer.headers, **(fault.headers if fault else {})}
            self.send_response(answer.status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            cut = fault is not None and fault.cut
            try:
                if self.command != "HEAD":
                    self.wfile.write(body[: len(body) // 2] if cut else body)
            except OSError:  # the client has had enough
                cut = True
            if cut:
                self.close_connection = True

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    return Handler

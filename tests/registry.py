"""Debian's docker-registry for tests: the real server on a port of its own, and a proxy before it that records, cuts and refuses."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

PROGRAM = shutil.which("docker-registry")
USER, SECRET = "tester", "correct horse"
HTPASSWD = f"{USER}:$2b$04$YIqfA8p6GPewB7Pd6nrrPOd6Dpj0qKDnMMfbtq0o94TNfyJ49Xo/e\n"  # bcrypt of SECRET, the one kind that it reads
LISTENING = re.compile(r"listening on (127\.0\.0\.1:\d+)")
REQUEST = re.compile(r'"([A-Z]+) (/v2/\S*) HTTP/1\.1" (\d+)')


@dataclass(frozen=True)
class Server:
    """A running registry."""

    host: str  # 127.0.0.1:PORT
    storage: Path
    log: Path

    def requests(self) -> list[tuple[str, str, int]]:
        """(method, path, status) of every request that was answered, oldest first."""
        return [(method, path, int(status)) for method, path, status in REQUEST.findall(self.log.read_text())]

    def state(self) -> list[tuple[str, int]]:
        """Everything that it holds; equal states mean that nothing was written."""
        return sorted((str(path), path.lstat().st_mtime_ns) for path in self.storage.rglob("*") if path.is_file())

    def blob(self, sha256: str) -> Path:
        """Where the bytes of a blob lie."""
        return self.storage / f"docker/registry/v2/blobs/sha256/{sha256[:2]}/{sha256}/data"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Mapping[str, str], bytes]:
        """One plain request, by no client of ours."""
        connection = http.client.HTTPConnection(self.host, timeout=30)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def manifest(self, repository: str, reference: str) -> dict[str, Any] | None:
        accepted = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"
        status, _, raw = self.ask("GET", f"/v2/{repository}/manifests/{reference}", Accept=accepted)
        return json.loads(raw) if status == 200 else None

    def put_blob(self, repository: str, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        _, headers, _ = self.ask("POST", f"/v2/{repository}/blobs/uploads/")
        where = urlsplit(headers["Location"])
        status, _, _ = self.ask("PUT", f"{where.path}?{where.query}&digest={digest}", data, Content_Type="application/octet-stream")
        assert status == 201
        return digest

    def put_manifest(self, repository: str, reference: str, said: Mapping[str, Any]) -> None:
        status, _, raw = self.ask(
            "PUT", f"/v2/{repository}/manifests/{reference}", json.dumps(said).encode(), Content_Type=said["mediaType"]
        )
        assert status == 201, raw

    def replace(self, repository: str, tag: str, name: str, data: bytes) -> None:
        """Another file under `name`, as somebody with the right to push would put it there."""
        said = self.manifest(repository, tag)
        assert said is not None
        layer = next(layer for layer in said["layers"] if layer["annotations"]["org.cncf.model.filepath"] == name)
        layer |= {"digest": self.put_blob(repository, data), "size": len(data)}
        self.put_manifest(repository, tag, said)

    def tags(self, repository: str) -> list[str]:
        status, _, raw = self.ask("GET", f"/v2/{repository}/tags/list")
        return sorted(json.loads(raw)["tags"] or []) if status == 200 else []


@contextmanager
def serving(folder: Path, **auth: Any) -> Iterator[Server]:
    """Starts docker-registry with its data below `folder`; `htpasswd=True`, or `token={…}` as in its configuration."""
    if PROGRAM is None:
        if "registry" in os.environ.get("BUILDSYS_TEST_REQUIRE", ""):
            pytest.fail("docker-registry is not installed, and BUILDSYS_TEST_REQUIRE names registry")
        pytest.skip("docker-registry is not installed (Debian: apt-get install docker-registry)")
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "version": 0.1,
        "log": {"level": "info"},
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}, "delete": {"enabled": True}},
        "http": {"addr": "127.0.0.1:0", "secret": "only for tests"},
    }
    if auth.get("htpasswd"):
        (folder / "htpasswd").write_text(HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}}
    elif auth.get("token"):
        config["auth"] = {"token": auth["token"]}
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    log = folder / "log"
    with log.open("wb") as out:
        running = subprocess.Popen([PROGRAM, "serve", str(folder / "config.yml")], stdout=out, stderr=subprocess.STDOUT)
    try:
        yield Server(_listening(running, log), folder / "storage", log)
    finally:
        running.terminate()
        running.wait(10)


def _listening(running: subprocess.Popen[bytes], log: Path) -> str:
    """The address that it says it took."""
    waited = threading.Event()
    for _ in range(600):
        match = LISTENING.search(log.read_text())
        if match:
            return match[1]
        assert running.poll() is None, f"docker-registry ended:\n{log.read_text()}"
        waited.wait(0.05)
    raise AssertionError(f"docker-registry took no port in 30 s:\n{log.read_text()}")


# A proxy with faults


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches."""

    pattern: str
    times: int = 1
    skip: int = 0  # matching requests that pass before
    status: int | None = None  # answered in place of the registry
    body: bytes = b"{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_request_after: int | None = None  # bytes of the body that still get through
    cut_answer_after: int | None = None
    before: Any = None  # called first


class Proxy:
    """Stands before a registry; `host` is its address."""

    def __init__(self, server: Server, referrers: bool = False) -> None:
        self.server, self.faults, self.requests = server, [], []
        self.referrers: dict[str, list[dict[str, Any]]] | None = {} if referrers else None
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.host = f"127.0.0.1:{self._http.server_port}"

    faults: list[Fault]
    requests: list[tuple[str, str, dict[str, str]]]  # method, path, headers

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, pattern: str, **fault: Any) -> None:
        self.faults.append(Fault(pattern, **fault))

    def fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, f"{method} {path}"):
                    fault.skip -= 1
                    if fault.skip < 0:
                        fault.times -= 1
                        return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def log_message(self, *said: object) -> None:
        pass

    def _handle(self) -> None:
        proxy, path = self.proxy, self.path
        proxy.requests.append((self.command, path, dict(self.headers.items())))
        fault = proxy.fault(self.command, path)
        if fault is not None and fault.before is not None:
            fault.before()
        if fault is not None and fault.status is not None:
            self._drain()
            self._answer(fault.status, dict(fault.headers), fault.body)
            return
        subject = re.fullmatch(r"/v2/.+/referrers/(sha256:[0-9a-f]{64})", path)
        if proxy.referrers is not None and subject is not None and self.command == "GET":
            index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": proxy.referrers.get(subject[1], [])}
            self._answer(200, {"Content-Type": INDEX}, json.dumps(index).encode())
            return
        with suppress(OSError, http.client.HTTPException):
            self._forward(fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _handle

    def _drain(self) -> None:
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0:
            left -= len(self.rfile.read(min(left, 1 << 16)) or b"x" * left)

    def _body(self, limit: int | None) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length") or 0)
        left = left if limit is None else min(left, limit)
        while left > 0:
            piece = self.rfile.read(min(left, 1 << 16))
            if not piece:
                return
            left -= len(piece)
            yield piece

    def _forward(self, fault: Fault | None) -> None:
        upstream = http.client.HTTPConnection(self.proxy.server.host, timeout=30)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "connection":
                    upstream.putheader(name, value)
            upstream.endheaders()
            sent = b""
            for piece in self._body(fault.cut_request_after if fault is not None else None):
                upstream.send(piece)
                sent = piece if self.path.find("/manifests/") > 0 else b""
            if fault is not None and fault.cut_request_after is not None:
                self.close_connection = True
                self.connection.close()
                return
            answer = upstream.getresponse()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in ("connection", "transfer-encoding")}
            if self.command == "PUT" and answer.status == 201 and self.proxy.referrers is not None:
                headers |= self._refer(sent, headers)
            self._relay(answer, headers, fault)
        finally:
            upstream.close()

    def _refer(self, raw: bytes, headers: Mapping[str, str]) -> dict[str, str]:
        """Keeps what a manifest says that it refers to, as a registry with the referrers API does."""
        said = json.loads(raw) if raw else {}
        if "subject" not in said or self.proxy.referrers is None:
            return {}
        digest = said["subject"]["digest"]
        entry = {"mediaType": said["mediaType"], "digest": headers["Docker-Content-Digest"], "size": len(raw)}
        self.proxy.referrers.setdefault(digest, []).append(entry | {"artifactType": said["artifactType"]})
        return {"OCI-Subject": digest}

    def _relay(self, answer: http.client.HTTPResponse, headers: Mapping[str, str], fault: Fault | None) -> None:
        self.send_response_only(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        left = fault.cut_answer_after if fault is not None else None
        while piece := answer.read(1 << 16):
            self.wfile.write(piece if left is None else piece[:left])
            left = left if left is None else left - len(piece)
            if left is not None and left <= 0:
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


INDEX = "application/vnd.oci.image.index.v1+json"

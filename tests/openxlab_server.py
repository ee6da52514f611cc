"""OpenXLab's API and its object store on 127.0.0.1, as openxlab 0.1.3's source knows them (model/clients, xlab/clients, oss2's requests).

with OpenXLabServer() as server:
    server.use(monkeypatch, tmp_path)
    server.repos["tiny"] = {}          # name of a file -> Stored; the owner is whoever has the access key
"""

from __future__ import annotations

import base64
import hmac
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

KEY, SECRET, NONCE, SESSION = "ak-c0ffee11", "sk-5ec2e7cafe", "nonce-1", "jwt-0a1b2c3d4e"
STORED = {"accessKeyId": "sts-1", "accessKeySecret": "sts-secret-2", "stsToken": "sts-token-3", "bucket": "models"}
SECRETS = (KEY, SECRET, SESSION, "sts-secret-2", "sts-token-3")
CLI = "/api/v1/model-center/api/v1/cli/repository"


class Refused(Exception):
    def __init__(self, message: str, status: int = 200) -> None:
        self.message, self.status = message, status


@dataclass
class Stored:
    data: bytes = b""
    complete: bool = False


@dataclass
class OpenXLabServer:
    repos: dict[str, dict[str, Stored]] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)  # method, path
    faults: list[tuple[str, int]] = field(default_factory=list)  # path, status: each once
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)  # unfinished
    begun: int = 0

    def __enter__(self) -> OpenXLabServer:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def use(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        """The environment of a user with a login, on a machine that has never seen OpenXLab."""
        patch.setenv("NO_PROXY", "*")
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("OPENXLAB_AK", KEY)
        patch.setenv("OPENXLAB_SK", SECRET)
        patch.setenv("BUILDSYS_OPENXLAB_ENDPOINT", self.url)
        patch.setenv("BUILDSYS_OPENXLAB_STORE", self.url)

    def count(self, method: str, path: str) -> int:
        return sum(1 for one in self.log if one[0] == method and re.search(path, one[1]))


class Handler(BaseHTTPRequestHandler):
    hub: OpenXLabServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.where, self.query = unquote(parts.path), {key: values[0] for key, values in parse_qs(parts.query, True).items()}
        self.sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append((self.command, self.path))
        fault = next((one for one in self.hub.faults if re.search(one[0], self.path)), None)
        try:
            if fault is not None:
                self.hub.faults.remove(fault)
                raise Refused("as the test wants it", fault[1])
            if self.where.startswith("/models/"):
                return self._store(self.where.removeprefix("/models/"))
            answer = ROUTES.get(self.where)
            if answer is None:
                raise Refused("no such endpoint", 404)
            if not self.where.endswith(("/auth", "/getJwt")) and self.headers.get("Authorization") != SESSION:
                raise Refused("no login", 401)
            self._json({"msgCode": "10000", "data": {"msgCode": "10000", "data": answer(self, json.loads(self.sent))}})
        except Refused as error:
            said = f"{error.message}: {self.headers.get('Authorization')} {self.sent!r}"  # servers do quote what they were sent
            self._json({"msgCode": "10000", "data": {"msgCode": "20001", "msg": said, "traceId": "t"}}, error.status)

    do_POST = do_PUT = do_DELETE = do_GET

    # Login

    def auth(self, said: Mapping[str, Any]) -> Any:
        if said["ak"] != KEY:
            raise Refused("unknown access key")
        return {"nonce": NONCE, "algorithm": "HmacSHA256"}

    def session(self, said: Mapping[str, Any]) -> Any:
        if said["d"] != base64.b64encode(hmac.digest(SECRET.encode(), NONCE.encode(), "sha256")).decode():
            raise Refused("wrong secret")
        until = {"expiration": "2099-01-01 00:00:00", "refresh_expiration": "2099-01-01 00:00:00"}
        return {"jwt": SESSION, "sso_uid": "1", "refresh_token": "r", **until}

    # The model center

    def _repo(self, name: str) -> dict[str, Stored]:
        if name not in self.hub.repos:
            raise Refused("no such repository")
        return self.hub.repos[name]

    def models(self, said: Mapping[str, Any]) -> Any:
        return {"models": [{"name": name, "weightName": name} for name in self._repo(said["repoName"])]}

    def create(self, said: Mapping[str, Any]) -> Any:
        if said["name"] in self.hub.repos or not said["github"] or not said["license"]:
            raise Refused("cannot be made")
        self.hub.repos[said["name"]] = {model["name"]: Stored() for model in said["models"]}
        return {}

    def status(self, said: Mapping[str, Any]) -> Any:
        repo = self._repo(said["repoName"])
        if said["uploadStatus"] == 2:
            repo[said["fileNames"][0]].complete = True
            return {}
        for model in said["models"] or ():
            repo[model["name"]] = Stored()
        asked = [*(said["models"] or ()), *(said["updateModels"] or ())]
        objects = [
            {"modelName": one["name"], "modelId": "7", "objectName": one["weightName"], "weightName": one["weightName"]} for one in asked
        ]
        return {"objects": objects, "repositoryId": said["repoName"], "uid": "1"}

    def signature(self, said: Mapping[str, Any]) -> Any:
        return {**STORED, "object": f"{said['data']['repositoryId']}/{said['fileName']}", "callback": "Y2I=", "callbackVar": "Y2I="}

    def downloads(self, said: Mapping[str, Any]) -> Any:
        repo = self._repo(said["repositoryName"])
        found = {name: repo[name] for name in said["modelNames"] if name in repo and repo[name].complete}
        told = {name: {"fileName": name, "hash": "", "url": f"{self.hub.url}/models/{said['repositoryName']}/{name}"} for name in found}
        return {"modelNames": told, "filePaths": None}

    # The object store

    def _store(self, key: str) -> None:
        if self.command == "POST" and "uploads" in self.query:
            self.hub.begun += 1
            upload = f"upload-{self.hub.begun}"
            self.hub.uploads[upload] = {}
            return self._xml("InitiateMultipartUploadResult", f"<Bucket>models</Bucket><Key>{key}</Key><UploadId>{upload}</UploadId>")
        if self.command == "PUT":
            self.hub.uploads[self.query["uploadId"]][int(self.query["partNumber"])] = self.sent
            return self._send(200, b"", {"ETag": f'"{md5(self.sent).hexdigest()}"'})
        if self.command == "POST":
            parts = self.hub.uploads.pop(self.query["uploadId"])
            repo, name = key.split("/")
            self.hub.repos[repo][name].data = b"".join(data for _, data in sorted(parts.items()))
            return self._xml("CompleteMultipartUploadResult", f"<Bucket>models</Bucket><Key>{key}</Key><ETag>e</ETag>")
        if "uploadId" in self.query:
            parts = sorted(self.hub.uploads[self.query["uploadId"]].items())
            told = [
                f"<PartNumber>{number}</PartNumber><ETag>{md5(data).hexdigest()}</ETag><Size>{len(data)}</Size>" for number, data in parts
            ]
            listed = "".join(f"<Part>{one}<LastModified>2026-01-01T00:00:00.000Z</LastModified></Part>" for one in told)
            return self._xml("ListPartsResult", f"<IsTruncated>false</IsTruncated><NextPartNumberMarker>0</NextPartNumberMarker>{listed}")
        repo, name = key.split("/")
        self._send(200, self.hub.repos[repo][name].data)

    # Answers

    def _xml(self, kind: str, inner: str) -> None:
        self._send(200, f'<?xml version="1.0" encoding="UTF-8"?><{kind}>{inner}</{kind}>'.encode(), {"Content-Type": "application/xml"})

    def _json(self, body: Any, status: int = 200) -> None:
        self._send(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


ROUTES: Mapping[str, Callable[[Handler, Mapping[str, Any]], Any]] = {
    "/api/v1/sso-be/api/v1/open/auth": Handler.auth,
    "/api/v1/sso-be/api/v1/open/getJwt": Handler.session,
    f"{CLI}/getRepositoryModelList": Handler.models,
    f"{CLI}/createModelRepository": Handler.create,
    f"{CLI}/updateFileUploadStatus": Handler.status,
    f"{CLI}/getFileDownloadUrl": Handler.downloads,
    "/api/v1/upload-service/api/v1/getUploadSignature": Handler.signature,
}

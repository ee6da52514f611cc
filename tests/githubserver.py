"""As much of GitHub's REST API as our actions speak: comments of a pull request, who may write, and the pull request itself. Real HTTP.

GitHub Docs, "Issue comments", "Get repository permissions for a user", "Get a pull request". A token that may not write is answered 403.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

BOT = "github-actions[bot]"
REPOSITORY = "team/models"


@dataclass
class GitHub:
    address: str = ""
    comments: list[dict[str, Any]] = field(default_factory=list)  # of pull request 7
    permissions: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    refuses: int = 0  # the status of every answer to what writes

    def comment(self, who: str, body: str) -> None:
        self.comments.append({"id": 100 + len(self.comments), "user": {"login": who}, "body": body})

    def environment(self) -> dict[str, str]:
        return {
            "GITHUB_API_URL": self.address,
            "GITHUB_SERVER_URL": "https://github.example",
            "GITHUB_REPOSITORY": REPOSITORY,
            "GITHUB_RUN_ID": "42",
            "GITHUB_TOKEN": "secret-token",
        }

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append((method, path))
        here = path.removeprefix(f"/repos/{REPOSITORY}/")
        if method != "GET" and self.refuses:
            return self.refuses, {"message": "Resource not accessible by integration"}
        if here == "issues/7/comments" and method == "GET":
            page, size = int(query["page"][0]), int(query["per_page"][0])
            return 200, self.comments[(page - 1) * size : page * size]
        if here == "issues/7/comments" and method == "POST":
            self.comment(BOT, body["body"])
            return 201, self.comments[-1]
        if (found := re.fullmatch(r"issues/comments/(\d+)", here)) and method == "PATCH":
            one = self.comments[int(found[1]) - 100]
            one["body"] = body["body"]
            return 200, one
        if (found := re.fullmatch(r"collaborators/([^/]+)/permission", here)) and found[1] in self.permissions:
            return 200, {"permission": self.permissions[found[1]]}
        if (found := re.fullmatch(r"pulls/(\d+)", here)) and found[1] in self.pulls:
            return 200, self.pulls[found[1]]
        return 404, {"message": "Not Found"}


@contextmanager
def serving() -> Iterator[GitHub]:
    state = GitHub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self) -> None:
            parts = urlsplit(self.path)
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else {}
            known = self.headers["Authorization"] == "Bearer secret-token"
            status, said = state.answer(self.command, parts.path, parse_qs(parts.query), body) if known else (401, {})
            data = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PATCH = reply

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""What the hub of hubserver.py hears and says: a request, an answer, who asks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class User:
    name: str
    orgs: tuple[str, ...] = ()
    write: bool = True  # the token's role
    gates: tuple[str, ...] = ()  # gated repositories whose terms it accepted

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.name, *self.orgs)


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # quoted, as it came
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    user: User | None

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def asks(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    return Answer(json.dumps(value).encode(), status, {"Content-Type": "application/json; charset=utf-8", **headers})


Route = tuple[str, str, Callable[..., Answer]]
"""Methods, a regular expression of the whole path, and what answers: (hub, request, **its named groups)."""

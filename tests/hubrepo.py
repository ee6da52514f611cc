"""Repositories as a hub keeps them, in memory: files, commits linked to their parents, branches, tags, pull requests, stored large files.

Ids are git's own (git-scm.com/book, 10.2): sha1 of `<type> <length>\\0<content>`. A large file's blob is its Git LFS pointer.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

LARGE_BYTES = 10 << 20
LARGE = (".safetensors", ".bin", ".parquet", ".gz", ".zst", ".model", ".gguf", ".onnx", ".zip")
EPOCH = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)


class Refused(Exception):
    """An answer other than 2xx, in the hub's terms."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


def git_id(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def is_large(path: str, size: int) -> bool:
    """What a new repository's .gitattributes and the hub's limit of 10 MiB say."""
    return path.endswith(LARGE) or size > LARGE_BYTES


@dataclass(frozen=True)
class Blob:
    """A file as git has it: its content, or the pointer to where its content is stored."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def id(self) -> str:
        return git_id("blob", self.pointer if self.large else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.id


def tree_id(files: Mapping[str, Blob]) -> str:
    """Files by path below one folder -> git's id of that folder."""
    below: dict[str, dict[str, Blob]] = {}
    entries: dict[str, tuple[str, str]] = {}
    for path, blob in files.items():
        head, slash, rest = path.partition("/")
        if slash:
            below.setdefault(head, {})[rest] = blob
        else:
            entries[head] = ("100644", blob.id)
    entries |= {name: ("40000", tree_id(inside)) for name, inside in below.items()}
    in_gits_order = sorted(entries, key=lambda name: name + "/" if name in below else name)
    return git_id("tree", b"".join(f"{entries[name][0]} {name}\0".encode() + bytes.fromhex(entries[name][1]) for name in in_gits_order))


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, Blob]
    parent: str  # "" for the first
    title: str
    message: str
    author: str
    number: int  # its moment: minutes after EPOCH

    @property
    def date(self) -> str:
        return (EPOCH + datetime.timedelta(minutes=self.number)).strftime("%Y-%m-%dT%H:%M:%S.000Z")

    @property
    def id(self) -> str:
        who = f"{self.author} <{self.author}@hub> {int(EPOCH.timestamp()) + 60 * self.number} +0000"
        lines = [f"tree {tree_id(self.files)}", *([f"parent {self.parent}"] if self.parent else []), f"author {who}", f"committer {who}"]
        return git_id("commit", ("\n".join(lines) + f"\n\n{self.title}\n\n{self.message}").encode())


@dataclass
class Discussion:
    """A pull request, or a plain discussion."""

    number: int
    title: str
    author: str
    pull_request: bool
    status: str = "open"
    base: str = "main"
    merged_as: str = ""
    created: str = ""


@dataclass
class Repo:
    kind: str  # model | dataset
    id: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/convert/parquet, refs/pr/1 -> commit
    stored: dict[str, bytes] = field(default_factory=dict)  # large files that have been sent, by sha256: committed or not yet
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        """What stands before the id in a page's address."""
        return "" if self.kind == "model" else f"{self.kind}s/"

    def ref(self, revision: str) -> str:
        """The full name of a branch, a tag or another reference; "" where there is none of that name."""
        return next((ref for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}") if ref in self.refs), "")

    def commit(self, revision: str) -> Commit:
        """Any revision: a reference's name, or a commit's first seven digits or more."""
        if ref := self.ref(revision):
            return self.commits[self.refs[ref]]
        found = [id for id in self.commits if re.fullmatch("[0-9a-f]{7,40}", revision) and id.startswith(revision)]
        if len(found) != 1:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[found[0]]

    def blob(self, revision: str, path: str) -> tuple[Commit, Blob]:
        commit = self.commit(revision)
        if path not in commit.files:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.id})
        return commit, commit.files[path]

    def record(self, ref: str, files: Mapping[str, Blob], title: str, author: str, parent: str | None = None, message: str = "") -> Commit:
        """A commit on top of `ref`'s present one (or of `parent`), to which `ref` then points."""
        parent = self.refs.get(ref, "") if parent is None else parent
        commit = Commit(dict(sorted(files.items())), parent, title, message, author, len(self.commits))
        self.commits[commit.id] = commit
        self.refs[ref] = commit.id
        self.stored |= {blob.sha256: blob.content for blob in files.values() if blob.large}
        return commit

    def put(
        self,
        files: Mapping[str, bytes | None],
        branch: str = "main",
        lfs: Callable[[str, int], bool] = is_large,
        title: str = "",
        author: str = "someone",
    ) -> str:
        """What another user's push does: `files` over those of the branch's head, None to delete. Answers the commit's id."""
        ref = branch if branch.startswith("refs/") else f"refs/heads/{branch}"
        held = dict(self.commits[self.refs[ref]].files) if ref in self.refs else {}
        for path, content in files.items():
            if content is None:
                del held[path]
            else:
                held[path] = Blob(content, lfs(path, len(content)))
        return self.record(ref, held, title or f"Upload {len(files)} files", author).id

    def tag(self, name: str, revision: str = "main") -> None:
        self.refs[f"refs/tags/{name}"] = self.commit(revision).id

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        found = [self.commit(revision)]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found

    def listed(self, files: Mapping[str, Blob], folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Entries below `folder`, as the hub's tree and paths-info tell them."""
        inside = {path: blob for path, blob in files.items() if path.startswith(folder)}
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        folders = {path[: i + 1] for path in inside for i in range(len(folder), len(path)) if path[i] == "/"}
        shown = [entry(path, blob) for path, blob in inside.items() if recursive or "/" not in path[len(folder) :]]
        for path in folders:
            if recursive or "/" not in path[len(folder) : -1]:
                below = {name.removeprefix(path): blob for name, blob in inside.items() if name.startswith(path)}
                shown.append({"type": "directory", "oid": tree_id(below), "size": 0, "path": path[:-1]})
        return sorted(shown, key=lambda one: str(one["path"]))


def entry(path: str, blob: Blob) -> dict[str, Any]:
    told: dict[str, Any] = {"type": "file", "oid": blob.id, "size": len(blob.content), "path": path}
    if blob.large:
        told["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}
    return told

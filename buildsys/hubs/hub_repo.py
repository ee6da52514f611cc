"""What a repository of the Hugging Face hub is called, here and there: ids, file names, addresses, and its place in the shared cache.

Layout of the cache: huggingface_hub, "Understand caching" (guides/manage-cache). Its environment variables are read whenever they are
asked for; the client reads them once, when it is imported, so both are told the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from buildsys.errors import BuildError

COMMIT = re.compile(r"[0-9a-f]{40}")
"""Also what git calls a file."""
SHA256 = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REVISION = re.compile(r"[^\s\\~^:?*\[\x00-\x1f\x7f]+")
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})


@dataclass(frozen=True)
class Repo:
    """A repository at a revision: a branch, a tag, a commit, refs/pr/1, refs/convert/parquet."""

    kind: Literal["model", "dataset"]
    id: str
    revision: str

    def __str__(self) -> str:
        """What errors call it."""
        return f"{self.id} at {self.revision[:12] if is_commit(self.revision) else self.revision}"

    @property
    def folder(self) -> str:
        """Its folder in the shared cache."""
        return "--".join((f"{self.kind}s", *self.id.split("/")))

    @property
    def page(self) -> str:
        """Where people look at it."""
        return f"{shown_endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"

    @property
    def download(self) -> str:
        """The command that fills the shared cache."""
        kind = " --repo-type dataset" if self.kind == "dataset" else ""
        return f"hf download {self.id}{kind} --revision {self.revision}"


@dataclass(frozen=True)
class RepoFile:
    size: int
    sha256: str | None  # of a file in large storage (LFS, xet): the hub tells it
    blob_id: str  # git's: sha1 of the file, or of the pointer that stands for one in large storage

    @property
    def etag(self) -> str:
        """What the file is called in the shared cache, and the hub's ETag of it."""
        return self.sha256 or self.blob_id


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit."""

    repo: Repo
    commit: str
    files: Mapping[str, RepoFile]
    whole: bool = True  # False: offline, so what the shared cache holds of it

    @property
    def at(self) -> Repo:
        """The repository at exactly this commit."""
        return Repo(self.repo.kind, self.repo.id, self.commit)


def is_commit(revision: str) -> bool:
    return COMMIT.fullmatch(revision) is not None


def check_id(repo_id: str) -> str:
    """`owner/name`, or ValueError; for the knobs that name a repository."""
    parts = repo_id.split("/")
    odd = "--" in repo_id or ".." in repo_id or repo_id.endswith(".git")
    if len(parts) != 2 or len(repo_id) > 96 or odd or not all(_ID.fullmatch(part) for part in parts):
        example = "owner/name as in its page's address, for example internlm/internlm2_5-7b-chat"
        raise ValueError(f"{repo_id!r} is no repository's id; write {example}")
    return repo_id


def check_revision(revision: str) -> str:
    """A branch, tag or commit as git allows it, or ValueError."""
    if not _REVISION.fullmatch(revision) or ".." in revision or any(part in ("", ".") for part in revision.split("/")):
        raise ValueError(f"{revision!r} is no revision; write a branch, a tag or a commit")
    return revision


def check_name(name: str, repo: Repo) -> str:
    """A file's name that stays inside the folder it is written to; the hub's answer is not trusted with that."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or str(pure) != name or any(sign == "\\" or ord(sign) < 32 for sign in name):
        what = f"holds a file called {name!r}, which leads out of its folder"
        raise BuildError(str(repo), what, f"do not use this repository; report it at {repo.page}/discussions")
    return name


def endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def shown_endpoint() -> str:
    """The hub's address without a password that may be in it."""
    parts = urlsplit(endpoint())
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def offline() -> bool:
    return (os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "").upper() in _TRUE


def cache() -> Path:
    """The shared cache of everything on this machine that uses the hub's client."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if not named:
        base = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
        named = os.path.join(base, "hub")
    return Path(os.path.expandvars(os.path.expanduser(named))).absolute()


def snapshot(repo: Repo, commit: str) -> Path:
    """The folder of the shared cache that holds the files of one commit, as links."""
    return cache() / repo.folder / "snapshots" / commit

"""ModelScope: its client, what that may raise, and which files a repository holds at a revision.

Everything goes through modelscope-hub, so its environment holds here too: MODELSCOPE_ENDPOINT, MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN. What
the server sends is known from that client's source (0.5.1: _legacy_api.py, _download.py, errors.py).

A listing has the sha256 of every file and the commit that last changed it, but no reliable name of the head: a branch is pinned to the
newest of those commits if the listing at that commit is the same. modelscope_files.py reads and brings the files.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from buildsys import disk
from buildsys.errors import BuildError
from buildsys.hubs.silent import Unreachable, asked_once
from buildsys.step import digest

SITE = "https://modelscope.cn"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
REVISION = re.compile(r"[A-Za-z0-9][\w./-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
LOGIN = "run `modelscope login`, or set MODELSCOPE_API_TOKEN"
AGAIN = "run the same command again later: what is complete is kept, and a download goes on where it stopped"


@dataclass(frozen=True)
class RepoFile:
    size: int
    sha256: str  # "": ModelScope tells none
    commit: str = ""  # that last changed it
    when: int = 0


@dataclass(frozen=True)
class Listing:
    """What a model repository holds at a revision."""

    repo: str
    asked: str  # a branch, a tag, a commit
    commit: str  # "": none is known to hold just these files
    files: Mapping[str, RepoFile]

    @property
    def revision(self) -> str:
        """The most lasting name of these contents."""
        return self.commit or self.asked

    @property
    def contents(self) -> dict[str, tuple[int, str]]:
        return {name: (file.size, file.sha256) for name, file in self.files.items()}

    @property
    def where(self) -> str:
        return page(self.repo)


# The client and its errors


def site() -> str:
    """The address that the client asks, without a password that somebody may have put into it."""
    said = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN", "").strip() or SITE
    parts = urlsplit(said if "://" in said else f"https://{said}")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def page(repo: str) -> str:
    return f"{site()}/models/{repo}"


def check_repo(repo: str) -> str:
    """`repo` itself; ValueError where it is no owner/name."""
    if not REPO.fullmatch(repo):
        raise ValueError(f"{repo!r} is no repository: write owner/name, as in the address of its page")
    return repo


def check_revision(revision: str) -> str:
    """`revision` itself; ValueError where it can be no branch, tag or commit. It becomes the name of a folder in the cache."""
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise ValueError(f"{revision!r} is no revision: write a branch, a tag or a whole commit")
    return revision


def connect() -> Any:
    """A client (modelscope_hub.HubApi) as the environment and `modelscope login` have set it up. It logs no addresses."""
    try:
        from modelscope_hub import HubApi, HubConfig
    except ImportError:
        what = "needs the package modelscope-hub, which is not installed"
        raise BuildError(site(), what, "run: pip install 'buildsys[modelscope]'") from None
    logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
    try:
        return HubApi(HubConfig())
    except (EOFError, ValueError, AttributeError, ImportError, IndexError, KeyError):  # what unpickling damage raises
        what = "the login that `modelscope login` saved cannot be read"
        raise BuildError(site(), what, "run `modelscope logout`, then `modelscope login`") from None


@contextmanager
def speaking(where: str, unreachable: str = "") -> Iterator[None]:
    """Around anything that asks ModelScope: what its client raises for a user's situation becomes a BuildError at `where`.

    No text of theirs is passed on, for it may quote a header or an address with a password. `unreachable` is the fix where the network is
    at fault.
    """
    try:
        yield
    except theirs() as error:
        raise disk.explained(error, where) or _explained(error, where, unreachable) from None
    except OSError as error:
        known = disk.explained(error, where)
        if known is None:
            raise
        raise known from None


def theirs() -> tuple[type[Exception], ...]:
    """What the client raises. Looked up when something was raised, so that what is here already needs no client."""
    try:
        from modelscope_hub.errors import HubError
        from requests import RequestException
    except ImportError:
        return ()
    return HubError, RequestException, UnicodeError


def passing(error: Exception) -> bool:
    """Whether asking again may help. What requests raises as a ValueError cannot be sent, or not be read."""
    return bool(getattr(error, "retryable", not isinstance(error, ValueError)))


def _explained(error: Exception, where: str, unreachable: str) -> BuildError:
    from modelscope_hub import errors
    from requests import exceptions

    status = getattr(error, "status_code", None)
    if isinstance(error, errors.AuthenticationError):
        return BuildError(where, "asks for a login, or does not know the token that it was given (401)", LOGIN)
    if isinstance(error, errors.QuotaExceededError):
        return BuildError(where, "the account's quota is used up", f"free some of it at {site()}, then run the same command again")
    if isinstance(error, errors.PermissionDeniedError):
        what = "is private or gated, and this account may not do that (403)"
        return BuildError(where, what, f"ask for access at {where}, then {LOGIN}, as the account that has it")
    if isinstance(error, errors.NotExistError):
        what = "is not there (404); without a login, a private repository looks the same"
        return BuildError(where, what, f"correct its name, or {LOGIN}")
    if isinstance(error, errors.RateLimitError):
        return BuildError(where, "too many requests (429)", AGAIN)
    if isinstance(error, errors.ServerError):
        said = f"HTTP {status}" if status else "an error of the server"
        return BuildError(where, f"answers with {said}, also when asked again", AGAIN)
    if isinstance(error, errors.FileIntegrityError):
        return BuildError(where, "sends other bytes than it lists", f"{AGAIN}; if it stays so, tell the repository's owner")
    if isinstance(error, (exceptions.InvalidHeader, UnicodeError)):
        return BuildError(where, "the token has a character that cannot be sent: a line end, or one outside ASCII", LOGIN)
    if isinstance(error, (errors.NetworkError, exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError)):
        fix = unreachable or "check the network and MODELSCOPE_ENDPOINT, then run the same command again: it goes on where it stopped"
        kind = Unreachable if _unconnected(error) else BuildError
        return kind(where, f"cannot be reached, or stopped answering ({type(error).__name__})", fix)
    if isinstance(error, (exceptions.InvalidProxyURL, exceptions.InvalidSchema)):
        what = f"cannot be asked through the proxy that is set ({type(error).__name__})"
        fix = "set HTTPS_PROXY, HTTP_PROXY and ALL_PROXY to http://host:port, or unset them; check MODELSCOPE_ENDPOINT"
        return BuildError(where, what, fix)
    if status is not None:
        return BuildError(where, f"refuses the request (HTTP {status}, {type(error).__name__})", f"look at {where}, and check the recipe")
    what = f"answers what its client cannot read ({type(error).__name__})"
    return BuildError(where, what, "check that MODELSCOPE_ENDPOINT names a ModelScope site, and that no proxy answers in its place")


def _unconnected(error: BaseException) -> bool:
    """Whether no connection was made at all, to the site or to the proxy before it."""
    from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, ProxyError

    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, (NewConnectionError, ConnectTimeoutError, ProxyError)):
        seen = seen.__cause__ or seen.__context__
    return seen is not None


# What a repository holds


def floating(revision: str) -> bool:
    """Whether a revision may move: all but a whole commit."""
    return COMMIT.fullmatch(revision) is None


def listing(repo: str, revision: str, home: Path) -> Listing:
    """The files of `repo`. Of a commit they are remembered under `home`: no network is asked twice."""
    kept = note(repo, revision, home)
    known = None if floating(revision) else _remembered(kept)
    if known is not None:
        return Listing(repo, revision, revision, known)
    api = connect()
    pin = pinned(repo, home)
    with asked_once(site(), page(repo), pin), speaking(page(repo), pin):
        found = look(api, repo, revision)
    if found.commit:
        _remember(note(repo, found.commit, home), found.files)
    return found


def look(api: Any, repo: str, revision: str) -> Listing:
    """The files of `repo` now, asked of the server."""
    from modelscope_hub.errors import NotExistError

    try:
        files = _files(api, repo, revision)
    except NotExistError:
        branches, tags = (sorted(str(ref.get("Revision")) for ref in refs) for refs in api.legacy.list_revisions_detail(repo, "model"))
        if revision in (*branches, *tags):
            files = {}  # a branch without a commit
        else:
            shown = ", ".join([*branches, *tags][:12]) or "none"
            raise BuildError(page(repo), f"has no revision {revision}; it has {shown}", "name one of these, or a whole commit") from None
    return Listing(repo, revision, _commit(api, repo, revision, files), files)


def _files(api: Any, repo: str, revision: str) -> dict[str, RepoFile]:
    entries = api.legacy.list_repo_files(repo, "model", revision=revision, recursive=True)
    return dict(_entry(repo, entry) for entry in entries if entry.get("Type") != "tree")


def _entry(repo: str, entry: Mapping[str, Any]) -> tuple[str, RepoFile]:
    name, size, told = entry.get("Path"), entry.get("Size"), entry.get("Sha256") or ""
    if not isinstance(name, str) or not isinstance(size, int) or size < 0 or not (told == "" or SHA256.fullmatch(str(told))):
        raise BuildError(page(repo), f"lists a file that cannot be one: {name!r}, {size!r} bytes", "check MODELSCOPE_ENDPOINT")
    if not name or name != PurePosixPath(name).as_posix() or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise BuildError(page(repo), f"lists a file outside the repository: {name!r}", "use a repository that you trust")
    when = entry.get("CommittedDate")
    return name, RepoFile(size, told, str(entry.get("Revision") or ""), when if isinstance(when, int) else 0)


def _commit(api: Any, repo: str, revision: str, files: Mapping[str, RepoFile]) -> str:
    """A commit with just these files: the one that was asked for, or the newest that the listing names, if asking for it shows the same."""
    from modelscope_hub.errors import NotExistError

    if not floating(revision):
        return revision
    contents = Listing(repo, revision, "", files).contents
    newest = sorted({(file.when, file.commit) for file in files.values() if not floating(file.commit)}, reverse=True)
    for _, commit in newest[:3]:  # several may share a second
        try:
            if Listing(repo, commit, commit, _files(api, repo, commit)).contents == contents:
                return commit
        except NotExistError:
            continue
    return ""


def note(repo: str, revision: str, home: Path) -> Path:
    """Where a commit's listing is remembered."""
    return home / "modelscope" / repo.replace("/", "--") / f"{revision}.json"


def _remember(kept: Path, files: Mapping[str, RepoFile]) -> None:
    written = {name: [file.size, file.sha256] for name, file in files.items()}
    with disk.writing(kept):
        disk.write(kept, json.dumps({"files": written, "digest": digest(written)}).encode())


def _remembered(kept: Path) -> dict[str, RepoFile] | None:
    """What `_remember` wrote; None where there is nothing, or damage."""
    try:
        said = json.loads(kept.read_bytes())
        whole = said["digest"] == digest(said["files"])
        return {name: RepoFile(size, told) for name, (size, told) in said["files"].items()} if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def pinned(repo: str, home: Path) -> str:
    """The fix for a machine that is offline, where an earlier plan has left what it found."""
    notes = sorted(note(repo, "x", home).parent.glob("*.json"), key=lambda kept: kept.stat().st_mtime)
    return f"go online, or pin what was last seen of it here: revision: {notes[-1].stem}" if notes else ""

"""Which files a repository holds: asked of the hub, remembered for good where a commit is named, or read from the shared cache offline.

A commit never changes, so what it holds is asked once. Endpoints: huggingface_hub, HfApi.repo_info and
HfApi.list_repo_tree, which wait for ever where an answer never comes, and so are not called.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from buildsys import disk
from buildsys.errors import BuildError
from buildsys.hubs.hub_errors import asking, not_here, patiently
from buildsys.hubs.hub_http import opened
from buildsys.hubs.hub_repo import (
    COMMIT,
    SHA256,
    Listing,
    Repo,
    RepoFile,
    cache,
    check_id,
    check_name,
    check_revision,
    endpoint,
    is_commit,
    offline,
    shown_endpoint,
    snapshot,
)
from buildsys.hubs.silent import asked_once
from buildsys.step import digest


def listing(repo: Repo, home: Path, under: str = "") -> Listing:
    """The files of `repo`, or of its folder `under` alone. What a commit holds is remembered below `home` and asked once."""
    try:
        check_id(repo.id)
        check_revision(repo.revision)
    except ValueError as error:
        raise BuildError(str(repo), str(error), "correct it") from None
    place = home / repo.folder
    commit = repo.revision if is_commit(repo.revision) else (_ref_here(repo, place) if offline() else _resolve(repo, place))
    memory = place / f"{commit}{'+' + quote(under, safe='') if under else ''}.json"
    known = _remembered(memory)
    if known is not None:
        return Listing(repo, commit, known)
    if offline():
        return Listing(repo, commit, _cached(repo, commit, under), whole=False)
    found = dict(_asked(Repo(repo.kind, repo.id, commit), under))
    with disk.writing(home):
        disk.write(memory, json.dumps(_written(found)).encode())
    return Listing(repo, commit, found)


def _resolve(repo: Repo, place: Path) -> str:
    """The commit that a branch or tag points to now; remembered for when there is no network."""
    from huggingface_hub.errors import RevisionNotFoundError

    about = f"{endpoint()}/api/{repo.kind}s/{repo.id}"
    with asked_once(endpoint(), str(repo)), asking(repo):
        try:
            said = _json(patiently(partial(_page, f"{about}/revision/{quote(repo.revision, safe='')}"))[0], repo)
        except RevisionNotFoundError:
            refs = _json(patiently(partial(_page, f"{about}/refs"))[0], repo)
            raise _no_revision(repo, _names(refs)) from None
    commit = said.get("sha") if isinstance(said, dict) else None
    if not isinstance(commit, str) or not is_commit(commit):
        raise _no_hub(repo)
    with disk.writing(place):
        disk.write(_ref(place, repo), commit.encode())
    return commit


def _names(refs: Any) -> list[str]:
    """Branches and tags, as far as the answer is one."""
    try:
        return [str(ref["name"]) for sort in ("branches", "tags") for ref in refs[sort]]
    except (KeyError, TypeError):
        return []


def _no_revision(repo: Repo, there: list[str]) -> BuildError:
    near = difflib.get_close_matches(repo.revision, there, n=3)
    shown = ", ".join(there[:8]) + (" …" if len(there) > 8 else "")
    fix = f"did you mean {' or '.join(near)}?" if near else "name one of these, or a commit"
    return BuildError(str(repo), f"{repo.id} has no revision {repo.revision}; it has {shown or 'none'}", fix)


def _ref(place: Path, repo: Repo) -> Path:
    return place / "refs" / quote(repo.revision, safe="")


def _ref_here(repo: Repo, place: Path) -> str:
    """The commit that a branch pointed to when it was last looked at, by us or by another user of the shared cache."""
    seen = [path for path in (_ref(place, repo), cache() / repo.folder / "refs" / repo.revision) if path.is_file()]
    if not seen:
        raise not_here(repo, str(repo))
    latest = max(seen, key=lambda path: path.stat().st_mtime_ns)
    commit = latest.read_text(errors="replace").strip()
    if not COMMIT.fullmatch(commit):
        raise BuildError(str(latest), "does not hold a commit", f"delete it, and while online run `{repo.download}`")
    return commit


def _asked(repo: Repo, under: str) -> Iterator[tuple[str, RepoFile]]:
    """The hub's listing, page by page."""
    folder = f"/{quote(under)}" if under else ""
    page: str | None = f"{endpoint()}/api/{repo.kind}s/{repo.id}/tree/{repo.revision}{folder}?recursive=true&expand=false"
    while page is not None:
        with asked_once(endpoint(), str(repo)), asking(repo):
            body, page = patiently(partial(_page, page))
        yield from _read(body, repo)


def _page(address: str) -> tuple[bytes, str | None]:
    """A page's content and the address of the next."""
    with opened(address) as answer:
        return answer.read(), answer.links.get("next", {}).get("url")


def _read(body: bytes, repo: Repo) -> Iterator[tuple[str, RepoFile]]:
    rows = _json(body, repo)
    try:
        for row in rows if isinstance(rows, list) else [rows]:
            if row["type"] == "file":
                yield check_name(row["path"], repo), _file(row)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _no_hub(repo) from None


def _file(row: Mapping[str, Any]) -> RepoFile:
    """A file is called by its ids in the shared cache: nothing but ids may be among them."""
    lfs: Mapping[str, Any] | None = row.get("lfs")
    found = RepoFile(int(lfs["size"] if lfs else row["size"]), lfs["oid"] if lfs else None, row["oid"])
    if found.size < 0 or not COMMIT.fullmatch(found.blob_id) or (lfs and not SHA256.fullmatch(lfs["oid"])):
        raise ValueError("no id")
    return found


def _json(body: bytes, repo: Repo) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise _no_hub(repo) from None


def _no_hub(repo: Repo) -> BuildError:
    return BuildError(str(repo), f"{shown_endpoint()} does not answer as a hub does", "check HF_ENDPOINT: is it the address of a hub?")


def _written(files: Mapping[str, RepoFile]) -> dict[str, Any]:
    rows = {name: [file.size, file.sha256, file.blob_id] for name, file in files.items()}
    return {"files": rows, "digest": digest(rows)}


def _remembered(memory: Path) -> dict[str, RepoFile] | None:
    """The inverse of `_written`; None where there is none, or it was damaged."""
    try:
        found = json.loads(memory.read_bytes())
        rows = found["files"]
        if digest(rows) != found["digest"]:
            return None
        return {name: RepoFile(size, sha256, blob_id) for name, (size, sha256, blob_id) in rows.items()}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _cached(repo: Repo, commit: str, under: str) -> dict[str, RepoFile]:
    """What the shared cache holds of a commit. Its links lead to files named as the hub names them: by sha256, or by git's id."""
    folder = snapshot(repo, commit)
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    wanted = {name: path for name, path in found.items() if not under or name.startswith(f"{under}/")}
    if not wanted:
        raise not_here(repo, str(repo))
    return {name: _described(path) for name, path in wanted.items()}


def _described(path: Path) -> RepoFile:
    size = path.stat().st_size
    name = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
    if SHA256.fullmatch(name):
        return RepoFile(size, name, "")
    return RepoFile(size, None, name if COMMIT.fullmatch(name) else git_id(path.read_bytes()))


def git_id(content: bytes) -> str:
    """How git, and so the hub, calls a small file: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()

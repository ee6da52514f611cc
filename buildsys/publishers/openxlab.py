"""Publishes to OpenXLab's model center (openxlab.org.cn). Experimental: its client can do less than a release needs.

What openxlab 0.1.3 cannot do, read in its source (openxlab/model): no commit of several files, so a reader may see some new and some old
ones; no revisions and no tags, so there is no rollback; no deletion but of a whole repository, so files of an earlier release stay; no
folders, so `deploy/x` is stored as `deploy--x`; no digest of what is stored. What is made of that here: files are sent one by one, a list
of their digests (release.sha256.json) last, and everything is read back and compared. Until the list is a release's, the release is not
there. The client runs in a process and an environment of its own: hubs/openxlab.py.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from buildsys.errors import BuildError
from buildsys.hubs import openxlab
from buildsys.publishers import Progress, Receipt, Release
from buildsys.slots import Frozen

VERSION = 1

LIST = "release.sha256.json"
FOLDER = "--"
_CANNOT = (
    "experimental: files are replaced one by one, so a reader may meanwhile see some new and some old ones",
    "experimental: OpenXLab has no tags and its client deletes no file: no rollback, and files of earlier releases stay",
)


class Knobs(Frozen):
    repo: str = Field(description="the repository, owner/name")
    private: bool = Field(default=True, description="whether a repository that is made here is private; one that exists stays as it is")
    license: str = Field(default="Other", description="what a repository that is made here says")
    code: str = Field(default="", description="address of the model's code: OpenXLab makes no repository without one; empty: make none")

    @field_validator("repo")
    @classmethod
    def _repo(cls, repo: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo, re.ASCII):
            raise ValueError(f"{repo!r} is no repository: write owner/name, as in the address of its page")
        return repo


def destination(knobs: Knobs, folder: Path) -> str:
    """The address of the repository's page; `folder` is of no interest here."""
    return f"https://openxlab.org.cn/models/detail/{knobs.repo}"


def plan(knobs: Knobs, release: Release, to: str) -> tuple[str, ...]:
    """What `publish` would do, in lines. Asks nobody: the other side tells no digests, so to say more it had to read everything."""
    stored = _stored(release, to)
    lines = [f"send {name} ({release.sizes[name]:,} bytes){'' if name == flat else f' as {flat}'}" for name, flat in stored.items()]
    if not openxlab.ready():
        lines.insert(0, f"make a Python environment for {openxlab.PIN} in {openxlab.environment()}")
    return (*_CANNOT, *lines, f"send {LIST}; read everything back from {to}; what is there and equal is not sent")


def publish(knobs: Knobs, release: Release, to: str, progress: Progress) -> Receipt:
    """Sends what differs, then the list, then reads back what was sent. Run again, it reads and sends nothing."""
    stored, listed = _stored(release, to), _list(release)
    wanted, total = _wanted(release, stored), sum(release.sizes.values()) + len(listed)
    found = _read(knobs, wanted, total, to, progress)
    create = _missing(knobs, to) if found is None else None
    found = found or {}
    differ = [name for name, flat in stored.items() if found.get(flat) != wanted[flat]]
    if differ or found.get(LIST) != wanted[LIST]:
        with tempfile.TemporaryDirectory() as folder:
            last = Path(folder) / LIST
            last.write_bytes(listed)
            files = [{"as": stored[name], "path": str(release.tree / name), "sha256": release.files[name]} for name in differ]
            files.append({"as": LIST, "path": str(last), "sha256": wanted[LIST]})
            total = sum(release.sizes[name] for name in differ) + len(listed)
            openxlab.ask(knobs.repo, {"do": "send", "files": files, "create": create}, to, progress, _bytes("upload", total, progress))
        found |= _read(knobs, [LIST, *(stored[name] for name in differ)], total, to, progress) or {}
    _compare(found, wanted, to)
    return _receipt(to, release)


def verify(knobs: Knobs, release: Release, to: str, progress: Progress) -> Receipt:
    """Reads every byte back. Files of earlier releases, which nobody can delete, are no part of it."""
    wanted = _wanted(release, _stored(release, to))
    total = sum(release.sizes.values()) + len(_list(release))
    _compare(_read(knobs, wanted, total, to, progress) or {}, wanted, to)
    return _receipt(to, release)


def rollback(knobs: Knobs, digest: str, to: str, progress: Progress) -> Receipt:
    raise BuildError(to, "OpenXLab keeps no earlier release, so there is none to go back to", "build the earlier recipe and publish it")


def _wanted(release: Release, stored: dict[str, str]) -> dict[str, str]:
    """Digests of what is stored, the list included."""
    return {**{flat: release.files[name] for name, flat in stored.items()}, LIST: sha256(_list(release)).hexdigest()}


def _receipt(to: str, release: Release) -> Receipt:
    return Receipt(f"{to} (experimental)", release.digest)


def _stored(release: Release, to: str) -> dict[str, str]:
    """name -> what it is called there. Refuses what cannot be stored."""
    stored = {name: name.replace("/", FOLDER) for name in release.files}
    names = [*stored.values(), LIST]
    twice = sorted({flat for flat in names if names.count(flat) > 1})
    if twice:
        raise BuildError(
            to, f"has no folders: two files of the release would both be {twice[0]}", "publish elsewhere, or rename one of them"
        )
    empty = [name for name, size in release.sizes.items() if not size]
    if empty:
        raise BuildError(to, f"stores no empty file, and {empty[0]} is one", "publish elsewhere")
    return stored


def _list(release: Release) -> bytes:
    """What is stored last: which files are the release. Equal releases have equal lists."""
    said = {"name": release.name, "digest": release.digest, "sha256": dict(sorted(release.files.items())), "folders": FOLDER}
    return (json.dumps(said, indent=1) + "\n").encode()


def _missing(knobs: Knobs, to: str) -> dict[str, Any]:
    """What to make the repository with."""
    if not knobs.code:
        fix = f"make {knobs.repo} on openxlab.org.cn, or set publish.openxlab.code to the address of the model's code to have it made"
        raise BuildError(to, "is not there, or is not yours", fix)
    return {"private": knobs.private, "license": knobs.license, "code": knobs.code}


def _read(knobs: Knobs, names: Iterable[str], total: int, to: str, progress: Progress) -> dict[str, str] | None:
    """Digests of those files that are there; None: no repository."""
    job = {"do": "read", "names": sorted(names)}
    found: dict[str, str] | None = openxlab.ask(knobs.repo, job, to, progress, _bytes("read back", total, progress))
    return found


def _bytes(what: str, total: int, progress: Progress) -> Callable[[int], None]:
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(what, min(done, total), total)

    return tick


def _compare(found: dict[str, str], wanted: dict[str, str], to: str) -> None:
    wrong = [
        f"{name} has sha256 {found[name][:12]}, not {told[:12]}" if name in found else f"{name} is missing"
        for name, told in wanted.items()
        if found.get(name) != told
    ]
    if wrong:
        raise BuildError(to, "; ".join(wrong[:3]) + (f" … and {len(wrong) - 3} more" if wrong[3:] else ""), "publish again")

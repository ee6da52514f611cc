"""Asks git and changes nothing: no index is refreshed, no work tree is made. What git refuses is told as where, what, fix.

Plumbing of git 2.20 and later (git-ls-tree, git-cat-file --batch); paths are relative to the folder that is asked about.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from buildsys.errors import BuildError

CHUNK_BYTES = 1 << 20
LINK, SUBMODULE = "120000", "160000"


@dataclass(frozen=True)
class Entry:
    """One file of a commit."""

    mode: str
    blob: str
    path: str


class Git:
    """The repository that `root` lies in, seen from `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        inside = self._run("rev-parse", "--is-inside-work-tree")
        if inside.returncode != 0 or inside.stdout.strip() != b"true":
            said = _last(inside.stderr)
            if "dubious" in said or "safe.directory" in said:
                raise BuildError(str(root), f"git refuses this repository: {said}", f"git config --global --add safe.directory {root}")
            raise BuildError(str(root), "is in no git repository, so there is nothing to compare with", "git init, and commit the recipes")

    def commit(self, ref: str) -> str:
        """The commit that `ref` names."""
        found = None if ref.startswith("-") else self._run("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
        if found is not None and found.returncode == 0:
            return found.stdout.decode().strip()
        remote, _, branch = ref.partition("/")
        fix = "name a branch, a tag or a commit: `git branch -a` and `git log` show them"
        if branch and remote in self._text("remote").split():
            fix = f"git fetch {remote} {branch}"
        elif self._text("rev-parse", "--is-shallow-repository") == "true":
            raise BuildError(f"base={ref}", "is no commit of this clone, which is shallow", "git fetch --unshallow, or fetch that ref")
        raise BuildError(f"base={ref}", "names no commit of this repository", fix)

    def forked(self, commit: str) -> str | None:
        """The commit where the checked-out branch left `commit`'s; None where this clone does not know (it is shallow, or has none)."""
        return self._text("merge-base", commit, "HEAD") or None

    def entries(self, commit: str) -> list[Entry]:
        """Every file below `root` as of `commit`."""
        listed = self._need("ls-tree", "-r", "-z", commit)
        found = []
        for line in filter(None, os.fsdecode(listed).split("\0")):
            about, path = line.split("\t", 1)
            mode, _, blob = about.split(" ")
            found.append(Entry(mode, blob, path))
        return found

    def changed(self, commit: str) -> frozenset[str]:
        """Files that git holds, or held in `commit`, and that are other in the work tree now."""
        options = ("--name-only", "-z", "--relative", "--no-renames", "--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty")
        return frozenset(filter(None, os.fsdecode(self._need("diff", *options, commit, "--", ".")).split("\0")))

    def untracked(self) -> list[str]:
        """What lies in the work tree and git does not hold, ignored or not; whole folders end with a slash."""
        listed = self._need("ls-files", "-z", "--others", "--directory")
        return list(filter(None, os.fsdecode(listed).split("\0")))

    def lfs(self, oid: str) -> Path:
        """Where git-lfs keeps the content of a pointer, if it was ever fetched."""
        common = Path(self.root, self._text("rev-parse", "--git-common-dir"))
        return common / "lfs" / "objects" / oid[:2] / oid[2:4] / oid

    def write(self, blobs: Iterable[tuple[str, Path]]) -> None:
        """Each blob's content into its file, as the commit holds it (no filters)."""
        wanted = list(blobs)
        if not wanted:
            return
        with self._open("cat-file", "--batch") as (asks, answers):
            for blob, path in wanted:
                asks.write(f"{blob}\n".encode())
                asks.flush()
                head = answers.readline().split()
                if len(head) != 3:
                    what = f"git has no content of {path.name} ({blob[:12]}): this clone is partial or damaged"
                    raise BuildError(str(self.root), what, "git fetch --refetch, or clone the repository again")
                with path.open("wb") as file:
                    _copy(answers, file, int(head[2]))
                answers.read(1)  # the newline behind each

    @contextmanager
    def _open(self, *arguments: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
        with subprocess.Popen(
            ["git", *arguments], cwd=self.root, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdin is not None and process.stdout is not None
            try:
                yield process.stdin, process.stdout
            finally:
                process.kill()

    def _need(self, *arguments: str) -> bytes:
        ran = self._run(*arguments)
        if ran.returncode != 0:
            raise BuildError(str(self.root), f"git {arguments[0]} failed: {_last(ran.stderr)}", "mend the repository: git fsck")
        return ran.stdout

    def _text(self, *arguments: str) -> str:
        ran = self._run(*arguments)
        return ran.stdout.decode(errors="replace").strip() if ran.returncode == 0 else ""

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(["git", *arguments], cwd=self.root, env=_environment(), capture_output=True, stdin=subprocess.DEVNULL)
        except FileNotFoundError:
            raise BuildError("git", "is not installed, and base= names one of its refs", "install git") from None


def _environment() -> dict[str, str]:
    """Nobody is asked for a password, and the index is left as it is."""
    return {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def _last(said: bytes) -> str:
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    return lines[0].removeprefix("fatal: ") if lines else "it says nothing"


def _copy(source: IO[bytes], to: IO[bytes], left: int) -> None:
    while left:
        chunk = source.read(min(left, CHUNK_BYTES))
        if not chunk:
            raise BuildError("git cat-file", "ended in the middle of a file", "run the same command again; if it stays so: git fsck")
        to.write(chunk)
        left -= len(chunk)

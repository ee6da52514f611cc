"""VERSIONs that a source tree of buildsys declares, read as text: of the working tree, and of any commit beside it.

Nothing of the other commit is imported or run; `ast` reads constants. Blobs come from git by their ids (git-cat-file(1), --batch).
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from buildsys.errors import BuildError

PACKAGE = "buildsys"
MARKS = (b"VERSION", b"KEY_FORMAT")  # a file without these declares nothing, and is not parsed


@dataclass(frozen=True)
class Bump:
    """A part whose VERSION is another now: `methods.awq`, `quant`, `steps.pack` (the glue of that kind of step), `keys`."""

    part: str
    before: int
    after: int

    def __str__(self) -> str:
        return f"{self.part} {self.before} -> {self.after}"


def bumps(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Bump, ...]:
    """What both have, with other numbers. A part that is new or gone is no bump: recipes that name it change with it."""
    both = sorted(before.keys() & after.keys())
    return tuple(Bump(part, before[part], after[part]) for part in both if before[part] != after[part])


def of_tree(root: Path) -> dict[str, int]:
    """Of the files below `root`/buildsys as they are now."""
    package = root / PACKAGE
    if not package.is_dir():
        raise _no_source(str(root), "this workspace has no folder buildsys/")
    return _versions({path.relative_to(package).as_posix(): path.read_bytes() for path in sorted(package.rglob("*.py"))}, str(package))


def of_commit(root: Path, ref: str) -> tuple[str, dict[str, int]]:
    """Of the commit that `ref` names, in the repository that `root` lies in; the commit's id beside it."""
    if ref.startswith("-"):
        raise _no_ref(ref)
    commit = _git(root, ["rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"], _no_ref(ref)).decode().strip()
    listed = _git(root, ["ls-tree", "-r", "-z", commit, "--", f"{PACKAGE}/"]).split(b"\0")
    named = [(line.split(b"\t", 1)[1].decode("utf-8", "replace"), line.split()[2]) for line in listed if line]
    python = [(name.removeprefix(f"{PACKAGE}/"), blob) for name, blob in named if name.endswith(".py")]
    if not python:
        raise _no_source(f"base={ref}", f"commit {commit[:12]} has no folder buildsys/")
    raw = _git(root, ["cat-file", "--batch"], said=b"".join(blob + b"\n" for _, blob in python))
    return commit, _versions(dict(zip((name for name, _ in python), _batched(raw), strict=True)), f"{commit[:12]}:{PACKAGE}")


def _batched(raw: bytes) -> Iterator[bytes]:
    """Contents in `cat-file --batch`'s answer: a line `id type bytes`, the content, a newline."""
    at = 0
    while at < len(raw):
        end = raw.index(b"\n", at)
        size = int(raw[at:end].split()[2])
        yield raw[end + 1 : end + 1 + size]
        at = end + size + 2


def _git(root: Path, arguments: Sequence[str], refusal: BuildError | None = None, said: bytes = b"") -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], input=said, capture_output=True, check=False)
    except FileNotFoundError:
        raise BuildError("git", "is not installed, and the base is a commit", "install git") from None
    if done.returncode == 0:
        return done.stdout
    words = done.stderr.decode(errors="replace").strip()
    if "not a git repository" in words:
        raise BuildError(
            str(root), "is in no git repository, and the base is a commit", "run this in a clone, or say upgrade=TOOL==VERSION"
        )
    if refusal is not None and "dubious ownership" not in words:
        raise refusal
    raise BuildError(f"git {arguments[0]}", words or f"ended with status {done.returncode}", "mend the repository: run `git fsck`")


def _no_ref(ref: str) -> BuildError:
    return BuildError(f"base={ref}", "is no commit, branch or tag here", "run `git fetch`, or correct the name; `git branch -a` shows them")


def _no_source(where: str, what: str) -> BuildError:
    fix = "say upgrade=buildsys==VERSION for what an installed buildsys of that version touches"
    return BuildError(where, f"{what}: no VERSION can be compared", fix)


def _versions(sources: Mapping[str, bytes], where: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, text in sources.items():
        if not any(mark in text for mark in MARKS):
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError) as error:
            raise BuildError(f"{where}/{name}", f"is no Python: {error}", "name a commit whose source is whole") from None
        found |= dict(_declared(PurePosixPath(name), tree))
    return found


def _declared(name: PurePosixPath, tree: ast.Module) -> Iterator[tuple[str, int]]:
    part = ".".join(name.with_suffix("").parts).removesuffix(".__init__")
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        if not isinstance(node, ast.Assign) or not isinstance(target, ast.Name):
            continue
        value = _value(node.value)
        if target.id == "VERSION" and isinstance(value, int):
            yield part, value
        elif target.id == "KEY_FORMAT" and part == "step" and isinstance(value, int):
            yield "keys", value
        elif target.id == "VERSIONS" and isinstance(value, dict):
            yield from ((f"steps.{kind}", version) for kind, version in value.items() if isinstance(version, int))


def _value(node: ast.expr) -> object:
    """A constant, or a mapping as graph.py writes it: literals, `**`, dict.fromkeys, MappingProxyType. None: anything else."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and ast.unparse(node.func) == "MappingProxyType":
        return _value(node.args[0])
    if isinstance(node, ast.Call) and len(node.args) == 2 and ast.unparse(node.func) == "dict.fromkeys":
        keys, value = (_value(argument) for argument in node.args)
        return dict.fromkeys(keys, value) if isinstance(keys, (tuple, list)) else None
    if isinstance(node, ast.Dict):
        merged: dict[object, object] = {}
        for key, inner in zip(node.keys, node.values, strict=True):
            value = _value(inner)
            if key is not None:
                merged[_value(key)] = value
            elif isinstance(value, dict):
                merged |= value
        return merged
    try:
        found: object = ast.literal_eval(node)
    except ValueError:
        return None
    return found

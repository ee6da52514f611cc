"""VERSIONs that a source tree of buildsys declares, read as text: of the working tree, and of any commit beside it.

Nothing of the other commit is imported or run; `ast` reads constants.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from buildsys.errors import BuildError
from buildsys.review.git import LINK, Git

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
    return _of_package(package, str(package))


def of_base(root: Path, ref: str) -> tuple[str, dict[str, int]]:
    """Of the commit where the checked-out branch left `ref` (what `ref` moved since is not this branch's doing); its id beside it.

    Raises BuildError where there is no repository, no such ref, or no source in it.
    """
    git = Git(root)
    named = git.commit(ref)
    commit = git.forked(named) or named
    entries = (entry for entry in git.entries(commit) if entry.mode != LINK and ".." not in entry.path.split("/"))
    python = [entry for entry in entries if entry.path.startswith(f"{PACKAGE}/") and entry.path.endswith(".py")]
    if not python:
        raise _no_source(f"base={ref}", f"commit {commit[:12]} has no folder {PACKAGE}/")
    with TemporaryDirectory(prefix="buildsys-base-") as folder:
        for entry in python:
            (Path(folder) / entry.path).parent.mkdir(parents=True, exist_ok=True)
        git.write((entry.blob, Path(folder) / entry.path) for entry in python)
        return commit, _of_package(Path(folder) / PACKAGE, f"{commit[:12]}:{PACKAGE}")


def _of_package(package: Path, where: str) -> dict[str, int]:
    return _versions({path.relative_to(package).as_posix(): path.read_bytes() for path in sorted(package.rglob("*.py"))}, where)


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

"""What each step of a recipe was made of when it was last built, and so why it runs now: `doit why`.

Kept in artifacts/.store/recipes/<recipe>.json. It explains keys and never decides anything: the store alone says what is built.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from buildsys import disk
from buildsys.step import Step, canonical, reads
from buildsys.store import Artifact

UNLESS = "runs unless its inputs come out equal"
SHA256 = re.compile(r"[0-9a-f]{64}")
MOST = 6  # knobs of one name that are told one by one: an override may change each layer's


@dataclass(frozen=True)
class Ingredients:
    """All that a step's key is made of, in full: the key tells that something changed, this tells what."""

    kind: str
    title: str
    key: str
    version: int
    knobs: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, str]]  # role -> file -> sha256

    @classmethod
    def of(cls, step: Step, key: str, artifacts: Mapping[str, Artifact]) -> Ingredients:
        """`artifacts` holds those of the step's needs, by planned key."""
        inputs = {
            need.role: {
                name: file.sha256 for name, file in sorted(artifacts[need.step.planned_key].files.items()) if reads(need.files, name)
            }
            for need in step.needs
        }
        return cls(step.kind, step.title, key, step.version, step.knobs, inputs)


class History:
    """The last build of one recipe, step by step."""

    def __init__(self, home: Path, recipe: str) -> None:
        self._path = home / "recipes" / f"{recipe}.json"
        self._before = _read(self._path)
        self._now: dict[str, Ingredients] = {}  # by planned key

    def note(self, step: Step, ingredients: Ingredients) -> None:
        """The step is built."""
        self._now[step.planned_key] = ingredients

    def write(self, steps: Iterable[Step]) -> None:
        """Remembers what was noted, and of steps that did not come up what was known before."""
        listed = list(steps)
        old = self.pair(listed)
        kept = [self._now.get(step.planned_key) or old.get(step.planned_key) for step in listed]
        entries = [one for one in kept if one is not None]
        if entries == self._before:
            return
        with disk.writing(self._path):
            disk.write(self._path, canonical([asdict(one) for one in entries]))
        self._before = entries

    def entries(self) -> tuple[Ingredients, ...]:
        """The last build's steps, needs first."""
        return tuple(self._before)

    def keys(self) -> tuple[str, ...]:
        """Real keys of the last build."""
        return tuple(one.key for one in self._before)

    def pair(self, steps: Iterable[Step]) -> dict[str, Ingredients]:
        """The last build of each step, by planned key: of one kind, those of equal titles, then the others in their order.

        A title tells steps of a kind apart, and may itself hold a knob that changed.
        """
        left = list(self._before)
        found: dict[str, Ingredients] = {}
        listed = list(steps)
        for same_title in (True, False):
            for step in listed:
                if step.planned_key in found:
                    continue
                for old in left:
                    if old.kind == step.kind and (old.title == step.title or not same_title):
                        found[step.planned_key] = old
                        left.remove(old)
                        break
        return found


def _read(path: Path) -> list[Ingredients]:
    try:
        return [Ingredients(**one) for one in json.loads(path.read_bytes())]
    except (FileNotFoundError, ValueError, TypeError):  # none yet, or damaged: then there is nothing to compare with
        return []


def why(now: Ingredients, last: Ingredients | None, damage: str | None = None) -> str:
    """Why a step whose key is not in the store has to run."""
    if last is None:
        return f"damaged: {damage}" if damage else "never built"
    if last.key == now.key:
        return f"damaged: {damage}" if damage else "its output is no longer in the store (forgotten, dropped or lost)"
    told = [*changes(now, last), *_changed_inputs(now, last)]
    return "; ".join(told) if told else "keys are made in another way than at its last build"


def changes(now: Ingredients, last: Ingredients) -> Iterator[str]:
    """What differs in a step itself: its VERSION and its knobs."""
    if now.version != last.version:
        yield f"VERSION {last.version} -> {now.version}"
    other = [name for name in last.knobs.keys() | now.knobs.keys() if last.knobs.get(name) != now.knobs.get(name)]
    other += last.knobs.keys() ^ now.knobs.keys()
    old, new = ({at: value for name in other if name in said for at, value in flat(said[name], name)} for said in (last.knobs, now.knobs))
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name) or (name in old) != (name in new)]
    for top, group in groupby(names, lambda name: name.partition(".")[0]):
        told = [change(name, old.get(name, "(unset)"), new.get(name, "(unset)")) for name in group]
        yield from told if len(told) <= MOST else [f"{len(told)} in {top} changed ({told[0]} …)"]


def _changed_inputs(now: Ingredients, last: Ingredients) -> Iterator[str]:
    for role in sorted(now.inputs.keys() | last.inputs.keys()):
        yield from _changed_files(role, last.inputs.get(role, {}), now.inputs.get(role, {}))


def change(name: str, old: Any, new: Any) -> str:
    """One knob's old and new value, in a few words."""
    if all(isinstance(value, str) and SHA256.fullmatch(value) for value in (old, new)):
        return f"{name} changed ({old[:8]} -> {new[:8]})"
    return f"{name} {shown(old)} -> {shown(new)}"


def shown(value: Any) -> Any:
    if isinstance(value, list) and len(value) > MOST:
        return f"[{value[0]}, … {len(value)} in all]"
    return value[:12] if isinstance(value, str) and SHA256.fullmatch(value) else value


def _changed_files(role: str, old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if len(names) > 3:
        yield f"{len(names)} files of {role} changed ({names[0]} …)"
        return
    for name in names:
        state = "is new" if name not in old else "is gone" if name not in new else "changed"
        yield f"{role}/{name} {state}"


def flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Leaves of nested JSON by dotted path; a list is one leaf where it holds plain values."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from flat(inner, f"{path}[{index}]")
    else:
        yield path, list(value) if isinstance(value, tuple) else value

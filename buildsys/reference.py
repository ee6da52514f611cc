"""What each step of a recipe gave at an earlier build: told by the recipe's lock, or by the store's last build of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.history import History, Ingredients
from buildsys.lock import label
from buildsys.step import Step, canonical
from buildsys.store import Artifact, File, Store

if TYPE_CHECKING:
    from buildsys.lock import Locked, Pinned

BESIDE = ("judge", "release", "generate")
"""Kinds that a recipe's history holds and that are no part of a build."""


@dataclass(frozen=True)
class Before:
    """One step as it was built then; as far as that is still known."""

    output: str  # digest of all that it made
    made: Ingredients | None = None  # what it was made of
    artifact: Artifact | None = None  # its files and its manifest
    seconds: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)  # by name, of a check

    @property
    def built(self) -> Mapping[str, Any]:
        said: Mapping[str, Any] = self.artifact.meta.get("built", {}) if self.artifact is not None else {}
        return said


@dataclass(frozen=True)
class Reference:
    """An earlier build of one recipe."""

    whence: str  # for people
    steps: Mapping[str, Before]  # by label
    store: Store  # where its files may lie
    lost: tuple[str, ...] = field(default=())  # steps of it that nothing is known of any more
    tools: Mapping[str, str] = field(default_factory=dict)  # of all its steps, where no manifest tells them step by step
    on: str = ""  # the GPU's name, or the CPU's, likewise


def _label(made: Ingredients) -> str:
    return label(Step(made.kind, made.title, made.version, made.knobs))


def built(store: Store, name: str) -> Reference | None:
    """The recipe's last build in `store`; None where there was none."""
    entries = [one for one in History(store.home, name).entries() if one.kind not in BESIDE]
    found: dict[str, Before] = {}
    lost: list[str] = []
    for made in entries:
        artifact = store.recorded(made.key) or _promised(made)
        if artifact is None:
            lost.append(_label(made))
        else:
            said = artifact.meta.get("built", {})
            found[_label(made)] = Before(artifact.digest(), made, artifact, seconds=said.get("seconds"))
    if not entries:
        return None
    return Reference(f"the build of {_latest(found.values())} in {store.root}", found, store, tuple(lost))


def _promised(made: Ingredients) -> Artifact | None:
    """A fetch whose files changed where they are is dropped by the store; what they were stands in its key."""
    files = made.knobs.get("files") if made.kind == "fetch" else None
    return Artifact(made.key, {name: File(sha256, 0) for name, sha256 in files.items()}) if files is not None else None


def _latest(steps: Iterable[Before]) -> str:
    return max((str(step.built.get("ended", "")) for step in steps), default="") or "an unknown day"


# From a lock


def locked(
    lock: Locked, path: Path, steps: Iterable[Step], here: Reference | None, store: Store, tools: Mapping[str, str]
) -> Reference | None:
    """The verified build that the lock tells of, for these steps; None where it tells of none. Of what `here` made with the same digest
    the files are at hand. `tools`: what the build was made with."""
    if lock.built is None:
        return None
    found = {}
    for step in steps:
        name = label(step)
        if name not in lock.built.steps:
            continue
        output = lock.built.steps[name]
        own = here.steps.get(name) if here is not None else None
        measured = {one.name: one.value for one in lock.built.measurements if name == f"measure {one.check}"}
        found[name] = Before(
            output,
            _made(lock, name, step),
            own.artifact if own is not None and own.output == output else None,
            lock.built.seconds.get(name),
            measured,
        )
    found |= {name: Before(output) for name, output in lock.built.steps.items() if name not in found}  # a check that cannot run here
    return Reference(f"the build that {path.name} tells of", found, store, tools=tools, on=lock.built.on)


def _made(lock: Locked, name: str, step: Step) -> Ingredients:
    """What a step of the lock was made of. A lock does not say which steps have a knob that all have alike: `step` tells."""
    if step.kind == "fetch":
        pinned = {"fetch source": lock.source, "fetch calibration text": lock.calibration}.get(name, lock.text)
        files = dict(pinned.files) if pinned is not None else {}
        return Ingredients(step.kind, _title(name, pinned), "", step.version, {"files": files}, {})
    if lock.steps.get(name) == step.planned_key:
        return Ingredients(step.kind, step.title, "", step.version, step.knobs, {})
    said = {**{knob: value for knob, value in lock.knobs.items() if knob in (*step.knobs, "VERSION")}, **lock.own.get(name, {})}
    version = said.pop("VERSION", step.version)
    absent = {knob: value for knob, value in step.knobs.items() if knob not in said and value in (None, [], {}, ())}
    knobs = {knob: step.knobs[knob] if _digest_of(step.knobs.get(knob)) == value else value for knob, value in said.items()}
    return Ingredients(step.kind, step.title, "", version, {**absent, **knobs}, {})


def _digest_of(value: Any) -> str:
    """How a lock writes a long knob."""
    return f"sha256 {hashlib.sha256(canonical(value)).hexdigest()}"


def _title(name: str, pinned: Pinned | None) -> str:
    """As a fetch of it would be called."""
    if pinned is None:
        return f"{name.removeprefix('fetch ')} (none)"
    (chosen, knobs), *_ = pinned.choice.items()
    place = " ".join((chosen, *([str(knobs["repo"])] if "repo" in knobs and pinned.pin else [])))
    return f"{name.removeprefix('fetch ')} ({place}{f' at {pinned.pin[:12]}' if pinned.pin else ''})"

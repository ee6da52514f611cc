"""What each step of a recipe gave at an earlier build: told by the recipe's lock, or by the store's last build of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from buildsys.history import History, Ingredients
from buildsys.step import Step
from buildsys.store import Artifact, File, Store

BESIDE = ("judge", "release", "generate")
"""Kinds that a recipe's history holds and that are no part of a build."""


@dataclass(frozen=True)
class Before:
    """One step as it was built then; as far as that is still known."""

    output: str  # digest of all that it made
    made: Ingredients | None = None  # what it was made of
    artifact: Artifact | None = None  # its files and its manifest
    planned: str = ""  # planned key
    seconds: float | None = None

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


def label(step: Step) -> str:
    """A step's name inside its recipe, the same whatever its knobs are."""
    if step.kind == "fetch":
        return f"fetch {step.title.partition(' (')[0]}"
    if step.kind == "tokens":
        return f"tokens {step.title.partition(' ')[0]}"
    if step.kind == "measure":
        return f"measure {step.title}"
    if step.kind == "score":
        policies = step.knobs["kv"]
        return "score" if policies == "none" else " ".join(("score", *policies))
    return step.kind


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

"""A step of a build and its keys. Constructive traces: Mokhov, Mitchell, Peyton Jones, "Build Systems a la Carte", 2018, section 5.

A step's *real* key is a digest of everything that its output depends on: the step's kind and VERSION, the knobs that it reads, and the
digests of the files that it reads from the steps before it. Equal keys are equal outputs, so a key found in the store is a finished
step. Its *planned* key needs no outputs (the planned keys of its needs stand in for them), so it is known before anything runs.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import marshal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

KEY_FORMAT = 1
"""Bumped when a key is made of other things, or written in another way; every older key is then a miss."""


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical(value: Any) -> bytes:
    """JSON with one spelling for each value: sorted keys, no spaces, ASCII, no NaN. Raises ValueError or TypeError on anything else."""
    return _ENCODER.encode(value).encode()


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of `value`, in hex."""
    return hashlib.sha256(canonical(value)).hexdigest()


@lru_cache(maxsize=1 << 16)
def _digest(marshalled: bytes) -> str:
    """Of what was marshalled. Steps of many recipes are equal, and so are most of a recipe's before and after a change: the bytes, which
    are as different as the values and their types, are made in a fifth of the time of JSON."""
    return digest(marshal.loads(marshalled))


def reads(globs: tuple[str, ...], name: str) -> bool:
    """Whether a step that reads `globs` of another's output reads its file `name`."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


@dataclass(frozen=True)
class Need:
    """Another step's output under the name that this step calls it by, and which of its files are read."""

    role: str
    step: Step
    files: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Step:
    """One node of the graph. Equal steps of different recipes compare equal and run once."""

    kind: str  # which function of steps.py runs it
    title: str  # what it does, for people
    version: int
    knobs: Mapping[str, Any]  # plain JSON; all of it is in the key
    needs: tuple[Need, ...] = ()
    after: tuple[Step, ...] = ()  # runs after these, whose outputs it does not read
    heavy: bool = False  # runs in a child process that has torch
    computes: bool = False  # it may use a GPU, which one step has at a time
    engine: bool = False  # it starts an engine, which has the GPU for itself
    hints: Mapping[str, Any] = field(default_factory=dict)  # where to find inputs on this machine; never in a key
    resumes: bool = False  # it can use what a killed run of it left in its stage
    clocked: tuple[str, ...] = ()  # files of its output that tell times and memory of the run: no two runs write the same
    promises: Mapping[str, str] | None = None  # its output, name -> sha256, where that is known before it runs

    @cached_property
    def planned_key(self) -> str:
        inputs = {need.role: [need.step.planned_key, sorted(need.files)] for need in self.needs}
        return self._key(inputs)

    def key(self, inputs: Mapping[str, str]) -> str:
        """The real key, given for each role the digest of the files that are read (see `store.Artifact.digest`)."""
        return self._key({need.role: inputs[need.role] for need in self.needs})

    def _key(self, inputs: Mapping[str, Any]) -> str:
        whole = {"key_format": KEY_FORMAT, "step": self.kind, "version": self.version, "knobs": self.knobs, "inputs": inputs}
        try:
            return _digest(marshal.dumps(whole, 2))
        except ValueError:  # it holds what is no plain value, a mapping of another kind
            return digest(whole)

    def __hash__(self) -> int:
        return hash(self.planned_key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self.planned_key == other.planned_key

    def walk(self) -> Iterator[Step]:
        """This step and all before it, each once, needs first."""
        yield from walk(self)


def walk(*ends: Step) -> tuple[Step, ...]:
    """These steps and all before them, each once, needs first."""
    seen: set[str] = set()
    found: list[Step] = []

    def visit(step: Step) -> None:
        if step.planned_key in seen:
            return
        seen.add(step.planned_key)
        for need in step.needs:
            visit(need.step)
        for before in step.after:
            visit(before)
        found.append(step)

    for end in ends:
        visit(end)
    return tuple(found)


@dataclass(frozen=True)
class Resources:
    """What a running step may use. No result depends on `threads` or `batch`; `device` and `gpus` are recorded beside it."""

    threads: int = 1
    batch: int = 1  # finished units of work that may wait for the one before them: more memory, less waiting
    device: str = "cpu"  # or "cuda"
    gpus: int = 1  # that share the work, where the device is one

    @property
    def devices(self) -> tuple[str, ...]:
        """Each device by its own name; the first is where results come together."""
        return tuple(f"cuda:{at}" for at in range(self.gpus)) if self.device == "cuda" and self.gpus > 1 else (self.device,)


@dataclass(frozen=True)
class Inputs:
    """The files that a step reads of one of its needs: those that it declared, and no others."""

    files: Mapping[str, Path]

    def path(self, name: str) -> Path:
        return self.files[name]

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.files))


def nobody_waits(path: Path) -> None:
    """For a finished file that is hashed when all are there."""


@dataclass(frozen=True)
class Request:
    """A step about to run: what it is, what it reads, and the folder that its output goes to (what a killed run left is still there)."""

    kind: str
    knobs: Mapping[str, Any]
    hints: Mapping[str, Any]
    inputs: Mapping[str, Mapping[str, Path]]
    stage: Path
    resources: Resources
    sha256: Callable[[Path], str]
    log: Path | None = None  # what a child process prints goes there
    finished: Callable[[Path], None] = nobody_waits
    """Told of a file of the stage that is complete and under its name, so that its digest is taken while others are made."""

    def read(self, role: str) -> Inputs:
        return Inputs(self.inputs[role])

"""What a review finds, as plain values: recipes that differ, and of each the knobs, steps, figures, gates and measurements.

`render.py` shows it; its JSON is these fields by their names (`doit diff format=json`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from buildsys.errors import BuildError

Kind = Literal["changed", "added", "deleted", "renamed", "broken"]
KINDS: tuple[Kind, ...] = ("broken", "changed", "added", "renamed", "deleted")
UNSET = "(unset)"


@dataclass(frozen=True)
class Knob:
    """One value of the resolved recipe. `where`: the line that writes it now or, where it is gone, wrote it."""

    key: str
    before: Any
    after: Any
    where: str


@dataclass(frozen=True)
class StepChange:
    """A step that the base has no equal of. `unless`: nothing of its own changed, and it runs unless its inputs come out equal."""

    kind: str
    title: str
    state: Literal["runs", "unless"]
    why: str
    seconds: float | None  # roughly; None where nobody knows, which are moments as a rule
    key: str  # planned


@dataclass(frozen=True)
class Figure:
    """One number that planning predicts; None: that side has none."""

    name: str
    unit: str  # bytes, s, tokens, tokens/s, sessions
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Gate:
    """A limit that moved. Loosened: something passes now that did not."""

    name: str
    before: Any
    after: Any
    state: Literal["LOOSENED", "tightened", "added", "gone", "changed"]


@dataclass(frozen=True)
class Moved:
    """A measurement of the last verified build of either side, from the locks, with its 95% interval (value, low, high)."""

    check: str
    name: str
    unit: str
    before: tuple[float, float, float] | None
    after: tuple[float, float, float] | None
    state: Literal["better", "worse", "within noise", "equal", "moved", "new", "gone"]


@dataclass(frozen=True)
class Change:
    """One recipe. `was`: its name in the base, where that is another. `shares`: how many of its steps the base has."""

    name: str
    kind: Kind
    where: str
    was: str = ""
    knobs: tuple[Knob, ...] = ()
    files: tuple[str, ...] = ()  # data in git that it reads and that changed
    steps: tuple[StepChange, ...] = ()
    kept: int = 0
    figures: tuple[Figure, ...] = ()
    gates: tuple[Gate, ...] = ()
    measurements: tuple[Moved, ...] = ()
    measured: str = ""  # what to know of these measurements: on which machine, and whether they are of these steps
    notes: tuple[str, ...] = ()
    published: tuple[str, ...] = ()  # places that its releases went to, of a recipe that is gone
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Review:
    """Everything that differs. Sums count a step that recipes share once; figures are summed over the recipes of `changes`."""

    ref: str
    commit: str
    changes: tuple[Change, ...]
    same: int  # recipes that resolve to what they were
    sums: tuple[Figure, ...] = ()
    machine: str = "CPU"  # that the seconds are for
    runs_s: float = 0.0  # of the steps that run for certain
    unless_s: float = 0.0  # of those that run unless their inputs come out equal
    runs: int = 0
    unless: int = 0
    notes: tuple[str, ...] = ()
    errors: tuple[BuildError, ...] = field(default=(), compare=False)

    def of(self, kind: Kind) -> tuple[Change, ...]:
        return tuple(change for change in self.changes if change.kind == kind)

    @property
    def counts(self) -> Mapping[str, int]:
        return {kind: len(self.of(kind)) for kind in KINDS if self.of(kind)}

    @property
    def loosened(self) -> tuple[tuple[str, Gate], ...]:
        """Each gate that lets more pass than before, with its recipe."""
        return tuple((change.name, gate) for change in self.changes for gate in change.gates if gate.state == "LOOSENED")

"""What verify found: a number with its interval, and the limit that a recipe holds it to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measurement:
    """One measured value. `low` and `high` are the ends of its 95% interval; equal to `value` where it is exact."""

    name: str
    value: float
    unit: str
    low: float
    high: float
    detail: str = ""  # evidence for people: the worst layer, the first finding …

    @classmethod
    def exact(cls, name: str, value: float, unit: str, detail: str = "") -> Measurement:
        return cls(name, value, unit, value, value, detail)


def scores_file(policy: str) -> str:
    """What a `score` step calls the scores of the artifact with a KV policy; without one they are every other check's too."""
    return "scores.safetensors" if policy == "none" else f"scores-{policy}.safetensors"


@dataclass(frozen=True)
class Limit:
    """Which measurement a check's knob bounds, and from which side.

    A `max` gate compares the upper end of the interval, a `min` gate the lower: a gate never passes on luck.
    """

    measurement: str
    side: Literal["max", "min"]

    def holds(self, found: Measurement, bound: float) -> bool:
        # Written so that NaN fails either way.
        return found.high <= bound if self.side == "max" else found.low >= bound


@dataclass(frozen=True)
class Verdict:
    """One gate judged, in words with the measured value and the limit. `skipped` (it could not run here) never counts as passed."""

    check: str
    state: Literal["passed", "failed", "skipped"]
    text: str
    where: str  # the line of the recipe that sets the limit, or the nearest around it

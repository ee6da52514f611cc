"""Top-1 agreement: the share of tokens for which both models would say the same next word under greedy decoding.

Called "flips" from the other side by Dutta et al. 2024 (arXiv:2407.09141), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from buildsys.measurement import Limit, Measurement
from buildsys.slots import Frozen

VERSION = 1
READS = ("scores",)
LIMITS = {"min_share": Limit("share", "min")}
FIXED: dict[str, tuple[Limit, float]] = {}
OPTIONAL: frozenset[str] = frozenset()
ALWAYS = True
ASIDE: frozenset[str] = frozenset()


class Knobs(Frozen):
    """`min_share`: the least that the lower end of the 95% interval may be, from 0 to 1; none: reported only."""

    min_share: Annotated[float, Field(ge=0, le=1)] | None = None


def measure(knobs: Knobs, inputs: Mapping[str, Any], context: Any) -> list[Measurement]:
    """The mean of scores' `agree`, which is 1 where both models' most likely token is the same."""
    from buildsys.io.checkpoint import load
    from buildsys.quant.bootstrap import interval

    scores = load(inputs["scores"].path("scores.safetensors"))
    found = interval(scores["agree"]).clipped(0.0, 1.0)
    low, high = wilson(found.value, scores["agree"].numel())
    return [Measurement("share", found.value, "of tokens", min(found.low, low), max(found.high, high))]


def wilson(share: float, count: int) -> tuple[float, float]:
    """The score interval of a share of `count` (Wilson 1927): the least that any interval may claim, also where all tokens agree."""
    z2 = 1.959964**2
    middle, wing = share + z2 / (2 * count), (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5
    return (middle - wing) / (1 + z2 / count), (middle + wing) / (1 + z2 / count)

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
    from buildsys.quant.bootstrap import share

    found = share(load(inputs["scores"].path("scores.safetensors"))["agree"])
    return [Measurement("share", found.value, "of tokens", found.low, found.high)]

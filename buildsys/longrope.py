"""LongRoPE: rotary positions of which each frequency is stretched by a number of its own, as Phi-3, Phi-3.5 and Phi-4-mini have them.

Ding et al. 2024, arXiv:2402.13753. One list of factors serves up to the original context, another beyond it. In Phi-4-mini the last
channels of a head do not turn (`partial_rotary_factor`). Names are those of the models' config.json. No torch here: planning reads it too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from buildsys.architecture import Rope, number, size
from buildsys.errors import BuildError

NAMED = ("longrope", "su", "yarn")
"""Its names over time: Phi-3's first files say `su`, and `yarn` meant it too (transformers' configuration_phi3.py)."""
ORIGINAL = 4096  # transformers' default of original_max_position_embeddings


@dataclass(frozen=True)
class LongRope(Rope):
    """The factors that frequencies are divided by: `short` for sequences of up to `original` tokens, `long` for longer ones."""

    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    original: int = ORIGINAL
    amplitude: float = 1.0  # what cosines and sines are multiplied by
    rotated: int = 0  # leading channels of a head that turn


def read_longrope(config: Mapping[str, Any], head_dim: int, where: str) -> LongRope | None:
    """None where config.json asks for another rule."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(said, Mapping) or (said.get("rope_type") or said.get("type")) not in NAMED:
        return None
    either = {key: value for key, value in config.items() if key in ("rope_theta", "partial_rotary_factor")} | dict(said)
    rotated = int(head_dim * number(either, "partial_rotary_factor", where, 1.0))
    original = size(config, "original_max_position_embeddings", where, ORIGINAL)
    stretch = number(said, "factor", where, size(config, "max_position_embeddings", where, ORIGINAL) / original)
    paper = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return LongRope(
        theta=number(either, "rope_theta", where, 10000.0),
        kind="longrope",
        short=_factors(said, "short_factor", rotated // 2, where),
        long=_factors(said, "long_factor", rotated // 2, where),
        original=original,
        amplitude=number(said, "attention_factor", where, paper),
        rotated=rotated,
    )


def _factors(said: Mapping[str, Any], key: str, count: int, where: str) -> tuple[float, ...]:
    """One for each frequency."""
    value = said.get(key)
    if not isinstance(value, list) or len(value) != count:
        held = f"a list of {len(value)}" if isinstance(value, list) else repr(value)
        raise BuildError(where, f"longrope's {key} is {held}; {count} numbers were expected", "repair the model's config.json")
    return tuple(number({key: factor}, key, where, 1.0) for factor in value)

"""Perplexity of the source model and of the quantized one on the same text, and their ratio, paired.

Jelinek et al. 1977. The two perplexities are for reading beside other people's tables; only the ratio is worth a gate, as what the text
contributes cancels in it window by window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from buildsys.measurement import Limit, Measurement
from buildsys.slots import Frozen

VERSION = 1
READS = ("scores",)
LIMITS = {"max_ratio": Limit("ratio", "max")}
FIXED: dict[str, tuple[Limit, float]] = {}
OPTIONAL: frozenset[str] = frozenset()
ALWAYS = True
ASIDE: frozenset[str] = frozenset()


class Knobs(Frozen):
    """`max_ratio`: the most that quantized / source may be at the upper end of its 95% interval; none: reported only."""

    max_ratio: Annotated[float, Field(gt=0)] | None = None


def measure(knobs: Knobs, inputs: Mapping[str, Any], context: Any) -> list[Measurement]:
    """exp of the mean negative log likelihood in nats of a token; the ratio is exp of the mean paired difference."""
    from buildsys.io.checkpoint import load
    from buildsys.quant.bootstrap import interval

    scores = load(inputs["scores"].path("scores.safetensors"))
    source, quantized = scores["source_nll"].double(), scores["quantized_nll"].double()
    found = {
        "source_perplexity": (source, "perplexity"),
        "quantized_perplexity": (quantized, "perplexity"),
        "ratio": (quantized - source, "ratio"),
    }
    intervals = {name: (interval(values, "exp-mean"), unit) for name, (values, unit) in found.items()}
    return [Measurement(name, each.value, unit, each.low, each.high) for name, (each, unit) in intervals.items()]

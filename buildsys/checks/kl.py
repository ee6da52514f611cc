"""KL divergence from the source model: how far each next-token distribution moved. The gate of quality.

Kullback & Leibler 1951; for quantized models, Dutta et al. 2024 (arXiv:2407.09141): it sees changes that accuracy and perplexity
average out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from buildsys.measurement import Limit, Measurement
from buildsys.slots import Frozen

VERSION = 1
READS = ("scores",)
LIMITS = {"max_nats": Limit("kl", "max")}
FIXED: dict[str, tuple[Limit, float]] = {}
OPTIONAL: frozenset[str] = frozenset()
ALWAYS = True
ASIDE: frozenset[str] = frozenset()


class Knobs(Frozen):
    """`max_nats`: the most that the upper end of the 95% interval may be; none: reported only."""

    max_nats: Annotated[float, Field(ge=0)] | None = None


def measure(knobs: Knobs, inputs: Mapping[str, Any], context: Any) -> list[Measurement]:
    """KL(source || quantized) over the full vocabulary, mean over the verify text's tokens."""
    from buildsys.io.checkpoint import load
    from buildsys.quant.bootstrap import interval

    scores = load(inputs["scores"].path("scores.safetensors"))
    found = interval(scores["kl"]).clipped(0.0, float("inf"))
    return [Measurement("kl", found.value, "nats", found.low, found.high)]

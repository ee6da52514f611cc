"""What the recipe's KV cache policy costs in quality: KL from the source model with the cache emulated, and what of it the cache adds.

TurboMind's per-head, per-token asymmetric int8 and int4, emulated in quant/kv.py while scoring. The increase is paired: both scores are of
the same artifact on the same tokens, once with the policy and once without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from buildsys.measurement import Limit, Measurement
from buildsys.slots import Frozen

VERSION = 1
READS = ("scores", "kv_scores")
LIMITS = {"max_nats": Limit("kl", "max"), "max_increase_nats": Limit("increase", "max")}
FIXED: dict[str, tuple[Limit, float]] = {}
OPTIONAL: frozenset[str] = frozenset()
ALWAYS = False
ASIDE: frozenset[str] = frozenset()


class Knobs(Frozen):
    """The most that the upper ends of the 95% intervals may be: of KL with the policy on, and of its increase. None: reported only."""

    max_nats: Annotated[float, Field(ge=0)] | None = None
    max_increase_nats: float | None = None


def measure(knobs: Knobs, inputs: Mapping[str, Any], context: Any) -> list[Measurement]:
    """KL(source || artifact with its KV policy) and the increase over the artifact alone; under policy `none` they are the same scores."""
    from buildsys.io.checkpoint import load
    from buildsys.quant.bootstrap import interval

    policy = str(context.facts["kv_cache"]["policy"])
    plain = load(inputs["scores"].path("scores.safetensors"))["kl"].double()
    with_policy = plain if policy == "none" else load(inputs["kv_scores"].path("scores.safetensors"))["kl"].double()
    kl, increase = interval(with_policy).clipped(0.0, float("inf")), interval(with_policy - plain)
    return [
        Measurement("kl", kl.value, "nats", kl.low, kl.high, f"KV cache {policy}"),
        Measurement("increase", increase.value, "nats", increase.low, increase.high, f"KV cache {policy} over none"),
    ]

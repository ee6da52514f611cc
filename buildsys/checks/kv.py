"""What each KV cache policy costs in quality: the recipe's own, which gates hold, and the others beside it, to choose from.

TurboMind's per-head, per-token asymmetric int8 and int4, emulated in quant/kv.py while scoring. Every difference is paired: scores of the
same artifact on the same tokens, once with a policy and once without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from buildsys.footprint import KV_BITS
from buildsys.measurement import Limit, Measurement, scores_file
from buildsys.slots import Frozen

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 2
READS = ("scores", "kv_scores")
LIMITS = {"max_nats": Limit("kl", "max"), "max_increase_nats": Limit("increase", "max")}
FIXED: dict[str, tuple[Limit, float]] = {}
OPTIONAL: frozenset[str] = frozenset()
ALWAYS = False
ASIDE: frozenset[str] = frozenset()


class Knobs(Frozen):
    """The most that the upper ends of the 95% intervals may be: of KL with the recipe's own policy on, and of its increase. None: reported
    only. `policies` are measured and never gated."""

    max_nats: Annotated[float, Field(ge=0)] | None = None
    max_increase_nats: float | None = None
    policies: tuple[Literal["int8", "int4"], ...] = Field(
        default=("int8", "int4"), description="which KV policies are measured beside `none`; the recipe's own always is"
    )

    @field_validator("policies")
    @classmethod
    def _in_order(cls, said: tuple[Literal["int8", "int4"], ...]) -> tuple[Literal["int8", "int4"], ...]:
        return tuple(policy for policy in KV_BITS if policy in said)  # in another order it is the same wish, and the same step


def measure(knobs: Knobs, inputs: Mapping[str, Any], context: Any) -> list[Measurement]:
    """KL(source || artifact with its KV policy) and the increase over the artifact alone; under policy `none` they are the same scores.
    Then `<what>_<policy>` for every policy that was scored: perplexity, kl, agreement, and increase over none."""
    from buildsys.quant.bootstrap import interval

    own, scores = str(context.facts["kv_cache"]["policy"]), dict(_read(inputs))
    plain = scores["none"]
    kl, increase = interval(scores[own]["kl"].double()).clipped(0.0, float("inf")), interval(_added(scores[own], plain))
    return [
        Measurement("kl", kl.value, "nats", kl.low, kl.high, f"KV cache {own}"),
        Measurement("increase", increase.value, "nats", increase.low, increase.high, f"KV cache {own} over none"),
        *(one for policy, found in scores.items() for one in _of(policy, found, plain)),
    ]


def _read(inputs: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Scores by policy, of those that are there."""
    from buildsys.io.checkpoint import load

    files = {name: inputs[role] for role in READS if role in inputs for name in inputs[role].names()}
    for policy in KV_BITS:
        name = scores_file(policy)
        if name in files:
            yield policy, load(files[name].path(name))


def _added(scores: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> Tensor:
    return scores["kl"].double() - plain["kl"].double()


def _of(policy: str, scores: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> Iterator[Measurement]:
    from buildsys.quant.bootstrap import interval, share

    found = {
        "perplexity": (interval(scores["quantized_nll"].double(), "exp-mean"), "perplexity"),
        "kl": (interval(scores["kl"].double()).clipped(0.0, float("inf")), "nats"),
        "increase": (interval(_added(scores, plain)), "nats"),
        "agreement": (share(scores["agree"]), "of tokens"),
    }
    for name, (each, unit) in found.items():
        yield Measurement(f"{name}_{policy}", each.value, unit, each.low, each.high)

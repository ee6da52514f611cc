"""What each KV policy costs in quality and what it holds on the target: the table from which a recipe's policy is chosen.

The quality is the kv check's; tokens and sessions are footprint.py's, for the same target with the policy exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from buildsys import gpus
from buildsys.deployment import serving_with
from buildsys.footprint import KV_BITS, Serving
from buildsys.measurement import Measurement
from buildsys.release.facts import Facts
from buildsys.report import plots
from buildsys.report.axes import fit
from buildsys.report.markup import number
from buildsys.report.sections import Row, row_of

COLUMNS = {"perplexity": "Perplexity", "kl": "KL from the source", "increase": "Added by the cache", "agreement": "Same next token"}
"""What the check measures of each policy, and what people call it."""
ENGINES = {**{str(name): told for name, told in gpus.ENGINES.items()}, "none": "no engine of LMDeploy"}


@dataclass(frozen=True)
class Policy:
    """One line of the table. `own`: the recipe's; `serving` is None where no target is named."""

    name: str
    own: bool
    found: Mapping[str, Measurement]  # by COLUMNS
    serving: Serving | None
    engine: str

    @property
    def cells(self) -> list[tuple[str, Measurement]]:
        return [(title, self.found[name]) for name, title in COLUMNS.items()]


def policies(facts: Facts) -> tuple[Policy, ...]:
    """Those that were scored, `none` first; empty where the recipe measures none."""
    measured = {one.name: one for one in facts.measurements.get("kv", ())}
    plan, found = facts.plan, []
    for name in KV_BITS:
        there = {what: measured[f"{what}_{name}"] for what in COLUMNS if f"{what}_{name}" in measured}
        if len(there) == len(COLUMNS):
            serving, engine = serving_with(plan.recipe, plan.survey, plan.layers.schemes, name)
            found.append(Policy(name, name == plan.recipe.kv_cache.policy, there, serving, ENGINES[engine]))
    return tuple(found)


def in_the_table(row: Row) -> bool:
    """Whether a measurement stands there, and so not among the others."""
    what, _, name = row.one.name.rpartition("_")
    return row.check == "kv" and what in COLUMNS and name in KV_BITS


def advice(found: Sequence[Policy]) -> Iterator[str]:
    """A sentence for each policy beside none: what it adds, and what that buys."""
    plain = next((one for one in found if one.name == "none"), None)
    for one in found:
        added = one.found["increase"]
        if plain is None or one is plain:
            continue
        said = f"{one.name} adds {number(added.value)} nats ({number(added.low)} to {number(added.high)})"
        if one.serving is not None and plain.serving is not None and plain.serving.pool_tokens:
            times = one.serving.pool_tokens / plain.serving.pool_tokens
            said += f" and holds {times:.2f} times the tokens"
            if one.serving.sessions != plain.serving.sessions:
                said += f": full sessions at once {number(one.serving.sessions)} instead of {number(plain.serving.sessions)}"
        yield f"{said}."


def strips(facts: Facts, found: Sequence[Policy]) -> Iterator[Markup]:
    """What each policy adds, all on one axis; the recipe's own with its limit."""
    shown = [one for one in found if one.name != "none" and all(map(math.isfinite, _ends(one.found["increase"])))]
    gate = row_of(facts, "kv", "increase")
    bound = next(((limit.side, value) for limit, value in gate.bounds), None) if gate is not None else None
    ends = [end for one in shown for end in _ends(one.found["increase"])]
    scale = fit([0.0, *ends, *([bound[1]] if bound is not None else [])], room=0.15)
    for one in shown:
        added, title = one.found["increase"], f"added by {one.name}{', the recipe’s own' if one.own else ''}"
        yield plots.interval(title, added.unit, scale, *_ends(added), bound if one.own else None)


def _ends(one: Measurement) -> tuple[float, float, float]:
    return one.low, one.value, one.high

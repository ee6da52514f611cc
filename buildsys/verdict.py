"""Limits against measurements: instant, never cached, and never passed by accident.

A gate compares the end of the 95% interval that is against it. What a check demands whatever the recipe says stands in its FIXED.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from buildsys.errors import BuildError
from buildsys.measurement import Limit, Measurement, Verdict
from buildsys.plan import Plan
from buildsys.slots import modules
from buildsys.store import Artifact, Store

MEASUREMENTS = "measurements.json"


def judge(plan: Plan, store: Store) -> tuple[Verdict, ...]:
    """Every gate of the recipe, judged. Raises BuildError where a measurement that a gate asks for is not there."""
    found = {step: seen.artifact for step, seen in store.walk(plan.steps).items()}
    verdicts: list[Verdict] = []
    worst = worst_layer(layer_errors(found[plan.quantized.planned_key], store))
    for check, step in plan.measures:
        artifact = found[step.planned_key]
        if artifact is None:
            raise BuildError(f"{plan.name}, check {check}", "has not been measured", f"run `doit build recipe={plan.name}`")
        measured = load_measurements(artifact, store)
        for knob, limit, bound in _gates(plan, check, measured):
            verdicts.append(_judged(check, measured, knob, limit, bound, worst, plan.recipe.at("verify", check, knob)))
    verdicts += [_skipped(plan, check, why) for check, why in plan.skipped.items()]
    return tuple(verdicts)


def _skipped(plan: Plan, check: str, why: str) -> Verdict:
    """A check that could not run here: never a pass, and a failure where the recipe says that it has to run."""
    if getattr(plan.recipe.verify.checks[check], "required", "auto") == "always":
        return Verdict(check, "failed", f"could not run, and required is always: {why}", plan.recipe.at("verify", check, "required"))
    return Verdict(check, "skipped", why, plan.recipe.at("verify", check))


def load_measurements(artifact: Artifact, store: Store) -> list[Measurement]:
    """What one check measured."""
    return [Measurement(**said) for said in json.loads(store.path(artifact, MEASUREMENTS).read_text())]


def _gates(plan: Plan, check: str, measured: list[Measurement]) -> Iterator[tuple[str, Limit, float]]:
    module, knobs = modules("checks")[check], plan.recipe.verify.checks.get(check)
    for knob, limit in module.LIMITS.items():
        bound = getattr(knobs, knob, None)
        if bound is not None:
            yield knob, limit, bound
    there = {one.name for one in measured}
    for name, (limit, bound) in module.FIXED.items():
        # Only what a check declares may be missing: free memory on a GPU that no recipe names. Anything else that is missing fails.
        if name in there or name not in module.OPTIONAL:
            yield name, limit, bound


def _judged(check: str, measured: list[Measurement], knob: str, limit: Limit, bound: float, worst: str, where: str) -> Verdict:
    one = next((one for one in measured if one.name == limit.measurement), None)
    if one is None:
        return Verdict(check, "failed", f"measured no {limit.measurement}, which {knob} limits", where)
    interval = "" if one.low == one.high else f" (95% interval {one.low:.4g} to {one.high:.4g})"
    text = f"{one.name} {one.value:.4g} {one.unit}{interval}, limit: at {'most' if limit.side == 'max' else 'least'} {bound:.4g}"
    if limit.holds(one, bound):
        return Verdict(check, "passed", text, where)
    reasons = (one.detail, f"worst layer: {worst}" if worst else "")
    return Verdict(check, "failed", "; ".join(part for part in (text, *reasons) if part), where)


def layer_errors(quantized: Artifact | None, store: Store) -> dict[str, float]:
    """For each quantized linear the relative error of its outputs."""
    errors: dict[str, float] = {}
    for name in quantized.files if quantized is not None else ():
        if quantized is not None and name.endswith(".errors.json"):
            notes = json.loads(store.path(quantized, name).read_text())
            errors |= {linear: noted["error"] for linear, noted in notes.items() if "error" in noted}
    return errors


def worst_layer(errors: Mapping[str, float]) -> str:
    """The linear whose rounding changed its outputs most, and by how much."""
    if not errors:
        return ""
    name = max(errors, key=lambda layer: errors[layer])
    return f"{name}, relative output error {errors[name]:.3g}"

"""The facts of a build in the order and the words in which a report tells them; plots.py draws them, page.html.jinja lays them out.

A number is held against its limits by the same `Limit.holds` that judges; what the judge said stands beside it, word for word.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from buildsys import footprint
from buildsys.gpus import lookup
from buildsys.measurement import Limit, Measurement, Verdict
from buildsys.recipe import Recipe
from buildsys.release.facts import Facts, Ran
from buildsys.release.resolved import resolved
from buildsys.report.markup import number
from buildsys.report.plots import Part
from buildsys.slots import modules
from buildsys.store import Artifact

State = str  # passed, failed, skipped, open
PARTS = ("embeddings", "attention", "MLP", "norms and biases", "output head", "other files")
PART_CSS = dict(zip(PARTS, ("c0", "c1", "c2", "c3", "c4", "c5"), strict=True))
MEMORY_CSS = {"context": "c3", "weights": "c1", "KV pool": "c4", "workspace": "c2"}


# What came out


@dataclass(frozen=True)
class Row:
    """One measurement with the limits that it is held to."""

    check: str
    one: Measurement
    bounds: tuple[tuple[Limit, float], ...]

    @property
    def state(self) -> State:
        if not self.bounds:
            return "open"
        return "passed" if all(limit.holds(self.one, bound) for limit, bound in self.bounds) else "failed"

    @property
    def exact(self) -> bool:
        return self.one.low == self.one.high

    @property
    def title(self) -> str:
        name = self.one.name.removesuffix(f"_{self.one.unit.lower()}").replace("_", " ")
        return name if self.check in name else f"{self.check}: {name}"

    @property
    def limits(self) -> str:
        return ", ".join(f"at {'most' if limit.side == 'max' else 'least'} {number(bound)}" for limit, bound in self.bounds)


def rows(facts: Facts) -> tuple[Row, ...]:
    found = []
    for check, measured in facts.measurements.items():
        module, knobs = modules("checks")[check], facts.plan.recipe.verify.checks.get(check)
        asked = [(limit, getattr(knobs, knob, None)) for knob, limit in module.LIMITS.items()]
        every = [*((limit, bound) for limit, bound in asked if bound is not None), *module.FIXED.values()]
        found += [Row(check, one, tuple(each for each in every if each[0].measurement == one.name)) for one in measured]
    return tuple(found)


def row_of(facts: Facts, check: str, name: str) -> Row | None:
    return next((row for row in rows(facts) if (row.check, row.one.name) == (check, name)), None)


def state_of(verdicts: Sequence[Verdict]) -> State:
    """One word for all gates. A gate that could not run is no gate that holds."""
    states = {verdict.state for verdict in verdicts}
    return next((state for state in ("failed", "skipped", "passed") if state in states), "open")


def in_a_line(verdicts: Sequence[Verdict]) -> str:
    """The verdict in one line."""
    count = Counter(verdict.state for verdict in verdicts)
    named = {state: ", ".join(dict.fromkeys(each.check for each in verdicts if each.state == state)) for state in count}
    if not verdicts:
        return "No gates: nothing was held to a limit."
    if count["failed"]:
        return f"Failed: {count['failed']} of {len(verdicts)} gates do not hold ({named['failed']})."
    if count["skipped"]:
        return f"Not verified: {count['skipped']} of {len(verdicts)} gates could not run here ({named['skipped']})."
    return f"Passed: all {len(verdicts)} gates hold." if len(verdicts) > 1 else "Passed: the one gate holds."


# What it is


def source_name(recipe: Recipe) -> str:
    """`internlm/internlm2_5-7b-chat (hf_hub)`: what the source's first knob says, and which source it is."""
    slot, knobs = next(iter(resolved(recipe)["source"].items()))
    said = next((value for value in (knobs or {}).values() if isinstance(value, str)), "")
    return f"{said} ({slot})" if said else str(slot)


def scheme_name(recipe: Recipe) -> str:
    """`4-bit g128 asymmetric, awq + gptq`, and another tool that did it."""
    tool = recipe.quantization.backend.module.TOOL
    methods = " + ".join(method.name for method in recipe.quantization.method)
    return f"{recipe.quantization.told}, {methods}{f' by {tool}' if tool else ''}"


def target_name(recipe: Recipe) -> str:
    if recipe.target is None:
        return "none named"
    return recipe.target.gpu if recipe.target.count == 1 else f"{recipe.target.count} x {recipe.target.gpu}"


# Where the error is


def roles(facts: Facts) -> dict[str, list[float | None]]:
    """Relative output errors: role -> one for each layer, the mean over experts, None where the linears stay float."""
    architecture, found = facts.plan.survey.architecture, dict[str, list[float | None]]()
    for role in dict.fromkeys(linear.role for linear in architecture.linears):
        names = [linear.name for linear in architecture.linears if linear.role == role]
        told = [[facts.layer_errors.get(architecture.prefix(layer) + name) for name in names] for layer in range(architecture.layers)]
        known = [[error for error in layer if error is not None] for layer in told]
        found[role] = [sum(errors) / len(errors) if errors else None for errors in known]
    return found


def worst(facts: Facts, count: int) -> list[tuple[str, float]]:
    known = [(name, error) for name, error in facts.layer_errors.items() if not math.isnan(error)]
    return sorted(known, key=lambda item: (-item[1], item[0]))[:count]


# How large it is


@dataclass(frozen=True)
class Sizes:
    """Bytes by part. Totals are those of the files; how they are shared out is computed from shapes."""

    source: Mapping[str, float]
    artifact: Mapping[str, float]

    @property
    def source_bytes(self) -> float:
        return sum(self.source.values())

    @property
    def artifact_bytes(self) -> float:
        return sum(self.artifact.values())


def sizes(facts: Facts) -> Sizes:
    plan = facts.plan
    float16 = footprint.weights(plan.survey.architecture, None)
    packed = footprint.weights(plan.survey.architecture, plan.layers.schemes)
    return Sizes(_shared_out(facts, float16, fetched(facts).output), _shared_out(facts, packed, facts.artifact))


def fetched(facts: Facts) -> Ran:
    """The step that brought the source."""
    return next(ran for ran in facts.steps if ran.step.kind == "fetch" and "config.json" in ran.output.files)


def _shared_out(facts: Facts, tensors: Sequence[footprint.TensorBytes], output: Artifact) -> dict[str, float]:
    weights = sum(file.size for name, file in output.files.items() if name.endswith(".safetensors"))
    parts = dict.fromkeys(PARTS, 0.0)
    computed = sum(each.disk_bytes for each in tensors) or 1
    for each in tensors:
        parts[footprint.part(facts.plan.survey.architecture, each.name)] += each.disk_bytes * weights / computed
    return parts | {"other files": float(output.size - weights)}


def parts_of(shares: Mapping[str, float]) -> list[Part]:
    return [Part(name, PART_CSS[name], size) for name, size in shares.items()]


@dataclass(frozen=True)
class Memory:
    """One GPU of the target, with the artifact and, for comparison, with the source in float16 and a float16 KV cache."""

    artifact: footprint.Serving
    source: footprint.Serving

    def parts(self, serving: footprint.Serving) -> list[Part]:
        held = (serving.context_bytes, serving.weights_bytes, serving.pool_bytes, serving.workspace_bytes)
        return [Part(name, css, size) for (name, css), size in zip(MEMORY_CSS.items(), held, strict=True)]

    @property
    def pairs(self) -> list[tuple[Part, Part]]:
        """Each part as the source has it, and as the artifact does."""
        return list(zip(self.parts(self.source), self.parts(self.artifact), strict=True))


def memory(facts: Facts) -> Memory | None:
    """None: the recipe names no target."""
    plan, target, artifact = facts.plan, facts.plan.recipe.target, facts.plan.serving
    gpu = lookup(target.gpu) if target is not None else None
    if target is None or artifact is None or gpu is None:
        return None
    architecture = plan.survey.architecture
    source = footprint.serving(
        architecture,
        None,
        gpu,
        kv_policy="none",
        max_entry_count=plan.recipe.kv_cache.max_entry_count,
        session_len=target.session_len or architecture.max_positions,
        max_batch_size=target.max_batch_size,
        count=target.count,
    )
    return Memory(artifact, source)


# Where it comes from


def inputs(facts: Facts) -> Iterator[tuple[str, str, int, str]]:
    """Every file that was fetched: which input, name, bytes, sha256."""
    for ran in facts.of_kind("fetch"):
        yield from ((ran.title, name, file.size, file.sha256) for name, file in ran.output.files.items())


def versions(facts: Facts) -> dict[str, str]:
    """Of what computed this; steps that ran on different days may name several."""
    found: dict[str, dict[str, None]] = {}
    for ran in facts.steps:
        for tool, version in ran.built.get("versions", {}).items():
            found.setdefault(tool, {})[str(version)] = None
    return {tool: ", ".join(found[tool]) for tool in sorted(found)}


def machines(facts: Facts) -> list[str]:
    """What the steps ran on."""
    found: dict[str, None] = {}
    for ran in facts.steps:
        gpu = ran.built.get("gpu")
        found[f"{gpu['name']}, CUDA {gpu['cuda']}" if gpu else str(ran.built.get("device", "not recorded"))] = None
    return list(found)

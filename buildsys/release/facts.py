"""All that is known of one finished build, read once: what the card, the provenance and the report are written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from buildsys.measurement import Measurement, Verdict
from buildsys.plan import Plan
from buildsys.step import Step
from buildsys.store import Artifact, Store
from buildsys.verdict import layer_errors, load_measurements


@dataclass(frozen=True)
class Ran:
    """One step as it was built: `output.meta["built"]` holds the machine, the versions of its tools, its seconds and when it ran."""

    step: Step
    output: Artifact

    @property
    def built(self) -> Mapping[str, Any]:
        said: Mapping[str, Any] = self.output.meta.get("built", {})
        return said

    @property
    def title(self) -> str:
        """What it was called when it ran."""
        return str(self.built.get("title") or self.step.title)

    @property
    def hints(self) -> Mapping[str, Any]:
        """Where a fetch had its files from. A branch may have moved on to another commit with equal files: that is not what ran."""
        said: Mapping[str, Any] = self.built.get("hints") or self.step.hints
        return said


@dataclass(frozen=True)
class Facts:
    """One recipe's build. `steps` are in topological order."""

    plan: Plan
    steps: tuple[Ran, ...]
    artifact: Artifact  # the deployable files
    measurements: Mapping[str, tuple[Measurement, ...]]  # by check
    verdicts: tuple[Verdict, ...]
    layer_errors: Mapping[str, float]  # linear -> relative error of its outputs

    @property
    def name(self) -> str:
        return self.plan.name

    def ran(self, step: Step) -> Ran:
        return next(ran for ran in self.steps if ran.step == step)

    @property
    def source(self) -> Ran:
        """The fetch that brought the model."""
        return self.ran(next(need.step for need in self.plan.artifact.needs if need.role == "source"))

    def of_kind(self, kind: str) -> tuple[Ran, ...]:
        return tuple(ran for ran in self.steps if ran.step.kind == kind)


def gather(plan: Plan, store: Store, verdicts: tuple[Verdict, ...]) -> Facts:
    """Raises KeyError where a step of the plan is not built."""
    found = {planned: one.artifact for planned, one in store.walk(plan.steps).items() if one.artifact is not None}
    return Facts(
        plan=plan,
        steps=tuple(Ran(step, found[step.planned_key]) for step in plan.steps),
        artifact=found[plan.artifact.planned_key],
        measurements={check: tuple(load_measurements(found[step.planned_key], store)) for check, step in plan.measures},
        verdicts=verdicts,
        layer_errors=layer_errors(found[plan.quantized.planned_key], store),
    )

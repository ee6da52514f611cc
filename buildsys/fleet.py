"""Many recipes at a glance: `doit plan recipe='*'`, one line for each and the sum, or JSON for machines.

Steps that recipes share are one step, so the sum is not the sum of the lines: it counts, and times, each step once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from buildsys import console as show
from buildsys.driver import Session
from buildsys.errors import BuildError
from buildsys.footprint import GIB
from buildsys.plan import Plan
from buildsys.slots import modules
from buildsys.step import Step
from buildsys.store import Found

FORMATS = ("text", "table", "json")
JSON_FORMAT = 1
"""Bumped when a key of the JSON goes, or means something else; new keys do not count."""

State = Literal["cached", "runs", "runs?"]


@dataclass(frozen=True)
class StepLine:
    """One step, of however many recipes. `runs?`: it runs unless its inputs come out equal."""

    kind: str
    title: str
    state: State
    seconds: float  # estimated; 0 for what takes a moment
    bytes: int  # on disk: of what is cached measured, else estimated


@dataclass(frozen=True)
class Fit:
    """On one of the target's `count` GPUs."""

    gpu: str
    count: int
    memory_bytes: int
    needed_bytes: int  # context, weights, workspace and one full session
    fits: bool
    sessions: int
    batch: int
    tokens_per_s: float  # of `batch` sessions together


@dataclass(frozen=True)
class Row:
    """What is known of one recipe before it is built."""

    name: str
    at: str  # recipes/x.yaml:1
    steps: tuple[str, ...]  # planned keys
    cached: int
    run: int  # at most: some may come out equal and be cached after all
    seconds: float  # of the steps that run
    artifact_bytes: int  # weights as they are packed
    target: Fit | None  # None: the recipe names no target
    gates: tuple[str, ...]  # "kl.max_nats 0.05"
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """A recipe that cannot be planned."""

    name: str
    errors: tuple[BuildError, ...]


@dataclass(frozen=True)
class Total:
    """Of all recipes together, what they share counted once."""

    recipes: int
    refused: int
    steps: int
    cached: int
    run: int
    seconds: float
    seconds_apart: float  # if each recipe were built in a store of its own
    artifact_bytes: int


@dataclass(frozen=True)
class Fleet:
    rows: tuple[Row | Refused, ...]  # in the order asked for
    steps: Mapping[str, StepLine]  # by planned key
    total: Total


def survey(session: Session, names: Sequence[str]) -> Fleet:
    """Plans the recipes and looks the store through once for all of them. A recipe that cannot be planned is a row too."""
    refused = session.attempt(names)
    plans = {name: session.plans[name] for name in names if name not in refused}
    steps = union(plans.values())
    found = session.store.walk(steps.values())
    lines = {key: line for plan in plans.values() for key, line in _lines(plan, found).items()}
    rows = {name: _row(plan, lines) for name, plan in plans.items()}
    told = tuple(rows[name] if name in rows else Refused(name, refused[name]) for name in names)
    return Fleet(told, lines, _total(rows, plans, lines, len(refused)))


def union(plans: Iterable[Plan]) -> dict[str, Step]:
    """Each step of any plan once, by planned key, needs first."""
    return {step.planned_key: step for plan in plans for step in plan.steps}


def seconds_of(plan: Plan, step: Step, of: Mapping[str, float] | None = None) -> float:
    """What a step takes. The plan knows what all steps of a kind take together. `of`: seconds by kind elsewhere than here."""
    return (plan.building.seconds if of is None else of).get(step.kind, 0.0) / _alike(plan, step)


def _alike(plan: Plan, step: Step) -> int:
    return max(1, sum(one.kind == step.kind for one in plan.steps))


def _lines(plan: Plan, found: Mapping[str, Found]) -> dict[str, StepLine]:
    lines = {}
    for step in plan.steps:
        here = found[step.planned_key]
        state: State = "cached" if here.artifact is not None else "runs" if here.key is not None else "runs?"
        guessed = plan.building.disk_bytes.get(step.kind, 0) // _alike(plan, step)
        size = here.artifact.size if here.artifact is not None else guessed
        lines[step.planned_key] = StepLine(step.kind, step.title, state, seconds_of(plan, step), size)
    return lines


def _row(plan: Plan, lines: Mapping[str, StepLine]) -> Row:
    keys = tuple(step.planned_key for step in plan.steps)
    missing = [lines[key] for key in keys if lines[key].state != "cached"]
    return Row(
        name=plan.name,
        at=plan.recipe.at(),
        steps=keys,
        cached=len(keys) - len(missing),
        run=len(missing),
        seconds=sum(line.seconds for line in missing),
        artifact_bytes=_packed(plan, lines),
        target=_fit(plan),
        gates=gates(plan),
        notes=plan.notes,
    )


def _packed(plan: Plan, lines: Mapping[str, StepLine]) -> int:
    return sum(lines[step.planned_key].bytes for step in plan.steps if step.kind in ("outside", "pack"))


def _fit(plan: Plan) -> Fit | None:
    serving = plan.serving
    if serving is None:
        return None
    most = serving.decode[-1]
    return Fit(
        serving.gpu,
        serving.count,
        serving.memory_bytes,
        serving.needed_bytes,
        serving.fits,
        serving.sessions,
        most.batch,
        most.tokens_per_s,
    )


def gates(plan: Plan) -> tuple[str, ...]:
    """What the recipe holds its measurements to."""
    found = []
    for check, knobs in plan.recipe.verify.checks.items():
        said = {knob: getattr(knobs, knob, None) for knob in modules("checks")[check].LIMITS}
        found += [f"{check}.{knob} {value:g}" for knob, value in said.items() if value is not None]
    return tuple(found)


def _total(rows: Mapping[str, Row], plans: Mapping[str, Plan], lines: Mapping[str, StepLine], refused: int) -> Total:
    missing = [line for line in lines.values() if line.state != "cached"]
    return Total(
        recipes=len(rows) + refused,
        refused=refused,
        steps=len(lines),
        cached=len(lines) - len(missing),
        run=len(missing),
        seconds=sum(line.seconds for line in missing),
        seconds_apart=sum(seconds_of(plan, step) for plan in plans.values() for step in plan.steps),
        artifact_bytes=sum(line.bytes for line in lines.values() if line.kind in ("outside", "pack")),
    )


# Shown


def table(fleet: Fleet) -> Iterator[str]:
    """Aligned columns for people."""
    heads = ("recipe", "cached", "to run", "takes", "weights", "GPU", "of it", "tokens/s", "gates", "notes")
    cells = [_cells(row) for row in fleet.rows if isinstance(row, Row)]
    names = [row.name for row in fleet.rows]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    widths[0] = max([widths[0], *map(len, names)])
    yield _aligned(heads, widths)
    for row in fleet.rows:
        yield _aligned(_cells(row), widths) if isinstance(row, Row) else f"{row.name:<{widths[0]}}  {reason(row)}"
    yield _sum(fleet.total)


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    left = (0, 5, 8)  # names and gates; numbers stand to the right
    told = (f"{cell:<{width}}" if at in left else f"{cell:>{width}}" for at, (cell, width) in enumerate(zip(cells, widths, strict=True)))
    return "  ".join(told).rstrip()


def _cells(row: Row) -> tuple[str, ...]:
    fit = row.target
    gpu = "-" if fit is None else fit.gpu if fit.count == 1 else f"{fit.count} x {fit.gpu}"
    share = "-" if fit is None else f"{fit.needed_bytes / GIB:.1f}/{fit.memory_bytes / GIB:.1f} GiB{'' if fit.fits else ' TOO SMALL'}"
    rate = "-" if fit is None else f"{fit.tokens_per_s:,.0f} at {fit.batch}"
    takes = show.seconds(row.seconds) if row.run else "-"
    kept = ", ".join(row.gates) or "none"
    return (
        row.name,
        str(row.cached),
        str(row.run),
        takes,
        show.size(row.artifact_bytes),
        gpu,
        share,
        rate,
        kept,
        str(len(row.notes) or "-"),
    )


def reason(row: Refused) -> str:
    """One line for people: the first of its mistakes."""
    first = row.errors[0]
    more = f" (and {len(row.errors) - 1} more: doit plan recipe={row.name})" if len(row.errors) > 1 else ""
    return f"CANNOT BE PLANNED: {first.where}  {first.what}; fix: {first.fix}{more}"


def _sum(total: Total) -> str:
    count = f"{total.recipes} recipe{'s' if total.recipes != 1 else ''}"
    said = f"{count}, {total.steps} different steps: {total.cached} cached, {total.run} to run"
    said += f", about {show.seconds(total.seconds)}" if total.run else ""
    alone = f" ({show.seconds(total.seconds_apart)} if each were built alone)" if total.run else ""
    refused = f"; {total.refused} cannot be planned" if total.refused else ""
    return f"{said}{alone}; {show.size(total.artifact_bytes)} of weights{refused}"


def document(fleet: Fleet) -> str:
    """JSON for machines: docs/fleet.md says what its keys mean."""
    recipes = [_told(row) for row in fleet.rows]
    steps = {key: asdict(line) for key, line in fleet.steps.items()}
    return json.dumps({"format": JSON_FORMAT, "recipes": recipes, "steps": steps, "sum": asdict(fleet.total)}, indent=1)


def _told(row: Row | Refused) -> dict[str, Any]:
    if isinstance(row, Row):
        return {"planned": True, **asdict(row)}
    return told_refused(row)


def told_refused(row: Refused) -> dict[str, Any]:
    """For machines: all of its mistakes."""
    errors = [{"where": error.where, "what": error.what, "fix": error.fix} for error in row.errors]
    return {"planned": False, "name": row.name, "errors": errors}


def told(session: Session, names: Sequence[str], format: str) -> Iterator[str]:
    """The fleet as `table` or `json`. Raises BuildError at its end where a recipe cannot be planned."""
    fleet = survey(session, names)
    yield from [document(fleet)] if format == "json" else table(fleet)
    end("plan", len(names), [row for row in fleet.rows if isinstance(row, Refused)])


def end(command: str, recipes: int, refused: Sequence[Refused]) -> None:
    """Raises BuildError where a recipe could not be planned, once everything else is shown."""
    if refused:
        some = ", ".join(row.name for row in refused[:3]) + (" …" if len(refused) > 3 else "")
        raise BuildError(command, f"{len(refused)} of {recipes} recipes cannot be planned: {some}", "mend what their lines say")

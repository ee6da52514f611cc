"""What a change under all recipes touches, before it is made: another version of a tool, or VERSIONs that a branch moves.

A tool's version is in no key (the manifest records it), so an upgrade rebuilds nothing by itself: here is which artifacts were made under
another, and what verifying, or building, them again would take. A VERSION is in the keys of what it is about: here is what then runs.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from buildsys import console as show
from buildsys import effort, fleet, gpus, versions
from buildsys.deployment import target_gpu
from buildsys.driver import Session
from buildsys.errors import BuildError
from buildsys.fleet import Refused
from buildsys.history import History
from buildsys.plan import Plan, builds
from buildsys.step import Step
from buildsys.store import Artifact
from buildsys.survey import implementing
from buildsys.versions import Bump
from buildsys.worker import COMPUTES

JSON_FORMAT = 1
FORMATS = ("table", "json")
TOOLS = ("python", "lmdeploy", "transformers", *COMPUTES)
"""What manifests may name even where none of this store does."""
VERIFIES = ("score", "measure", "serve", "generate")
ASKED = re.compile(r"([A-Za-z][A-Za-z0-9._-]*)==(\S+)")
VERSION = re.compile(r"(\d+(?:\.\d+)*)((?:a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(?:\+([a-z0-9]+(?:[._-][a-z0-9]+)*))?")  # PEP 440, normal form


@dataclass(frozen=True)
class Cost:
    """Estimated. `gpu_hours`: of its seconds those on a GPU."""

    seconds: float = 0.0
    gpu_hours: float = 0.0


@dataclass(frozen=True)
class Recorded:
    """What a lock tells of a build that this store does not have: versions of its tools, and the GPU or processor that it ran on."""

    versions: Mapping[str, str]
    on: str


@dataclass(frozen=True)
class Touched:
    """One recipe. `least` and `most`: to verify and to build again (upgrade); what is bumped alone, and with all after it (base)."""

    name: str
    why: tuple[str, ...]
    machine: str  # that the seconds are of: where it was built, else its target, else these processors
    built: bool  # whether any of its steps is in the store
    steps: tuple[str, ...]  # planned keys, as `most` counts them
    least: Cost
    most: Cost


@dataclass(frozen=True)
class Impact:
    """Sums count a step that recipes share once."""

    asked: Mapping[str, Any]
    heads: tuple[str, str]  # what `least` and `most` are
    rows: tuple[Touched, ...]
    refused: tuple[Refused, ...]
    unrecorded: tuple[str, ...]  # recipes of which nothing is built, so that nothing tells
    recipes: int
    least: Cost
    most: Cost
    said: tuple[str, ...] = ()  # before the table


def upgrade(session: Session, names: Sequence[str], said: str, locked: Mapping[str, Recorded] = MappingProxyType({})) -> Impact:
    """Recipes whose steps ran under another version of a tool. `said`: torch==2.14.0. A local part (+cpu) counts where it is asked for.
    `locked`: by recipe, for those of which nothing is built here. Raises BuildError on what names no tool and version."""
    tool, version = _asked(said)
    plans, refused = _planned(session, names)
    outputs = _outputs(session, plans)
    recorded = {name: _recorded(outputs[name]) for name in plans}
    told = [*(found for steps in recorded.values() for found in steps.values()), *(each.versions for each in locked.values())]
    known = sorted({*TOOLS, *(each.lower() for found in told for each in found)})
    if tool not in known:
        near = difflib.get_close_matches(tool, known, 1, 0.5)
        fix = f"did you mean {near[0]}=={version}?" if near else f"name one of {', '.join(known)}"
        raise BuildError(f"upgrade={said}", f"{tool} is no tool that a build records", fix)
    sums = _Sums(session, outputs)
    for name, plan in plans.items():
        on = ""
        if not recorded[name] and name in locked:  # all that computes ran under the one version that the lock has
            on, theirs = locked[name].on, {each.lower(): version for each, version in locked[name].versions.items()}
            recorded[name] = {step.planned_key: theirs for step in plan.steps if step.heavy}
        other = {key: found[tool] for key, found in recorded[name].items() if tool in found and not _same(found[tool], version)}
        steps = [step for step in plan.steps if step.planned_key in other]
        if steps:
            why = tuple(f"{tool} {found}" for found in sorted(set(other.values())))
            sums.add(plan, why, [step for step in steps if step.kind in VERIFIES], steps, on)
    unrecorded = tuple(name for name in plans if not recorded[name])
    return sums.impact({"upgrade": {"tool": tool, "version": version}}, ("verify again", "build again"), refused, unrecorded, len(names))


def base(session: Session, names: Sequence[str], ref: str) -> Impact:
    """Recipes with steps whose VERSION is another than where this branch left `ref`."""
    commit, before = versions.of_base(session.workspace.root, ref)
    moved = versions.bumps(before, versions.of_tree(session.workspace.root))
    plans, refused = _planned(session, names)
    sums, used = _Sums(session, _outputs(session, plans)), set[Bump]()
    for plan in plans.values() if moved else ():
        own = {step.planned_key: [bump for bump in moved if bump.part in _parts(plan, step)] for step in plan.steps}
        hit = {bump for found in own.values() for bump in found}
        if hit:
            used |= hit
            direct = [step for step in plan.steps if own[step.planned_key]]
            sums.add(plan, tuple(map(str, sorted(hit, key=str))), direct, _after(plan.steps, direct))
    asked = {"base": {"ref": ref, "commit": commit}, "bumps": [{**asdict(bump), "used": bump in used} for bump in moved]}
    said = tuple(f"VERSION of {bump}{_warning(bump)}{'' if bump in used else ': in the key of no step of these recipes'}" for bump in moved)
    none = (f"no VERSION is another than in {ref} ({commit[:12]})",)
    return sums.impact(asked, ("bumped steps", "with all after"), refused, (), len(names), said or none)


def _warning(bump: Bump) -> str:
    """An output that was built when the number was this one before is found in every store that has it."""
    return " (it goes BACK: stores may hold other outputs under that number)" if bump.after < bump.before else ""


def _asked(said: str) -> tuple[str, str]:
    match = ASKED.fullmatch(said.strip())
    if match is None:
        raise BuildError(f"upgrade={said}", "names no tool and version", "write upgrade=torch==2.14.0")
    tool, version = match[1].lower(), match[2]
    if VERSION.fullmatch(version) is None:
        raise BuildError(f"upgrade={said}", f"{version} is no version of {tool}", f"write it as pip does: upgrade={tool}==2.14.0")
    return tool, version


def _same(recorded: str, asked: str) -> bool:
    """Whether the versions are equal, as PEP 440's `==asked` has it: 2.13 is 2.13.0, and 2.13.0 takes 2.13.0+cpu."""
    ours, theirs = VERSION.fullmatch(recorded), VERSION.fullmatch(asked)
    if ours is None or theirs is None:
        return recorded == asked
    left, right = ([*re.sub(r"(\.0+)+$", "", match[1]).split("."), *match.groups()[1:4]] for match in (ours, theirs))
    return left == right and (theirs[5] is None or ours[5] == theirs[5])


def _planned(session: Session, names: Sequence[str]) -> tuple[dict[str, Plan], tuple[Refused, ...]]:
    refused = session.attempt(names)
    plans = {name: session.plans[name] for name in names if name not in refused}
    return plans, tuple(Refused(name, errors) for name, errors in refused.items())


def _outputs(session: Session, plans: Mapping[str, Plan]) -> dict[str, dict[str, Artifact]]:
    """What is built of each recipe, by planned key; of a step that is not built as the recipe says now, what its last build left."""
    found = session.store.walk(fleet.union(plans.values()).values())
    outputs: dict[str, dict[str, Artifact]] = {}
    for name, plan in plans.items():
        here = {step.planned_key: found[step.planned_key].artifact for step in plan.steps}
        missing = [step for step in plan.steps if here[step.planned_key] is None]
        last = History(session.store.home, name).pair(missing) if missing else {}
        here |= {key: session.store.find(one.key) for key, one in last.items()}
        outputs[name] = {key: artifact for key, artifact in here.items() if artifact is not None}
    return outputs


def _recorded(outputs: Mapping[str, Artifact]) -> dict[str, dict[str, str]]:
    """Versions of the tools of each step that is built; what a step's own child process had (`torch of the tool`) is what made it."""
    found = {}
    for key, artifact in outputs.items():
        told = artifact.meta.get("built", {}).get("versions", {})
        own = {name.removesuffix(" of the tool"): version for name, version in told.items() if name.endswith(" of the tool")}
        if told:
            found[key] = {name.lower(): str(version) for name, version in (told | own).items()}
    return found


def _parts(plan: Plan, step: Step) -> frozenset[str]:
    """The parts of buildsys whose VERSION is in the step's key (graph.py writes them there)."""
    knobs, parts = step.knobs, {"keys", f"steps.{step.kind}"}
    for slot, key in (("datasets", "dataset"), ("formats", "format"), ("backends", "backend"), ("checks", "check")):
        if isinstance(knobs.get(key), Mapping):
            parts.add(f"{slot}.{knobs[key]['name']}")
    methods = [*knobs.get("methods", ()), *knobs.get("own_methods", {}).values()]
    parts |= {f"methods.{chosen['name']}" for chosen in methods if isinstance(chosen, Mapping)}
    if knobs.get("quant") is not None:
        parts.add("quant")
    if "model" in knobs:
        parts.add(f"archs.{implementing(plan.survey.config, plan.recipe.at()).__name__.rpartition('.')[2]}")
    return frozenset(parts)


def _after(steps: Iterable[Step], direct: Collection[Step]) -> list[Step]:
    """These steps and all that read what comes out of them, in the plan's order."""
    keys = {step.planned_key for step in direct}
    for step in steps:  # needs come first
        if any(need.step.planned_key in keys for need in step.needs):
            keys.add(step.planned_key)
    return [step for step in steps if step.planned_key in keys]


class _Sums:
    """Rows as they come, and what they take together, each step once."""

    def __init__(self, session: Session, outputs: Mapping[str, Mapping[str, Artifact]]) -> None:
        self._session, self._outputs = session, outputs
        self._rows: list[Touched] = []
        self._counted: dict[str, dict[str, Cost]] = {"least": {}, "most": {}}

    def add(self, plan: Plan, why: tuple[str, ...], least: Sequence[Step], most: Sequence[Step], on: str = "") -> None:
        """`on`: the machine that built it, where no output tells."""
        outputs, session = self._outputs[plan.name], self._session
        speed = _speed(plan, outputs, session.settings.threads, on)
        building = builds(plan.recipe, plan.survey, plan.layers.schemes, speed, session.finder)
        costs = {}
        for name, steps in (("least", least), ("most", most)):
            each = {step.planned_key: _cost(fleet.seconds_of(plan, step, building.seconds), speed) for step in steps}
            costs[name] = _sum(each.values())
            self._counted[name] = each | self._counted[name]
        keys = tuple(step.planned_key for step in most)
        self._rows.append(Touched(plan.name, why, speed.machine, bool(outputs), keys, costs["least"], costs["most"]))

    def impact(
        self,
        asked: Mapping[str, Any],
        heads: tuple[str, str],
        refused: tuple[Refused, ...],
        unrecorded: tuple[str, ...],
        recipes: int,
        said: tuple[str, ...] = (),
    ) -> Impact:
        least, most = (_sum(self._counted[name].values()) for name in ("least", "most"))
        return Impact(asked, heads, tuple(self._rows), refused, unrecorded, recipes, least, most, said)


def _speed(plan: Plan, outputs: Mapping[str, Artifact], threads: int, on: str = "") -> effort.Speed:
    """Of the machine that its steps ran on; of a recipe that is not built, of its target."""
    built = [artifact.meta["built"] for artifact in outputs.values() if "built" in artifact.meta]
    names = [str(one["gpu"]["name"]) for one in built if isinstance(one.get("gpu"), Mapping) and "name" in one["gpu"]]
    near = [gpu for name in (names or [on])[:1] for close in gpus.close(name)[:1] if (gpu := gpus.lookup(close)) is not None]
    gpu = near[0] if near else None if on or any("device" in one for one in built) else target_gpu(plan.recipe)
    return effort.cpu_speed(threads) if gpu is None else effort.cuda_speed(gpu)


def _cost(seconds: float, speed: effort.Speed) -> Cost:
    return Cost(seconds, seconds / 3600 if speed.device == "cuda" else 0.0)


def _sum(costs: Iterable[Cost]) -> Cost:
    listed = list(costs)
    return Cost(sum(cost.seconds for cost in listed), sum(cost.gpu_hours for cost in listed))


# Shown


def table(impact: Impact) -> Iterator[str]:
    """Aligned columns for people."""
    yield from impact.said
    cells = [("recipe", *impact.heads, "on", "because of")] if impact.rows else []
    cells += [(row.name, _told(row.least), _told(row.most), row.machine, "; ".join(row.why)) for row in impact.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
    yield from (fleet.reason(row) for row in impact.refused)
    said = f"{len(impact.rows)} of {impact.recipes} recipes"
    if impact.rows:
        first, second = impact.heads
        said += f"; what they share once: {first} {_told(impact.least)}, {second} {_told(impact.most)}"
    if impact.unrecorded:
        some = ", ".join(impact.unrecorded[:5]) + (" …" if len(impact.unrecorded) > 5 else "")
        said += f"; nothing is built of {len(impact.unrecorded)}, so nothing tells of {some}"
    yield said


def _told(cost: Cost) -> str:
    return f"{show.seconds(cost.seconds)} ({cost.gpu_hours:.2g} GPU-hours)" if cost.gpu_hours else show.seconds(cost.seconds)


def document(impact: Impact) -> str:
    """JSON for machines: docs/fleet.md says what its keys mean."""
    recipes = [asdict(row) for row in impact.rows]
    refused = [fleet.told_refused(row) for row in impact.refused]
    total = {"recipes": impact.recipes, "touched": len(impact.rows), "least": asdict(impact.least), "most": asdict(impact.most)}
    said = {"format": JSON_FORMAT, **impact.asked, "least": impact.heads[0], "most": impact.heads[1]}
    return json.dumps(said | {"recipes": recipes, "refused": refused, "unrecorded": impact.unrecorded, "sum": total}, indent=1)


def _locked(session: Session, names: Sequence[str]) -> dict[str, Recorded]:
    """What locks tell of builds, each with the tools that it was made with."""
    found = {}
    for name in names:
        versions = session.locks.toolchain.of(name)
        locked = session.locks.of(session.workspace.load(name)) if versions else None
        if versions and locked is not None and locked.built is not None:
            found[name] = Recorded(versions, locked.built.on)
    return found


def told(session: Session, said: Mapping[str, str]) -> Iterator[str]:
    """`doit impact`. Raises BuildError at its end where a recipe cannot be planned."""
    shape = said.get("format", "table")
    if shape not in FORMATS:
        raise BuildError(f"format={shape}", "is no way to show what is touched", f"say one of {', '.join(FORMATS)}")
    if ("upgrade" in said) == ("base" in said):
        what = "of both upgrade= and base=?" if "base" in said else "of what?"
        raise BuildError("impact", what, "say upgrade=torch==VERSION (or another tool), or base=REF for VERSIONs that this branch moves")
    names = list(session.workspace.names())
    found = upgrade(session, names, said["upgrade"], _locked(session, names)) if "upgrade" in said else base(session, names, said["base"])
    yield from [document(found)] if shape == "json" else table(found)
    fleet.end("impact", len(names), found.refused)

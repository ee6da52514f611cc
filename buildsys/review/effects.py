"""What a changed recipe means: its steps beside the base's, what planning predicts, which gates moved, what the locks measured.

A step is kept where its real key is certain to be the same: nothing of its own changed, and what it reads is kept, or is known by digest
before anything runs. After constructive traces, as store and `doit why` have them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from buildsys.history import UNLESS, Ingredients, changes
from buildsys.plan import Plan
from buildsys.recipe import Recipe
from buildsys.review.found import Figure, Gate, Moved, StepChange
from buildsys.slots import modules
from buildsys.step import Need, Step, reads

NEW = "no step of the base is its like"


class Measured(Protocol):
    """One measurement of a lock."""

    @property
    def check(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def unit(self) -> str: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


@dataclass(frozen=True)
class Taken:
    """What a lock says of a verified build. `current`: its steps are those that the recipe plans now."""

    measurements: Sequence[Measured]
    on: str  # the GPU's name, or the processor's
    current: bool


# Steps


def stepped(before: Sequence[Step], after: Plan, known: Mapping[str, object]) -> tuple[tuple[StepChange, ...], int]:
    """Steps of `after` that have to run, and how many need not. `before`: the base's; `known`: planned keys that it has anywhere."""
    olds = _labelled(before)
    kept: set[str] = set()
    found = []
    for label, step in _labelled(after.steps).items():
        old = olds.get(label)
        if step.planned_key in known:
            kept.add(step.planned_key)
            continue
        own = [*_own(step, old)] if old is not None else [NEW]
        if not own and old is not None and _reads_the_same(step, old, kept):
            kept.add(step.planned_key)
        else:
            found.append(_changed(step, old, own, after, kept))
    return tuple(found), len(kept)


def seconds(plan: Plan, step: Step) -> float | None:
    """Of one step: a plan knows what all of a kind take together."""
    whole = plan.building.seconds.get(step.kind)
    return None if whole is None else whole / sum(one.kind == step.kind for one in plan.steps)


def _labelled(steps: Iterable[Step]) -> dict[tuple[str, str, int], Step]:
    """Steps by what they are in their recipe, whatever their knobs say."""
    found: dict[tuple[str, str, int], Step] = {}
    alike: Counter[tuple[str, str]] = Counter()
    for step in steps:
        part = step.title if step.kind == "measure" else ""
        if step.kind in ("fetch", "tokens"):
            part = step.title.partition(" (")[0] if step.kind == "fetch" else step.title.partition(" ")[0]
        found[step.kind, part, alike[step.kind, part]] = step
        alike[step.kind, part] += 1
    return found


def _reads_the_same(step: Step, old: Step, kept: set[str]) -> bool:
    """Whether what both read is certain to be equal; they read it in the same roles."""
    theirs = {need.role: need for need in old.needs}
    return all(_is_the_same(need, theirs[need.role], kept) for need in step.needs)


def _is_the_same(need: Need, old: Need, kept: set[str]) -> bool:
    if sorted(need.files) != sorted(old.files):
        return False
    if need.step.planned_key in kept:
        return True
    promised, before = need.step.promises, old.step.promises
    return promised is not None and before is not None and _read(need, promised) == _read(old, before)


def _read(need: Need, files: Mapping[str, str]) -> dict[str, str]:
    return {name: sha256 for name, sha256 in files.items() if reads(need.files, name)}


def _own(step: Step, old: Step) -> Iterator[str]:
    """What differs in the step itself, in words."""
    if (step.version, step.knobs) == (old.version, old.knobs) and [*_globs(step)] == [*_globs(old)]:
        return
    now, last = (Ingredients(one.kind, one.title, one.planned_key, one.version, one.knobs, {}) for one in (step, old))
    yield from changes(now, last)
    mine, theirs = (dict(_globs(one)) for one in (step, old))
    for role in sorted(mine.keys() | theirs.keys()):
        if role not in mine or role not in theirs:
            yield f"it {'reads' if role in mine else 'no longer reads'} {role}"
        elif mine[role] != theirs[role]:
            yield f"it reads other files of {role}"


def _globs(step: Step) -> Iterator[tuple[str, list[str]]]:
    """What it reads of its needs, by role."""
    return ((need.role, sorted(need.files)) for need in step.needs)


def _changed(step: Step, old: Step | None, own: list[str], plan: Plan, kept: set[str]) -> StepChange:
    """`own`: what differs in the step itself."""
    theirs = {need.role: need for need in old.needs} if old is not None else {}
    moved = [need.role for need in step.needs if need.role in theirs and not _is_the_same(need, theirs[need.role], kept)]
    state: Literal["runs", "unless"] = "runs" if own else "unless"
    why = "; ".join(own) if own else f"{UNLESS}: {', '.join(moved)}"
    return StepChange(step.kind, step.title, state, why, seconds(plan, step), step.planned_key)


# Figures


def figures(before: Plan | None, after: Plan | None) -> tuple[Figure, ...]:
    """What planning predicts of either side; an unchanged number stands there too."""
    old, new = (_predicted(plan) if plan is not None else {} for plan in (before, after))
    return tuple(Figure(name, unit, old.get((name, unit)), new.get((name, unit))) for name, unit in dict.fromkeys((*old, *new)))


def _predicted(plan: Plan) -> dict[tuple[str, str], float]:
    building, serving = plan.building, plan.serving
    found: dict[tuple[str, str], float] = {
        ("weights on disk", "bytes"): building.disk_bytes.get("outside", 0) + building.disk_bytes["pack"]
    }
    if serving is not None:
        found["GPU memory, with one full session", "bytes"] = serving.needed_bytes * serving.count
        found["KV cache", "tokens"] = serving.pool_tokens
        found["full sessions at once", "sessions"] = serving.sessions
        for decode in serving.decode:
            found[f"decode at batch {decode.batch}", "tokens/s"] = decode.tokens_per_s
    found["memory while building", "bytes"] = building.host_bytes + building.gpu_bytes
    found["clean build", "s"] = sum(building.seconds.values())
    return found


# Gates


def gates(before: Recipe, after: Recipe) -> Iterator[Gate]:
    """Limits that moved, checks that came or went, and checks that may be skipped."""
    old, new = before.verify.checks, after.verify.checks
    for check, module in modules("checks").items() if old != new else ():
        if (check in old) != (check in new) and not module.LIMITS.keys() & {*_limits(old, check), *_limits(new, check)}:
            yield _moved_check(check, check in new, demands=bool(module.FIXED) and not module.ALWAYS)
        was, now = _limits(old, check), _limits(new, check)
        for knob, limit in module.LIMITS.items():
            if was.get(knob) != now.get(knob):
                yield _moved_gate(f"{check}.{knob}", was.get(knob), now.get(knob), limit.side)
        asked = [getattr(checks.get(check), "required", None) for checks in (old, new)]
        if asked[0] != asked[1] and None not in asked:
            yield Gate(f"{check}.required", asked[0], asked[1], "LOOSENED" if asked[0] == "always" else "tightened")
    waived, waives = (tuple(getattr(recipe.publish, "waive", ())) for recipe in (before, after))
    if waived != waives:
        more = set(waives) - set(waived)
        yield Gate("publish.waive", list(waived), list(waives), "LOOSENED" if more else "tightened")


def _moved_check(check: str, there: bool, demands: bool) -> Gate:
    """A check without a limit of the recipe's; `demands`: it has limits of its own, and is not made where nobody names it."""
    if there:
        return Gate(check, None, "checked", "added")
    return Gate(check, "checked", None, "LOOSENED" if demands else "gone")


def _limits(checks: Mapping[str, Any], check: str) -> dict[str, float]:
    knobs = checks.get(check)
    return {knob: bound for knob in modules("checks")[check].LIMITS if (bound := getattr(knobs, knob, None)) is not None}


def _moved_gate(name: str, was: float | None, now: float | None, side: str) -> Gate:
    if was is None or now is None:
        return Gate(name, was, now, "added" if was is None else "LOOSENED")
    return Gate(name, was, now, "LOOSENED" if (now > was) == (side == "max") else "tightened")


# Measurements


def measurements(before: Taken | None, after: Taken | None) -> tuple[Moved, ...]:
    """Two builds' numbers side by side. Only their intervals are known, so they are not paired: where these overlap, that is noise."""
    if before is None or after is None:
        return ()
    old, new = ({(one.check, one.name): one for one in side.measurements} for side in (before, after))
    found = []
    for key in dict.fromkeys((*old, *new)):
        was, now = old.get(key), new.get(key)
        one = now or was
        assert one is not None
        ends = tuple((each.value, each.low, each.high) if each is not None else None for each in (was, now))
        found.append(Moved(one.check, one.name, one.unit, ends[0], ends[1], _judged(was, now)))
    return tuple(found)


def measured(before: Taken | None, after: Taken | None) -> str:
    """What to know of these measurements before anybody believes them."""
    if after is None and before is None:
        return ""
    if before is None or after is None:
        return f"The {'base' if before is None else 'branch'} has no locked build: nothing measured to compare."
    if not after.current:
        return "The lock was written before this change: build it, then doit lock, to see what was measured of it."
    alike = "The base's lock is older than its recipe. " if not before.current else ""
    where = f"Measured on {after.on}" + (f", before on {before.on}: speed and memory do not compare" if before.on != after.on else "")
    return f"{alike}{where}; intervals of 95%, not paired (locks hold no tokens): where they overlap, that is noise."


def _judged(was: Measured | None, now: Measured | None) -> Literal["better", "worse", "within noise", "equal", "moved", "new", "gone"]:
    if was is None or now is None:
        return "new" if was is None else "gone"
    if (was.value, was.low, was.high) == (now.value, now.low, now.high):
        return "equal"
    if was.low <= now.high and now.low <= was.high:
        return "within noise"
    side = _good_side(was.check, was.name)
    if side is None:
        return "moved"
    return "better" if (now.value < was.value) == (side == "max") else "worse"


def _good_side(check: str, name: str) -> str | None:
    """`max` where less is better, `min` where more is, as the check's own limits have it."""
    module = modules("checks").get(check)
    limits = [*module.LIMITS.values(), *(limit for limit, _ in module.FIXED.values())] if module is not None else []
    exact = next((limit.side for limit in limits if limit.measurement == name), None)
    return exact or next((limit.side for limit in limits if name.startswith(f"{limit.measurement}_")), None)

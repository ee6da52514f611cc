"""Locks of recipes: made of a plan and the facts of its build, and held against a plan. `recipes/x.lock` lies beside `recipes/x.yaml`.

The types are in locked.py, their form on disk in lockfile.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from buildsys.errors import BuildError
from buildsys.graph import VERSIONS, text_of
from buildsys.history import flat, shown
from buildsys.io import chat, headers
from buildsys.located import Located
from buildsys.locked import SUFFIX, Built, Lock, Locked, Measured, Model, Pinned, Tensor, again, collapsed, written
from buildsys.quant import VERSION as QUANT
from buildsys.recipe import PATH_KNOBS, Recipe
from buildsys.slots import SLOTS, Choice, modules
from buildsys.step import KEY_FORMAT, Step, canonical, digest

if TYPE_CHECKING:
    from buildsys.plan import Plan
    from buildsys.release.facts import Facts

__all__ = ["Built", "Drift", "Lock", "Locked", "Measured", "Model", "Pinned", "Tensor", "again", "drift", "label", "of", "path_of"]

EMPTY: tuple[Any, ...] = (None, [], {})
LONG = 2000  # characters of a knob's JSON; a longer one (the schemes of thousands of linears) is locked as its digest
HERE = ("serve",)
"""Kinds of steps whose keys hold the machine that plans them: what reads them is no part of a lock's planned steps."""


@dataclass(frozen=True)
class Drift:
    """One thing that is not what it was when the recipe was locked, as short text; "" stands for what is not there."""

    what: str  # "source file model.safetensors", "quantize: scheme.group_size"
    locked: str
    now: str

    def __str__(self) -> str:
        if not self.locked or not self.now:
            return f"{self.what} is {'new' if self.now else 'gone'}"
        return f"{self.what} {self.locked} -> {self.now}"


def path_of(recipe: Recipe) -> Path:
    """The lock of the recipe's file, with all its variants."""
    return recipe.file.with_suffix(SUFFIX)


def label(step: Step) -> str:
    """A step's name inside its recipe, whatever its knobs: "fetch source", "tokens calibration", "score int8", "measure kl"."""
    if step.kind == "fetch":
        return f"fetch {step.title.partition(' (')[0]}"
    if step.kind == "tokens":
        return f"tokens {step.title.partition(' ')[0]}"
    if step.kind == "measure":
        return f"measure {step.title}"
    if step.kind == "score":
        policies = step.knobs["kv"]
        return "score" if policies == "none" else " ".join(("score", *policies))
    return step.kind


def planned(plan: Plan) -> dict[str, Step]:
    """The steps of a plan that every machine plans alike, by label."""
    return {label(step): step for step in plan.steps if not _of_this_machine(step)}


def _of_this_machine(step: Step) -> bool:
    return step.kind in HERE or any(need.step.kind in HERE for need in step.needs)


# Making one


def of(plan: Plan, facts: Facts | None, model: Model | None = None) -> Locked:
    """The lock of a plan and, where it is built and verified, of its build. `model`: known from an earlier lock."""
    steps = planned(plan)
    knobs, own = _knobs(steps)
    recipe = plan.recipe
    pins = _pins(plan, steps)
    return Locked(
        asked=asked(
            recipe, lambda where, _: _files(*((plan.artifact, "source") if where[0] == "source" else (steps[f"tokens {where[0]}"], "text")))
        ),
        source=pins["source"],
        model=model or _model(plan),
        calibration=pins.get("calibration"),
        text=pins.get("verify"),
        tokens=_tokens(facts) if facts is not None else {},
        steps={name: step.planned_key for name, step in steps.items()},
        knobs=knobs,
        own=own,
        built=_built(facts) if facts is not None and not any(one.state == "failed" for one in facts.verdicts) else None,
    )


def _pins(plan: Plan, steps: Mapping[str, Step]) -> dict[str, Pinned]:
    """What the recipe's choices stand for now: its source, and the texts of calibration and verify, where these are not the model's own."""
    texts = {
        section: pinned(text_of(plan.recipe, section)[1], found, _files(steps[f"tokens {section}"], "text"))
        for section, found in plan.texts.items()
    }
    return {"source": pinned(plan.recipe.source, plan.source, _files(plan.artifact, "source")), **texts}


def _files(step: Step, role: str) -> Mapping[str, str]:
    """sha256 of what a step reads of a fetch, all of it: planning has hashed what no hub tells."""
    return next(need.step.promises or {} for need in step.needs if need.role == role)


def pinned(chosen: Choice, found: Located, files: Mapping[str, str]) -> Pinned:
    """What a choice stands for."""
    sizes = {name: found.sizes[name] if name in found.sizes else found.files[name].stat().st_size for name in files}
    return Pinned(choice=written(chosen), pin=found.commit, files=files, sizes=sizes)


def _model(plan: Plan) -> Model:
    config = plan.survey.config
    try:
        json.dumps(config, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        what = f"config.json holds {error.object[error.start : error.end]!r}, which no text file can hold"
        raise BuildError(plan.recipe.at("source"), what, "take config.json from the model's publisher again") from None
    shapes = headers.describe(plan.source.files, plan.source.sizes)
    tensors = collapsed({name: (entry.dtype, entry.shape) for name, (_, entry) in shapes.items()})
    template = chat.fingerprint(plan.source.files)
    return Model(config=config, tensors=tensors, tokenizer=plan.survey.tokenizer, template=template)


def _knobs(steps: Mapping[str, Step]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What the steps' keys are made of: knobs of one value in all that have them, and the others by step."""
    values: dict[str, list[tuple[str, Any]]] = {}
    for name, step in steps.items():
        for knob, value in _lockable(step).items():
            values.setdefault(knob, []).append((name, value))
    shared: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for knob, found in values.items():
        if all(value == found[0][1] for _, value in found) and len(found) > 1:
            shared[knob] = found[0][1]
        else:
            for name, value in found:
                own.setdefault(name, {})[knob] = value
    return shared, own


def _lockable(step: Step) -> dict[str, Any]:
    """What is locked of a step's knobs."""
    return {knob: _bounded(value) for knob, value in _said(step).items()}


def _said(step: Step) -> dict[str, Any]:
    """A step's knobs but for files, which the lock has elsewhere; without what is left open, and a first VERSION."""
    found = {} if step.kind == "fetch" else {knob: _pruned(value) for knob, value in step.knobs.items()}
    found |= {"VERSION": step.version} if step.version != 1 else {}
    return {knob: value for knob, value in found.items() if value not in EMPTY}


def _pruned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: inner for key, one in value.items() if (inner := _pruned(one)) not in EMPTY}
    return [_pruned(one) for one in value] if isinstance(value, (list, tuple)) else value


def _bounded(value: Any) -> Any:
    text = canonical(value)
    return value if len(text) <= LONG else f"sha256 {hashlib.sha256(text).hexdigest()}"


def _tokens(facts: Facts) -> dict[str, str]:
    """sha256 of tokens.safetensors, the ids themselves: equal ids are equal files."""
    return {label(ran.step).partition(" ")[2]: ran.output.files["tokens.safetensors"].sha256 for ran in facts.of_kind("tokens")}


def _built(facts: Facts) -> Built:
    measured = [
        Measured(check=check, name=one.name, value=float(one.value), unit=one.unit, low=float(one.low), high=float(one.high))
        for check, found in facts.measurements.items()
        for one in found
    ]
    return Built(
        artifact=facts.artifact.digest(),
        steps={label(ran.step): ran.output.digest() for ran in facts.steps},
        measurements=tuple(sorted(measured, key=lambda one: (one.check, one.name))),
        verdicts=dict(sorted((verdict.check, verdict.state) for verdict in facts.verdicts)),
        on=_on(facts),
        seconds={label(ran.step): float(ran.built["seconds"]) for ran in facts.steps if "seconds" in ran.built},
        size_bytes=facts.artifact.size,
    )


def _on(facts: Facts) -> str:
    """What measured: a GPU's name where one did, or the processor's."""
    builds = [ran.built for ran in facts.steps if ran.step.kind in ("serve", "score", "quantize")]
    gpus = [built["gpu"]["name"] for built in builds if built.get("gpu", {}).get("name")]
    processors = [built["machine"]["cpu"] for built in builds if built.get("machine", {}).get("cpu")]
    return str((gpus or processors or ["an unknown machine"])[-1])


# Holding a plan against one


def asked(recipe: Recipe, files: Callable[[tuple[str, str], Choice], Mapping[str, str]]) -> str:
    """Digest of all that the keys of a plan are made of but what a hub tells: where it is what the lock has, nothing has to be planned.

    `files` gives sha256 of the files of a choice that is local, by where it stands. A VERSION of any slot module is in it.
    """
    chosen = {("source", ""): recipe.source}
    chosen |= {(section, key): dataset for section in ("calibration", "verify") for key, dataset in [text_of(recipe, section)]}
    local = {section: dict(files((section, key), one)) for (section, key), one in chosen.items() if is_local(one)}
    versions = {f"{slot}.{name}": module.VERSION for slot in SLOTS if slot != "publishers" for name, module in modules(slot).items()}
    said = recipe.model_dump(mode="json", exclude={"publish", "report", "locked"})
    return digest({"recipe": said, "files": local, "versions": versions, "steps": dict(VERSIONS), "quant": QUANT, "keys": KEY_FORMAT})


def is_local(chosen: Choice) -> bool:
    """Whether a choice names files of this machine."""
    return any(getattr(chosen.knobs, knob, None) for knob in PATH_KNOBS)


def drift(locked: Locked, plan: Plan) -> list[Drift]:
    """What a plan has other than the lock says: files, choices, knobs; where a key differs for no reason that is known, the step."""
    steps = planned(plan)
    keys = {name: step.planned_key for name, step in steps.items()}
    if keys == locked.steps and _fits(locked, plan.recipe):
        return []
    now = _pins(plan, steps)
    found = [
        *_pinned_drift("source", locked.source, now["source"]),
        *_pinned_drift("calibration text", locked.calibration, now.get("calibration")),
        *_pinned_drift("verify text", locked.text, now.get("verify")),
    ]
    names = sorted(locked.steps.keys() | keys.keys())
    found += [
        Drift(f"step {name}", _short(locked.steps.get(name, "")), _short(keys.get(name, "")))
        for name in names
        if name not in keys or name not in locked.steps
    ]
    changed = [name for name in names if name in keys and name in locked.steps and locked.steps[name] != keys[name]]
    found += _knob_drift(locked, {name: steps[name] for name in changed})
    return found or [Drift(f"key of step {name}", _short(locked.steps[name]), _short(keys[name])) for name in changed]


def _fits(locked: Locked, recipe: Recipe) -> bool:
    chosen = (recipe.source, recipe.calibration.dataset, recipe.verify.text)
    pins = (locked.source, locked.calibration, locked.text)
    return all(pin is None or pin.fits(one) for pin, one in zip(pins, chosen, strict=True))


def _short(value: str) -> str:
    return value[:12]


def _pinned_drift(what: str, locked: Pinned | None, now: Pinned | None) -> Iterator[Drift]:
    if locked is None or now is None:
        if locked is not now:
            yield Drift(what, *("the model's own" if one is None else next(iter(one.choice)) for one in (locked, now)))
        return
    old, new = (dict(flat(one.choice, "")) for one in (locked, now))
    for knob in sorted(old.keys() | new.keys()):
        if old.get(knob) != new.get(knob):
            yield _changed(f"{what} {knob}", old.get(knob), new.get(knob))
    if locked.pin != now.pin:
        yield Drift(f"{what} commit", _short(locked.pin), _short(now.pin))
    for name in sorted(locked.files.keys() | now.files.keys()):
        before, after = locked.files.get(name, ""), now.files.get(name, "")
        if before != after:
            yield Drift(f"{what} file {name}", _short(before), _short(after))


def _knob_drift(locked: Locked, steps: Mapping[str, Step]) -> Iterator[Drift]:
    """Knobs of these steps that are other than locked; what changed alike in several is told once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, step in steps.items():
        own, now = locked.own.get(name, {}), _said(step)
        for knob in sorted(own.keys() | now.keys()):
            # Of a knob that all steps have alike the lock does not say which have it; `now` tells.
            was = own.get(knob, locked.knobs.get(knob) if knob in now else None)
            if was == now.get(knob):
                continue
            before, after = dict(flat(was, knob)), dict(flat(_bounded(now[knob]) if knob in now else None, knob))
            for leaf in sorted(before.keys() | after.keys()):
                if before.get(leaf) != after.get(leaf):
                    one = _changed(leaf, before.get(leaf), after.get(leaf))
                    found.setdefault((one.what, one.locked, one.now), []).append(name)
    for (what, before_, after_), names in found.items():
        yield Drift(f"{names[0]}: {what}" if len(names) == 1 else what, before_, after_)


def _changed(what: str, old: Any, new: Any) -> Drift:
    return Drift(what, *("" if value is None else str(shown(value)) for value in (old, new)))

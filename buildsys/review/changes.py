"""Two workspaces compared: which recipes differ, and what that means. Documents first, then recipes; only what differs is planned.

A recipe whose files, and the files that these extend, are byte for byte the same is not composed again: of 1,000 recipes over one changed
base only those are read twice that extend it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from buildsys.document import Document, Where
from buildsys.errors import BuildError, BuildErrors
from buildsys.overlay import is_inside, lexical
from buildsys.plan import Plan
from buildsys.recipe import PATH_KNOBS, Recipe
from buildsys.review import effects
from buildsys.review.base import OWN, Base
from buildsys.review.effects import Taken
from buildsys.review.found import KINDS, UNSET, Change, Figure, Gate, Kind, Knob, Review
from buildsys.slots import modules
from buildsys.step import Step, canonical
from buildsys.workspace import FOLDER, Workspace

ASIDE = ("publish", "report")  # sections that decide nothing in the artifact
NEIGHBOURS = 8  # unchanged recipes of one source that are planned to see which steps of a new recipe the base has
TAKEN = "gates are judged on other text than before"


@dataclass(frozen=True)
class Side:
    """One of the two workspaces, and what plans its recipes (raising BuildError)."""

    workspace: Workspace
    plan: Callable[[str], Plan]
    taken: Callable[[Recipe, Plan], Taken | None] = lambda recipe, plan: None  # what the recipe's lock says of its last build


def compare(now: Side, then: Side, base: Base, wanted: Callable[[str], bool] = lambda name: True) -> Review:
    """Everything that differs. `wanted`: of which names to speak; the others are neither compared nor counted."""
    names = {name: file for name, file in now.workspace.names().items() if wanted(name)}
    before = {name: file for name, file in _names(base).items() if wanted(name)}
    touched = _touched(now.workspace, base)
    pairs = [name for name, file in names.items() if name in before and touched(file)]
    found = _Comparison(now, then, base)
    found.both(pairs)
    found.moved([name for name in names if name not in before], [name for name in before if name not in names])
    order = {kind: at for at, kind in enumerate(KINDS)}
    changes = sorted(found.changes, key=lambda change: (order[change.kind], change.name))
    same = sum(name in before for name in names) - sum(change.kind in ("changed", "broken") and change.name in before for change in changes)
    return found.summed(Review(base.ref, base.commit, tuple(changes), same, notes=base.notes, errors=tuple(found.errors)))


def _names(base: Base) -> Mapping[str, Path]:
    try:
        return base.workspace.names()
    except BuildError as error:
        raise base.error(error) from None


def _touched(workspace: Workspace, base: Base) -> Callable[[Path], bool]:
    """Whether a recipe's file, what it extends, its lock, or data in git that it names differs from the base."""
    reader, root = workspace.reader, workspace.root
    changed = {root / path for path in base.changed}
    own = {path for path in changed if path.is_relative_to(root / FOLDER) and path.name.endswith(OWN)}
    around = {above for path in changed - own for above in (path, *path.parents)}
    known: dict[Path, bool] = {}

    def chain(file: Path, chained: tuple[Path, ...] = ()) -> bool:
        if file not in known:
            parents = reader.parents(reader.read(file), file, chained)
            known[file] = file in own or any(chain(parent, (*chained, file)) for parent in parents)
        return known[file]

    def touched(file: Path) -> bool:
        if file in own or file.with_suffix(".lock") in own:
            return True
        try:
            return chain(file) or any(place in around for place in _places(reader.compose(file), root))
        except BuildError:
            return True  # loading it says what is wrong

    return touched


def _places(document: Document, root: Path) -> Iterator[Path]:
    """Where the paths of a document lead, those of variants left out: these are told by their file."""
    for where, written in _paths(document.data, ()):
        if isinstance(written, str) and (origin := document.origin(where)) is not None:
            yield lexical(_certain(written), (root / origin.file).parent)


def _paths(value: Any, where: Where) -> Iterator[tuple[Where, Any]]:
    """What stands under the names of paths in plain JSON, by itself or in a list, and where."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if not isinstance(inner, (dict, list)):
            if key in PATH_KNOBS:
                yield (*where, key), inner
        elif key in PATH_KNOBS and isinstance(inner, list):
            yield from (((*where, key, index), one) for index, one in enumerate(inner) if not isinstance(one, (dict, list)))
        else:
            yield from _paths(inner, (*where, key))


class _Comparison:
    """Collects changes; knows every step of the base that it came across."""

    def __init__(self, now: Side, then: Side, base: Base) -> None:
        self.now, self.then, self.base = now, then, base
        self.changes: list[Change] = []
        self.errors: list[BuildError] = []
        self.plans: dict[str, tuple[Plan | None, Plan | None]] = {}  # by the change's name: before, after
        self._known: dict[str, Step] = {}  # of the base, by planned key

    # Which

    def both(self, names: list[str]) -> None:
        """Recipes that both sides have."""
        for name in names:
            try:
                after = self.now.workspace.load(name)
            except BuildError as error:
                self._broken(name, error)
                continue
            try:
                before = self._load(name)
            except BuildError as error:
                self._added(name, after, f"the base's {name} is no valid recipe: {self.base.error(error).what}", "changed")
                continue
            self._pair(name, name, before, after)

    def moved(self, added: list[str], deleted: list[str]) -> None:
        """Recipes that one side has: the same content under another name is a recipe renamed."""
        gone: dict[bytes, list[str]] = {}
        olds: dict[str, Recipe] = {}
        for name in deleted:
            try:
                olds[name] = self._load(name)
                gone.setdefault(_content(olds[name]), []).append(name)
            except BuildError:
                self.changes.append(Change(name, "deleted", self._place(name), notes=("it was no valid recipe",)))
        for name in added:
            try:
                after = self.now.workspace.load(name)
            except BuildError as error:
                self._broken(name, error)
                continue
            alike = gone.get(_content(after))
            if alike:
                was = alike.pop(0)
                self._pair(name, was, olds.pop(was), after)
            else:
                self._added(name, after)
        for name, recipe in olds.items():
            self._deleted(name, recipe)

    def _load(self, name: str) -> Recipe:
        recipe = self.then.workspace.load(name)
        self.base.reach(recipe)
        return recipe

    # What of it

    def _pair(self, name: str, was: str, before: Recipe, after: Recipe) -> None:
        knobs = tuple(_knobs(before, after))
        files = tuple(self._files(after))
        if name == was and not knobs and not files and not self._lock_moved(after):
            return
        old, new, errors = self._planned(was, name)
        if name == was and not knobs and old is not None and new is not None and _keys(old) == _keys(new) and not self._lock_moved(after):
            return  # a file that nothing reads
        kind: Kind = "changed" if name == was else "renamed"
        change = Change(name, kind, knobs[0].where if knobs else after.at(), was="" if name == was else was, knobs=knobs, files=files)
        change = replace(change, gates=tuple(effects.gates(before, after)), notes=tuple(_notes(before, after, old, new)), errors=errors)
        if name != was:
            change = replace(change, where=after.at(), published=self._published(before), notes=(*change.notes, _left(was)))
        if old is not None and new is not None:
            self._known |= {step.planned_key: step for step in old.steps}
            steps, kept = effects.stepped(old.steps, new, {step.planned_key: None for step in old.steps})
            change = replace(change, steps=steps, kept=kept, figures=effects.figures(old, new))
            ends = self.then.taken(before, old), self.now.taken(after, new)
            change = replace(change, measurements=effects.measurements(*ends), measured=effects.measured(*ends))
        self._keep(change, old, new)

    def _added(self, name: str, after: Recipe, note: str = "", kind: Kind = "added") -> None:
        try:
            plan = self.now.plan(name)
        except BuildError as error:
            self._refused(error)
            self._keep(Change(name, kind, after.at(), errors=tuple(_each(error)), notes=(note,) if note else ()), None, None)
            return
        self._look_around(after)
        steps, kept = effects.stepped((), plan, self._known)
        notes = (*((note,) if note else ()), *plan.notes)
        gates = tuple(_all_gates(after)) if kind == "added" else ()
        change = Change(name, kind, after.at(), steps=steps, kept=kept, figures=effects.figures(None, plan), notes=notes, gates=gates)
        self._keep(change, None, plan)

    def _deleted(self, name: str, before: Recipe) -> None:
        self._keep(Change(name, "deleted", self._place(name), published=self._published(before), notes=(_left(name),)), None, None)

    def _broken(self, name: str, error: BuildError) -> None:
        self._refused(error)
        self.changes.append(Change(name, "broken", error.where, errors=tuple(_each(error))))

    def _keep(self, change: Change, old: Plan | None, new: Plan | None) -> None:
        self.changes.append(change)
        self.plans[change.name] = old, new

    # Parts

    def _planned(self, was: str, name: str) -> tuple[Plan | None, Plan | None, tuple[str, ...]]:
        old = new = None
        errors: list[str] = []
        try:
            new = self.now.plan(name)
        except BuildError as error:
            self._refused(error)
            errors += _each(error)
        try:
            old = self.then.plan(was)
        except BuildError as error:
            errors += [f"the base cannot be planned here: {text}" for text in map(self.base.told, _each(error))]
        return old, new, tuple(errors)

    def _refused(self, error: BuildError) -> None:
        self.errors += error.errors if isinstance(error, BuildErrors) else [error]

    def _look_around(self, recipe: Recipe) -> None:
        """Steps that unchanged recipes of the same source have; the base has them too."""
        changed = {change.name for change in self.changes}
        alike = 0
        before = self.base.workspace.names()
        for name in self.now.workspace.names():
            if name in changed or name not in before or alike == NEIGHBOURS:
                continue
            try:
                other = self.now.workspace.load(name)
                if other.source == recipe.source:
                    alike += 1
                    self._known |= {step.planned_key: step for step in self.then.plan(name).steps}
            except BuildError:
                continue  # its own trouble, and none of this recipe's

    def _files(self, recipe: Recipe) -> Iterator[str]:
        """Changed data in git that the recipe names."""
        data = [path for path in sorted(self.base.changed) if not (path.startswith(f"{FOLDER}/") and path.endswith(OWN))]
        places = {_certain(written) for _, written in _paths(resolved(recipe), ())} if data else set()
        for path in data:
            if path in places or any(str(above) in places for above in Path(path).parents):
                yield path

    def _lock_moved(self, recipe: Recipe) -> bool:
        return self.now.workspace.reader.name(recipe.file.with_suffix(".lock")) in self.base.changed

    def _place(self, name: str) -> str:
        file = self.base.workspace.names()[name]
        return f"{self.base.workspace.reader.name(file)} in {self.base.ref}"

    def _published(self, recipe: Recipe) -> tuple[str, ...]:
        """Where its releases went, if there were any."""
        found = []
        for publisher, knobs in recipe.publish.publishers.items():
            try:
                to = modules("publishers")[publisher].destination(knobs, recipe.folder("publish", publisher))
            except BuildError as error:
                to = f"nowhere ({error.what})"
            place = str(to).replace(f"{self.base.workspace.root}/", "").replace(str(self.base.top), "")
            found.append(f"{publisher} {place}")
        return tuple(found)

    # Sums

    def summed(self, review: Review) -> Review:
        steps = {step.key: step for change in review.changes for step in change.steps}
        took = {state: [step.seconds or 0.0 for step in steps.values() if step.state == state] for state in ("runs", "unless")}
        machine = next((plan.building.machine for pair in self.plans.values() for plan in pair if plan is not None), review.machine)
        return replace(
            review,
            sums=tuple(self._sums()),
            machine=machine,
            runs_s=sum(took["runs"]),
            unless_s=sum(took["unless"]),
            runs=len(took["runs"]),
            unless=len(took["unless"]),
        )

    def _sums(self) -> Iterator[Figure]:
        """Of the recipes that both sides plan: sizes and rates added up, and seconds with each shared step once."""
        pairs = [(old, new) for old, new in self.plans.values() if old is not None and new is not None]
        wanted = ("weights on disk", "GPU memory, with one full session", "KV cache", "decode at batch 1")
        figures = [figure for change in self.changes if None not in self.plans.get(change.name, (None,)) for figure in change.figures]
        for name in wanted:
            ends = [(one.before, one.after) for one in figures if one.name == name]
            if ends:
                unit = next(one.unit for one in figures if one.name == name)
                yield Figure(name, unit, sum(was or 0 for was, _ in ends), sum(now or 0 for _, now in ends))
        if pairs:
            yield Figure("clean build", "s", *(_once(plan for pair in pairs for plan in (pair[side],)) for side in (0, 1)))


def _once(plans: Iterator[Plan]) -> float:
    """Seconds of a clean build of them all."""
    steps = {step.planned_key: effects.seconds(plan, step) or 0.0 for plan in plans for step in plan.steps}
    return sum(steps.values())


def _keys(plan: Plan) -> set[str]:
    return {step.planned_key for step in plan.steps}


def _each(error: BuildError) -> Iterator[str]:
    for one in error.errors if isinstance(error, BuildErrors) else (error,):
        yield f"{one.where}  {one.what}; fix: {one.fix}"


def _left(name: str) -> str:
    return f"artifacts/{name} stays where it was built until doit gc"


def _all_gates(recipe: Recipe) -> Iterator[Gate]:
    bare = recipe.model_copy(update={"verify": recipe.verify.model_copy(update=dict.fromkeys(recipe.verify.checks))})
    return (gate for gate in effects.gates(bare, recipe) if gate.state == "added")


def _notes(before: Recipe, after: Recipe, old: Plan | None, new: Plan | None) -> Iterator[str]:
    text = [(recipe.verify.text, recipe.verify.samples, recipe.verify.seqlen, recipe.verify.seed) for recipe in (before, after)]
    if text[0] != text[1]:
        yield TAKEN
    if old is not None and new is not None:
        yield from (f"new: {note}" for note in new.notes if note not in old.notes)
        yield from (f"no longer: {note}" for note in old.notes if note not in new.notes)


# Resolved recipes


def resolved(recipe: Recipe) -> dict[str, Any]:
    """All that the recipe says, bases and variants merged, defaults written out, paths from the workspace."""
    said: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    for where, written in [*_paths(said, ())]:
        if not os.path.isabs(written):
            around = where[:-1] if isinstance(where[-1], str) else where[:-2]
            place = lexical(written, recipe.folder(*around))
            if is_inside(place, recipe.root):
                _put(said, where, place.as_posix().removeprefix(recipe.root.as_posix()).lstrip("/") or ".")
    return said


def _certain(path: str) -> str:
    """Of a glob the folder that all it finds lies in."""
    parts = Path(path).parts
    wild = next((at for at, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    return str(Path(*parts[:wild]))


def _put(value: Any, where: Where, text: str) -> None:
    for key in where[:-1]:
        value = value[key]
    value[where[-1]] = text


def _content(recipe: Recipe) -> bytes:
    """Equal for two recipes that make the same artifact of the same files."""
    return canonical({key: value for key, value in resolved(recipe).items() if key not in ASIDE})


def _knobs(before: Recipe, after: Recipe) -> Iterator[Knob]:
    """Each value that differs."""
    sides = resolved(before), resolved(after)
    same = {key for key in sides[0].keys() & sides[1].keys() if sides[0][key] == sides[1][key]}
    old, new = (dict(_flat({key: value for key, value in said.items() if key not in same}, ())) for said in sides)
    for where in dict.fromkeys((*old, *new)):
        was, now = old.get(where, UNSET), new.get(where, UNSET)
        if was != now or type(was) is not type(now):
            writer = after if where in new else before
            yield Knob(".".join(map(str, where)), was, now, writer.at(*where))


def _flat(value: Any, where: Where) -> Iterator[tuple[Where, Any]]:
    """Leaves by their place; a list of plain values is one, and so is an empty mapping, which says that something is named."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, (*where, key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, (*where, index))
    else:
        yield where, value

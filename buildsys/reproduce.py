"""`doit reproduce`: a recipe built anew in a clean store, held step by step against its lock or its last build.

Reproducible as reproducible-builds.org has it: the same source, recipe and tools give the same bits. Times and memory are nobody's bits:
files that tell them are declared on their steps (`Step.clocked`), and are held beside each other as numbers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from buildsys import causes, disk, gpus, unequal
from buildsys import console as show
from buildsys.driver import Session
from buildsys.errors import BuildError, BuildErrors
from buildsys.lock import Locked, label, path_of
from buildsys.reference import Before, Reference, built, locked
from buildsys.step import Step, digest
from buildsys.store import Artifact, Store

PAGE = "docs/reproducibility.md"
NAMED = ("measure", "serve", "score")
"""Kinds of steps that a build may lack: a check that could not run there, or that was named later."""


def reproduce(session: Session, names: list[str], said: Mapping[str, str]) -> Iterator[str]:
    """Lines for people; raises BuildErrors with every recipe that is not reproduced, after all of them were tried."""
    keep = _keep(said)
    theirs = _against(session, said)
    earlier = {name: _earlier(session, name, theirs, "against" in said) for name in names}
    session.goodbye = "interrupted: nothing was compared to the end; run the same command again"
    errors: list[BuildError] = []
    with session.store.in_use(), theirs.in_use(), _clean(session, said, keep) as clean:
        clean.plan(names)
        references = {name: earlier[name].of(clean.steps(name)) for name in names}
        for name in names:
            _same_recipe(clean, name, references[name])
        clean.look()
        for name in names:
            try:
                yield from _Rerun(session, clean, name, references[name]).lines()
            except _Differs as error:
                errors.append(error)
    if errors:
        raise errors[0] if len(errors) == 1 else BuildErrors(errors)


def _keep(said: Mapping[str, str]) -> bool:
    asked = said.get("keep", "0")
    if asked not in ("0", "1", "True"):  # an option without a value is True
        raise BuildError(f"keep={asked}", "is neither 0 nor 1", "write keep=1 to keep the clean store, or leave it out")
    return asked != "0"


class _Differs(BuildError):
    """A recipe that came out otherwise."""


# What is compared with


def _against(session: Session, said: Mapping[str, str]) -> Store:
    """The store with the earlier build: this workspace's, or that of the artifacts/ that `against` names."""
    if "against" not in said:
        return session.store
    root = Path(said["against"])
    if not (root / ".store").is_dir():
        raise BuildError(f"against={root}", "holds no store", "name the folder artifacts/ of a workspace that has built the recipe")
    return Store(root)


@dataclass(frozen=True)
class _Earlier:
    """What is known of a recipe's earlier build: its lock goes before the store."""

    built: Reference | None
    lock: Locked | None
    path: Path  # of the lock
    store: Store
    tools: Mapping[str, str]  # that the locked build was made with

    def of(self, steps: tuple[Step, ...]) -> Reference:
        found = locked(self.lock, self.path, steps, self.built, self.store, self.tools) if self.lock is not None else None
        found = found or self.built
        assert found is not None
        return found


def _earlier(session: Session, name: str, store: Store, named: bool) -> _Earlier:
    """Raises BuildError where nothing is known. `named`: the user named the store, so it is that which is meant."""
    recipe, found = session.workspace.load(name), built(store, name)
    path, lock = path_of(recipe), session.locks.of(recipe) if not named else None
    if found is None and (lock is None or lock.built is None):
        told = "there is no lock" if lock is None else "its lock tells of no verified build"
        what = f"{name} was never built in {store.root}, and {told}"
        raise BuildError(recipe.at(), what, f"run `doit build recipe={name}` first")
    return _Earlier(found, lock, path, store, session.locks.toolchain.of(name) or {} if lock is not None else {})


# Before anything is built


def _same_recipe(clean: Session, name: str, reference: Reference) -> None:
    """Refuses what cannot come out equal: another source or text, another recipe. Another code VERSION may."""
    plan, errors = clean.plans[name], []
    for step in clean.steps(name):
        before = reference.steps.get(label(step))
        if before is None and step.kind not in NAMED:
            errors.append(_unknown(plan.recipe.at(), name, step, reference))
        elif before is not None and before.made is not None and not step.clocked:  # whose knobs name the machine
            errors += _drifted(plan, step, before.made, reference)
    if errors:
        raise errors[0] if len(errors) == 1 else BuildErrors(errors)


def _unknown(where: str, name: str, step: Step, reference: Reference) -> BuildError:
    state = "is no longer recorded" if label(step) in reference.lost else "was never finished"
    what = f"{name}: {step.kind} {step.title} {state} in {reference.whence}, so there is nothing to compare with"
    return BuildError(where, what, f"run `doit build recipe={name}` first")


def _drifted(plan: Any, step: Step, made: Any, reference: Reference) -> Iterator[BuildError]:
    found = causes.changes(made, step)
    back = f"or build what is there now: `doit build recipe={plan.name}` (and `doit lock recipe={plan.name}` where there is a lock)"
    if found.files:
        what = f"{_source(step)} is not what {reference.whence} was made from: {_moved(made.title, step.title)}"
        what += "; ".join(_file(name, *shas, step, reference.store) for name, shas in list(found.files.items())[:3])
        what += f"; {len(found.files) - 3} more files" if len(found.files) > 3 else ""
        yield BuildError(_at(plan, step), what, f"put it back as it was, {back}")
    if found.recipe:
        more = f" and {len(found.recipe) - 6} more" if len(found.recipe) > 6 else ""
        what = f"{step.kind} {step.title} is not what {reference.whence} says: {'; '.join(found.recipe[:6])}{more}"
        yield BuildError(plan.recipe.at(), what, f"put the recipe back as it was, {back}")


def _source(step: Step) -> str:
    what = label(step).removeprefix("fetch ")
    return "the source" if what == "source" else f"the dataset of {what}"


def _at(plan: Any, step: Step) -> str:
    where = {"source": ("source",), "calibration text": ("calibration", "dataset"), "verify text": ("verify", "text")}
    return str(plan.recipe.at(*where.get(label(step).removeprefix("fetch "), ())))


def _moved(old: str, new: str) -> str:
    """A fetch's title holds the repository and the commit, where it has such."""
    return f"moved from {_place(old)} to {_place(new)}; " if _place(old) != _place(new) else ""


def _place(title: str) -> str:
    return title.partition(" (")[2].removesuffix(")").strip()


def _file(name: str, old: str, new: str, step: Step, store: Store) -> str:
    """One file of a source; what in it differs, where both are here."""
    if not old or not new:
        return f"file {name} is {'new' if not old else 'gone'}"
    text = f"file {name} differs (sha256 {causes.shown(old)} -> {causes.shown(new)})"
    here = step.hints.get("paths", {}).get(name)
    then = store.held(old)
    return f"{text}: {unequal.told(name, then, Path(here))}" if here is not None and then is not None else text


# Building anew


@contextmanager
def _clean(session: Session, said: Mapping[str, str], keep: bool) -> Iterator[Session]:
    """A session over an empty store, which is gone afterwards: on an error and on Ctrl-C too, in whatever thread that comes."""
    folder = _folder(session.store, said)
    remove = partial(shutil.rmtree, folder, ignore_errors=True)
    if not keep:
        session.at_end(remove)
    clean = session.beside(Store(folder))
    try:
        yield clean
    finally:
        clean.end()
        if keep:
            session.console.line(f"kept      {folder}")
        else:
            remove()


def _folder(store: Store, said: Mapping[str, str]) -> Path:
    """An empty folder of our own: a new one, or that which `folder` names; a name that gc drops where a kill leaves it."""
    if "folder" not in said:
        with disk.writing(store.home):
            store.home.mkdir(parents=True, exist_ok=True)
            return Path(tempfile.mkdtemp(prefix=".reproduce-", dir=store.home))
    folder = Path(said["folder"])
    with disk.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.mkdir(folder)
        except FileExistsError:
            what = "is there already, and a reproduction begins with nothing"
            raise BuildError(f"folder={folder}", what, "name a folder that is not there yet, or leave folder= out") from None
    return folder


@dataclass(frozen=True)
class _Rerun:
    """One recipe, built anew and compared."""

    session: Session  # the user's, whose GPU is shared
    clean: Session
    name: str
    reference: Reference

    def lines(self) -> Iterator[str]:
        """Raises _Differs at the first step that came out otherwise; what comes after it is not built."""
        settings, plan = self.clean.settings, self.clean.plans[self.name]
        yield f"{self.name}: beside {self.reference.whence}; anew in a clean store, threads={settings.threads} batch={settings.batch}"
        outputs: dict[str, str] = {}
        aside: list[str] = []
        notes: list[str] = []
        for step in self.clean.steps(self.name):
            named, artifact = label(step), self._build(step)
            before = self.reference.steps.get(named)
            if before is None:
                aside.append(named)
                yield self._row("new", step, artifact, None)
                continue
            if step.clocked:
                yield self._row("measured", step, artifact, before)
                yield from self._numbers(step, before, artifact)
            elif artifact.digest() != before.output:
                yield self._row("differs", step, artifact, before)
                yield from self._apart(step, before, artifact)
            else:
                outputs[named] = artifact.digest()
                notes += [note for note in causes.changes(before.made, step).code if note not in notes] if before.made is not None else []
                yield self._row("equal", step, artifact, before)
        yield from (f"  note      {note}: its output is the same" for note in notes)
        yield from ([f"  note      not in {self.reference.whence}: {', '.join(aside)}"] if aside else [])
        lacking = self.reference.steps.keys() - {label(step) for step in self.clean.steps(self.name)}
        yield from ([f"  note      not built here: {', '.join(sorted(lacking))}"] if lacking else [])
        made = self.clean.store.recorded(self.clean.key(plan.artifact))
        assert made is not None
        yield f"{self.name}: identical, {len(outputs)} steps, digest {digest(outputs)}"
        yield f"  artifact  {made.digest()}"

    def _build(self, step: Step) -> Artifact:
        """On a GPU after whoever else builds in this workspace."""
        taken = step.computes and self.clean.settings.device != "cpu" and gpus.here() is not None

        def waiting(holder: str) -> None:
            self.session.console.line(f"waits   {step.kind} {step.title}: {holder} has the GPU")

        with self.session.store.lock("gpu", waiting) if taken or step.engine else nullcontext():
            if not self.clean.ready(step):
                self._run(step)
        found = self.clean.store.recorded(self.clean.key(step))
        assert found is not None
        return found

    def _run(self, step: Step) -> None:
        try:
            self.clean.build(step)
        except BuildErrors:
            raise
        except BuildError as error:  # its log goes with the store
            raise BuildError(error.where, error.what, f"{error.fix} (say keep=1 to keep its log)") from error

    def _row(self, state: str, step: Step, artifact: Artifact, before: Before | None) -> str:
        took = artifact.meta.get("built", {}).get("seconds", 0.0)
        then = f" (then {show.seconds(before.seconds)})" if before is not None and before.seconds is not None else ""
        return f"  {state:<9} {step.kind:<9} {step.title:<42} {artifact.digest()[:12]} {show.seconds(took):>9}{then}"

    def _numbers(self, step: Step, before: Before, artifact: Artifact) -> Iterator[str]:
        """What was measured then and now."""
        for name in step.clocked:
            then = before.measured or self._measured(before, name)
            now = {one["name"]: one for one in json.loads(self.clean.store.path(artifact, name).read_text())} if then else {}
            for each in [each for each in now if each in then]:
                yield f"    {each:<24} {then[each]:.6g} -> {now[each]['value']:.6g} {now[each]['unit']}"

    def _measured(self, before: Before, name: str) -> Mapping[str, float]:
        """What an earlier check measured, where its file is at hand."""
        file = before.artifact.files.get(name) if before.artifact is not None and name == "measurements.json" else None
        path = self.reference.store.held(file.sha256) if file is not None else None
        return {one["name"]: one["value"] for one in json.loads(path.read_text())} if path is not None else {}

    def _apart(self, step: Step, before: Before, artifact: Artifact) -> Iterator[str]:
        plan = self.clean.plans[self.name]
        where = self._first(step, before, artifact)
        yield from (f"    {line}" for line in where)
        reasons, fix = self._reasons(step, before, artifact)
        yield f"    because   {'; '.join(reasons) if reasons else 'of nothing that is recorded'}"
        first = where[0].removeprefix("first     ").partition("; ")[0]
        what = f"{self.name} is not reproduced: {step.kind} {step.title} is the first step that differs ({first}); "
        what += f"what differs beside it: {'; '.join(reasons)}" if reasons else "code, inputs, tools and machine are recorded as the same"
        raise _Differs(plan.recipe.at(), what, fix)

    def _first(self, step: Step, before: Before, artifact: Artifact) -> list[str]:
        if before.artifact is None:
            gone = f"its files are not in {self.reference.store.root}"
            return [f"first     digest {before.output[:12]} then, {artifact.digest()[:12]} now; {gone}"]
        old = {name: file.sha256 for name, file in before.artifact.files.items()}
        new = {name: file.sha256 for name, file in artifact.files.items()}
        names = unequal.files(old, new)
        first, more = names[0], f"; {len(names)} of {len(old.keys() | new.keys())} files differ"
        if first not in old or first not in new:
            return [f"first     {first} is {'new' if first not in old else 'gone'}{more}"]
        then = self.reference.store.held(before.artifact.files[first].sha256)
        if then is None:
            return [f"first     {first}, whose earlier content is no longer in {self.reference.store.root}{more}"]
        told = unequal.told(first, then, self.clean.store.path(artifact, first), self._order())
        return [f"first     {first}, {told}{more}"]

    def _order(self) -> list[str]:
        """Names in a block in the order in which it computes."""
        architecture = self.clean.plans[self.name].survey.architecture
        inside = [[site, *(linear.name for linear in architecture.linears if linear.site == site)] for site in architecture.sites]
        return [name for names in inside for name in names]

    def _reasons(self, step: Step, before: Before, artifact: Artifact) -> tuple[list[str], str]:
        """What of two manifests differs, nearest first, and what to do about it."""
        now = artifact.meta.get("built", {})
        code = list(causes.changes(before.made, step).code) if before.made is not None else []
        around = list(causes.tools(before.built, now) if before.built else causes.told(self.reference.tools, self.reference.on, now))
        read = list(causes.inputs(before.built, now)) if before.built else []
        if code:
            return [
                *code,
                *read,
                *around,
            ], "reproduce with the code that built it (git log tells when its VERSION was bumped), or build anew"
        if read:
            return [*read, *around], "what it read was measured or is not pinned: see its own step"
        if around:
            return around, f"use the tools and the kind of machine that built it; {PAGE} says what is promised across them"
        if not before.built:
            return [], f"reproduce it where it was built, where more is recorded, or say against=ARTIFACTS; see {PAGE}"
        return [], f"this is a bug in buildsys: a step gave other bits from the same inputs; please report it, with keep=1 ({PAGE})"

"""What `doit lock` does: writes locks and says what changed in them; with --check it writes nothing and says what no longer fits.

A check reads a lock's first lines and hashes local files; only a recipe that has changed since is planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys import toolchain
from buildsys.driver import Session
from buildsys.errors import BuildError, BuildErrors
from buildsys.lock import Locked, again, drift, of, path_of
from buildsys.locking import missing, quick, refusal, required
from buildsys.recipe import Recipe
from buildsys.workspace import FOLDER

if TYPE_CHECKING:
    from buildsys.plan import Plan
    from buildsys.release.facts import Facts


def changes(before: Locked | None, now: Locked, plan: Plan) -> Iterator[str]:
    """What writing the lock changed, for people."""
    if before is None:
        yield f"locked {plan.name}: {len(now.steps)} steps, {_state(now)}"
        return
    found = drift(before, plan)
    yield from (f"  {one}" for one in found)
    old, new = ({(one.check, one.name): one for one in (lock.built.measurements if lock.built else ())} for lock in (before, now))
    for key in sorted(old.keys() | new.keys()):
        was, now_ = old.get(key), new.get(key)
        if was != now_:
            told = [f"{one.value:.4g} {one.unit}" if one is not None else "not measured" for one in (was, now_)]
            yield f"  {key[0]} {key[1]}: {told[0]} -> {told[1]}"
    yield f"locked {plan.name}: {len(now.steps)} steps, {_state(now)}"


def _state(locked: Locked) -> str:
    return f"built on {locked.built.on}, output {locked.built.artifact[:12]}" if locked.built is not None else "not built yet"


def check(session: Session, names: list[str] | None) -> Iterator[str]:
    """Every lock still fits, of these recipes or of all. Raises BuildErrors with what does not. Writes nothing."""
    errors: list[BuildError] = []
    locked = 0
    for name in names if names is not None else session.workspace.names():
        recipe = session.workspace.load(name)
        path = session.locks.shown(path_of(recipe))
        try:
            if not path_of(recipe).exists():
                if names is not None or required(recipe, session.settings.locked):
                    raise missing(recipe, path)
                continue
            if not quick(recipe, session.finder):
                _look(session, recipe, path)
            locked += 1
        except BuildErrors as several:
            errors += several.errors
        except BuildError as error:
            errors.append(error)
    if errors:
        raise BuildErrors(list({(error.where, error.what): error for error in errors}.values()))
    yield f"{locked} recipe{'s are' if locked != 1 else ' is'} as locked"


def _look(session: Session, recipe: Recipe, path: str) -> None:
    """Plans what has changed since it was locked: not every change is one of the result."""
    held_ = session.locks.of(recipe)
    if held_ is None:
        raise BuildError(path, f"does not hold {recipe.name}", f"run `{again(recipe.name)}`")
    found = drift(held_, session.planned(recipe, held_))
    if found:
        raise BuildErrors([refusal(recipe.name, path, one) for one in found])


def lock(session: Session, names: list[str], said: Mapping[str, str]) -> Iterator[str]:
    """Writes the locks of these recipes: what they name now, commits as locked before unless `refresh` is said, and their last build."""
    place = session.workspace.root / FOLDER / toolchain.FILE
    tools = toolchain.Toolchain.read(place, session.locks.shown(place))
    made: dict[Path, tuple[Recipe, dict[str, Locked]]] = {}
    for name in names:
        recipe = session.workspace.load(name)
        try:
            before = session.locks.of(recipe)
        except BuildError as error:
            before = None
            yield f"{error.where} {error.what}: it is written anew"
        plan = session.planned(recipe, None if "refresh" in said else before)
        if plan.source.lacks:
            raise BuildError(recipe.at("source"), f"cannot be locked now: {plan.source.lacks}", "go online, then run it again")
        session.plans[name] = plan
        facts = _facts(session, name)
        if facts is not None:
            tools = tools.having(name, toolchain.versions(facts))
        now = of(plan, facts)
        if now.built is None and before is not None and before.steps == now.steps:
            now = now.model_copy(update={"built": before.built, "tokens": before.tokens})  # built elsewhere, as it is planned here
        yield from changes(before, now, plan)
        made.setdefault(path_of(recipe), (recipe, {}))[1][name] = now
    for path, (recipe, locked) in made.items():
        gone = {name for name in _known(session, recipe) if name not in session.workspace.names()}
        wrote = session.locks.write(recipe, locked, gone)
        yield f"{'wrote' if wrote else 'unchanged'} {session.locks.shown(path)}"
    tools = tools.without(set(tools.recipes) - set(session.workspace.names()))
    if (tools.recipes or place.exists()) and toolchain.write(place, tools):
        yield f"wrote {session.locks.shown(place)}"


def _known(session: Session, recipe: Recipe) -> Iterable[str]:
    try:
        found = session.locks.lock(recipe)
    except BuildError:
        return ()
    return found.recipes if found is not None else ()


def _facts(session: Session, name: str) -> Facts | None:
    """Of a whole build that passed; None: there is none of what is planned."""
    try:
        facts = session.facts(name)
    except BuildError:
        return None
    return facts if all(one.state != "failed" for one in facts.verdicts) else None

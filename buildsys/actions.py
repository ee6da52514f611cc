"""What the commands do that build nothing: check, plan, why, forget, clean, gc, schema. The same under doit and without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from buildsys import console as show
from buildsys import publishing
from buildsys.driver import Session, limits
from buildsys.errors import BuildError, BuildErrors
from buildsys.history import UNLESS, History, Ingredients, why
from buildsys.step import Step, digest
from buildsys.store import Artifact, Found, Store

if TYPE_CHECKING:
    from buildsys.plan import Plan
    from buildsys.recipe import Recipe
    from buildsys.review.effects import Taken
    from buildsys.workspace import Workspace


def check(workspace: Workspace) -> list[str]:
    """Every mistake in any recipe raises, all of them in one BuildErrors."""
    _here(workspace)
    errors = workspace.check()
    if errors:
        raise BuildErrors(errors)
    names = workspace.names()
    open_ends = {name: workspace.load(name).floating() for name in names}
    lines = [f"unlocked  {name}  {'; '.join(texts)}" for name, texts in open_ends.items() if texts]
    count = f"{len(names)} recipe{'s' if len(names) != 1 else ''}"
    return [*lines, f"{count}, no mistakes{f'; {len(lines)} unlocked: what they name may change' if lines else ''}"]


def lock(session: Session, names: list[str] | None, said: Mapping[str, str], check: bool) -> Iterator[str]:
    """Writes locks, or with `check` says whether they still fit (of all recipes, where none is named)."""
    from buildsys import relock

    _here(session.workspace)
    if not check:
        if names is None:
            raise BuildError("lock", "which recipe?", "name one, or say --check, which is about all that have a lock")
        yield from relock.lock(session, names, said)
        return
    if "refresh" in said:
        raise BuildError("refresh", "does not go with check", "leave one of the two out")
    yield from relock.check(session, names)


def _here(workspace: Workspace) -> None:
    """A wrong folder has no mistakes and needs nothing: to say so, or to drop a store for it, would be wrong."""
    if not (workspace.root / "recipes").is_dir():
        raise BuildError(str(workspace.root), "is no workspace: it has no folder recipes/", "run this where dodo.py and recipes/ are")


def diff(session: Session, said: Mapping[str, str]) -> Iterator[str]:
    """What the work tree's recipes are beside those of the git ref `base`. Mistakes of the work tree's raise once all else is told."""
    from buildsys.review import base, changes, render

    _here(session.workspace)
    form = render.chosen(said.get("format", "text"))
    if "base" not in said:
        raise BuildError("diff", "against what?", "write base=REF: doit diff base=origin/main")
    with base.at(session.workspace, said["base"], session.store.home) as old:
        before = Session(old.workspace, session.store, replace(session.settings, locked=None), session.console)
        before.locks = base.SharedLocks(old, session.locks)
        now, then = (changes.Side(one.workspace, partial(_planned, one), partial(_taken, one)) for one in (session, before))
        review = changes.compare(now, then, old, _wanted(now.workspace, old.workspace, said.get("recipe")))
    yield from render.render(review, form)
    if review.errors:
        raise BuildErrors(list(review.errors))


def _planned(session: Session, name: str) -> Plan:
    session.plan([name])
    return session.plans[name]


def _taken(session: Session, recipe: Recipe, plan: Plan) -> Taken | None:
    """What the recipe's lock says of its last verified build."""
    from buildsys.lock import planned
    from buildsys.review.effects import Taken

    locked = session.locks.of(recipe)
    if locked is None or locked.built is None:
        return None
    now = {name: step.planned_key for name, step in planned(plan).items()}
    return Taken(locked.built.measurements, locked.built.on, now == dict(locked.steps))


def _wanted(now: Workspace, then: Workspace, spec: str | None) -> Callable[[str], bool]:
    """Of which recipes to speak: those that `recipe=` names on either side."""
    if spec is None:
        return lambda name: True
    found: set[str] = set()
    for token in spec.split(","):
        try:
            found |= set(now.find(token))
        except BuildError:  # it may be one that is no more
            found |= set(then.find(token))
    return found.__contains__


def publish_without_building(session: Session, names: list[str], to: str | None) -> Iterator[str]:
    """What would be sent or, with `to`, back to the release of that digest."""
    session.plan(names)
    for name in names:
        publishing.publishable(session, name)
    for name in names:
        yield from publishing.rollback(session, name, to) if to is not None else publishing.rehearse(session, name)


def plans(session: Session, names: Sequence[str], format: str | None) -> Iterator[str]:
    """One recipe step by step, several as a table; `format` (text, table, json) says otherwise."""
    from buildsys import fleet

    if format not in (None, *fleet.FORMATS):
        raise BuildError(f"format={format}", "is no way to show a plan", f"say one of {', '.join(fleet.FORMATS)}")
    chosen = format or ("text" if len(names) == 1 else "table")
    if chosen != "text":
        yield from fleet.told(session, names, chosen)
        return
    session.plan(names)
    for name in names:
        yield from plan(session, name)


def impact(session: Session, said: Mapping[str, str]) -> Iterator[str]:
    """What another version of a tool, or VERSIONs that a branch moves, would touch."""
    from buildsys import impact

    yield from impact.told(session, said)


def plan(session: Session, name: str) -> list[str]:
    """Each step: cached, or why it runs; nothing is built."""
    from buildsys.outlook import outlook

    return [*_table(session, name, sizes=True), *outlook(session.plans[name])]


def reasons(session: Session, name: str) -> list[str]:
    """Each step: cached, or what changed since its last build."""
    return _table(session, name, sizes=False)


def _table(session: Session, name: str, sizes: bool) -> list[str]:
    steps = session.steps(name)
    found = session.store.walk(steps)
    history = History(session.store.home, name)
    judged = limits(session.plans[name])
    last = history.pair([*steps, judged])
    artifacts = {planned: one.artifact for planned, one in found.items() if one.artifact is not None}
    outputs = {planned: one.output for planned, one in found.items() if one.output is not None}
    rows = [_row(step, found[step.planned_key], last.get(step.planned_key), outputs, session.store.damage) for step in steps]
    now = Ingredients.of(judged, digest(judged.knobs), {})
    before = last.get(judged.planned_key)
    why_judge = "always, in a moment" if before is None or before.key == now.key else why(now, before)
    rows.append(("runs", judged, why_judge))
    cached = sum(state == "cached" for state, _, _ in rows)
    width = max(len(step.title) for _, step, _ in rows)
    lines = [f"{name}  ({session.plans[name].recipe.at()})"]
    for state, step, text in rows:
        artifact = artifacts.get(step.planned_key)
        if sizes:
            text = show.size(artifact.size) if artifact is not None else f"{text}{_expected(step, steps, session.plans[name])}"
        lines.append(f"  {state:<7} {step.kind:<9} {step.title:<{width}}  {text}".rstrip())
    lines.append(f"  {len(steps)} steps: {cached} cached, {len(steps) - cached} to run")
    return lines


def _expected(step: Step, steps: Sequence[Step], plan: Plan) -> str:
    seconds, size = plan.building.seconds.get(step.kind), plan.building.disk_bytes.get(step.kind)
    alike = sum(one.kind == step.kind for one in steps)  # the plan knows what a kind takes in all
    said = [f"about {show.seconds(seconds / alike)}"] if seconds is not None else []
    said += [show.size(size)] if size is not None else []
    return f"  ({', '.join(said)})" if said else ""


def _row(
    step: Step, found: Found, last: Ingredients | None, outputs: Mapping[str, Artifact], damage: Mapping[str, str]
) -> tuple[str, Step, str]:
    if found.artifact is not None:
        return "cached", step, ""
    if found.key is None:
        return "runs?", step, UNLESS
    text = why(Ingredients.of(step, found.key, outputs), last, damage.get(found.key))
    return "runs", step, text


def verify(session: Session, said: Mapping[str, str]) -> Iterator[str]:
    """Digests, signature, statement and weights of a folder or of a hub's repository, ours or not. Raises what does not hold."""
    from buildsys.release.audit import audit

    if ("path" in said) == ("repo" in said):
        what = "of both path= and repo=?" if "path" in said else "of what?"
        raise BuildError("verify", what, "say path=FOLDER (path=artifacts/NAME is a recipe's), or repo=ORG/NAME of the Hugging Face hub")
    key = Path(said["key"]) if "key" in said else None
    folder = Path(said["path"]) if "path" in said else _brought(session, said["repo"], said.get("revision", "main"))

    def progress(phase: str, done: int, total: int) -> None:
        session.console.progress("verify", "verify", phase, done, total)

    try:
        found = audit(folder, key, progress, said.get("repo"))
    finally:
        session.console.finished("verify")
    yield from found.lines
    if found.findings:
        raise BuildErrors(list(found.findings))
    yield f"{said.get('repo', folder)}: nothing wrong was found"


def _brought(session: Session, repo: str, revision: str) -> Path:
    """A folder with the repository's files, as the hub has them now."""
    from buildsys.hubs import hub

    home = session.store.home / "hub"
    listed = hub.listing(hub.Repo("model", repo, revision), home)
    if not listed.files:
        raise BuildError(str(listed.repo), "holds no files", "name another repository or revision")
    found = hub.locate(listed, listed.files, home)
    session.console.line(f"{repo} at {listed.commit[:12]}, {len(found.names)} files")
    paths = hub.fetch(found.how, found.sha256, partial(session.console.progress, "fetch", f"fetch {repo}")) if found.how else found.files
    session.console.finished("fetch")
    return next(path.parents[len(Path(name).parts) - 1] for name, path in paths.items())


def forget(session: Session, name: str) -> list[str]:
    """The recipe's steps run again at its next build; a recipe that shares one of them builds it again too."""
    steps = session.steps(name)
    found = session.store.walk(steps)
    last = History(session.store.home, name).pair(steps)
    lines = []
    for step in steps:
        now, before = found[step.planned_key].key, last.get(step.planned_key)
        keys = {key for key in (now, before.key if before is not None else None) if key is not None}
        if sum(session.store.forget(key) for key in keys):
            lines.append(f"{name}: forgot {step.kind} {step.title}")
    return lines or [f"{name}: no step of it was in the store"]


def clean(store: Store, name: str) -> list[str]:
    """artifacts/<recipe> goes; the steps stay."""
    link = store.root / name
    if not store.unlink(name):
        return [f"{link} is not there"]
    kept = f"its steps stay in {store.home}: `doit forget recipe={name}` drops them, and then `doit gc` frees the disk"
    return [f"removed {link}; {kept}"]


def gc(session: Session) -> list[str]:
    """Drops what no recipe needs: links of recipes that are no more, steps that no recipe reaches, and what only they used."""
    _here(session.workspace)
    store, names = session.store, session.workspace.names()
    lines = []
    for name in names:
        session.workspace.load(name)  # a recipe that cannot be read may need anything, so it stops gc
        try:
            session.plan([name])
        except BuildError as error:  # its hub cannot be reached, its folder is not mounted: what it was built of stays
            lines.append(f"{name} cannot be planned now, so what its last build used is kept ({error.what})")

    def needed() -> set[str]:
        """Real keys as far as they are known, and those of the last build: below a missing step nothing else tells them."""
        keep: set[str] = set()
        for name in names:
            steps = session.steps(name) if name in session.plans else ()
            keep |= {found.key for found in store.walk(steps).values() if found.key is not None}
            keep |= set(History(store.home, name).keys())
        return keep

    gone = [name for name in store.names() if name not in names]
    freed = store.gc(needed, gone)
    lines += [f"removed {store.root / name}: there is no such recipe" for name in gone]
    return [*lines, f"freed {show.size(freed)}; kept what {len(names)} recipe{'s need' if len(names) != 1 else ' needs'}"]


def schema() -> str:
    """JSON Schema of a recipe, for editors."""
    from buildsys.recipe_schema import text

    return text().rstrip("\n")


def description(path: Path, name: str, otherwise: str) -> str:
    """One line about a recipe, for lists: the first comment on top of its file that says something."""
    said = ""
    with path.open(errors="replace") as file:
        for line in file:
            text = line.lstrip("# ").strip()
            if not line.startswith("#") or said:
                break
            said = "" if text.startswith("yaml-language-server") else text
    variant = name.partition("@")[2]
    return (said or otherwise) + (f" (variant {variant})" if variant else "")

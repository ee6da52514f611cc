"""`doit report`, `doit compare`: gather what a page shows, and write it beside the artifacts; a build whose gates fail too, since then it
matters most."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from buildsys import disk
from buildsys.driver import Session
from buildsys.errors import BuildError, BuildErrors
from buildsys.steps import GENERATIONS

if TYPE_CHECKING:
    from buildsys.release.facts import Facts, Ran
    from buildsys.report.view import View

INDEX = "index.html"


def report(session: Session, names: list[str]) -> Iterator[str]:
    """A page for each recipe that is built; where several are asked for, a catalogue of all of them beside. Builds nothing but answers."""
    from buildsys.report import catalogue

    entries = []
    with session.store.in_use():
        for name in names:
            try:
                session.plan([name])
                facts = session.facts(name)
            except BuildError as error:
                if len(names) == 1:
                    raise
                recipe = session.workspace.load(name)  # what is wrong with the recipe itself is no reason to leave it out: it raises
                known = name in session.plans
                entries.append(catalogue.unbuilt(recipe, catalogue.NOT_BUILT if known else f"not known: {error.what}"))
                yield f"{name}: {catalogue.NOT_BUILT if known else f'left out: {error.what}'}"
                continue
            path = session.store.root / f"{name}.html"
            yield f"{name}: {_write(path, _page(session, facts, alone=len(names) == 1))}"
            entries.append(catalogue.entry(facts, quote(path.name)))
        if len(names) > 1:
            yield f"{len(entries)} recipes: {_write(session.store.root / INDEX, catalogue.catalogue(entries))}"


def compare(session: Session, names: list[str]) -> Iterator[str]:
    """What is built, side by side: a table here and a page beside the artifacts. Builds nothing."""
    from buildsys.report import compare as shown

    if not 2 <= len(names) <= shown.AT_MOST:
        fix = "write doit compare recipes=ONE,OTHER; `doit report recipe='*'` shows any number in a catalogue"
        raise BuildError("recipes=", f"names {len(names)}; from 2 to {shown.AT_MOST} are compared", fix)
    session.plan(names)
    with session.store.in_use():
        sides, errors = [], []
        for letter, name in zip(string.ascii_uppercase, names, strict=False):
            try:
                facts = session.facts(name)
            except BuildError as error:
                errors.append(error)
                continue
            scores = session.store.path(shown.scored(facts).output, shown.SCORES)
            sides.append(shown.Side(letter, facts, scores, shown.link(session.store.root / f"{name}.html")))
        if errors:
            raise errors[0] if len(errors) == 1 else BuildErrors(errors)
        first, *others = sides
        sides = [first, *(replace(side, difference=shown.difference(first, side)) for side in others)]
        yield from shown.lines(sides)
        yield f"compared: {_write(session.store.root / shown.file_name(names), shown.page(sides))}"


def _page(session: Session, facts: Facts, alone: bool) -> str:
    from buildsys.report.page import page

    return page(facts, _view(session, facts, "" if alone else INDEX))


def _view(session: Session, facts: Facts, index: str) -> View:
    from buildsys.report.view import NO_OUTLIERS, NO_PROMPTS, NO_STATISTICS, Generation, View, generations, outliers

    answered: tuple[Generation, ...] = ()
    why = NO_PROMPTS
    try:
        answers = session.answers(facts.name)
        if answers is not None:
            answered = generations(session.store.path(answers, GENERATIONS))
    except BuildError as error:  # a page without answers is better than none
        why = f"The models could not be asked: {error.what}; {error.fix}."
    statistics = {name: session.store.path(ran.output, name) for ran in facts.of_kind("calibrate") for name in ran.output.files}
    return View(
        generations=answered,
        no_generations=why,
        outliers=outliers(statistics),
        no_outliers=NO_OUTLIERS if statistics else NO_STATISTICS,
        signature=_signature(session, facts),
        catalogue=index,
        served=next((_served(session, ran) for ran in facts.of_kind("serve")), {}),
    )


def _served(session: Session, ran: Ran) -> Mapping[str, Any]:
    told: Mapping[str, Any] = json.loads(session.store.path(ran.output, "served.json").read_text(encoding="utf-8"))
    return told


def _signature(session: Session, facts: Facts) -> str:
    from buildsys.release.provenance import SIGNATURE

    link = session.store.root / facts.name
    if session.store.linked(facts.name) != facts.artifact.digest():
        return "Not released: its gates do not hold, or it was not built to its end."
    signed = (link / SIGNATURE).exists()
    return "Signed: `python -m buildsys verify --path FOLDER --key PUBLIC.pem` checks it." if signed else "Not signed."


def _write(path: Path, text: str) -> Path:
    with disk.writing(path):
        disk.write(path, text.encode())
        path.chmod(0o644)  # for others to read, whatever the temporary file was
    return path

"""Sends judged releases where their recipes say, and goes back to earlier ones. Nothing is cached: publishers look at the other side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from buildsys.driver import Session
from buildsys.errors import BuildError
from buildsys.measurement import Verdict
from buildsys.publishers import Progress, Receipt
from buildsys.slots import modules

if TYPE_CHECKING:
    from buildsys.recipe import Recipe


def publishable(session: Session, name: str) -> None:
    """Refuses a recipe that names no place to publish to, or one that cannot be, before anything is built for it."""
    recipe = session.plans[name].recipe
    if not recipe.publish.publishers:
        raise BuildError(recipe.at("publish"), f"{name} names no place to publish to", "write publish: {directory: {path: …}}")
    for _ in _places(session, name):
        pass


def publish(session: Session, name: str) -> Iterator[str]:
    """Sends the judged release; a line for each place. Raises BuildError where a declared check did not pass and is not waived."""
    session.unpublished.add(name)
    recipe = session.plans[name].recipe
    lost = [verdict for verdict in session.verdicts[name] if not _publishes(verdict, recipe)]
    if lost:
        text = "; ".join(f"{verdict.check} was {verdict.state}: {verdict.text}" for verdict in lost)
        waive = f"publish: {{waive: [{', '.join(dict.fromkeys(verdict.check for verdict in lost))}]}}"
        fix = f"run it where every declared check can run, or write {waive}"
        raise BuildError(recipe.at("verify"), f"{name} is not published: {text}", fix)
    for publisher, module, knobs, to in _places(session, name):
        receipt = _send(session, name, publisher, partial(module.publish, knobs, session.releases[name], to))
        yield f"published {name} -> {receipt.url} ({publisher}, read back, digest {receipt.digest[:16]})"
    session.unpublished.discard(name)


def rehearse(session: Session, name: str) -> list[str]:
    """What `publish` would send of what is built; nothing is sent, and nothing is built."""
    facts, recipe = session.facts(name), session.plans[name].recipe
    lost = [f"check {verdict.check} {verdict.state}: {verdict.text}" for verdict in facts.verdicts if not _publishes(verdict, recipe)]
    if lost:
        raise BuildError(recipe.at("verify"), f"{name} would not be published: {'; '.join(lost)}", f"run `doit build recipe={name}`")
    release = session.seal(facts)
    lines = []
    for publisher, module, knobs, to in _places(session, name):
        lines.append(f"{name} -> {publisher} {to}, release {release.digest[:16]}; nothing is sent:")
        with _at_recipe(session, name, publisher):
            lines += [f"  {line}" for line in module.plan(knobs, release, to)]
    return lines


def rollback(session: Session, name: str, whole: str) -> Iterator[str]:
    """Makes an earlier release, by its whole digest, the current one everywhere that the recipe publishes to; nothing is built."""
    for publisher, module, knobs, to in _places(session, name):
        receipt = _send(session, name, publisher, partial(module.rollback, knobs, whole, to))
        yield f"rolled back {name} -> {receipt.url} ({publisher}, read back, digest {receipt.digest[:16]})"


def _publishes(verdict: Verdict, recipe: Recipe) -> bool:
    """Whether a gate lets the artifact go out: it holds, or could not run here and the recipe waives that by name."""
    return verdict.state == "passed" or (verdict.state == "skipped" and verdict.check in recipe.publish.waive)


def _places(session: Session, name: str) -> Iterator[tuple[str, ModuleType, Any, Any]]:
    recipe = session.plans[name].recipe
    for publisher, knobs in recipe.publish.publishers.items():
        module = modules("publishers")[publisher]
        with _at_recipe(session, name, publisher):
            to = module.destination(knobs, recipe.folder("publish", publisher))
        yield publisher, module, knobs, to


def _send(session: Session, name: str, publisher: str, send: Callable[[Progress], Receipt]) -> Receipt:
    task = f"publish {name}"
    try:
        with _at_recipe(session, name, publisher):
            return send(partial(session.console.progress, task, task))
    finally:
        session.console.finished(task)


@contextmanager
def _at_recipe(session: Session, name: str, publisher: str) -> Iterator[None]:
    """An error of a publisher is told at the recipe's line that names the publisher."""
    try:
        yield
    except BuildError as error:
        where = session.plans[name].recipe.at("publish", publisher)
        raise BuildError(where, f"{error.where}: {error.what}", error.fix) from error

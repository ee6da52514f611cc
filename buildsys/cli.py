"""`python -m buildsys COMMAND`: the same as `doit COMMAND`, one step at a time, for those who have no doit at hand.

`python -m buildsys schema > recipes/recipe.schema.json` writes what editors read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from buildsys import __version__, actions, disk
from buildsys.console import Console
from buildsys.driver import DEVICES, Session, Settings
from buildsys.errors import BuildError
from buildsys.store import Store
from buildsys.workspace import Workspace

Command = Callable[[Session, list[str]], Iterable[str]]


def names(session: Session, _: list[str]) -> Iterator[str]:
    """every recipe"""
    for name, path in session.workspace.names().items():
        yield f"{name:<40} {actions.description(path, name, str(path.relative_to(session.workspace.root)))}"


def check(session: Session, _: list[str]) -> Iterable[str]:
    """every recipe: valid? file:line, what, fix"""
    return actions.check(session.workspace)


def schema(session: Session, _: list[str]) -> Iterable[str]:
    """JSON Schema of a recipe, for editors"""
    return [actions.schema()]


def gc(session: Session, _: list[str]) -> Iterable[str]:
    """drop from the store what no recipe needs"""
    return actions.gc(session)


def plan(session: Session, recipes: list[str]) -> Iterator[str]:
    """a recipe's steps, each cached or why it runs; nothing runs"""
    session.plan(recipes)
    for name in recipes:
        yield from actions.plan(session, name)


def why(session: Session, recipes: list[str]) -> Iterator[str]:
    """what changed since each step's last build"""
    session.plan(recipes)
    for name in recipes:
        yield from actions.reasons(session, name)


def forget(session: Session, recipes: list[str]) -> Iterator[str]:
    """make a recipe's steps run again at its next build"""
    session.plan(recipes)
    for name in recipes:
        yield from actions.forget(session, name)


def clean(session: Session, recipes: list[str]) -> Iterator[str]:
    """remove artifacts/RECIPE; its steps stay in the store"""
    for name in recipes:
        yield from actions.clean(session.store, name)


def build(session: Session, recipes: list[str]) -> Iterator[str]:
    """build, verify and link artifacts/RECIPE"""
    session.open(recipes)
    session.look()
    for name in recipes:
        for step in session.steps(name):
            if not session.ready(step):
                session.build(step)
            yield session.outcomes[step.planned_key].line(step)
        yield from session.judge(name)
        yield session.summary(name)


def publish(session: Session, recipes: list[str]) -> Iterator[str]:
    """build, then publish"""
    session.plan(recipes)
    for name in recipes:
        session.publishable(name)
    yield from build(session, recipes)
    for name in recipes:
        yield from session.publish(name)


ALL: tuple[Command, ...] = (names, check, schema, gc)
EACH: tuple[Command, ...] = (plan, build, why, forget, clean, publish)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    said = _parser().parse_args(arguments)
    console = Console()
    try:
        how = {name: value for name, value in vars(said).items() if name in ("threads", "batch", "device") and value is not None}
        session = Session(Workspace(Path.cwd()), Store(), Settings.read(how), console)
        try:
            recipes = session.workspace.find(",".join(said.recipes)) if said.command in EACH else []
            for line in said.command(session, recipes):
                console.line(line)
        finally:
            session.end()
    except BuildError as error:
        console.error(str(error))
        return 1
    except OSError as error:
        known = disk.explained(error, Path.cwd())
        if known is None:
            raise
        console.error(str(known))
        return 1
    except KeyboardInterrupt:
        console.error("interrupted: what is finished is kept, and the same command goes on from there")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="buildsys", description="the build system for quantized language models")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (*ALL, *EACH):
        name = command.__name__
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        sub.set_defaults(command=command)
        if command in EACH:
            sub.add_argument("recipes", nargs="+", metavar="RECIPE", help="a name, a glob or a path")
        if command in (build, publish):
            sub.add_argument("--threads", help="threads of a step (all processors)")
            sub.add_argument("--batch", help="sequences prefetched at a time; changes speed and memory, never a result")
            sub.add_argument("--device", help=f"one of {', '.join(DEVICES)}")
    return parser


if __name__ == "__main__":
    sys.exit(main())

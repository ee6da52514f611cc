"""`python -m buildsys COMMAND`: the same as `doit COMMAND`, one step at a time, for those who have no doit at hand.

`python -m buildsys schema > recipes/recipe.schema.json` writes what editors read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from buildsys import __version__, actions, disk, pages, publishing
from buildsys.console import Console
from buildsys.driver import DEVICES, Session, Settings
from buildsys.errors import BuildError
from buildsys.store import Store
from buildsys.workspace import Workspace

Said = Mapping[str, str]  # options of the line
Command = Callable[[Session, list[str], Said], Iterable[str]]


def names(session: Session, _: list[str], said: Said) -> Iterator[str]:
    """every recipe"""
    for name, path in session.workspace.names().items():
        yield f"{name:<40} {actions.description(path, name, str(path.relative_to(session.workspace.root)))}"


def check(session: Session, _: list[str], said: Said) -> Iterable[str]:
    """every recipe: valid? file:line, what, fix"""
    return actions.check(session.workspace)


def schema(session: Session, _: list[str], said: Said) -> Iterable[str]:
    """JSON Schema of a recipe, for editors"""
    return [actions.schema()]


def diff(session: Session, _: list[str], said: Said) -> Iterable[str]:
    """what changed since a git ref: recipes, steps that run, gates, numbers"""
    return actions.diff(session, said)


def impact(session: Session, _: list[str], said: Said) -> Iterable[str]:
    """which recipes another version of a tool, or VERSIONs that a branch moves, would touch"""
    return actions.impact(session, said)


def gc(session: Session, _: list[str], said: Said) -> Iterable[str]:
    """drop from the store what no recipe needs"""
    return actions.gc(session)


def plan(session: Session, recipes: list[str], said: Said) -> Iterator[str]:
    """a recipe's steps, each cached or why it runs; several recipes as a table; nothing runs"""
    yield from actions.plans(session, recipes, said.get("format"))


def why(session: Session, recipes: list[str], said: Said) -> Iterator[str]:
    """what changed since each step's last build"""
    session.plan(recipes)
    for name in recipes:
        yield from actions.reasons(session, name)


def forget(session: Session, recipes: list[str], said: Said) -> Iterator[str]:
    """make a recipe's steps run again at its next build"""
    session.plan(recipes)
    for name in recipes:
        yield from actions.forget(session, name)


def clean(session: Session, recipes: list[str], said: Said) -> Iterator[str]:
    """remove artifacts/RECIPE; its steps stay in the store"""
    for name in recipes:
        yield from actions.clean(session.store, name)


def build(session: Session, recipes: list[str], said: Said) -> Iterator[str]:
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


def publish(session: Session, recipes: list[str], said: Said) -> Iterator[str]:
    """build, then publish"""
    if "dry" in said and "to" in said:
        raise BuildError("--to", "does not go with --dry", "leave one of the two out")
    if "dry" in said or "to" in said:
        yield from actions.publish_without_building(session, recipes, said.get("to"))
        return
    session.plan(recipes)
    for name in recipes:
        publishing.publishable(session, name)
    yield from build(session, recipes, said)
    for name in recipes:
        yield from publishing.publish(session, name)


def report(session: Session, recipes: list[str], said: Said) -> Iterable[str]:
    """one HTML page for each recipe, and an index where there are several"""
    return pages.report(session, recipes)


def compare(session: Session, recipes: list[str], said: Said) -> Iterable[str]:
    """what is built of several recipes, side by side"""
    return pages.compare(session, recipes)


def verify(session: Session, _: list[str], said: Said) -> Iterable[str]:
    """digests, signature, statement and weights of any model folder, or of a hub's repository"""
    return actions.verify(session, said)


def reproduce(session: Session, recipes: list[str], said: Said) -> Iterable[str]:
    """build anew in a clean store, and hold each step against the lock or the last build"""
    from buildsys.reproduce import reproduce as anew

    return anew(session, recipes, said)


def lock(session: Session, recipes: list[str], said: Said) -> Iterable[str]:
    """pin what a recipe names and remember its last verified build, in RECIPE.lock beside it; --check: does it still fit?"""
    return actions.lock(session, recipes or None, said, "check" in said)


def serve(session: Session, recipes: list[str], said: Said) -> Iterable[str]:
    """run the recipe's engine with its own settings, until Ctrl-C"""
    from buildsys import live

    return live.serve(session, recipes, said)


def chat(session: Session, recipes: list[str], said: Said) -> Iterable[str]:
    """talk with the model in the terminal"""
    from buildsys import live

    return live.chat(session, recipes, said)


def bench(session: Session, recipes: list[str], said: Said) -> Iterable[str]:
    """tokens a second, time to the first token, GPU memory"""
    from buildsys import live

    return live.bench(session, recipes, said)


def web(session: Session, recipes: list[str], said: Said) -> Iterable[str]:
    """talk with the model in the browser"""
    from buildsys import live

    return live.web(session, recipes, said)


ALL: tuple[Command, ...] = (names, check, schema, gc, verify, diff, impact)
EACH: tuple[Command, ...] = (plan, build, why, forget, clean, publish, report, reproduce, compare, serve, chat, bench, web, lock)

OPTIONS: dict[str, tuple[Command, ...]] = {
    "threads": (build, publish, report, reproduce, diff),
    "batch": (build, publish, reproduce),
    "device": (build, publish, report, reproduce, diff),
    "key": (build, publish, verify),
    "dry": (publish,),
    "to": (publish,),
    "check": (lock,),
    "refresh": (lock,),
    "locked": (plan, why, build, publish),
    "path": (verify,),
    "repo": (verify,),
    "revision": (verify,),
    "port": (serve, web),
    "url": (chat, bench, web),
    "format": (plan, diff, impact),
    "upgrade": (impact,),
    "base": (diff, impact),
    "recipe": (diff,),
    "folder": (reproduce,),
    "keep": (reproduce,),
    "against": (reproduce,),
}
FLAGS = ("dry", "keep", "check", "refresh")
HELP = {
    "threads": "threads of a step (all processors)",
    "batch": "sequences prefetched at a time; changes speed and memory, never a result",
    "device": f"one of {', '.join(DEVICES)}",
    "key": "a file: the private key that signs, or the public key that signatures are checked with",
    "dry": "say what would be sent; build and send nothing",
    "to": "build nothing: go back to the earlier release of this digest",
    "check": "write nothing; fail where a lock no longer fits",
    "refresh": "ask hubs anew where branches and tags point",
    "locked": "required: refuse what is other than locked",
    "path": "a model's folder",
    "repo": "a repository of the Hugging Face hub, ORG/NAME",
    "revision": "of the repository: a branch, a tag or a commit (main)",
    "port": "where to listen, on this machine alone",
    "url": "a server that runs; else one is started",
    "format": "how to show it: text, table or json; of diff text, markdown or json",
    "upgrade": "a tool and its new version: torch==2.14.0",
    "base": "a commit, branch or tag to compare with",
    "recipe": "only these: names, globs or paths",
    "folder": "where the clean store is made; a folder that is not there yet (one under artifacts/)",
    "keep": "the clean store stays",
    "against": "another workspace's artifacts/, whose build is compared with",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    said = _parser().parse_args(arguments)
    console = Console()
    session = None
    try:
        how = {name: str(value) for name, value in vars(said).items() if name in OPTIONS and value not in (None, False)}
        for name in (name for name, value in how.items() if not value.strip()):
            raise BuildError(f"--{name}", "is empty", "give it a value, or leave it out")
        session = Session(Workspace(Path.cwd()), Store(), Settings.read(how), console)
        try:
            recipes = session.workspace.find(",".join(said.recipes)) if said.command in EACH and said.recipes else []
            for line in said.command(session, recipes, how):
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
        console.error(session.goodbye if session is not None else "interrupted")
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
            sub.add_argument("recipes", nargs="*" if command is lock else "+", metavar="RECIPE", help="a name, a glob or a path")
        for option in (option for option, commands_with_it in OPTIONS.items() if command in commands_with_it):
            sub.add_argument(f"--{option}", help=HELP[option], action="store_true" if option in FLAGS else "store")
    return parser


if __name__ == "__main__":
    sys.exit(main())

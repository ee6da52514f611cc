"""What this process was asked for: the command line by doit's rules, and what it selects. Read once.

doit does not tell task creators which command runs or what else stands on the line, so the line is read from sys.argv.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

from buildsys import early
from buildsys.console import Console
from buildsys.driver import Session, Settings
from buildsys.errors import BuildError
from buildsys.step import Step
from buildsys.store import Store
from buildsys.workspace import Workspace

TASKS = (
    *("bench", "build", "chat", "check", "compare", "diff", "gc", "impact", "lock", "plan", "publish", "report", "reproduce"),
    *("serve", "test", "verify", "web", "why"),
)
COMMANDS = frozenset({"run", "list", "info", "clean", "forget", "help", "ignore", "dumpdb", "strace", "tabcompletion", "resetdep"})
VARIABLES = {
    "recipe": ("bench", "build", "chat", "diff", "forget", "lock", "plan", "publish", "report", "reproduce", "serve", "web", "why"),
    "recipes": ("compare",),
    "threads": ("build", "diff", "plan", "publish", "report", "reproduce"),
    "batch": ("build", "publish", "report", "reproduce"),
    "device": ("build", "diff", "plan", "publish", "report", "reproduce"),
    "key": ("build", "publish", "verify"),
    "dry": ("publish",),
    "to": ("publish",),
    "refresh": ("lock",),
    "locked": ("build", "plan", "publish", "why"),
    "path": ("verify",),
    "repo": ("verify",),
    "revision": ("verify",),
    "port": ("serve", "web"),
    "url": ("bench", "chat", "web"),
    "format": ("diff", "plan", "impact"),
    "upgrade": ("impact",),
    "base": ("diff", "impact"),
    "folder": ("reproduce",),
    "keep": ("reproduce",),
    "against": ("reproduce",),
}
"""What may be said on the line, and to which tasks."""


@dataclass(frozen=True)
class Line:
    """The command line, by doit's rules: `name=value` anywhere is a variable."""

    command: str  # doit's; "run" where none is named
    words: tuple[str, ...]
    said: dict[str, str]

    @classmethod
    def read(cls, arguments: list[str]) -> Line:
        words = tuple(word for word in arguments if word[:1] not in ("", "-") and "=" not in word)
        said: dict[str, str] = {}
        for word in arguments:
            if word[:1] not in ("", "-") and "=" in word:
                name, value = word.split("=", 1)
                said[name] = f"{said[name]},{value}" if name == "recipe" and name in said else value
        return cls(next((word for word in words if word in COMMANDS), "run"), words, said)

    def names(self, task: str) -> list[str]:
        """Recipes named as `task:recipe`."""
        return [word.partition(":")[2] for word in self.words if word.startswith(f"{task}:")]

    @property
    def builds(self) -> bool:
        """Whether `recipe=` says what to build: `doit build`, `doit publish`, or plain `doit`."""
        named = [word for word in self.words if word.partition(":")[0] in TASKS]
        return self.command == "run" and not self.looks and (not named or "build" in named or "publish" in named)

    def check(self, name: str) -> None:
        """Refuses a variable that is empty, or that says nothing to the tasks of the line: to go on would be to do something else."""
        if not self.said[name].strip():
            raise BuildError(f"{name}=", "is empty", "give it a value, or leave it out")
        named = {word.partition(":")[0] for word in self.words if word.partition(":")[0] in (*TASKS, *COMMANDS)} - {"run"} or {"build"}
        if named <= set(TASKS) and not named.intersection(VARIABLES[name]):
            fix = f"leave it out; it goes with {', '.join(VARIABLES[name])}"
            raise BuildError(f"{name}=", f"says nothing to {' and '.join(sorted(named))}", fix)
        if name in ("dry", "to") and "publish" not in self.words:
            fix = f"write doit publish recipe=NAME {name}={self.said[name]}"
            raise BuildError(f"{name}=", "goes with `publish recipe=NAME` alone", fix)
        if name == "to" and self.said.get("dry", "0") != "0":
            raise BuildError("to=", "does not go with dry=1", "leave one of the two out")

    @property
    def looks(self) -> bool:
        """Whether `doit publish` is to say what it would do, or to go back to what is published already: nothing is built for that."""
        return self.said.get("dry", "0") != "0" or "to" in self.said


class Run:
    """What this process was asked for, read once."""

    def __init__(self) -> None:
        self.line = Line.read(sys.argv[1:])
        self.console = Console()
        self.workspace = Workspace(Path.cwd())
        self.store = Store()
        for name in self.line.said:
            if name not in VARIABLES:
                raise _unknown_variable(name)
            self.line.check(name)
        self.session = Session(self.workspace, self.store, Settings.read(self.line.said), self.console, begun=early.CHILD)

    def asked(self, task: str, variable: str = "recipe") -> list[str]:
        """Recipes of `recipe=`, or of `recipes=`, which has to be there."""
        spec = self.line.said.get(variable)
        if spec is None:
            names = list(self.workspace.names())
            shown = ", ".join([*names[:12], *(["…"] if len(names) > 12 else [])])
            known = f"recipes: {shown}" if names else "there is no recipe under recipes/ yet"
            example = ",".join((names or ["NAME"])[: 2 if variable == "recipes" else 1])
            raise BuildError(f"doit {task}", f"which {variable}?", f"write doit {task} {variable}={example}  ({known})")
        return self.workspace.find(spec)

    @cached_property
    def selected(self) -> list[str]:
        """Recipes that this command line builds or publishes. All are planned before the first step of any of them runs."""
        names = dict.fromkeys(self.workspace.find(",".join(found)) if (found := self._by_task()) else [])
        if self.line.builds and "recipe" in self.line.said:
            names |= dict.fromkeys(self.asked("build"))
        if names:
            self.session.open(names)
            self.session.look()
        return list(names)

    def _by_task(self) -> list[str]:
        return [*self.line.names("build"), *self.line.names("publish")] if self.line.command == "run" else []

    @cached_property
    def steps(self) -> dict[str, Step]:
        """Steps of the selected recipes by task name; recipes share equal ones."""
        return {task_name(step): step for name in self.selected for step in self.session.steps(name)}

    @cached_property
    def before(self) -> dict[str, list[str]]:
        """Tasks before each step. What runs *after* what is in no key: equal steps of two recipes may wait for different ones."""
        found: dict[str, dict[str, None]] = {}
        for name in self.selected:
            for step in self.session.steps(name):
                ahead = (*(need.step for need in step.needs), *step.after)
                found.setdefault(task_name(step), {}).update(dict.fromkeys(map(task_name, ahead)))
        return {task: list(ahead) for task, ahead in found.items()}


@cache
def invocation() -> Run:
    """The one of this process."""
    return Run()


def _unknown_variable(name: str) -> BuildError:
    from difflib import get_close_matches

    near = get_close_matches(name, VARIABLES, 1, 0.5)
    fix = f"did you mean {near[0]}=?" if near else f"the variables are {', '.join(f'{known}=' for known in VARIABLES)}"
    return BuildError(f"{name}=", "is no variable of buildsys", fix)


def task_name(step: Step) -> str:
    """What doit calls a step: equal steps of two recipes are one task."""
    return f"{step.kind}:{step.planned_key[:16]}"

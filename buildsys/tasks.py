"""The build as doit tasks: `from buildsys.tasks import *` is a whole dodo.py.

doit schedules and the store holds the truth, so doit's own database lives in memory and dies with the process. Recipes are planned here
only where this command line builds or publishes them: listing 1,000 recipes reads their names.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO

from doit.exceptions import BaseFail, TaskFailed, UnmetDependency

from buildsys import actions, disk
from buildsys.console import Console
from buildsys.driver import Session, Settings
from buildsys.errors import BuildError
from buildsys.step import Step
from buildsys.store import Store
from buildsys.workspace import Workspace

__all__ = ["DOIT_CONFIG", "task_build", "task_check", "task_gc", "task_plan", "task_publish", "task_test", "task_why"]

Task = dict[str, Any]
COMMANDS = frozenset({"run", "list", "info", "clean", "forget", "help", "ignore", "dumpdb", "strace", "tabcompletion", "resetdep"})
VARIABLES = ("recipe", "threads", "batch", "device")
PROCESS = os.getpid()


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
        tasks = {name.removeprefix("task_") for name in __all__}
        named = [word for word in self.words if word.partition(":")[0] in tasks]
        return self.command == "run" and (not named or "build" in named or "publish" in named)


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
        self.session = Session(self.workspace, self.store, Settings.read(self.line.said), self.console)

    def asked(self, task: str) -> list[str]:
        """Recipes of `recipe=`, which has to be there."""
        spec = self.line.said.get("recipe")
        if spec is None:
            names = list(self.workspace.names())
            shown = ", ".join([*names[:12], *(["…"] if len(names) > 12 else [])])
            known = f"recipes: {shown}" if names else "there is no recipe under recipes/ yet"
            raise BuildError(f"doit {task}", "which recipe?", f"write doit {task} recipe={names[0] if names else 'NAME'}  ({known})")
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
        return {_task(step): step for name in self.selected for step in self.session.steps(name)}

    @cached_property
    def before(self) -> dict[str, list[str]]:
        """Tasks before each step. What runs *after* what is in no key: equal steps of two recipes may wait for different ones."""
        found: dict[str, dict[str, None]] = {}
        for name in self.selected:
            for step in self.session.steps(name):
                ahead = (*(need.step for need in step.needs), *step.after)
                found.setdefault(_task(step), {}).update(dict.fromkeys(map(_task, ahead)))
        return {task: list(ahead) for task, ahead in found.items()}


@cache
def _run() -> Run:
    return Run()


def _unknown_variable(name: str) -> BuildError:
    from difflib import get_close_matches

    near = get_close_matches(name, VARIABLES, 1, 0.5)
    fix = f"did you mean {near[0]}=?" if near else f"the variables are {', '.join(f'{known}=' for known in VARIABLES)}"
    return BuildError(f"{name}=", "is no variable of buildsys", fix)


def _task(step: Step) -> str:
    return f"{step.kind}:{step.planned_key[:16]}"


# Task creators


def _creator(create: Callable[[], Iterator[Task]]) -> Callable[[], Iterator[Task]]:
    """Makes a mistake found while tasks are created one message and exit status 1, without a traceback."""

    def created() -> Iterator[Task]:
        try:
            tasks = list(create())
        except BuildError as error:
            _refuse(error)
        except OSError as error:
            known = disk.explained(error, Path.cwd())
            if known is None:
                raise
            _refuse(known)
        yield from tasks

    created.__doc__ = create.__doc__
    return created


def _refuse(error: BuildError) -> NoReturn:
    print(error, file=sys.stderr)
    raise SystemExit(1)


def _build_tasks() -> Iterator[Task]:
    """recipe=NAME[,NAME]: build, verify and link artifacts/NAME (NAME: a name, a glob, a path)"""
    run = _run()
    if run.line.command != "run":
        yield from _listed("build", _build_tasks.__doc__ or "")
        return
    for task, step in run.steps.items():
        ready = [(_ready, [task])]
        yield _plain(task, (_act, [_step, task]), task_dep=run.before[task], uptodate=ready, doc=f"{step.kind} {step.title}")
    for name in run.selected:
        steps = [_task(step) for step in run.session.steps(name)]
        yield _plain(f"judge:{name}", (_act, [_judge, name]), task_dep=steps)
        yield _plain(f"build:{name}", None, task_dep=[f"judge:{name}"], uptodate=[Current(name)], doc=f"build {name}")
    names = run.asked("build") if run.line.builds and "recipe" in run.line.said else []
    action = None if names else (_act, [_which, "build"])
    yield _plain("build", action, task_dep=[f"build:{name}" for name in names], doc=_build_tasks.__doc__)


def _publish_tasks() -> Iterator[Task]:
    """recipe=NAME[,NAME]: build, then publish"""
    run = _run()
    if run.line.command != "run":
        yield _plain("publish", (_act, [_which, "publish"]), doc=_publish_tasks.__doc__)
        return
    for name in run.selected:
        yield _plain(f"publish:{name}", (_act, [_publish, name]), task_dep=[f"build:{name}"], doc=f"publish {name}")
    names = run.asked("publish") if "publish" in run.line.words and "recipe" in run.line.said else []
    action = None if names else (_act, [_which, "publish"])
    yield _plain("publish", action, task_dep=[f"publish:{name}" for name in names], doc=_publish_tasks.__doc__)


def _listed(task: str, doc: str) -> Iterator[Task]:
    """For commands that run nothing: every recipe as a task, from its name alone."""
    run = _run()
    recipes = run.workspace.names()
    for name, path in recipes.items():
        at = path.relative_to(run.workspace.root)
        yield _plain(
            f"{task}:{name}",
            None,
            doc=actions.description(path, name, str(at)),
            uptodate=[Current(name)],
            clean=[(_clean, [name])],
            meta={"buildsys": str(at), "artifact": str(run.store.root / name)},
        )
    chosen = run.asked(task) if "recipe" in run.line.said else list(recipes)
    yield _plain(task, None, task_dep=[f"{task}:{name}" for name in chosen], doc=doc)


def _plan_tasks() -> Iterator[Task]:
    """recipe=NAME: its steps, each cached or why it runs; nothing runs"""
    yield _plain("plan", (_act, [_each, "plan", actions.plan]), doc=_plan_tasks.__doc__)


def _why_tasks() -> Iterator[Task]:
    """recipe=NAME: what changed since each step's last build"""
    yield _plain("why", (_act, [_each, "why", actions.reasons]), doc=_why_tasks.__doc__)


def _check_tasks() -> Iterator[Task]:
    """every recipe: valid? file:line, what, fix"""
    yield _plain("check", (_act, [_check]), doc=_check_tasks.__doc__)


def _gc_tasks() -> Iterator[Task]:
    """drop from the store what no recipe needs"""
    yield _plain("gc", (_act, [_gc]), doc=_gc_tasks.__doc__)


def _test_tasks() -> Iterator[Task]:
    """run the tests (arguments go to pytest: doit test -- -k store)"""
    yield _plain("test", _test, doc=_test_tasks.__doc__, pos_arg="arguments")


def _plain(name: str, action: Any, **more: Any) -> Task:
    return {"basename": name, "actions": None if action is None else [action], "io": {"capture": False}, "doc": "", **more}


def task_build() -> Iterator[Task]:
    return _creator(_build_tasks)()


def task_publish() -> Iterator[Task]:
    return _creator(_publish_tasks)()


def task_plan() -> Iterator[Task]:
    return _creator(_plan_tasks)()


def task_why() -> Iterator[Task]:
    return _creator(_why_tasks)()


def task_check() -> Iterator[Task]:
    return _creator(_check_tasks)()


def task_gc() -> Iterator[Task]:
    return _creator(_gc_tasks)()


def task_test() -> Iterator[Task]:
    return _creator(_test_tasks)()


# Actions


def _act(do: Callable[..., Iterable[str]], *arguments: Any) -> TaskFailed | None:
    """Shows what `do` has to say; an error that a user can mend is a failed task, anything else is doit's to catch."""
    run = _run()
    if os.getpid() != PROCESS:
        what = "cannot share what is built among its processes"
        return TaskFailed(str(BuildError("doit -P process", what, "use -P thread, the default here")))
    try:
        for line in do(run, *arguments):
            run.console.line(line)
    except BuildError as error:
        return TaskFailed(str(error))
    except OSError as error:
        known = disk.explained(error, run.store.home)
        if known is None:
            raise
        return TaskFailed(str(known))
    return None


def _ready(name: str) -> bool:
    """doit's `uptodate`: asked when the tasks before it are done. What is wrong shows again, aloud, when the step runs."""
    run = _run()
    try:
        return run.session.ready(run.steps[name])
    except (BuildError, OSError):
        return False


def _step(run: Run, task: str) -> Iterable[str]:
    step = run.steps[task]
    run.session.build(step, again=step.planned_key in run.session.outcomes)  # doit -a: the store has it
    return []


def _judge(run: Run, name: str) -> Iterable[str]:
    return run.session.judge(name)


def _publish(run: Run, name: str) -> Iterable[str]:
    return run.session.publish(name)


def _which(run: Run, task: str) -> Iterable[str]:
    run.asked(task)
    return []


def _each(run: Run, task: str, show: Callable[[Session, str], list[str]]) -> Iterator[str]:
    names = run.asked(task)
    run.session.plan(names)
    for name in names:
        yield from show(run.session, name)


def _check(run: Run) -> Iterable[str]:
    return actions.check(run.workspace)


def _gc(run: Run) -> Iterable[str]:
    return actions.gc(run.session)


def _clean(name: str, dryrun: bool) -> None:
    run = _run()
    for line in [f"would remove {run.store.root / name}"] if dryrun else actions.clean(run.store, name):
        run.console.line(line)


def _test(arguments: list[str] | None) -> TaskFailed | None:
    if find_spec("pytest") is None:
        return TaskFailed(str(BuildError("doit test", "pytest is not installed", "pip install -e '.[test]'")))
    status = subprocess.call([sys.executable, "-m", "pytest", *(arguments or [])])
    return TaskFailed(f"tests failed (pytest's exit status is {status})") if status else None


def forget(names: list[str], everything: bool) -> int:
    """`doit forget`, for the recipes that the line names; returns the exit status."""
    run = _run()
    try:
        chosen = list(run.workspace.names()) if everything else names or run.asked("forget")
        run.session.plan(chosen)
        for name in chosen:
            for line in actions.forget(run.session, name):
                run.console.line(line)
    except BuildError as error:
        _refuse(error)
    return 0


class Current:
    """doit's `uptodate` of a recipe: whether artifacts/<recipe> is what the recipe says, judged. As text: why not."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._why = "not looked at"

    def __call__(self) -> bool:
        run = _run()
        session = run.session
        try:
            session.plan([self._name])
            found = session.store.walk(session.steps(self._name))
            self._why = "\n".join(actions.plan(session, self._name))
        except BuildError as error:
            _refuse(error)
        artifact = found[session.plans[self._name].artifact.planned_key].artifact
        complete = all(one.artifact is not None for one in found.values())
        return complete and artifact is not None and session.store.linked(self._name) == artifact.digest()

    def __repr__(self) -> str:
        return self._why


# Reporting


class Reporter:
    """One line for each step, errors as they come, one line for each recipe at the end."""

    desc = "one line for each step (buildsys)"

    def __init__(self, outstream: TextIO, options: dict[str, Any]) -> None:
        self._run = _run()
        if outstream is not sys.stdout:
            self._run.console.redirect(outstream)
        self._errors: list[str] = []

    def initialize(self, tasks: dict[str, Any], selected_tasks: list[str]) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _interrupted)

    def get_status(self, task: Any) -> None:
        pass

    def execute_task(self, task: Any) -> None:
        pass

    def skip_ignore(self, task: Any) -> None:
        pass

    def teardown_task(self, task: Any) -> None:
        pass

    def skip_uptodate(self, task: Any) -> None:
        self._outcome(task)

    def add_success(self, task: Any) -> None:
        self._outcome(task)

    def _outcome(self, task: Any) -> None:
        step = self._run.steps.get(task.name) if self._run.line.command == "run" else None
        if step is not None:
            self._run.console.line(self._run.session.outcomes[step.planned_key].line(step))

    def add_failure(self, task: Any, fail: BaseFail) -> None:
        step = self._run.steps.get(task.name)
        name = f"{step.kind:<9} {step.title}" if step is not None else task.name
        if isinstance(fail, UnmetDependency):
            self._run.console.line(f"skipped {name}: something that it needs failed")
        elif fail.traceback:
            self._run.console.error(_internal(self._run.store, name, fail))
        else:
            if step is not None:
                self._run.console.line(f"failed  {name}")
            self._run.console.error(fail.message)

    def cleanup_error(self, exception: BaseFail) -> None:
        self._run.console.error(exception.get_msg())

    def runtime_error(self, message: str) -> None:
        self._errors.append(message)

    def complete_run(self) -> None:
        for message in self._errors:
            self._run.console.error(message)
        for name in self._run.session.plans if self._run.line.builds or self._run.selected else ():
            self._run.console.line(self._run.session.summary(name))
        self._run.session.end()


def _internal(store: Store, name: str, fail: BaseFail) -> str:
    """An error that nobody foresaw: its traceback goes to a file, for whoever mends it."""
    last = "".join(fail.traceback).strip().rpartition("\n")[2]
    log = store.home / "logs" / f"internal-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        disk.write(log, "".join(fail.traceback).encode())
    except OSError as error:
        return f"{name}  internal error: {last}\n    fix: {_REPORT} (its traceback is lost: {error.strerror})"
    return f"{name}  internal error: {last}\n    fix: {_REPORT} with {log}"


_REPORT = "this is a bug in buildsys, please report it"


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)
    run = _run()
    run.session.end()
    run.console.error("interrupted: what is finished is kept, and the same command goes on from there")
    raise SystemExit(128 + number)


DOIT_CONFIG = {
    "default_tasks": ["build"],
    "reporter": Reporter,
    "par_type": "thread",  # heavy steps are processes anyway
    "backend": "sqlite3",
    "dep_file": ":memory:",
}

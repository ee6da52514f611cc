"""The build as doit tasks: `from buildsys.tasks import *` is a whole dodo.py.

doit schedules and the store holds the truth, so doit's own database lives in memory and dies with the process. Recipes are planned here
only where this command line builds or publishes them: listing 1,000 recipes reads their names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from buildsys import early  # noqa: F401  first of all: it begins what can begin while the rest is imported

# isort: split
from doit.exceptions import TaskFailed

from buildsys import actions, disk, pages, publishing
from buildsys.driver import Session
from buildsys.errors import BuildError
from buildsys.invocation import Run, invocation, task_name
from buildsys.reporter import Reporter

__all__ = [
    "DOIT_CONFIG",
    "task_bench",
    "task_build",
    "task_chat",
    "task_check",
    "task_compare",
    "task_diff",
    "task_gc",
    "task_impact",
    "task_lock",
    "task_plan",
    "task_publish",
    "task_report",
    "task_reproduce",
    "task_serve",
    "task_test",
    "task_verify",
    "task_web",
    "task_why",
]

Task = dict[str, Any]
PROCESS = os.getpid()


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
    run = invocation()
    if run.line.command != "run":
        yield from _listed("build", _build_tasks.__doc__ or "")
        return
    for task, step in run.steps.items():
        ready = [(_ready, [task])]
        yield _plain(task, (_act, [_step, task]), task_dep=run.before[task], uptodate=ready, doc=f"{step.kind} {step.title}")
    for name in run.selected:
        steps = [task_name(step) for step in run.session.steps(name)]
        yield _plain(f"judge:{name}", (_act, [_judge, name]), task_dep=steps)
        yield _plain(f"build:{name}", None, task_dep=[f"judge:{name}"], uptodate=[Current(name)], doc=f"build {name}")
    names = run.asked("build") if run.line.builds and "recipe" in run.line.said else []
    action = None if names else (_act, [_which, "build"])
    yield _plain("build", action, task_dep=[f"build:{name}" for name in names], doc=_build_tasks.__doc__)


def _publish_tasks() -> Iterator[Task]:
    """recipe=NAME[,NAME]: build, then publish; dry=1 says what would be sent, to=DIGEST goes back to an earlier release"""
    run = invocation()
    if "publish" in run.line.words and run.line.looks:
        yield _plain("publish", (_act, [_look_or_go_back]), doc=_publish_tasks.__doc__)
        return
    if run.line.command != "run":
        yield _plain("publish", (_act, [_which, "publish"]), doc=_publish_tasks.__doc__)
        return
    names = run.asked("publish") if "publish" in run.line.words and "recipe" in run.line.said else []
    selected = run.selected
    for name in {*names, *run.line.names("publish")}.intersection(selected):
        publishing.publishable(run.session, name)
    for name in selected:
        yield _plain(f"publish:{name}", (_act, [_publish, name]), task_dep=[f"build:{name}"], doc=f"publish {name}")
    action = None if names else (_act, [_which, "publish"])
    yield _plain("publish", action, task_dep=[f"publish:{name}" for name in names], doc=_publish_tasks.__doc__)


def _listed(task: str, doc: str) -> Iterator[Task]:
    """For commands that run nothing: every recipe as a task, from its name alone."""
    run = invocation()
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


def _report_tasks() -> Iterator[Task]:
    """recipe=NAME[,NAME]: one HTML page for each, and an index where there are several"""
    yield _plain("report", (_act, [_report]), doc=_report_tasks.__doc__)


def _compare_tasks() -> Iterator[Task]:
    """recipes=NAME,NAME: what is built, side by side: quality, paired where it can be, size, time, memory"""
    yield _plain("compare", (_act, [_compare]), doc=_compare_tasks.__doc__)


def _verify_tasks() -> Iterator[Task]:
    """path=DIR or repo=ORG/NAME [key=PUBLIC.pem]: digests, signature, statement and weights of any model folder"""
    yield _plain("verify", (_act, [_verify]), doc=_verify_tasks.__doc__)


def _serve_tasks() -> Iterator[Task]:
    """recipe=NAME [port=N]: run its engine with its own settings, until Ctrl-C"""
    yield _plain("serve", (_act, [_serve]), doc=_serve_tasks.__doc__)


def _chat_tasks() -> Iterator[Task]:
    """recipe=NAME [url=http://HOST:PORT]: talk with the model in the terminal"""
    yield _plain("chat", (_act, [_chat]), doc=_chat_tasks.__doc__)


def _bench_tasks() -> Iterator[Task]:
    """recipe=NAME [url=http://HOST:PORT]: tokens a second, time to the first token, GPU memory"""
    yield _plain("bench", (_act, [_bench]), doc=_bench_tasks.__doc__)


def _web_tasks() -> Iterator[Task]:
    """recipe=NAME [url=http://HOST:PORT] [port=N]: talk with the model in the browser"""
    yield _plain("web", (_act, [_web]), doc=_web_tasks.__doc__)


def _plan_tasks() -> Iterator[Task]:
    """recipe=NAME[,NAME] [format=text|table|json]: steps, each cached or why it runs; several recipes as a table; nothing runs"""
    yield _plain("plan", (_act, [_plan]), doc=_plan_tasks.__doc__)


def _impact_tasks() -> Iterator[Task]:
    """upgrade=TOOL==VERSION or base=REF: which recipes that touches, and what verifying or building them again takes"""
    yield _plain("impact", (_act, [_impact]), doc=_impact_tasks.__doc__)


def _why_tasks() -> Iterator[Task]:
    """recipe=NAME: what changed since each step's last build"""
    yield _plain("why", (_act, [_each, "why", actions.reasons]), doc=_why_tasks.__doc__)


def _reproduce_tasks() -> Iterator[Task]:
    """recipe=NAME: build it anew in a clean store, and hold each step against its lock or its last build"""
    yield _plain("reproduce", (_act, [_reproduce]), doc=_reproduce_tasks.__doc__)


def _lock_tasks() -> Iterator[Task]:
    """recipe=NAME [refresh=1]: pin what it names, with its last verified build, in NAME.lock; --check: does every lock still fit?"""
    check = {"name": "check", "long": "check", "type": bool, "default": False, "help": "write nothing; fail where a lock no longer fits"}
    yield _plain("lock", _lock_or_check, doc=_lock_tasks.__doc__, params=[check])


def _check_tasks() -> Iterator[Task]:
    """every recipe: valid? file:line, what, fix"""
    yield _plain("check", (_act, [_check]), doc=_check_tasks.__doc__)


def _diff_tasks() -> Iterator[Task]:
    """base=REF [recipe=NAME] [format=text|markdown|json]: what changed since REF: recipes, steps that run, gates, numbers"""
    yield _plain("diff", (_act, [_diff]), doc=_diff_tasks.__doc__)


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


def task_impact() -> Iterator[Task]:
    return _creator(_impact_tasks)()


def task_why() -> Iterator[Task]:
    return _creator(_why_tasks)()


def task_reproduce() -> Iterator[Task]:
    return _creator(_reproduce_tasks)()


def task_check() -> Iterator[Task]:
    return _creator(_check_tasks)()


def task_diff() -> Iterator[Task]:
    return _creator(_diff_tasks)()


def task_lock() -> Iterator[Task]:
    return _creator(_lock_tasks)()


def task_gc() -> Iterator[Task]:
    return _creator(_gc_tasks)()


def task_report() -> Iterator[Task]:
    return _creator(_report_tasks)()


def task_compare() -> Iterator[Task]:
    return _creator(_compare_tasks)()


def task_verify() -> Iterator[Task]:
    return _creator(_verify_tasks)()


def task_serve() -> Iterator[Task]:
    return _creator(_serve_tasks)()


def task_chat() -> Iterator[Task]:
    return _creator(_chat_tasks)()


def task_bench() -> Iterator[Task]:
    return _creator(_bench_tasks)()


def task_web() -> Iterator[Task]:
    return _creator(_web_tasks)()


def task_test() -> Iterator[Task]:
    return _creator(_test_tasks)()


# Actions


def _act(do: Callable[..., Iterable[str]], *arguments: Any) -> TaskFailed | None:
    """Shows what `do` has to say; an error that a user can mend is a failed task, anything else is doit's to catch."""
    run = invocation()
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
    run = invocation()
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
    return publishing.publish(run.session, name)


def _look_or_go_back(run: Run) -> Iterator[str]:
    names = run.asked("publish")
    yield from actions.publish_without_building(run.session, names, run.line.said.get("to"))


def _report(run: Run) -> Iterable[str]:
    return pages.report(run.session, run.asked("report"))


def _compare(run: Run) -> Iterable[str]:
    return pages.compare(run.session, run.asked("compare", "recipes"))


def _verify(run: Run) -> Iterable[str]:
    return actions.verify(run.session, run.line.said)


def _which(run: Run, task: str) -> Iterable[str]:
    run.asked(task)
    return []


def _plan(run: Run) -> Iterable[str]:
    return actions.plans(run.session, run.asked("plan"), run.line.said.get("format"))


def _impact(run: Run) -> Iterable[str]:
    return actions.impact(run.session, run.line.said)


def _each(run: Run, task: str, show: Callable[[Session, str], list[str]]) -> Iterator[str]:
    names = run.asked(task)
    run.session.plan(names)
    for name in names:
        yield from show(run.session, name)


def _reproduce(run: Run) -> Iterable[str]:
    from buildsys.reproduce import reproduce

    return reproduce(run.session, run.asked("reproduce"), run.line.said)


def _serve(run: Run) -> Iterable[str]:
    from buildsys import live  # here and below: HTTP and JSON clients that no build needs

    return _alone(run, "serve", live.serve)


def _chat(run: Run) -> Iterable[str]:
    from buildsys import live

    return _alone(run, "chat", live.chat)


def _bench(run: Run) -> Iterable[str]:
    from buildsys import live

    return _alone(run, "bench", live.bench)


def _web(run: Run) -> Iterable[str]:
    from buildsys import live

    return _alone(run, "web", live.web)


def _alone(run: Run, task: str, do: Callable[[Session, list[str], Mapping[str, str]], list[str]]) -> list[str]:
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C reaches the main thread, and a terminal is one person's
        raise BuildError(f"doit -n {task}", "runs alone", "leave -n away")
    return do(run.session, run.asked(task), run.line.said)


def _lock_or_check(check: bool) -> TaskFailed | None:
    return _act(_lock, check)


def _lock(run: Run, check: bool) -> Iterable[str]:
    names = None if check and "recipe" not in run.line.said else run.asked("lock")
    return actions.lock(run.session, names, run.line.said, check)


def _check(run: Run) -> Iterable[str]:
    return actions.check(run.workspace)


def _diff(run: Run) -> Iterable[str]:
    return actions.diff(run.session, run.line.said)


def _gc(run: Run) -> Iterable[str]:
    return actions.gc(run.session)


def _clean(name: str, dryrun: bool) -> None:
    run = invocation()
    for line in [f"would remove {run.store.root / name}"] if dryrun else actions.clean(run.store, name):
        run.console.line(line)


def _test(arguments: list[str] | None) -> TaskFailed | None:
    if find_spec("pytest") is None:
        return TaskFailed(str(BuildError("doit test", "pytest is not installed", "pip install -e '.[test]'")))
    status = subprocess.call([sys.executable, "-m", "pytest", *(arguments or [])])
    return TaskFailed(f"tests failed (pytest's exit status is {status})") if status else None


def forget(names: list[str], everything: bool) -> int:
    """`doit forget`, for the recipes that the line names; returns the exit status."""
    run = invocation()
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
        run = invocation()
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


DOIT_CONFIG = {
    "default_tasks": ["build"],
    "reporter": Reporter,
    "par_type": "thread",  # heavy steps are processes anyway
    "backend": "sqlite3",
    "dep_file": ":memory:",
}

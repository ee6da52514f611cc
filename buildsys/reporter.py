"""What a run shows under doit: one line for each step, errors as they come, one line for each recipe at the end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any, NoReturn, TextIO

from doit.exceptions import BaseFail, UnmetDependency

from buildsys import disk
from buildsys.invocation import invocation
from buildsys.store import Store


class Reporter:
    """One line for each step, errors as they come, one line for each recipe at the end."""

    desc = "one line for each step (buildsys)"

    def __init__(self, outstream: TextIO, options: dict[str, Any]) -> None:
        self._run = invocation()
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
    run = invocation()
    run.session.end()
    run.console.error(run.session.goodbye)
    raise SystemExit(128 + number)

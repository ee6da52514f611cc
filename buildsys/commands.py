"""doit's own commands where its defaults would mislead: `forget`, `ignore`, and a line with an empty argument.

doit finds them by entry point, in every project of this environment, so each hands over to doit's own where the tasks are not ours.
"""

from __future__ import annotations

import sys
from typing import Any

from doit.cmd_base import DodoTaskLoader, check_tasks_exist
from doit.cmd_forget import Forget as DoitForget
from doit.cmd_ignore import Ignore as DoitIgnore
from doit.exceptions import InvalidCommand


def _recipes(command: Any) -> dict[str, Any] | None:
    """Our tasks by name; None where the tasks are somebody else's."""
    tasks = {task.name: task for task in command.task_list}
    return tasks if any(task.meta and "buildsys" in task.meta for task in command.task_list) else None


class Forget(DoitForget):  # type: ignore[misc]
    """`doit forget recipe=NAME`, `doit forget build:NAME`: the store is what remembers, so it is what forgets."""

    doc_purpose = "make a recipe's steps run again at its next build"

    def _execute(self, forget_sub: bool, forget_disable_default: bool, forget_all: bool) -> int:
        tasks = _recipes(self)
        if tasks is None:
            return super()._execute(forget_sub, forget_disable_default, forget_all) or 0
        from buildsys import tasks as ours

        check_tasks_exist(tasks, self.sel_tasks)
        return ours.forget([name.partition(":")[2] for name in self.sel_tasks if name.startswith("build:")], forget_all)


class Ignore(DoitIgnore):  # type: ignore[misc]
    """Steps of a build cannot be left out, and doit's list of ignored tasks would not be kept."""

    def _execute(self, pos_args: list[str]) -> int:
        if _recipes(self) is None:
            return super()._execute(pos_args) or 0
        raise InvalidCommand("buildsys leaves no step out of a build: take the check out of the recipe, or name other recipes")


class Loader(DodoTaskLoader):  # type: ignore[misc]
    """doit's own loader, which first refuses what makes doit 0.37 end in a traceback before it reads a dodo.py: `doit build ""`."""

    def __init__(self) -> None:
        super().__init__()
        if "" in sys.argv[1:]:
            print('doit  has an empty argument ("") on its line\n    fix: take it out, or write recipe=NAME', file=sys.stderr)
            raise SystemExit(1)

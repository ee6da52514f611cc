"""Prints what a workflow goes on with, as outputs of a step: `builds`, and `publishes`, those of them that say where to.

Each is a list of {file, recipes} for a matrix: variants of one file share steps and a lock, so one job builds them. RECIPES names them as
`recipe=` does; where it is empty they are those that DIFF, a file of `doit diff format=json`, calls new or changed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from buildsys.errors import BuildError
from buildsys.workspace import Workspace


def main() -> int:
    workspace = Workspace(Path.cwd())
    try:
        asked = os.environ.get("RECIPES", "").strip()
        names = workspace.find(asked) if asked else _changed(Path(os.environ["DIFF"]), workspace)
        publishable = [name for name in names if workspace.load(name).publish.publishers]
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"builds={json.dumps(_by_file(names))}")
    print(f"publishes={json.dumps(_by_file(publishable))}")
    return 0


def _changed(diff: Path, workspace: Workspace) -> list[str]:
    """Of the names that the difference touches those that are still there: what was deleted cannot be built."""
    touched = {change["name"] for change in json.loads(diff.read_text())["changes"]}
    return [name for name in workspace.names() if name in touched]


def _by_file(names: list[str]) -> list[dict[str, str]]:
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(name.partition("@")[0], []).append(name)
    return [{"file": file, "recipes": ",".join(several)} for file, several in files.items()]


if __name__ == "__main__":
    sys.exit(main())

"""A build system over toy steps, for tests of what runs steps: `toy.install()` in a dodo.py, or `python toy.py COMMAND`.

A toy recipe is JSON: {"steps": {name: {"kind", "knobs", "needs": {role: name}, "after": [name], "heavy", "computes", "engine"}},
"artifact": name, "measures": {check: name}, "limits": {check: largest bytes}, "publish": {"directory": path}}.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pydantic import create_model

from buildsys import effort, workspace
from buildsys.errors import BuildError
from buildsys.measurement import Verdict
from buildsys.publishers import directory
from buildsys.step import Need, Request, Step

Progress = Callable[[str, int, int], None]
DODO = "import toy\ntoy.install()\nfrom buildsys.tasks import *\n"


def run(request: Request, progress: Progress) -> dict[str, Any]:
    """A step that does what its knobs say, and leaves a mark of having run in $TOY_MARKS."""
    knobs = request.knobs
    if "TOY_MARKS" in os.environ:
        with Path(os.environ["TOY_MARKS"]).open("a") as marks:
            marks.write(f"{knobs['name']}\n")
    if (request.stage / ".resumed").exists():
        print("goes on from where it was killed")
    (request.stage / ".resumed").touch()
    began = time.monotonic()
    while time.monotonic() - began < knobs.get("sleep_s", 0):
        progress("sleep", int(10 * (time.monotonic() - began)), int(10 * knobs["sleep_s"]))
        time.sleep(0.02)
    while "until" in knobs and not Path(knobs["until"]).exists() and time.monotonic() - began < 60:
        time.sleep(0.02)
    FAULTS[knobs.get("fault", "none")]()
    read = [path.read_text() for role in sorted(request.inputs) for path in request.read(role).files.values()]
    for name in knobs.get("files", ["out.txt"]):
        now = time.time_ns() if knobs.get("clocked") else ""
        (request.stage / name).write_text(f"{now}{knobs.get('text', '')}({' '.join(read)})")
    return {"threads": request.resources.threads}


def _spin() -> None:
    sum(range(10**10))  # one call in C that lets no other thread run


def _full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere/block.safetensors")


def _error() -> None:
    raise BuildError("toy.yaml:3", "toys do not float", "get a boat")


def _bug() -> None:
    raise ValueError("a toy broke")


FAULTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "spin": _spin,
    "full": _full,
    "error": _error,
    "bug": _bug,
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "grow": lambda: bytearray(os.urandom(1 << 20) * 256).clear(),
    "memory": lambda: (_ for _ in ()).throw(MemoryError("no more")),
}


class Workspace(workspace.Workspace):
    def load(self, name: str) -> Any:
        path = self.names()[name]
        try:
            graph = json.loads(path.read_text())
        except ValueError as error:
            raise BuildError(f"recipes/{path.name}:1", f"is no JSON: {error}", "write JSON") from None
        checks = {check: create_model("Knobs", max_bytes=(int, limit))() for check, limit in graph.get("limits", {}).items()}
        at = lambda *where: f"recipes/{path.name}:1"  # noqa: E731
        publish = SimpleNamespace(waive=(), publishers={name: directory.Knobs(path=to) for name, to in graph.get("publish", {}).items()})
        folder = lambda *where: self.root  # noqa: E731
        return SimpleNamespace(
            name=name, file=path, locked=None, graph=graph, at=at, folder=folder, verify=SimpleNamespace(checks=checks), publish=publish
        )


def plan(recipe: Any, store: Any, *more: Any) -> Any:
    graph = recipe.graph
    made: dict[str, Step] = {}
    for name, said in graph["steps"].items():
        knobs = {"name": name, **said.get("knobs", {})}
        if "reads" in said:
            knobs["sha256"] = store.sha256(Path(said["reads"]))
        needs = tuple(Need(role, made[other]) for role, other in said.get("needs", {}).items())
        after = tuple(made[other] for other in said.get("after", []))
        clocked = tuple(knobs.get("files", ["out.txt"])) if knobs.get("clocked") else ()
        heavy, version = said.get("heavy", False), said.get("version", 1)
        uses = {use: said.get(use, False) for use in ("computes", "engine")}
        made[name] = Step(said.get("kind", "make"), name, version, knobs, needs, after, heavy, clocked=clocked, resumes=True, **uses)
    measures = tuple((check, made[name]) for check, name in graph.get("measures", {}).items())
    artifact = made[graph["artifact"]]
    return SimpleNamespace(
        name=recipe.name,
        recipe=recipe,
        artifact=artifact,
        measures=measures,
        generated=None,
        building=effort.Building({}, {}, 0, 0),
        serving=None,
        notes=("toys",),
        skipped={},
    )


def judge(made: Any, store: Any) -> tuple[Verdict, ...]:
    verdicts = []
    for check, step in made.measures:
        found = store.walk(step.walk())[step.planned_key].artifact
        limit = made.recipe.graph["limits"][check]
        state = "passed" if found.size <= limit else "failed"
        verdicts.append(Verdict(check, state, f"size is {found.size} bytes, the limit is max {limit}", made.recipe.at()))
    return tuple(verdicts)


def gather(made: Any, store: Any, verdicts: tuple[Verdict, ...]) -> Any:
    """What sealing needs to know of a toy: its files, and its name."""
    artifact = store.walk(made.artifact.walk())[made.artifact.planned_key].artifact
    return SimpleNamespace(plan=made, name=made.name, artifact=artifact, verdicts=verdicts)


def install() -> None:
    """Makes buildsys build toys in this process and its children."""
    import buildsys.deployment
    import buildsys.plan
    import buildsys.release.facts
    import buildsys.release.seal
    import buildsys.verdict
    from buildsys import cli, driver, invocation

    buildsys.plan.plan = plan  # type: ignore[assignment]
    buildsys.deployment.needs_engine = lambda recipe: False
    buildsys.verdict.judge = judge
    buildsys.release.facts.gather = gather
    buildsys.release.seal.card = lambda facts: f"# {facts.name}\n"
    buildsys.release.seal.documents = lambda facts, files, sizes: {"provenance/statement.json": json.dumps(files, sort_keys=True).encode()}
    for module in (invocation, cli):
        module.Workspace = Workspace  # type: ignore[attr-defined]
        module.Session = partial(driver.Session, steps="toy")  # type: ignore[attr-defined]


if __name__ == "__main__":
    install()
    from buildsys.cli import main

    sys.exit(main())

"""The workflow files as data, and what GitHub's runner does with the `run:` steps of a composite action: environment, outputs, conditions.

GitHub Docs, "Metadata syntax for GitHub Actions" (runs for composite actions) and "Workflow commands" (GITHUB_OUTPUT, GITHUB_STEP_SUMMARY).
Expressions are read as far as these files use them in actions: a name, `==`, `!=`, `&&` and strings; anything else fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ACTIONS = ROOT / ".github" / "actions"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FILES = [*WORKFLOWS, *sorted(ACTIONS.glob("*/action.yml"))]
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


def read(path: Path) -> dict[str, Any]:
    said = yaml.load(path.read_text(), yaml.BaseLoader)  # `on` stays a word
    assert isinstance(said, dict)
    return said


def jobs(document: Mapping[str, Any]) -> dict[str, Any]:
    """A workflow's jobs; an action is one job without a name."""
    return dict(document["jobs"]) if "jobs" in document else {"": document["runs"]}


def steps(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for job in jobs(document).values():
        yield from job["steps"]


@dataclass
class Runner:
    """One job on a machine: what a composite action does in `workspace`."""

    workspace: Path
    temp: Path
    environment: Mapping[str, str]
    event: Mapping[str, str] = field(default_factory=dict)  # what stands for github.event.… in an expression
    summary: str = ""
    log: str = ""

    def run(self, action: str, instead: Mapping[str, str] | None = None, **inputs: str) -> tuple[int, dict[str, str]]:
        """The exit status of the action and its outputs. `instead`: by a step's name, what to run in the place of its own."""
        document = read(ACTIONS / action / "action.yml")
        known = {"github.token": self.environment.get("GITHUB_TOKEN", ""), **self.event}
        given = {name: self._text(one.get("default", ""), known) for name, one in document["inputs"].items()}
        given |= {name.replace("_", "-"): value for name, value in inputs.items()}
        known |= {f"inputs.{name}": value for name, value in given.items()}
        failed = 0
        for step in document["runs"]["steps"]:
            if "run" not in step or failed or not self._holds(step.get("if", "success"), known):
                continue
            status, outputs = self._step(action, (instead or {}).get(step.get("name", ""), step["run"]), step, known)
            known |= {f"steps.{step.get('id', '')}.outputs.{name}": value for name, value in outputs.items()}
            failed = failed or status
        return failed, {name: self._text(one["value"], known) for name, one in document.get("outputs", {}).items()}

    def _step(self, action: str, body: str, step: Mapping[str, Any], known: Mapping[str, str]) -> tuple[int, dict[str, str]]:
        files = {name: self.temp / f"_{name}" for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        for file in files.values():
            file.write_text("")
        environment = {
            **self.environment,
            **{name: str(file) for name, file in files.items()},
            "RUNNER_TEMP": str(self.temp),
            "GITHUB_ACTION_PATH": str(ACTIONS / action),
            **{name: self._text(value, known) for name, value in step.get("env", {}).items()},
        }
        where = self.workspace / self._text(step.get("working-directory", "."), known)
        # As GitHub starts `shell: bash`.
        line = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", body]
        ran = subprocess.run(line, cwd=where, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240)
        self.log += ran.stdout
        self.summary += files["GITHUB_STEP_SUMMARY"].read_text()
        return ran.returncode, dict(line.split("=", 1) for line in files["GITHUB_OUTPUT"].read_text().splitlines())

    def _text(self, value: str, known: Mapping[str, str]) -> str:
        return EXPRESSION.sub(lambda found: known[found[1]] if found[1] in known else self._absent(found[1]), value)

    @staticmethod
    def _absent(name: str) -> str:
        assert re.fullmatch(r"(steps\.[\w-]+\.outputs|github\.event)\.[\w.-]+", name), f"this runner knows no {name}"
        return ""  # as GitHub: an output that was not written is empty

    def _holds(self, condition: str, known: Mapping[str, str]) -> bool:
        if condition == "success":
            return True
        for part in condition.split(" && "):
            found = re.fullmatch(r"([\w.-]+) (==|!=) '([^']*)'", part)
            assert found, f"this runner cannot read {part}"
            if (self._text(f"${{{{ {found[1]} }}}}", known) == found[3]) != (found[2] == "=="):
                return False
        return True


def environment(venv: Path, requirements: Path) -> Path:
    """A virtual environment with what pip would install for `requirements`, no more, taken from the tests' own Python; and buildsys."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(venv), "platbase": str(venv)}))
    for name in closure(requirements):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if not file.parts[0].startswith("..")} - {"__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    (site / "buildsys").symlink_to(ROOT / "buildsys")
    own = metadata.distribution("buildsys")
    (site / "buildsys-0.dist-info").mkdir()
    for name in ("METADATA", "entry_points.txt"):
        (site / "buildsys-0.dist-info" / name).write_text(own.read_text(name) or "")
    doit = venv / "bin" / "doit"
    doit.write_text(f"#!{venv}/bin/python\nimport sys\nfrom doit.__main__ import main\nsys.exit(main())\n")
    doit.chmod(0o755)
    return venv


def closure(requirements: Path) -> set[str]:
    """Names of the distributions that these requirements bring, on this machine."""
    found: set[str] = set()
    ahead = [Requirement(line) for text in requirements.read_text().splitlines() if (line := text.partition("#")[0].strip())]
    while ahead:
        one = ahead.pop()
        if one.name.lower() in found:
            continue
        found.add(one.name.lower())
        for said in metadata.requires(one.name) or ():
            more = Requirement(said)
            if more.marker is None or any(more.marker.evaluate({"extra": extra}) for extra in (one.extras or {""})):
                ahead.append(more)
    return found


def clean() -> dict[str, str]:
    """The tests' environment without what would tell Python where else to look."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "GIT_", "GITHUB_", "RUNNER_"))}

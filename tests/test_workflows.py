"""The workflow files are what GitHub reads, and safe: schema, zizmor's, ShellCheck's and actionlint's rules, and our own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import workflows
from workflows import ACTIONS, FILES, ROOT, WORKFLOWS

PROGRAMS = Path(sys.executable).parent  # where pip put them
ACTIONLINT = os.environ.get("BUILDSYS_ACTIONLINT")  # .ci/actionlint prints it
PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")
BAD = """\
on: pull_request_target
jobs:
  a:
    runs-on: ubuntu-latest
    steps:
      - uses: actions/checkout@v7
        with:
          ref: ${{ github.event.pull_request.head.sha }}
      - run: echo "${{ github.event.pull_request.title }}"
        env:
          TOKEN: ${{ secrets.HF_TOKEN }}
"""


def program(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    found = PROGRAMS / name
    assert found.exists(), f"{name} is not installed; run: pip install -e '.[test]'"
    return subprocess.run([str(found), *arguments], cwd=ROOT, text=True, capture_output=True, timeout=120)


def schema(kind: str, *files: Path) -> subprocess.CompletedProcess[str]:
    return program("check-jsonschema", "--builtin-schema", f"vendor.github-{kind}", *map(str, files))


def test_github_reads_them() -> None:
    for kind, files in (("workflows", WORKFLOWS), ("actions", FILES[len(WORKFLOWS) :])):
        said = schema(kind, *files)
        assert files and said.returncode == 0, said.stdout + said.stderr


def test_zizmor_finds_nothing() -> None:
    said = program("zizmor", "--offline", "--no-progress", "--format", "plain", ".github")
    assert said.returncode == 0 and "No findings" in said.stdout, said.stdout + said.stderr


def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    bodies = [step["run"] for path in FILES for step in workflows.steps(workflows.read(path)) if "run" in step]
    for number, body in enumerate(bodies):
        (tmp_path / f"{number}.sh").write_text(f"#!/usr/bin/env bash\nset -eo pipefail\n{body}\n")
    said = program("shellcheck", *map(str, tmp_path.iterdir()))
    assert bodies and said.returncode == 0, said.stdout


def test_actionlint_finds_nothing() -> None:
    if ACTIONLINT is None:
        if "actionlint" in os.environ.get("BUILDSYS_TEST_REQUIRE", ""):
            pytest.fail("BUILDSYS_TEST_REQUIRE names actionlint; run: export BUILDSYS_ACTIONLINT=$(.ci/actionlint)")
        pytest.skip("no actionlint: BUILDSYS_ACTIONLINT=$(.ci/actionlint) names one")
    said = subprocess.run([ACTIONLINT, ".github/workflows/*.yml"], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert said.returncode == 0, said.stdout + said.stderr


def test_they_would_find_something(tmp_path: Path) -> None:
    folder = tmp_path / ".github" / "workflows"
    folder.mkdir(parents=True)
    (folder / "bad.yml").write_text(BAD)
    (folder / "worse.yml").write_text(BAD.replace("runs-on: ubuntu-latest", "runs: ubuntu-latest"))
    assert schema("workflows", folder / "bad.yml").returncode == 0 and schema("workflows", folder / "worse.yml").returncode == 1
    said = program("zizmor", "--offline", "--no-progress", "--format", "plain", str(folder / "bad.yml"))
    assert said.returncode != 0
    assert all(rule in said.stdout for rule in ("dangerous-triggers", "template-injection", "unpinned-uses", "excessive-permissions"))
    (tmp_path / "a.sh").write_text("#!/usr/bin/env bash\nrm -rf $1\n")
    assert program("shellcheck", str(tmp_path / "a.sh")).returncode == 1
    assert sorted(name for name, rule in RULES.items() if list(rule(folder / "bad.yml"))) == sorted(RULES)


# Our own rules


def unpinned(path: Path) -> Iterator[str]:
    """Actions are pinned by commit, and the version stands beside it."""
    for line in path.read_text().splitlines():
        used = re.match(r"\s*(?:- )?uses: (.*)", line)
        if used and not used[1].startswith("./") and PINNED.fullmatch(used[1]) is None:
            yield line.strip()


def pasted(path: Path) -> Iterator[str]:
    """What GitHub knows comes to a script through its environment, never pasted into it."""
    yield from (step["run"] for step in workflows.steps(workflows.read(path)) if "${{" in step.get("run", ""))


def untold(path: Path) -> Iterator[str]:
    """Secrets are in the job `publish` alone, in the step that publishes, behind an environment; nothing is inherited."""
    document = workflows.read(path)
    for name, job in workflows.jobs(document).items():
        for place, said in (("env", job.get("env")), ("with", job.get("with")), ("secrets", job.get("secrets"))):
            if "secrets." in str(said) or said == "inherit":
                yield f"{name} {place}"
        for step in job.get("steps", ()):
            named = name == "publish" and step.get("name") == "Publish" and job.get("environment") == "publish"
            if "secrets." in str(step) and not named:
                yield f"{name} {step}"
    if "secrets." in str({key: value for key, value in document.items() if key != "jobs"}):
        yield "outside of the jobs"


def dangerous(path: Path) -> Iterator[str]:
    """Nothing runs for a pull request with rights of the base."""
    on = workflows.read(path).get("on", {})
    yield from sorted({"pull_request_target", "workflow_run"}.intersection([on] if isinstance(on, str) else on))


def credentials(path: Path) -> Iterator[str]:
    """No checkout leaves a token behind, and no job that may write checks out what a pull request brings."""
    document = workflows.read(path)
    for name, job in workflows.jobs(document).items():
        writes = "write" in str(job.get("permissions", ""))
        for step in (step for step in job.get("steps", ()) if step.get("uses", "").startswith("actions/checkout@")):
            said: dict[str, Any] = step.get("with", {})
            if said.get("persist-credentials") != "false":
                yield f"{name} keeps its token"
            if writes and said.get("ref", "") not in TRUSTED:
                yield f"{name} may write, and checks out {said.get('ref', 'what the event says')}"


def permitted(path: Path) -> Iterator[str]:
    """A job says what it may; without that it could do what the repository lets it."""
    document = workflows.read(path)
    if "jobs" in document:
        yield from (name for name, job in document["jobs"].items() if "permissions" not in job)
        if document.get("permissions") != {}:
            yield "permissions: {} is missing"


TRUSTED = ("${{ github.event.pull_request.base.sha }}", "${{ github.event.pull_request.base.sha || github.sha }}")
RULES = {rule.__name__: rule for rule in (unpinned, pasted, untold, dangerous, credentials, permitted)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT / ".github")))
@pytest.mark.parametrize("rule", RULES)
def test_our_rules(rule: str, path: Path) -> None:
    assert list(RULES[rule](path)) == []


def test_only_what_nobody_else_can_start_publishes() -> None:
    publish = workflows.read(ROOT / ".github/workflows/recipes.yml")["jobs"]["publish"]
    assert "github.event_name == 'push' && github.ref == 'refs/heads/main'" in publish["if"]
    assert publish["environment"] == "publish" and publish["permissions"] == {"contents": "read"}


def test_every_action_of_ours_is_there_and_gets_what_it_takes() -> None:
    for path in FILES:
        for step in workflows.steps(workflows.read(path)):
            if step.get("uses", "").startswith("./"):
                action = workflows.read(ROOT / step["uses"] / "action.yml")["inputs"]
                assert step.get("with", {}).keys() <= action.keys(), step
                assert {name for name, one in action.items() if one.get("required") == "true"} <= step.get("with", {}).keys(), step


def test_scripts_of_actions_need_no_installation() -> None:
    """comment.py and gate.py run with the runner's own Python, before anything of a pull request is there."""
    for path in (ACTIONS / "comment" / "comment.py", ACTIONS / "gate" / "gate.py"):
        said = subprocess.run([sys.executable, "-I", "-S", "-c", f"import runpy; runpy.run_path({str(path)!r}, run_name='read')"])
        assert said.returncode == 0
    assert shutil.which("bash")

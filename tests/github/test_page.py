"""docs/review.md is so: the edit is applied and the commands are run in a clone, in the page's order; the workflow that it shows is one.

Numbers and digests differ from machine to machine, so they are compared as `#`; a line `...` stands for any others.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import runs
import yaml
from test_workflows import schema, unpinned
from workflows import ACTIONS, ROOT, WORKFLOWS, clean, read

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "review.md").read_text()
BLOCK = re.compile(r"^```(diff|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DIGEST = re.compile(r"\b[0-9a-f]{12,}\b")
PLACE = re.compile(r"file:///\S+|(?<=, built on )[^,]*")
NUMBER = re.compile(r"\d[\d.,]*")


def like(line: str) -> str:
    return " ".join(NUMBER.sub("#", DIGEST.sub("#", PLACE.sub("#", line))).split()).replace("# kB", "# B").replace("# MB", "# B")


def holds(shown: list[str], said: list[str]) -> bool:
    """Whether what was said is what is shown."""
    if not shown:
        return not said
    if shown[0] == "...":
        return any(holds(shown[1:], said[start:]) for start in range(len(said) + 1))
    return bool(said) and shown[0] == said[0] and holds(shown[1:], said[1:])


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, demo: tuple[Path, runs.Ran]) -> Path:
    """`main` with the demo, built and locked; and a branch."""
    built, _ = demo
    root = runs.copy(built, tmp_path_factory.mktemp("page") / "clone")
    runs.doit(root, "lock", "recipe=demo").fine()
    (root / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    for words in (["init", "--quiet", "--initial-branch=main"], ["add", "--all"], ["commit", "--quiet", "--message", "main"]):
        git(root, *words)
    git(root, "switch", "--quiet", "--create", "kv8")
    return root


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *words], cwd=root, env=clean(), check=True)


def test_the_worked_pull_request(clone: Path, tmp_path: Path) -> None:
    done = 0
    for kind, text in BLOCK.findall(PAGE):
        if kind == "diff":
            (tmp_path / "edit.patch").write_text(text)
            git(clone, "apply", "--unidiff-zero", str(tmp_path / "edit.patch"))
            git(clone, "commit", "--all", "--quiet", "--message", "Eight bits for keys and values")
            continue
        command, *shown = text.splitlines()
        assert command.startswith("$ doit ")
        ran = runs.doit(clone, *command.split()[2:]).fine()
        said = [
            line for line in map(like, ran.out.splitlines()) if line and not line.startswith("... ")
        ]  # a slow machine tells how far it is
        assert holds([like(line) for line in shown if line], said), f"{command} says\n{ran.out}"
        done += 1
    assert done >= 4


def test_a_line_that_is_not_said_fails() -> None:
    assert holds(["a", "...", "c"], ["a", "b", "c"]) and holds(["..."], []) and not holds(["a", "...", "d"], ["a", "b", "c"])
    assert not holds(["a"], ["a", "b"]) and like("built 4 of 16 in 3.9 s") == like("built 12 of 1 in  10 s")


def test_the_workflow_for_other_repositories_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "shown.yml").write_text(text)
    said = schema("workflows", tmp_path / "shown.yml")
    assert said.returncode == 0, said.stdout
    assert list(unpinned(tmp_path / "shown.yml")) == ["- uses: OWNER/buildsys/.github/actions/review@COMMIT"]
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert job["steps"][1]["with"].keys() <= read(ACTIONS / "review" / "action.yml")["inputs"].keys()


def test_the_table_of_jobs_is_that_of_the_workflow() -> None:
    shown = re.findall(r"^\| (`.*?`) \|", PAGE, re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(shown)) == list(read(WORKFLOWS[0])["jobs"])
    variables = re.findall(r"(?:vars|secrets)\.(\w+)", WORKFLOWS[0].read_text())
    assert [name for name in variables if f"`{name}`" not in PAGE] == []

"""Who may start builds, of which commit: the gate's script on events as GitHub writes them, against a server that speaks its API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from githubserver import REPOSITORY, GitHub, serving
from workflows import Runner, clean

pytestmark = pytest.mark.slow

HEAD, BASE, OLD = "1a2b3c4d" * 5, "b" * 40, "9" * 40


def pull(repository: str | None = REPOSITORY) -> dict[str, Any]:
    head = {"sha": HEAD, "repo": None if repository is None else {"full_name": repository}}
    return {"number": 7, "head": head, "base": {"sha": BASE}}


@pytest.fixture
def github() -> Iterator[GitHub]:
    with serving() as found:
        found.permissions = {"writer": "write", "owner": "admin", "reader": "read", "robot%5Bbot%5D": "write"}
        found.pulls = {"7": pull()}
        yield found


def gate(github: GitHub, folder: Path, name: str, event: dict[str, Any], recipes: str = "") -> tuple[dict[str, str], str]:
    (folder / "event.json").write_text(json.dumps(event))
    about = {"GITHUB_EVENT_NAME": name, "GITHUB_EVENT_PATH": str(folder / "event.json"), "GITHUB_SHA": HEAD}
    runner = Runner(folder, folder, clean() | github.environment() | about)
    status, outputs = runner.run("gate", token="secret-token", recipes=recipes)
    assert status == 0 and "secret-token" not in runner.log, runner.log
    told = Path(outputs["file"]).read_text() if outputs["file"] else ""
    assert outputs["go"] in ("true", "false") and (outputs["go"] == "true" or outputs["sha"] == "")
    return outputs, told


def said(body: str, who: str = "writer", on: str = "pull_request") -> dict[str, Any]:
    return {"comment": {"body": body, "user": {"login": who}}, "issue": {"number": 7, on: {}}}


@pytest.mark.parametrize(
    ("body", "recipes"),
    [
        ("/build", ""),
        ("/build demo", "demo"),
        ("  /build llama*,qwen@g64  \r\nplease", "llama*,qwen@g64"),
        (f"/build {HEAD[:9]}", ""),
        (f"/build demo {HEAD}", "demo"),
    ],
)
def test_who_may_write_builds_by_a_comment(github: GitHub, tmp_path: Path, body: str, recipes: str) -> None:
    for who in ("writer", "owner", "robot[bot]"):
        outputs, told = gate(github, tmp_path, "issue_comment", said(body, who))
        assert outputs == outputs | {"go": "true", "sha": HEAD, "base": BASE, "recipes": recipes, "number": "7"}
        assert HEAD[:12] in told and who in told and "/actions/runs/42" in told


@pytest.mark.parametrize("who", ["reader", "stranger", "../../writer"])
@pytest.mark.parametrize("body", ["/build", f"/build {HEAD}", "/build $(rm)"])
def test_nobody_else_does_and_gets_no_answer(github: GitHub, tmp_path: Path, who: str, body: str) -> None:
    outputs, told = gate(github, tmp_path, "issue_comment", said(body, who))
    assert outputs["go"] == "false" and told == ""


@pytest.mark.parametrize(
    "body", ["/build ; rm -rf /", "/build $(id)", "/build a b c", "/build `id`", '/build "x', f"/build demo {HEAD}0", "/build a=b"]
)
def test_what_is_no_name_never_gets_further(github: GitHub, tmp_path: Path, body: str) -> None:
    outputs, told = gate(github, tmp_path, "issue_comment", said(body))
    assert outputs["go"] == "false" and outputs["recipes"] == "" and told.startswith("Not built: write `/build`")


@pytest.mark.parametrize("event", [said("/build", on="assignee"), said("/builder"), said("see /build"), said("")])
def test_other_comments_start_nothing(github: GitHub, tmp_path: Path, event: dict[str, Any]) -> None:
    outputs, told = gate(github, tmp_path, "issue_comment", event)
    assert outputs["go"] == "false" and told == "" and github.asked == []


@pytest.mark.parametrize("repository", ["somebody/models", None])
def test_a_fork_is_built_at_the_commit_that_was_read(github: GitHub, tmp_path: Path, repository: str | None) -> None:
    github.pulls = {"7": pull(repository)}
    outputs, told = gate(github, tmp_path, "issue_comment", said("/build"))
    assert outputs["go"] == "false" and f"write `/build {HEAD}`" in told
    outputs, told = gate(github, tmp_path, "issue_comment", said(f"/build {OLD}"))
    assert outputs["go"] == "false" and f"{OLD[:12]} is no longer the last commit, {HEAD[:12]} is" in told
    assert gate(github, tmp_path, "issue_comment", said(f"/build {HEAD}"))[0]["go"] == "true"


def test_a_label_is_worth_as_much_as_who_gave_it(github: GitHub, tmp_path: Path) -> None:
    event = {"sender": {"login": "writer"}, "pull_request": pull()}
    outputs, _ = gate(github, tmp_path, "pull_request", event)
    assert outputs == outputs | {"go": "true", "sha": HEAD, "base": BASE, "recipes": "", "number": "7"}
    assert gate(github, tmp_path, "pull_request", event | {"sender": {"login": "reader"}})[0]["go"] == "false"


def test_pushes_and_runs_by_hand(github: GitHub, tmp_path: Path) -> None:
    outputs, _ = gate(github, tmp_path, "push", {"before": BASE, "after": HEAD})
    assert outputs == outputs | {"go": "true", "sha": HEAD, "base": BASE, "number": "", "file": ""}
    assert gate(github, tmp_path, "push", {"before": "0" * 40, "after": HEAD})[0]["base"] == f"{HEAD}~1"
    outputs, _ = gate(github, tmp_path, "workflow_dispatch", {}, "llama*")
    assert outputs == outputs | {"go": "true", "sha": HEAD, "recipes": "llama*"}
    assert gate(github, tmp_path, "workflow_dispatch", {}, "a\nsha=0")[0]["go"] == "false"
    assert gate(github, tmp_path, "schedule", {})[0]["go"] == "false"

"""The comment on a pull request: one for each topic, updated and never doubled, against a server that speaks GitHub's API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from githubserver import BOT, GitHub, serving
from workflows import Runner, clean

pytestmark = pytest.mark.slow

MARKER = "<!-- buildsys: review -->\n"


@pytest.fixture
def github() -> Iterator[GitHub]:
    with serving() as found:
        yield found


def comment(
    github: GitHub, folder: Path, text: str, status: int = 0, number: str = "7", topic: str = "review", token: str = "secret-token"
) -> str:
    (folder / "text.md").write_text(text)
    runner = Runner(folder, folder, clean() | github.environment())
    ended, _ = runner.run("comment", file=str(folder / "text.md"), topic=topic, number=number, token=token)
    assert ended == status, runner.log
    assert "Traceback" not in runner.log and "secret-token" not in runner.log
    return runner.log


def test_the_first_is_written_and_the_next_update_it(github: GitHub, tmp_path: Path) -> None:
    comment(github, tmp_path, "one\n")
    comment(github, tmp_path, "two\n")
    comment(github, tmp_path, "two\n")
    assert [(one["id"], one["body"]) for one in github.comments] == [(100, f"{MARKER}two\n")]
    assert [method for method, _ in github.asked if method != "GET"] == ["POST", "PATCH"], "what is there already is not written again"


def test_topics_have_comments_of_their_own(github: GitHub, tmp_path: Path) -> None:
    comment(github, tmp_path, "a")
    comment(github, tmp_path, "b", topic="build")
    comment(github, tmp_path, "c", topic="review of models --> x")
    assert [one["body"].partition("\n")[0] for one in github.comments] == [
        MARKER.strip(),
        "<!-- buildsys: build -->",
        "<!-- buildsys: review of models  x -->",
    ]


def test_it_is_found_among_many_and_by_who_wrote_it(github: GitHub, tmp_path: Path) -> None:
    for number in range(250):
        github.comment("reader", f"{MARKER}I am not the bot {number}")
    github.comment(BOT, f"about {MARKER}")
    github.comment(BOT, MARKER.replace("\n", "\r\n") + "as GitHub's page would save it")
    comment(github, tmp_path, "new")
    assert len(github.comments) == 252 and github.comments[-1]["body"] == f"{MARKER}new\n"
    assert all("I am not the bot" in one["body"] for one in github.comments[:250])


def test_a_fork_cannot_comment_and_does_not_fail(github: GitHub, tmp_path: Path) -> None:
    github.refuses = 403
    assert "::warning::this token may not comment" in comment(github, tmp_path, "one")
    assert github.comments == []


def test_what_is_too_long_leads_to_the_summary(github: GitHub, tmp_path: Path) -> None:
    comment(github, tmp_path, "é" * (65_536 - len(MARKER) - 1))
    assert len(github.comments[0]["body"]) == 65_536
    comment(github, tmp_path, "é" * 65_536)
    assert "65,536 characters" in github.comments[0]["body"]
    assert "(https://github.example/team/models/actions/runs/42)" in github.comments[0]["body"]


def test_what_cannot_be_written_says_so(github: GitHub, tmp_path: Path) -> None:
    assert "there is no pull request to comment on" in comment(github, tmp_path, "one", status=1, number="")
    assert "answers 404" in comment(github, tmp_path, "one", status=1, number="8")
    assert "answers 401" in comment(github, tmp_path, "one", status=1, token="another")
    github.address = "http://127.0.0.1:1"
    assert "cannot be reached" in comment(github, tmp_path, "one", status=1)

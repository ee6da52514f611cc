"""Publishing to the Hugging Face hub, by its real client to a hub on this machine: one commit or none, and never at another's expense."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hubserver import READER, WRITER, HubServer
from huggingface_hub import HfApi, set_client_factory
from huggingface_hub.utils._http import default_client_factory
from publishers.places import described, release
from pydantic import ValidationError

from buildsys.errors import BuildError
from buildsys.hubs import hub_errors, hub_state, hub_write
from buildsys.hubs.silent import silent
from buildsys.publishers import Receipt, Release
from buildsys.publishers.hf_hub import Knobs, destination, plan, publish, rollback, verify

REPO = "my-org/tiny-4bit"
KNOBS = Knobs(repo=REPO)
TO = f"the page of {REPO}"


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home", WRITER)
        for module in (hub_errors, hub_state):
            monkeypatch.setattr(module, "WAITS_S", (0.0, 0.0, 0.0))
        yield server


@pytest.fixture
def one(tmp_path: Path) -> Release:
    return release(tmp_path / "one", "a", gone="soon")


@pytest.fixture
def two(tmp_path: Path) -> Release:
    return release(tmp_path / "two", "b", notes="new")


def send(made: Release, **knobs: Any) -> Receipt:
    return publish(Knobs(repo=REPO, **knobs), made, TO, quiet)


def names(hub: HubServer, revision: str = "main") -> set[str]:
    return set(hub.repo("model", REPO).commit(revision).files)


def head(hub: HubServer, ref: str = "refs/heads/main") -> str:
    return hub.repo("model", REPO).refs[ref]


def test_one_commit_and_a_tag(hub: HubServer, one: Release) -> None:
    receipt = send(one)
    repo = hub.repo("model", REPO)
    assert receipt == Receipt(f"{hub.url}/{REPO}/tree/{one.tag}", one.digest) and repo.private
    assert names(hub) == {*one.files, ".gitattributes"} and len(repo.history("main")) == 2
    assert repo.refs[f"refs/tags/{one.tag}"] == head(hub) and repo.commit("main").title == f"Publish tiny {one.tag}"
    assert all(repo.commit("main").files[name].sha256 == sha for name, sha in one.files.items())


def test_unchanged_content_sends_nothing(hub: HubServer, one: Release) -> None:
    first = send(one)
    hub.log.clear()
    assert send(one) == first and verify(KNOBS, one, TO, quiet) == first and not hub.changes


def test_stale_files_go_with_the_same_commit(hub: HubServer, one: Release, two: Release) -> None:
    send(one)
    before = head(hub)
    send(two)
    repo = hub.repo("model", REPO)
    assert names(hub) == {*two.files, ".gitattributes"} and repo.commit("main").parent == before
    assert names(hub, one.tag) == {*one.files, ".gitattributes"}, "the earlier release can still be had"


def test_what_is_to_be_kept_stays(hub: HubServer, one: Release, two: Release) -> None:
    send(one)
    hub.add("model", REPO, {"plots/a.png": b"1"})
    assert "delete plots/a.png" in plan(KNOBS, two, TO)
    send(two, keep=("plots/*",))
    assert "plots/a.png" in names(hub) and verify(Knobs(repo=REPO, keep=("plots/*",)), two, TO, quiet)
    with pytest.raises(BuildError, match=r"plots/a\.png was not published"):
        verify(KNOBS, two, TO, quiet)
    rollback(Knobs(repo=REPO, keep=("plots/*",)), one.digest, TO, quiet)
    assert "plots/a.png" in names(hub)
    with pytest.raises(BuildError, match=r"keep covers config\.json"):
        send(one, keep=("*.json",))


def test_a_dry_run_only_looks(hub: HubServer, one: Release, two: Release) -> None:
    lines = plan(KNOBS, one, TO)
    assert lines[0].startswith(f"make the private repository {REPO}") and "add model.safetensors (0.0 MiB)" in lines
    send(one)
    assert plan(KNOBS, one, TO)[0].endswith("already holds these 4 files; read them back, send nothing")
    hub.log.clear()
    assert plan(KNOBS, two, TO) == (
        "one commit on main:",
        "replace config.json (0.0 MiB)",
        "replace model.safetensors (0.0 MiB)",
        "add notes (0.0 MiB)",
        "delete gone",
        f"tag it {two.tag}",
    )
    assert {one.method for one in hub.log} <= {"GET", "HEAD"}


def test_large_files_go_first_in_parts_and_only_once(hub: HubServer, one: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.part_bytes = 2000
    monkeypatch.setattr(hub_write, "LARGE_BYTES", 4000)
    told: list[tuple[str, int, int]] = []
    hub.fail("/commit/main", status=500)
    with pytest.raises(BuildError, match="answers 500"):
        publish(KNOBS, one, TO, lambda *said: told.append(said))
    total = sum(one.sizes.values())
    assert [done for what, done, _ in told if what == "upload"] == [0, total - 5000, total] and told[0][2] == total
    assert len(hub.requests("", "PUT")) == 3 and names(hub) == {".gitattributes"}, "main is untouched"
    send(one)
    assert len(hub.requests("", "PUT")) == 3, "what had arrived is not sent again"


def test_an_answer_that_gets_lost_makes_no_second_commit(hub: HubServer, one: Release) -> None:
    hub.fail("/commit/main", cut=True)
    with pytest.raises(BuildError, match="cannot be reached"):
        send(one)
    send(one)
    assert len(hub.repo("model", REPO).history("main")) == 2 and len(hub.requests("/commit/", "POST")) == 1


def test_another_commit_that_touches_nothing_of_ours(hub: HubServer, one: Release, two: Release) -> None:
    send(one)
    hub.fail("/commit/main", act=lambda: hub.add("model", REPO, {"plots/a.png": b"1"}))
    send(two, keep=("plots/*",))
    assert names(hub) == {*two.files, ".gitattributes", "plots/a.png"}


def test_another_commit_that_touches_ours_is_not_overwritten(hub: HubServer, one: Release, two: Release) -> None:
    send(one)
    hub.fail("/commit/main", act=lambda: hub.add("model", REPO, {"config.json": b"mine"}, title="My own"))
    with pytest.raises(BuildError, match=r"someone committed \w{12} \(My own\) meanwhile, which changes config\.json") as caught:
        send(two)
    assert "run the same command again" in caught.value.fix and hub.repo("model", REPO).commit("main").title == "My own"
    send(two)
    assert verify(KNOBS, two, TO, quiet)


def test_two_publish_the_same_at_once(hub: HubServer, one: Release, two: Release) -> None:
    send(one)
    hub.fail("/commit/main", act=lambda: send(two))
    send(two)
    assert len(hub.repo("model", REPO).history("main")) == 3


def test_somebody_who_never_ends_committing(hub: HubServer, one: Release) -> None:
    hub.fail("/commit/main", times=9, act=lambda: hub.add("model", REPO, {"log.txt": b"%d" % len(hub.log)}))
    with pytest.raises(BuildError, match="others committed there 3 times"):
        send(one, keep=("log.txt",))


def test_a_pull_request_is_opened_once(hub: HubServer, one: Release, two: Release) -> None:
    send(one)
    before = head(hub)
    proposing = Knobs(repo=REPO, pull_request=True)
    assert plan(proposing, two, TO)[0] == "a pull request for main:"
    receipt = publish(proposing, two, TO, quiet)
    assert receipt == Receipt(f"{hub.url}/{REPO}/discussions/1", two.digest) and head(hub) == before
    hub.log.clear()
    assert publish(proposing, two, TO, quiet) == receipt == verify(proposing, two, TO, quiet) and not hub.changes
    hub.add("model", REPO, {"config.json": b"broken"}, branch="refs/pr/1")
    with pytest.raises(BuildError, match=r"config\.json has sha256"):
        verify(proposing, two, TO, quiet)
    assert publish(proposing, two, TO, quiet) == receipt and len(hub.repo("model", REPO).discussions) == 1
    HfApi(endpoint=hub.url, token=WRITER).merge_pull_request(REPO, 1)
    assert publish(proposing, two, TO, quiet) == Receipt(f"{hub.url}/{REPO}/tree/main", two.digest)
    assert verify(KNOBS, two, TO, quiet) and rollback(KNOBS, one.tag, TO, quiet) and rollback(KNOBS, two.digest[:8], TO, quiet)


def test_who_may_only_read_may_propose(hub: HubServer, one: Release, two: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    send(one)
    hub.repo("model", REPO).private = False
    monkeypatch.setenv("HF_TOKEN", READER)
    assert send(two, pull_request=True).url.endswith("/discussions/1")


def test_a_tag_elsewhere_with_equal_content_stays(hub: HubServer, one: Release) -> None:
    send(one)
    at = hub.repo("model", REPO).refs[f"refs/tags/{one.tag}"]
    hub.add("model", REPO, {"config.json": b"other"})
    send(one)
    assert hub.repo("model", REPO).refs[f"refs/tags/{one.tag}"] == at != head(hub)


def test_a_tag_that_stands_for_something_else_is_refused(hub: HubServer, one: Release, two: Release) -> None:
    send(one)
    before = head(hub)
    hub.repo("model", REPO).tag(two.tag, "main")
    for act in (lambda: plan(KNOBS, two, TO), lambda: send(two)):
        with pytest.raises(BuildError, match=rf"the tag {two.tag} is at {before[:12]}, where config\.json, .* differs") as caught:
            act()
    assert caught.value.fix == f"run `hf repos tag delete {REPO} {two.tag}`, then publish again" and head(hub) == before


def test_a_model_that_no_publish_brought_is_not_replaced(hub: HubServer, one: Release) -> None:
    hub.add("model", REPO, {"README.md": b"hi", "model.safetensors": b"precious"})
    before = head(hub)
    for act in (lambda: plan(KNOBS, one, TO), lambda: send(one)):
        with pytest.raises(BuildError, match=r"holds model\.safetensors, and no release of ours") as caught:
            act()
    assert "replace: true" in caught.value.fix and head(hub) == before
    send(one, replace=True)
    assert names(hub) == set(one.files)


def test_another_branch_begins_empty(hub: HubServer, one: Release, two: Release) -> None:
    send(one)
    assert plan(Knobs(repo=REPO, branch="next"), two, TO)[0] == "make the branch next"
    send(two, branch="next")
    assert names(hub, "next") == {*two.files, ".gitattributes"} and names(hub) == {*one.files, ".gitattributes"}
    assert destination(Knobs(repo=REPO, branch="next"), Path()) == f"{hub.url}/{REPO}/tree/next"


def test_a_rollback_sends_no_large_file_and_rewrites_no_history(hub: HubServer, one: Release, two: Release) -> None:
    first, _ = send(one), send(two)
    before = head(hub)
    hub.log.clear()
    assert rollback(KNOBS, one.digest, TO, quiet) == first
    assert not hub.requests("", "PUT") and hub.repo("model", REPO).commit("main").parent == before
    assert hub.repo("model", REPO).commit("main").title == f"Roll back to {one.tag}" and names(hub) == {*one.files, ".gitattributes"}


def test_a_rollback_finds_a_release_whose_tag_is_gone(hub: HubServer, one: Release, two: Release) -> None:
    first, _ = send(one), send(two)
    del hub.repo("model", REPO).refs[f"refs/tags/{one.tag}"]
    assert rollback(KNOBS, one.digest, TO, quiet) == first and f"refs/tags/{one.tag}" in hub.repo("model", REPO).refs


def test_a_rollback_to_a_release_that_was_altered(hub: HubServer, one: Release, two: Release) -> None:
    send(one), send(two)
    hub.repo("model", REPO).refs[f"refs/tags/{one.tag}"] = hub.add("model", REPO, {"config.json": b"evil"}, branch="other")
    with pytest.raises(BuildError, match=rf"{one.tag} has the digest \w{{64}}, not {one.digest}: it was altered"):
        rollback(KNOBS, one.digest, TO, quiet)
    assert verify(KNOBS, two, TO, quiet), "main is untouched"


def test_what_the_hub_gives_is_read_and_not_only_what_it_says(hub: HubServer, one: Release) -> None:
    send(one)
    hub.repo("model", REPO).stored[one.files["model.safetensors"]] = b"rotten"
    with pytest.raises(BuildError, match=rf"model\.safetensors has sha256 \w{{12}}, not {one.files['model.safetensors'][:12]}"):
        verify(KNOBS, one, TO, quiet)
    assert verify(Knobs(repo=REPO, read_back="listing"), one, TO, quiet)


def test_reading_back_survives_a_bad_line(hub: HubServer, one: Release) -> None:
    send(one)
    hub.fail(f"^/model/{REPO}/", "GET", cut=True)
    hub.fail("/resolve/.*/config.json", "GET", status=503, times=2)
    told: list[tuple[int, int]] = []
    verify(KNOBS, one, TO, lambda what, done, total: told.append((done, total)))
    assert any("range" in asked.headers for asked in hub.requests(f"^/model/{REPO}/", "GET"))
    assert told[-1] == (sum(one.sizes.values()),) * 2
    hub.fail("/resolve/.*/config.json", "GET", status=503, times=9)
    with pytest.raises(BuildError, match="answers 503"):
        verify(KNOBS, one, TO, quiet)


def test_a_gitignore_there_leaves_nothing_out(hub: HubServer, one: Release) -> None:
    hub.add("model", REPO, {".gitignore": b"*.safetensors\n"})
    send(one, replace=True, keep=(".gitignore",))
    assert "model.safetensors" in names(hub)


def test_a_file_that_changed_since_it_was_built(hub: HubServer, one: Release) -> None:
    (one.tree / "model.safetensors").write_text("b" * 5000)
    with pytest.raises(BuildError, match=rf"has sha256 \w{{64}}, not {one.files['model.safetensors']} as when it was built"):
        send(one)
    assert names(hub) == {".gitattributes"}


def test_a_card_that_the_hub_does_not_take(hub: HubServer, one: Release, tmp_path: Path) -> None:
    (one.tree / "README.md").write_text("---\na: [\n---\n# Hi\n")
    with pytest.raises(BuildError, match="does not take the model card: Invalid metadata") as caught:
        send(described(one.tree))
    assert "metadata" in caught.value.fix and names(hub) == {".gitattributes"}


WHO = {
    "": "wants to know who writes, and there is no token",
    READER: "does not let this machine's token write",
    "hf_wrong": "accept the token",
}


@pytest.mark.parametrize("token", WHO)
def test_who_may_not_write_is_told_how_to(token: str, hub: HubServer, one: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("model", REPO, {"README.md": b"hi"})
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BuildError, match=WHO[token]) as caught:
        send(one)
    assert "`hf auth login`" in caught.value.fix and names(hub) == {"README.md"}
    assert not token or token not in str(caught.value)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("token", WHO)
def test_a_dry_run_refuses_who_may_not_write(
    token: str, there: bool, hub: HubServer, one: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    if there:
        hub.add("model", REPO, {"README.md": b"hi"})
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(BuildError, match=WHO[token]) as caught:
        plan(KNOBS, one, TO)
    assert "`hf auth login`" in caught.value.fix and not hub.changes


def test_a_dry_run_where_the_hub_does_not_tell_who_one_is(hub: HubServer, one: Release) -> None:
    hub.fail("/whoami", status=404)
    assert plan(KNOBS, one, TO)[0].startswith("make the private repository")
    hub.fail("/whoami", body=b'{"auth": {}}')
    assert plan(KNOBS, one, TO)[0].startswith("make the private repository")
    hub.fail("/whoami", body=b"<html>")
    with pytest.raises(BuildError, match="no hub's answer"):
        plan(KNOBS, one, TO)


def test_a_hub_that_answers_again_can_be_published_to(hub: HubServer, one: Release) -> None:
    """Planning, hours ago, found nobody there."""
    silent()[hub.url] = "cannot be reached", "wait"
    assert send(one) and verify(KNOBS, one, TO, quiet)


def test_the_client_logs_no_address(hub: HubServer, one: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would tell the address of each request that it repeats, and some are signed."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    client, said = logging.getLogger("huggingface_hub"), list[str]()
    client.setLevel(logging.WARNING)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    client.addHandler(handler)
    hub.fail("^/model/", "PUT", status=503)
    try:
        send(one)
    finally:
        client.removeHandler(handler)
    assert len(hub.requests("^/model/", "PUT")) == 2 and not said


def test_somebody_elses_namespace(hub: HubServer, one: Release) -> None:
    with pytest.raises(BuildError, match="You don't have the rights to create a model under the namespace") as caught:
        publish(Knobs(repo="others/tiny"), one, TO, quiet)
    assert "it needs the right to write to others" in caught.value.fix


FAULTS = [{"status": 500, "times": 9}, {"status": 404}, {"body": b"<html>", "times": 9}, {"body": b"{}"}, {"cut": True, "times": 9}]
STAGES = [
    "/refs$",
    "/repos/create",
    "/tree/",
    "/preupload/",
    "/objects/batch",
    "^/model/",
    "/api/verify/",
    "/commit/",
    "/tag/",
    "/resolve/",
]


@pytest.mark.parametrize("how", FAULTS, ids=str)
@pytest.mark.parametrize("path", STAGES)
def test_every_failure_says_what_to_do_and_tells_no_secret(
    path: str, how: dict[str, Any], hub: HubServer, one: Release, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail(path, **how)
    try:
        send(one)
    except BuildError as error:
        assert error.fix and WRITER not in str(error) and "Traceback" not in str(error)
        hub.faults.clear()
        send(one)
    assert verify(KNOBS, one, TO, quiet) and WRITER not in "".join(capfd.readouterr())


def test_a_hub_that_never_answers(hub: HubServer, one: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_state, "LIMIT_S", 0.3)
    set_client_factory(default_client_factory)  # a session that is there already has the limit of before
    hub.fail("/commit/main", wait_s=2)
    try:
        with pytest.raises(BuildError, match="said nothing for") as caught:
            send(one)
        assert "check the network" in caught.value.fix
    finally:
        set_client_factory(default_client_factory)


def test_no_network(hub: HubServer, one: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(BuildError, match="HF_HUB_OFFLINE forbids"):
            send(one)
    hub.stop()
    for act in (lambda: plan(KNOBS, one, TO), lambda: send(one), lambda: verify(KNOBS, one, TO, quiet)):
        with pytest.raises(BuildError, match="cannot be reached") as caught:
            act()
    assert "network" in caught.value.fix


@pytest.mark.parametrize("knobs", [{"repo": "tiny"}, {"repo": "a/b/c"}, {"repo": REPO, "branch": "a b"}, {"repo": REPO, "read_back": "no"}])
def test_knobs_are_checked_before_anything_is_built(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Knobs(**knobs)

"""Publishing to ModelScope, with the real client over real HTTP; what every publisher has to do is in test_contract.py."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from modelscope_server import OWN, READER, WRITER, ModelScopeServer
from publishers.places import release
from pydantic import ValidationError

from buildsys.errors import BuildError
from buildsys.publishers import Release, modelscope

KNOBS = modelscope.Knobs(repo="my-org/tiny-4bit")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelScopeServer]:
    with ModelScopeServer() as server:
        server.use(monkeypatch, tmp_path, WRITER)
        yield server


@pytest.fixture
def one(tmp_path: Path) -> Release:
    return release(tmp_path / "one", "a", **{"README.md": "# tiny"})


def quiet(what: str, done: int, total: int) -> None:
    assert what and 0 <= done <= total


def publish(made: Release, knobs: modelscope.Knobs = KNOBS) -> modelscope.Receipt:
    return modelscope.publish(knobs, made, modelscope.destination(knobs, Path()), quiet)


def verify(made: Release) -> modelscope.Receipt:
    return modelscope.verify(KNOBS, made, modelscope.destination(KNOBS, Path()), quiet)


def writes(server: ModelScopeServer) -> list[str]:
    return [one.path for one in server.log if one.method != "GET"]


def test_one_commit_and_a_tag(server: ModelScopeServer, one: Release) -> None:
    receipt = publish(one)
    repo = server.repos[KNOBS.repo]
    assert repo.private and repo.messages == ["initial commit", f"Publish tiny, {one.tag}"]
    assert repo.tags == {one.tag: repo.branches["master"]} and receipt.url == f"{server.url}/models/{KNOBS.repo}/files?version={one.tag}"
    held = repo.at("master") or {}
    assert held.keys() == one.files.keys() | OWN.keys() and held["model.safetensors"].large and not held["config.json"].large


def test_only_what_differs_is_sent(server: ModelScopeServer, one: Release, tmp_path: Path) -> None:
    publish(one)
    server.log.clear()
    two = release(tmp_path / "two", "a", notes="new")  # without the README
    plan = modelscope.plan(KNOBS, two, modelscope.destination(KNOBS, Path()))
    assert [line.split(" (")[0] for line in plan[1:]] == ["add notes", "drop README.md"] and not writes(server)
    publish(two)
    assert not server.asked("PUT", "/upload/"), "the weights are there"
    assert verify(two).digest == two.digest


def test_what_an_earlier_run_sent_is_not_sent_again(server: ModelScopeServer, one: Release) -> None:
    server.fail(r"/commit/", status=400)
    with pytest.raises(BuildError, match="HTTP 400"):
        publish(one)
    assert set(server.repos[KNOBS.repo].at("master") or {}) == set(OWN), "the branch is as it was"
    server.log.clear()
    publish(one)
    assert not server.asked("PUT", "/upload/")


@pytest.mark.parametrize("path", [r"/upload/", r"/commit/master", r"objects/batch", r"repo/tag"])
def test_a_server_that_stumbles(path: str, server: ModelScopeServer, one: Release) -> None:
    server.fail(path, status=503)
    if "tag" in path or "batch" in path:
        with pytest.raises(BuildError, match="HTTP 503"):
            publish(one)
    publish(one)
    assert verify(one).digest == one.digest and len(server.repos[KNOBS.repo].messages) == 2


def test_a_commit_that_landed_though_its_answer_was_lost(server: ModelScopeServer, one: Release) -> None:
    server.fail(r"/commit/", cut=True)
    publish(one)
    assert verify(one).digest == one.digest and len(server.repos[KNOBS.repo].messages) == 2


def test_somebody_else_commits_in_between(server: ModelScopeServer, one: Release) -> None:
    publish(release(one.tree.parent / "zero", "z"))
    theirs = {"theirs.txt": (b"hello", False)}
    server.fail(r"/commit/", act=lambda: server.repos[KNOBS.repo].commit("master", theirs))
    with pytest.raises(BuildError, match=r"theirs\.txt is not of the release") as caught:
        publish(one)
    assert "who else commits" in caught.value.fix
    publish(one)
    assert verify(one).digest == one.digest


def test_bytes_that_the_hub_lost_are_found(server: ModelScopeServer, one: Release) -> None:
    publish(one)
    oid = one.files["model.safetensors"]
    whole = server.objects[oid]
    server.objects[oid] = whole[:-1] + b"?"  # under the same name: the listing says nothing of it
    with pytest.raises(BuildError, match=r"model\.safetensors reads back") as caught:
        verify(one)
    assert sha256(server.objects[oid]).hexdigest() in caught.value.what


def test_a_tag_that_holds_something_else_is_not_moved(server: ModelScopeServer, one: Release) -> None:
    publish(one)
    repo = server.repos[KNOBS.repo]
    repo.tags[one.tag] = next(iter(repo.commits))
    for act in (publish, lambda made: modelscope.plan(KNOBS, made, modelscope.destination(KNOBS, Path()))):
        with pytest.raises(BuildError, match="holds other files"):
            act(one)


def test_a_tag_that_was_altered_is_no_release(server: ModelScopeServer, one: Release, tmp_path: Path) -> None:
    publish(one)
    publish(release(tmp_path / "two", "b"))
    repo = server.repos[KNOBS.repo]
    repo.tags[one.tag] = next(iter(repo.commits))
    with pytest.raises(BuildError, match="other files than its name says"):
        modelscope.rollback(KNOBS, one.digest, modelscope.destination(KNOBS, Path()), quiet)


def test_a_file_of_the_hubs_own_may_be_released(server: ModelScopeServer, tmp_path: Path) -> None:
    made = release(tmp_path / "own", "a", **{"configuration.json": '{"ours": 1}'})
    first = publish(made)
    publish(release(tmp_path / "two", "b"))
    assert modelscope.rollback(KNOBS, made.digest, modelscope.destination(KNOBS, Path()), quiet) == first
    assert server.content(KNOBS.repo, "configuration.json") == b'{"ours": 1}'


def test_a_model_that_no_publish_brought_is_not_replaced(server: ModelScopeServer, one: Release) -> None:
    server.add(KNOBS.repo, {**OWN, "README.md": b"hi", "model.safetensors": b"precious", "notes.txt": b"mine"})
    repo = server.repos[KNOBS.repo]
    before = dict(repo.branches)
    for act in (publish, lambda made: modelscope.plan(KNOBS, made, modelscope.destination(KNOBS, Path()))):
        with pytest.raises(BuildError, match=r"holds model\.safetensors, notes\.txt, and no release of ours") as caught:
            act(one)
        assert "replace: true" in caught.value.fix
    assert repo.branches == before and not writes(server)
    publish(one, KNOBS.model_copy(update={"replace": True}))
    assert verify(one).digest == one.digest


def test_what_the_hub_writes_into_a_new_repository_may_be_replaced(server: ModelScopeServer, one: Release) -> None:
    server.add(KNOBS.repo, {**OWN, "README.md": b"hi"})
    assert publish(one).digest == one.digest


def test_a_digest_that_only_begins_as_a_tag_does(server: ModelScopeServer, one: Release, tmp_path: Path) -> None:
    publish(one)
    publish(release(tmp_path / "two", "b"))
    asked, before = one.digest[:16] + "0" * 48, list(server.repos[KNOBS.repo].messages)
    with pytest.raises(BuildError, match=f"{one.tag} holds the release {one.digest}, not {asked}"):
        modelscope.rollback(KNOBS, asked, modelscope.destination(KNOBS, Path()), quiet)
    assert server.repos[KNOBS.repo].messages == before


def test_the_client_logs_nothing(server: ModelScopeServer, one: Release) -> None:
    logging.getLogger("modelscope_hub").setLevel(logging.INFO)
    server.fail(r"repo/files", status=503)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("modelscope_hub").addHandler(handler)
    try:
        publish(one)
    finally:
        logging.getLogger("modelscope_hub").removeHandler(handler)
    assert not said


def test_rollback_copies_on_the_hub(server: ModelScopeServer, one: Release, tmp_path: Path) -> None:
    first = publish(one)
    publish(release(tmp_path / "two", "b"))
    server.log.clear()
    assert modelscope.rollback(KNOBS, one.digest[:8], modelscope.destination(KNOBS, Path()), quiet) == first
    repo = server.repos[KNOBS.repo]
    assert repo.messages[-1] == f"Roll back to {one.tag}" and len(repo.messages) == 4, "history is kept"
    assert not server.asked("PUT", "/upload/") and verify(one) == first
    with pytest.raises(BuildError, match=r"there are .*, .*"):
        modelscope.rollback(KNOBS, "12345678", modelscope.destination(KNOBS, Path()), quiet)


def test_who_may_not(server: ModelScopeServer, one: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", READER)
    server.add(KNOBS.repo, dict(OWN))
    with pytest.raises(BuildError, match="403") as caught:
        publish(one)
    assert "modelscope login" in caught.value.fix
    server.repos[KNOBS.repo].private = True
    with pytest.raises(BuildError, match="401") as caught:
        publish(one)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "")
    for act in (publish, lambda made: modelscope.plan(KNOBS, made, modelscope.destination(KNOBS, Path()))):
        with pytest.raises(BuildError, match="needs a login"):
            act(one)
    assert not server.asked("PUT", "")


def test_a_name_that_is_taken(server: ModelScopeServer, one: Release) -> None:
    publish(one)
    server.fail(r"/revisions", status=404)
    server.fail(r"/repo/files", status=404)
    with pytest.raises(BuildError, match="may not see it"):
        publish(one)


def test_an_absent_branch_names_those_there_are(server: ModelScopeServer, one: Release) -> None:
    publish(one)
    with pytest.raises(BuildError, match="no revision next; it has master"):
        publish(one, KNOBS.model_copy(update={"branch": "next"}))


def test_no_token_is_told(server: ModelScopeServer, one: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = publish(one)
    assert WRITER not in str(receipt)
    for canary in ("ms-canary-77", "ms-canary-77\n"):
        monkeypatch.setenv("MODELSCOPE_API_TOKEN", canary)
        with pytest.raises(BuildError) as caught:
            publish(release(tmp_path / "other", "b"))
        assert "ms-canary-77" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and WRITER.encode() in path.read_bytes()]


def test_progress_counts_bytes(server: ModelScopeServer, one: Release) -> None:
    told = list[tuple[str, int, int]]()
    server.fail(r"/upload/", status=500)
    modelscope.publish(KNOBS, one, modelscope.destination(KNOBS, Path()), lambda *step: told.append(step))
    uploads = [step for step in told if step[0] == "upload"]
    assert uploads[-1][1] == uploads[-1][2] == one.sizes["model.safetensors"] and all(0 <= done <= total for _, done, total in told)


def test_knobs() -> None:
    for wrong in ({"repo": "alone"}, {"repo": "a/b", "branch": "../x"}, {"repo": "a/b", "color": 1}):
        with pytest.raises(ValidationError):
            modelscope.Knobs.model_validate(wrong)

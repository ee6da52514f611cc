"""The tests' hub, seen by the real client and by git: what a test of ours learns from it, it would learn from a hub."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hubserver import READER, WRITER, HubServer, User
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 3000, "deploy/a b.yaml": b"tp: 1\n", "deploy/x/y.txt": b"y"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token=WRITER)


def test_ids_are_gits_own(hub: HubServer, tmp_path: Path) -> None:
    hub.add("model", "org/name", FILES)
    commit = hub.repo("model", "org/name").commit("main")
    for path, blob in commit.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(blob.pointer if blob.large else blob.content)
    env = {"HOME": str(tmp_path), "GIT_CONFIG_NOSYSTEM": "1"}
    for role in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{role}_NAME": "someone", f"GIT_{role}_EMAIL": "someone@hub", f"GIT_{role}_DATE": "2024-01-01T00:00:00Z"}

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    git("add", ".")
    made = git("commit-tree", git("write-tree").strip(), "-m", commit.title, "-m", "body").strip()
    listed = {line.split("\t")[1]: line.split()[2] for line in git("ls-tree", "-r", made).splitlines()}
    assert listed == {path: blob.id for path, blob in commit.files.items()}
    folders = {one.path: one.tree_id for one in HfApi(endpoint=hub.url).list_repo_tree("org/name") if isinstance(one, RepoFolder)}
    assert folders == {"deploy": git("rev-parse", f"{made}:deploy").strip()}
    assert made == replace(commit, message="body\n").id


def test_listings(hub: HubServer, api: HfApi) -> None:
    first = hub.add("model", "org/name", FILES)
    hub.page = 2
    listed = {one.path: one for one in api.list_repo_tree("org/name", recursive=True) if isinstance(one, RepoFile)}
    assert listed.keys() == FILES.keys() and [path for path, one in listed.items() if one.lfs] == ["model.safetensors"]
    second = hub.add("model", "org/name", {"config.json": None, "new": b"1"})
    assert api.model_info("org/name").sha == second and api.model_info("org/name", revision=first[:8]).sha == first
    assert [one.commit_id for one in api.list_repo_commits("org/name")] == [second, first]
    assert {one.path for one in api.get_paths_info("org/name", ["new", "config.json", "deploy"])} == {"new", "deploy"}
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/name", revision="nope")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/other")


def test_references(hub: HubServer, api: HfApi) -> None:
    main = hub.add("dataset", "org/data", {"load.py": b"1"})
    converted = hub.add("dataset", "org/data", {"default/train/0000.parquet": b"P"}, branch="refs/convert/parquet")
    hub.repo("dataset", "org/data").tag("v1")
    refs = api.list_repo_refs("org/data", repo_type="dataset", include_pull_requests=True)
    found = {one.name: one.target_commit for one in (*refs.branches, *refs.converts, *refs.tags)}
    assert found == {"main": main, "parquet": converted, "v1": main}
    assert api.dataset_info("org/data", revision="refs/convert/parquet").sha == converted


def test_downloads(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("model", "org/name", FILES)
    for path, content in FILES.items():
        found = Path(hf_hub_download("org/name", path, endpoint=hub.url, cache_dir=tmp_path, token=WRITER))
        assert found.read_bytes() == content and commit in str(found)
    assert len(hub.requests("^/model/org/name/", "GET")) == 1, "a large file comes from the other origin, without the token"
    hub.fail("^/model/org/name/", "GET", cut=True)
    found = Path(hf_hub_download("org/name", "model.safetensors", endpoint=hub.url, cache_dir=tmp_path / "again"))
    assert found.read_bytes() == FILES["model.safetensors"] and hub.log[-1].headers["range"] == "bytes=1000-" and hub.log[-1].status == 206
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("org/name", "nope", endpoint=hub.url, cache_dir=tmp_path)


def test_gates(hub: HubServer, tmp_path: Path) -> None:
    hub.add("model", "org/name", FILES)
    hub.repo("model", "org/name").gated = True
    for token, status in ((False, 401), (READER, 403)):
        with pytest.raises(GatedRepoError) as caught:
            HfApi(endpoint=hub.url, token=token).hf_hub_download("org/name", "config.json", cache_dir=tmp_path)
        assert caught.value.response.status_code == status
    hub.tokens[READER] = User("reader", gates=("org/name",))
    assert HfApi(endpoint=hub.url, token=READER).hf_hub_download("org/name", "config.json", cache_dir=tmp_path)
    hub.repo("model", "org/name").private = True
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=READER).model_info("org/name")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.url, token="hf_wrong").model_info("org/name")


def test_commits(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    api.create_repo("my-org/new", private=True)
    hub.part_bytes = 1000
    (tmp_path / "w").write_bytes(b"w" * 2500)
    contents = {"model.safetensors": tmp_path / "w", "config.json": b"{}", "b.bin": b"b"}
    adds = [CommitOperationAdd(path, content) for path, content in contents.items()]
    head = api.model_info("my-org/new").sha
    first = api.create_commit("my-org/new", adds, commit_message="one", parent_commit=head).oid
    assert len(hub.requests("^/model/my-org/new/", "PUT")) == 4, "three parts and a whole"
    assert hub.repo("model", "my-org/new").commit(first).files["model.safetensors"].content == b"w" * 2500
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.create_commit("my-org/new", [CommitOperationDelete("b.bin")], commit_message="two", parent_commit=head)
    api.create_tag("my-org/new", tag="v1", revision=first)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("my-org/new", tag="v1")
    moved = [CommitOperationCopy("b.bin", "c.bin"), CommitOperationDelete("b.bin")]
    api.create_commit("my-org/new", moved, commit_message="two")
    assert {one.path for one in api.list_repo_tree("my-org/new")} == {".gitattributes", "model.safetensors", "config.json", "c.bin"}
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi(endpoint=hub.url, token=READER).create_repo("my-org/other")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("others/model")


def test_pull_requests(hub: HubServer, api: HfApi) -> None:
    hub.add("model", "my-org/name", FILES)
    made = api.create_commit("my-org/name", [CommitOperationAdd("config.json", b"[]")], commit_message="try", create_pr=True)
    assert made.pr_num == 1 and made.pr_revision == "refs/pr/1" and api.model_info("my-org/name").sha != made.oid
    assert [one.title for one in api.get_repo_discussions("my-org/name", discussion_status="open")] == ["try"]
    assert api.get_discussion_details("my-org/name", 1).target_branch == "refs/heads/main"
    hub.add("model", "my-org/name", {"other": b"1"})
    api.merge_pull_request("my-org/name", 1)
    files = hub.repo("model", "my-org/name").commit("main").files
    assert files["config.json"].content == b"[]" and files["other"].content == b"1"
    assert not list(api.get_repo_discussions("my-org/name", discussion_status="open"))


def test_faults(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    hub.add("model", "org/name", FILES)
    hub.fail("/api/models/org/name", status=500, skip=1)
    api.model_info("org/name")
    with pytest.raises(HfHubHTTPError, match="500"):
        api.model_info("org/name")
    hub.fail("^/model/org/name", body=b"x" * 3000)
    wrong = api.hf_hub_download("org/name", "model.safetensors", cache_dir=tmp_path)
    assert Path(wrong).read_bytes() == b"x" * 3000, "the client does not look"
    hub.fail("/resolve/", "HEAD", headers={"X-Linked-Etag": '"other"'})
    hub.fail("/api/models/org/name", act=lambda: hub.add("model", "org/name", {"config.json": b"changed"}))
    assert api.model_info("org/name").sha == hub.repo("model", "org/name").refs["refs/heads/main"]

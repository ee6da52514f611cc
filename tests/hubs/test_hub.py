"""The hub through its real client, over HTTP: what planning gets, what is remembered, what comes whole, and how all of it may fail."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hubserver import READER, WRITER, HubServer
from hubwire import Answer, Request
from huggingface_hub import close_session

from buildsys.errors import BuildError
from buildsys.hubs import hub, hub_download, hub_errors, hub_http
from buildsys.hubs.hub_repo import Repo, cache, check_id, check_name, check_revision, shown_endpoint
from buildsys.hubs.silent import silent
from buildsys.io import headers
from buildsys.located import Located

ID = "org/tiny"
ROWS = 50_000


def weights(value: int, rows: int = ROWS) -> bytes:
    prefix, _ = headers.encode({"model.norm.weight": ("F16", (8,)), "model.embed.weight": ("F32", (rows,))}, {"format": "pt"})
    return prefix + bytes([value]) * (4 * rows + 16)


FILES = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"pieces" * 100,
    "model.safetensors": weights(7),
    "sub/model.safetensors": weights(9, 10),
    "README.md": b"# Tiny\n",
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    monkeypatch.setattr(hub_errors, "WAITS_S", (0.0,) * 3)
    monkeypatch.setattr(hub_download, "WAITS_S", (0.0,) * 3)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    silent.cache_clear()
    with HubServer() as running:
        running.use(monkeypatch, tmp_path / "hf")
        yield running
    close_session()  # made with this test's environment
    silent.cache_clear()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def leave() -> None:
        from huggingface_hub import constants

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    return leave


def repo(revision: str = "main", id: str = ID) -> Repo:
    return Repo("model", id, revision)


def located(home: Path, *names: str, revision: str = "main") -> Located:
    return hub.locate(hub.listing(repo(revision), home), names or FILES, home)


def brought(found: Located, told: Callable[[str, int, int], object] = lambda *_: None) -> dict[str, Path]:
    return hub.fetch(found.how, found.sha256, lambda *said: (told(*said), None)[1])


def refused(act: Callable[[], object]) -> BuildError:
    with pytest.raises(BuildError) as caught:
        act()
    error = caught.value
    assert error.where and error.what and error.fix
    assert "hf_" not in str(error) and "Bearer" not in str(error), "a token is no matter of an error"
    return error


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# What planning gets


def test_of_weights_the_header_comes_and_the_rest_is_known(server: HubServer, home: Path) -> None:
    commit = server.add("model", ID, FILES)
    found = located(home)
    assert dict(found.sha256) == {name: sha256(content) for name, content in FILES.items()}
    large = {name: len(content) for name, content in FILES.items() if name.endswith((".safetensors", ".model"))}
    assert dict(found.sizes) == large and found.pin == f"{ID} at {commit[:12]}"
    for name in ("config.json", "tokenizer.json", "README.md"):
        assert found.files[name].read_bytes() == FILES[name]
    for name in ("model.safetensors", "sub/model.safetensors"):
        whole = home.parent / "whole"
        whole.write_bytes(FILES[name])
        assert headers.read(found.files[name], name, found.sizes[name]) == headers.read(whole)
    assert "tokenizer.model" not in found.files, "planning does not need it"
    sent = sum(len(FILES[name]) for name in FILES if name not in large)
    kept = sum(path.stat().st_size for path in cache().rglob("*") if path.is_file() and not path.is_symlink())
    assert kept < sent + 1000, "no weights were brought"
    json.dumps(found.how)


def test_a_header_longer_than_the_first_look(server: HubServer, home: Path) -> None:
    names = {f"model.layers.{i}.some.quite.long.name.of.a.tensor.weight": ("F16", (1,)) for i in range(4000)}
    prefix, _ = headers.encode(names, {})
    assert len(prefix) > hub.FIRST_BYTES
    server.add("model", ID, {"model.safetensors": prefix + bytes(8000)})
    found = located(home, "model.safetensors")
    assert len(headers.read(found.files["model.safetensors"], "", found.sizes["model.safetensors"]).tensors) == 4000


def test_what_is_no_safetensors_is_refused_when_planning(server: HubServer, home: Path) -> None:
    server.add("model", ID, {"model.safetensors": b"x" * 5000})
    assert "no safetensors file" in refused(lambda: located(home, "model.safetensors")).what


def test_a_large_file_that_planning_reads(server: HubServer, home: Path) -> None:
    server.add("model", ID, {"tokenizer.model": FILES["tokenizer.model"]})
    found = hub.locate(hub.listing(repo(), home), ["tokenizer.model"], home, whole=["tokenizer.model"])
    assert found.files["tokenizer.model"].read_bytes() == FILES["tokenizer.model"]
    assert not found.sizes and not found.how, "all of it is here"


def test_branch_tag_pull_request_and_commit(server: HubServer, home: Path) -> None:
    first = server.add("model", ID, {"config.json": b"1"})
    server.repo("model", ID).refs["refs/tags/v1"] = first
    second = server.add("model", ID, {"config.json": b"2"})
    third = server.add("model", ID, {"config.json": b"3"}, branch="refs/pr/1")
    wanted = {"main": second, "v1": first, first: first, second: second, "refs/pr/1": third}
    assert {revision: hub.listing(repo(revision), home).commit for revision in wanted} == wanted
    assert located(home, "config.json", revision="v1").files["config.json"].read_bytes() == b"1"
    assert located(home, "config.json", revision="refs/pr/1").files["config.json"].read_bytes() == b"3"


def test_a_dataset_and_one_folder_of_it(server: HubServer, home: Path) -> None:
    files = {"en/a.txt": b"a", "en/b/c.txt": b"c", "fr/a.txt": b"f", "data.parquet": b"PAR1" * 9}
    server.add("dataset", ID, {"old.txt": b""})
    server.add("dataset", ID, files, branch="refs/convert/parquet")
    server.page = 2  # entries of one page
    there = Repo("dataset", ID, "refs/convert/parquet")
    assert sorted(hub.listing(there, home).files) == sorted(files)
    assert sorted(hub.listing(there, home, "en").files) == ["en/a.txt", "en/b/c.txt"]
    found = hub.locate(hub.listing(there, home), ["en/b/c.txt", "data.parquet"], home)
    assert found.files["en/b/c.txt"].read_bytes() == b"c" and "data.parquet" not in found.files
    assert brought(found)["data.parquet"].read_bytes() == files["data.parquet"]


# What is remembered


def test_a_commit_is_asked_once(server: HubServer, home: Path) -> None:
    commit = server.add("model", ID, FILES)
    found = located(home, revision=commit)
    server.log.clear()
    assert located(home, revision=commit) == found and not server.log


def test_planning_a_remembered_commit_does_not_even_load_the_client(server: HubServer, home: Path) -> None:
    commit = server.add("model", ID, FILES)
    located(home, revision=commit)
    server.log.clear()
    script = (
        "import sys; from pathlib import Path; from buildsys.hubs import hub; home = Path(sys.argv[1]);"
        f"listed = hub.listing(hub.Repo('model', {ID!r}, {commit!r}), home); hub.locate(listed, listed.files, home);"
        "assert 'huggingface_hub' not in sys.modules and 'httpx2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(home)], check=True, env={**os.environ, **server.environment()})
    assert not server.log


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"files": {}, "digest": "0"}', b'{"files": 1}'])
def test_a_damaged_memory_is_asked_again(server: HubServer, home: Path, damage: bytes) -> None:
    commit = server.add("model", ID, FILES)
    found = located(home, revision=commit)
    kept = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert len(kept) == 1 + 3 + 2 * 2, "listing, small files, headers and their digests"
    for path, content in kept.items():
        path.write_bytes(damage)
        assert located(home, revision=commit) == found and path.read_bytes() == content


def test_a_branch_is_asked_every_time(server: HubServer, home: Path) -> None:
    first = server.add("model", ID, {"config.json": b"1"})
    assert hub.listing(repo(), home).commit == first
    second = server.add("model", ID, {"config.json": b"2"})
    assert hub.listing(repo(), home).commit == second


# Bringing it here


def test_files_come_whole_and_once(server: HubServer, home: Path) -> None:
    commit = server.add("model", ID, FILES)
    found = located(home)
    told: list[tuple[str, int, int]] = []
    paths = brought(found, lambda *said: told.append(said))
    assert {name: path.read_bytes() for name, path in paths.items()} == FILES
    assert all(path.is_absolute() and path.is_relative_to(cache()) for path in paths.values())
    total = sum(map(len, FILES.values()))
    assert told[-1] == ("download", total, total)
    assert not list(cache().rglob("*.incomplete"))
    # It is the client's own cache: the client finds everything there.
    from huggingface_hub import scan_cache_dir, try_to_load_from_cache

    assert try_to_load_from_cache(ID, "model.safetensors", cache_dir=cache(), revision=commit) == str(paths["model.safetensors"])
    assert not scan_cache_dir(cache()).warnings
    server.log.clear()
    assert brought(found) == paths and not server.log, "it is here now"


def test_what_another_tool_downloaded_is_used(server: HubServer, home: Path) -> None:
    from huggingface_hub import snapshot_download

    server.add("model", ID, FILES)
    snapshot_download(ID, cache_dir=cache(), endpoint=server.url)
    found = located(home)
    server.log.clear()
    brought(found)
    assert not server.log


def test_a_cut_download_goes_on(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    found = located(home)
    half = len(FILES["model.safetensors"]) // 2
    server.log.clear()
    server.fail(found.sha256["model.safetensors"], method="GET", cut=True)
    assert brought(found)["model.safetensors"].read_bytes() == FILES["model.safetensors"]
    asked = [one.headers.get("range") for one in server.requests(found.sha256["model.safetensors"], "GET")]
    assert asked == [None, f"bytes={half}-"]


def test_the_next_command_goes_on_where_this_one_gave_up(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    found = located(home, "model.safetensors")
    server.fail(found.sha256["model.safetensors"], method="GET", cut=True)
    server.fail(found.sha256["model.safetensors"], method="GET", status=503, times=9)
    error = refused(lambda: brought(found))
    assert "503" in error.what and "goes on where it stopped" in error.fix and "model.safetensors" in error.where
    server.faults.clear()
    server.log.clear()
    assert brought(found)["model.safetensors"].read_bytes() == FILES["model.safetensors"]
    assert [one.headers["range"] for one in server.requests("/model/", "GET")] == [f"bytes={len(FILES['model.safetensors']) // 2}-"]


def test_a_killed_process_leaves_what_came(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    found = located(home, "model.safetensors")
    weights = FILES["model.safetensors"]
    server.fail("/model/", method="GET", cut=True)
    server.fail("/model/", method="GET", status=503, times=99)
    script = (
        "import json, sys; from buildsys.hubs import hub; how, expected = map(json.loads, sys.argv[1:]);"
        "hub.fetch(how, expected, lambda *_: None)"
    )
    arguments = [json.dumps(found.how), json.dumps(dict(found.sha256))]
    child = subprocess.Popen([sys.executable, "-c", script, *arguments], env={**os.environ, **server.environment()})
    while not any(one.status == 503 for one in list(server.log)):
        assert child.poll() is None
        time.sleep(0.02)
    child.kill()
    child.wait()
    server.faults.clear()
    server.log.clear()
    told: list[int] = []
    brought(found, lambda phase, done, total: told.append(done))
    assert [one.headers["range"] for one in server.requests("/model/", "GET")] == [f"bytes={len(weights) // 2}-"]
    assert told[-1] == len(weights), "what was there counts as done"


class Unranged(HubServer):
    """Sends everything, whatever was asked for."""

    def answer(self, request: Request, cdn: bool) -> Answer:
        kept = {name: value for name, value in request.headers.items() if name != "range"}
        return super().answer(replace(request, headers=kept), cdn)


def test_a_server_that_knows_no_ranges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: Path) -> None:
    with Unranged() as server:
        server.use(monkeypatch, tmp_path / "hf")
        server.add("model", ID, FILES)
        found = located(home, "model.safetensors")
        assert len(found.files["model.safetensors"].read_bytes()) < 1000
        part = cache() / repo().folder / "blobs" / f"{found.sha256['model.safetensors']}.incomplete"
        part.parent.mkdir(parents=True)
        part.write_bytes(FILES["model.safetensors"][:1000])
        assert brought(found)["model.safetensors"].read_bytes() == FILES["model.safetensors"]


def test_two_at_once_download_once(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    found = located(home)
    server.log.clear()
    with ThreadPoolExecutor() as several:
        first, second = (several.submit(brought, found) for _ in range(2))
    assert first.result() == second.result()
    assert len(server.requests(found.sha256["model.safetensors"], "GET")) == 1


def test_a_full_disk(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    found = located(home)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        error = refused(lambda: brought(found))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written" in error.what and "make room" in error.fix
    assert brought(found)["model.safetensors"].read_bytes() == FILES["model.safetensors"]


def test_a_server_that_never_answers(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = server.add("model", ID, FILES)
    monkeypatch.setattr(hub_http, "TIMEOUT_S", 0.05)
    server.fail("/tree/", wait_s=0.2, times=9)
    assert "did not answer" in refused(lambda: hub.listing(repo(commit), home)).what


def test_errors_of_the_server_pass(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    server.fail("/api/", status=500, times=2)
    server.fail("config.json", status=503, times=2)
    found = located(home)
    server.fail("model.safetensors", status=502)
    server.fail("/model/", status=429)
    assert {name: path.read_bytes() for name, path in brought(found).items()} == FILES


def test_errors_of_the_server_that_stay(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    server.fail("/api/", status=500, times=99)
    assert "answers 500" in refused(lambda: located(home)).what


def test_wrong_content_is_not_kept(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    found = located(home)
    wrong = FILES["model.safetensors"][:-1] + b"!"
    server.fail(found.sha256["model.safetensors"], method="GET", body=wrong)
    error = refused(lambda: brought(found))
    assert (
        sha256(wrong) in error.what and found.sha256["model.safetensors"] in error.what and "model.safetensors of org/tiny" in error.where
    )
    assert not [path for path in cache().rglob("*") if path.is_file() and path.read_bytes() == wrong]
    assert brought(found)["model.safetensors"].read_bytes() == FILES["model.safetensors"], "the same command again brings it"


def test_too_much_content_is_refused(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    found = located(home)
    server.fail(found.sha256["model.safetensors"], method="GET", body=FILES["model.safetensors"] + b"more")
    assert "more now" in refused(lambda: brought(found)).what
    brought(found)


def test_a_small_file_with_other_content_is_refused_when_planning(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    server.fail("config.json", method="GET", body=b'{"model_type": "xxxxx"}')
    error = refused(lambda: located(home))
    assert "is not what" in error.what and "config.json" in error.where
    assert located(home).files["config.json"].read_bytes() == FILES["config.json"]


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-Etag", "X-Linked-Size"])
def test_a_file_that_changes_after_it_was_listed(server: HubServer, home: Path, header: str) -> None:
    server.add("model", ID, FILES)
    found = located(home)
    server.fail("resolve/.*/model.safetensors", method="HEAD", headers={header: "0" * 40})
    error = refused(lambda: brought(found))
    assert "when it was listed" in error.what and "model.safetensors" in error.where


def test_a_damaged_file_in_the_cache_is_removed(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    found = located(home)
    path = brought(found)["model.safetensors"]
    path.resolve().write_bytes(b"rot" * 1000)
    error = refused(lambda: brought(found))
    assert "removed" in error.what and not path.exists() and found.sha256["model.safetensors"] in error.what
    assert brought(found)["model.safetensors"].read_bytes() == FILES["model.safetensors"]


def test_a_plan_that_expects_other_content(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    found = located(home, "model.safetensors")
    error = refused(lambda: hub.fetch(found.how, {"model.safetensors": "0" * 64}, lambda *_: None))
    assert "0" * 64 in error.what and found.sha256["model.safetensors"] in error.what


def test_more_than_the_disk_holds(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    how = dict(located(home, "model.safetensors").how)
    how["files"] = {"model.safetensors": {**how["files"]["model.safetensors"], "size": 1 << 60}}
    error = refused(lambda: hub.fetch(how, {}, lambda *_: None))
    assert "GiB free" in error.what and "HF_HUB_CACHE" in error.fix


# Whom the hub lets in


def test_a_gated_model(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("model", ID, FILES)
    server.repo("model", ID).gated = True
    error = refused(lambda: located(home))
    assert "gated" in error.what and "without a token" in error.what
    assert f"{server.url}/{ID}" in error.fix and "hf auth login" in error.fix
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "with the token" in refused(lambda: located(home)).what
    server.tokens[READER] = type(server.tokens[READER])("reader", write=False, gates=(ID,))
    brought(located(home))


def test_a_private_model_looks_absent(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("model", "me/secret", FILES)
    server.repo("model", "me/secret").private = True
    error = refused(lambda: hub.listing(repo(id="me/secret"), home))
    assert "there is none, or it is private" in error.what and "hf auth login" in error.fix
    monkeypatch.setenv("HF_TOKEN", WRITER)
    found = hub.locate(hub.listing(repo(id="me/secret"), home), FILES, home)
    assert brought(found)["model.safetensors"].read_bytes() == FILES["model.safetensors"]
    kept = [path for folder in (home, cache()) for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in kept if WRITER.encode() in path.read_bytes()] and WRITER not in str(found)


def test_a_token_that_is_none(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("model", ID, FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_canaryCANARYcanary")
    error = refused(lambda: hub.listing(repo(), home))
    assert "401" in error.what and "hf auth login" in error.fix and "canary" not in str(error)


def test_no_such_model_revision_or_file(server: HubServer, home: Path) -> None:
    assert "shows no such model" in refused(lambda: hub.listing(repo(id="org/nothing"), home)).what
    server.add("model", ID, FILES)
    server.add("model", ID, FILES, branch="experiment")
    error = refused(lambda: hub.listing(repo("experimnt"), home))
    assert "main, experiment" in error.what and error.fix == "did you mean experiment?"
    error = refused(lambda: hub.listing(repo("f" * 40), home))
    assert "no revision ffff" in error.what
    assert "has no nothing.txt" in refused(lambda: located(home, "nothing.txt")).what


# No network


def test_nobody_answers(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    found = located(home)
    close_session()  # connections that are open stay so
    server.stop()
    for act in (lambda: hub.listing(repo(), home), lambda: brought(found)):
        error = refused(act)
        assert "cannot be reached: Connection refused" in error.what and "HF_ENDPOINT" in error.fix and "HF_HUB_OFFLINE" in error.fix


def test_a_silent_hub_is_asked_once_for_all_recipes(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = server.add("model", ID, FILES)
    found = located(home, revision=pinned)
    close_session()
    server.stop()
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    first = refused(lambda: hub.listing(repo(), home))
    assert len(slept) == 3
    second = refused(lambda: hub.listing(repo("0" * 40, "org/other"), home))
    assert (second.what, second.fix) == (first.what, first.fix) and second.where == "org/other at 000000000000" and len(slept) == 3
    assert located(home, revision=pinned) == found, "what is remembered asks nobody"
    with HubServer() as other:
        other.use(monkeypatch, home.parent / "hf")
        other.add("model", ID, FILES)
        assert located(home).sha256 == found.sha256, "another hub may answer"


def test_a_hub_that_stumbles_is_asked_again(server: HubServer, home: Path) -> None:
    server.add("model", ID, FILES)
    server.fail("/api/", status=500, times=4)
    refused(lambda: hub.listing(repo(), home))
    assert hub.listing(repo(), home).files


PROXIES = {"socks5://127.0.0.1:9": "ImportError", "odd://user:canary@host": "ValueError", "http://user:canary@host:port": "InvalidURL"}


@pytest.mark.parametrize("proxy", PROXIES)
def test_a_proxy_that_is_none(proxy: str, server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if proxy.startswith("socks"):
        monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", proxy)
    close_session()
    error = refused(lambda: hub.listing(repo(), home))
    assert "names no proxy" in error.what and PROXIES[proxy] in error.what and "http://host:port" in error.fix
    assert "canary" not in str(error)


def test_certificates_that_are_not_there(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(home / "none.pem"))
    close_session()
    error = refused(lambda: hub.listing(repo(), home))
    assert "SSL_CERT_FILE" in error.what and "unset" in error.fix


def test_a_token_that_cannot_be_sent(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canaryé")
    error = refused(lambda: hub.listing(repo(), home))
    assert "outside ASCII" in error.what and "HF_TOKEN" in error.fix and "canary" not in str(error)


def test_an_address_that_is_none_and_one_that_is_no_hub(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    assert "hub.example is no address" in refused(lambda: hub.listing(repo(), home)).what
    monkeypatch.setenv("HF_ENDPOINT", "https://no-such-host.invalid")
    assert "cannot be reached" in refused(lambda: hub.listing(repo(), home)).what
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    commit = server.add("model", ID, FILES)
    for body in (b"<html>", b"[1]", b"{}", b'[{"type": "file"}]', b"\xff", b"7", b"null"):
        for revision in ("main", commit):
            server.fail("/api/", body=body)
            assert "does not answer as a hub does" in refused(partial(hub.listing, repo(revision), home)).what


def test_a_password_in_the_address_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://user:canary@mirror.example/hub/")
    assert shown_endpoint() == "https://mirror.example/hub"


def test_offline_from_what_is_remembered_and_cached(server: HubServer, home: Path, offline: Callable[[], None]) -> None:
    commit = server.add("model", ID, FILES)
    found = located(home)
    paths = brought(found)
    offline()
    assert located(home) == found, "the branch is where it was when it was last looked at"
    assert located(home, revision=commit) == found and brought(found) == paths


def test_offline_from_the_shared_cache_alone(server: HubServer, home: Path, offline: Callable[[], None]) -> None:
    from huggingface_hub import snapshot_download

    commit = server.add("model", ID, FILES)
    snapshot_download(ID, cache_dir=cache(), endpoint=server.url, ignore_patterns="README.md")
    offline()
    server.log.clear()
    listed = hub.listing(repo(), home)
    assert listed.commit == commit and not listed.whole and sorted(listed.files) == sorted(set(FILES) - {"README.md"})
    found = hub.locate(listed, listed.files, home)
    assert dict(found.sha256) == {name: sha256(content) for name, content in FILES.items() if name != "README.md"}
    assert brought(found)["model.safetensors"].read_bytes() == FILES["model.safetensors"]
    assert not server.log


def test_offline_and_not_there(server: HubServer, home: Path, offline: Callable[[], None]) -> None:
    commit = server.add("model", ID, FILES)
    found = located(home)
    offline()
    for act in (lambda: hub.listing(repo("other"), home), lambda: hub.listing(repo("0" * 40), home), lambda: brought(found)):
        error = refused(act)
        assert "HF_HUB_OFFLINE" in error.what and f"hf download {ID} --revision " in error.fix
    assert f"--revision {commit}" in refused(lambda: brought(found)).fix


# Names


@pytest.mark.parametrize(
    "ids", [{"oid": "../../x"}, {"oid": "0" * 40, "lfs": {"oid": "../" * 20, "size": 1}}, {"oid": "0" * 40, "size": -1}]
)
def test_an_id_cannot_lead_out_of_the_cache(server: HubServer, home: Path, ids: dict[str, object]) -> None:
    commit = server.add("model", ID, {"config.json": b"{}"})
    server.fail("/tree/", body=json.dumps([{"type": "file", "path": "config.json", "size": 1, **ids}]).encode())
    assert "does not answer as a hub does" in refused(lambda: hub.listing(repo(commit), home)).what


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/../../b", "a//b", "./a", "a\\b", "a\nb", ""])
def test_a_file_cannot_be_called_out_of_its_folder(server: HubServer, home: Path, name: str) -> None:
    refused(lambda: check_name(name, repo()))
    server.add("model", ID, {"config.json": b"{}"})
    row = {"type": "file", "path": name, "size": 1, "oid": "0" * 40}
    server.fail("/tree/", body=json.dumps([row]).encode())
    assert "leads out" in refused(lambda: hub.listing(repo(), home)).what
    how = {"kind": "model", "repo": ID, "commit": "0" * 40, "files": {name: {"size": 1, "sha256": None, "blob_id": "0" * 40}}}
    refused(lambda: hub.fetch(how, {}, lambda *_: None))


@pytest.mark.parametrize(
    "id", ["gpt2", "a/b/c", "https://huggingface.co/a/b", "a/..", "-a/b", "a/b.git", "a--b/c", "a/b c", "", "a/" + "b" * 96]
)
def test_ids_that_are_none(id: str, home: Path) -> None:
    with pytest.raises(ValueError, match="owner/name"):
        check_id(id)
    assert "owner/name" in refused(lambda: hub.listing(repo(id=id), home)).what


@pytest.mark.parametrize("revision", ["", "a b", "../x", "a/../b", "/a", "a/", "x..y", "a\nb", "a:b"])
def test_revisions_that_are_none(revision: str, home: Path) -> None:
    with pytest.raises(ValueError, match="no revision"):
        check_revision(revision)
    refused(lambda: hub.listing(repo(revision), home))


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "refs/convert/parquet", "feature/x", "0" * 40])
def test_revisions(revision: str) -> None:
    assert check_revision(revision) == revision and hub.is_commit(revision) == (revision == "0" * 40)


def test_what_the_client_downloads_itself_is_told_too(server: HubServer, home: Path) -> None:
    """As it does where the hub keeps a file in xet storage, which no server here speaks."""
    server.add("model", ID, FILES)
    listed = hub.listing(repo(), home)
    told: list[int] = []
    wanted = hub_download.Wanted(listed.at, "model.safetensors", listed.files["model.safetensors"])
    hub_download._by_client(wanted, told.append)
    assert sum(told) == len(FILES["model.safetensors"]) and wanted.link.read_bytes() == FILES["model.safetensors"]

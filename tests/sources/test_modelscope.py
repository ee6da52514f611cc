"""Models from ModelScope, with the real client over real HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from modelscope_server import READER, WRITER, ModelScopeServer
from pydantic import ValidationError

from buildsys.errors import BuildError
from buildsys.hubs import modelscope_files
from buildsys.hubs.silent import silent
from buildsys.io import headers
from buildsys.located import Located
from buildsys.sources import modelscope

REPO = "org/tiny-model"
HEADER, _ = headers.encode({"a.weight": ("F16", (640, 512))}, {})
WEIGHTS = HEADER + os.urandom(640 * 512 * 2)
MODEL = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": json.dumps({"vocab": "x" * 70_000}).encode(),  # in large storage, and small enough to be brought
    "tokenizer_config.json": b"{}",
    "README.md": b"# tiny",
    "onnx/model.onnx": b"not this one",
}
OURS = sorted(("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelScopeServer]:
    """A hub with one model, and a machine that has never seen one."""
    silent.cache_clear()
    with ModelScopeServer() as server:
        server.use(monkeypatch, tmp_path)
        server.add(REPO, MODEL)
        yield server
    silent.cache_clear()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def locate(home: Path, revision: str = "master", repo: str = REPO) -> Located:
    return modelscope.locate(modelscope.Knobs(repo=repo, revision=revision), Path(), home)


def quiet(what: str, done: int, total: int) -> None:
    pass


def fetch(found: Located) -> dict[str, Path]:
    return modelscope.fetch(json.loads(json.dumps(dict(found.how))), found.sha256, quiet)


def refused(home: Path, revision: str = "master") -> BuildError:
    with pytest.raises(BuildError) as caught:
        locate(home, revision)
    return caught.value


def test_planning_reads_small_files_and_headers_alone(server: ModelScopeServer, home: Path) -> None:
    head = server.repos[REPO].branches["master"]
    found = locate(home)
    assert sorted(found.files) == OURS and found.sizes == {"model.safetensors": len(WEIGHTS)}
    assert found.sha256 == {name: sha256(MODEL[name]).hexdigest() for name in OURS}
    assert found.pin == f"{REPO} at {head[:12]}" and found.how["revision"] == head
    assert found.files["model.safetensors"].read_bytes() == HEADER
    assert found.files["config.json"].read_bytes() == MODEL["config.json"]
    ranges = [one.headers["range"] for one in server.asked("GET", sha256(WEIGHTS).hexdigest())]
    assert ranges == [f"bytes=0-{modelscope_files.FIRST_BYTES - 1}"]


def test_a_long_header_is_asked_for_in_two_parts(server: ModelScopeServer, home: Path) -> None:
    long, _ = headers.encode({f"layer.{number:05}.weight": ("F16", (1,)) for number in range(6000)}, {})
    assert len(long) > modelscope_files.FIRST_BYTES
    weights = long + bytes(12_000)
    server.add(REPO, {**MODEL, "model.safetensors": weights})
    assert locate(home).files["model.safetensors"].read_bytes() == long
    first, second = [one.headers["range"] for one in server.asked("GET", sha256(weights).hexdigest())]
    assert first == f"bytes=0-{modelscope_files.FIRST_BYTES - 1}" and second == f"bytes={modelscope_files.FIRST_BYTES}-{len(long) - 1}"


def test_fetch_brings_what_is_away(server: ModelScopeServer, home: Path) -> None:
    found, told = locate(home), list[tuple[str, int, int]]()
    files = modelscope.fetch(found.how, found.sha256, lambda *step: told.append(step))
    assert {name: path.read_bytes() for name, path in files.items()} == {name: MODEL[name] for name in OURS}
    assert told[-1] == ("download", len(WEIGHTS), len(WEIGHTS)), "small files were here already"


def test_branch_tag_and_commit(server: ModelScopeServer, home: Path) -> None:
    first = server.repos[REPO].branches["master"]
    server.repos[REPO].tags["v1"] = first
    second = server.add(REPO, {**MODEL, "config.json": b'{"second": 1}'})
    assert locate(home, first).how["revision"] == locate(home, "v1").how["revision"] == first
    assert locate(home).how["revision"] == second
    server.add(REPO, MODEL, branch="other/branch")
    assert fetch(locate(home, "other/branch"))["config.json"].read_bytes() == MODEL["config.json"]


def test_a_branch_that_ends_in_a_deletion_has_no_known_commit(server: ModelScopeServer, home: Path) -> None:
    server.add(REPO, {name: data for name, data in MODEL.items() if name != "README.md"})
    found = locate(home)
    assert found.how["revision"] == "master" and found.pin == f"{REPO} at master"
    assert fetch(found)["config.json"].read_bytes() == MODEL["config.json"]
    server.add(REPO, {**MODEL, "config.json": b'{"architectures": ["MistralForCausalM"]}'})
    with pytest.raises(BuildError, match="sha256"):
        fetch(Located({}, found.sha256, {}, {**found.how, "sizes": found.how["sizes"] | {"config.json": 40}}))


def test_a_hub_that_tells_no_commits(server: ModelScopeServer, home: Path) -> None:
    server.commits = False
    assert fetch(locate(home))["model.safetensors"].read_bytes() == WEIGHTS


def test_a_pinned_model_is_planned_without_a_network(server: ModelScopeServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = str(locate(home).how["revision"])
    before, asked = locate(home, commit), len(server.log)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)  # the client would wait 7 s between its own
    assert locate(home, commit) == before and len(server.log) == asked
    error = refused(home)
    assert f"revision: {commit}" in error.fix and "cannot be reached" in error.what
    code = "import sys\nfrom pathlib import Path\nfrom buildsys.sources import modelscope as m\n"
    code += f"m.locate(m.Knobs(repo={REPO!r}, revision={commit!r}), Path(), Path({str(home)!r}))\n"
    code += "print([name for name in ('modelscope_hub', 'requests', 'torch') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]", "what is remembered needs no client"


def test_a_silent_site_is_asked_once_for_all_recipes(home: Path, server: ModelScopeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    assert "cannot be reached" in refused(home).what
    waits = len(slept)
    with pytest.raises(BuildError, match="cannot be reached") as caught:
        locate(home, repo="org/other")
    assert waits and len(slept) == waits and caught.value.where == "http://127.0.0.1:9/models/org/other"
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    server.fail(r"repo/files", status=503, times=9)
    assert "HTTP 503" in refused(home).what
    server.faults.clear()
    assert sorted(locate(home).files) == OURS, "a site that stumbles is asked again"


@pytest.mark.parametrize("proxy", ["socks5://user:canary@127.0.0.1:9", "http://"])
def test_a_proxy_that_is_none(proxy: str, home: Path, server: ModelScopeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setitem(sys.modules, "socks", None)
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://modelscope.example")
    error = refused(home)
    assert "proxy" in error.what and "http://host:port" in error.fix and "canary" not in str(error)


def test_damaged_memory_is_asked_for_again(server: ModelScopeServer, home: Path) -> None:
    commit = str(locate(home).how["revision"])
    before = locate(home, commit)
    for path in home.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-3])
    assert locate(home, commit).sha256 == before.sha256
    assert locate(home, commit).files["model.safetensors"].read_bytes() == HEADER


def test_complete_files_are_not_asked_for_again(server: ModelScopeServer, home: Path) -> None:
    files = fetch(locate(home))
    server.log.clear()
    server.add(REPO, {**MODEL, "config.json": b"{}"})  # weights as before, at another commit
    again = fetch(locate(home))
    assert again["model.safetensors"] == files["model.safetensors"] and again["config.json"].read_bytes() == b"{}"
    assert not server.asked("GET", sha256(WEIGHTS).hexdigest())


def test_a_cut_download_goes_on_where_it_stopped(server: ModelScopeServer, home: Path) -> None:
    found = locate(home)
    server.log.clear()
    server.fail(r"/objects/", cut=True)
    assert fetch(found)["model.safetensors"].read_bytes() == WEIGHTS
    assert [one.headers.get("range") for one in server.asked("GET", "/objects/")] == [None, f"bytes={len(WEIGHTS) // 2}-"]


def test_faults_while_planning_are_outlived(server: ModelScopeServer, home: Path) -> None:
    server.fail(r"repo/files", status=503)
    server.fail(r"FilePath=config.json", status=500)
    server.fail(r"/objects/", cut=True)
    assert sorted(locate(home).files) == OURS


def test_a_server_that_stays_broken_is_named(server: ModelScopeServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("buildsys.hubs.modelscope_files.time.sleep", lambda seconds: None)
    server.fail(r"FilePath=config.json", status=502, times=99)
    error = refused(home)
    assert "HTTP 502" in error.what and REPO in error.where and "again" in error.fix


def test_wrong_bytes_are_refused_and_not_kept(server: ModelScopeServer, home: Path) -> None:
    found = locate(home)
    damaged = WEIGHTS[:-1] + bytes([WEIGHTS[-1] ^ 1])
    server.fail(r"/objects/", body=damaged)
    with pytest.raises(BuildError) as caught:
        fetch(found)
    assert sha256(damaged).hexdigest() in caught.value.what and sha256(WEIGHTS).hexdigest() in caught.value.what
    assert fetch(found)["model.safetensors"].read_bytes() == WEIGHTS, "the same command mends it"
    server.fail(r"FilePath=tokenizer_config.json", body=b"[]")
    (found.files["tokenizer_config.json"]).unlink()
    assert "sha256" in refused(home).what


def test_a_damaged_file_in_the_cache_is_brought_again(server: ModelScopeServer, home: Path) -> None:
    found = locate(home)
    path = fetch(found)["model.safetensors"]
    path.write_bytes(bytes(len(WEIGHTS)))
    assert fetch(found)["model.safetensors"].read_bytes() == WEIGHTS


def test_gated_and_private(server: ModelScopeServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[REPO].gated = True
    error = refused(home)
    assert "gated" in error.what and "modelscope login" in error.fix and f"{server.url}/models/{REPO}" in error.fix
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", READER)
    assert sorted(fetch(locate(home))) == OURS, "the token is not sent on to the object store, which would refuse it"
    server.repos[REPO].private = True
    assert "private" in refused(home).what


CANARY = "ms-canary-0d1e2f3a4b5c"


def test_no_token_is_told_or_kept(server: ModelScopeServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", CANARY)
    assert "modelscope login" in refused(home).fix and CANARY not in str(refused(home))
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", f"{CANARY}\n")  # requests quotes such a header
    assert "line end" in refused(home).what and CANARY not in str(refused(home))
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", f"{CANARY}é漢")
    assert "ASCII" in refused(home).what and CANARY not in str(refused(home))
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"http://user:{CANARY}@127.0.0.1:9")
    monkeypatch.setattr("modelscope_hub._legacy_api.REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
    assert CANARY not in str(refused(home))
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", WRITER)
    fetch(locate(home))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written and not [path for path in written if WRITER.encode() in path.read_bytes() or CANARY.encode() in path.read_bytes()]


def test_what_is_not_there(server: ModelScopeServer, home: Path) -> None:
    server.repos[REPO].tags["v1"] = server.repos[REPO].branches["master"]
    error = refused(home, "v2")
    assert "no revision v2" in error.what and "master, v1" in error.what
    with pytest.raises(BuildError, match=r"org/absent .*404"):
        locate(home, repo="org/absent")
    assert "no revision" in refused(home, "0" * 40).what


def test_a_site_that_is_none(server: ModelScopeServer, home: Path) -> None:
    server.fail(r"repo/files", body=b"<html>a proxy</html>")
    assert "MODELSCOPE_ENDPOINT" in refused(home).fix


def test_pickles_alone_and_names_that_leave(server: ModelScopeServer, home: Path) -> None:
    server.add(REPO, {"config.json": b"{}", "pytorch_model.bin": b"x"})
    error = refused(home)
    assert "pickle" in error.what and f"modelscope download {REPO}" in error.fix
    server.add(REPO, {**MODEL, "../../evil": b"x"})
    assert "outside" in refused(home).what


def test_shards(server: ModelScopeServer, home: Path) -> None:
    shards = {
        f"model-0000{number}-of-00002.safetensors": headers.encode({f"{number}": ("F16", (4,))}, {})[0] + bytes(8) for number in (1, 2)
    }
    index = json.dumps({"weight_map": {str(number): name for number, name in enumerate(shards, 1)}}).encode()
    files = {"config.json": b"{}", "model.safetensors.index.json": index, **shards}
    server.add(REPO, files)
    found = locate(home)
    assert found.sizes == {name: len(data) for name, data in shards.items()}
    assert {name: path.read_bytes() for name, path in fetch(found).items()} == files


def test_a_full_disk_is_told_before_the_first_byte(server: ModelScopeServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = locate(home)
    huge = {**found.how, "sizes": {**found.how["sizes"], "model.safetensors": 1 << 60}}
    with pytest.raises(BuildError, match="GiB free"):
        modelscope.fetch(huge, found.sha256, quiet)


def test_knobs() -> None:
    assert modelscope.floats(modelscope.Knobs(repo=REPO)) == "revision: master may move"
    assert modelscope.floats(modelscope.Knobs(repo=REPO, revision="a" * 40)) == ""
    for wrong in ({"repo": "name-alone"}, {"repo": "../x"}, {"repo": "a/b/c"}, {"repo": REPO, "revision": "../x"}):
        with pytest.raises(ValidationError):
            modelscope.Knobs.model_validate(wrong)


def test_the_package_is_named_where_it_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    assert "pip install 'buildsys[modelscope]'" in refused(home).fix

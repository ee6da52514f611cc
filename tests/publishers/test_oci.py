"""The OCI publisher against Debian's docker-registry: what others find there, what refers to it, and what is never trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from publishers.ociuser import REPO, WEIGHTS, at, publish, quiet, refused, verify
from publishers.places import described, release
from pydantic import ValidationError
from registry import Proxy, Server, serving

from buildsys.hubs import registry, registry_http
from buildsys.hubs.registry_login import PASSWORD
from buildsys.hubs.registry_login import USER as USER_KNOB
from buildsys.publishers import oci

STATEMENT = {"provenance__statement.json": '{"_type": "https://in-toto.io/Statement/v1"}\n'}
IN_TOTO = "application/vnd.in-toto+json"
SIGNED = {**STATEMENT, "provenance__statement.intoto.jsonl": '{"payload": ""}\n'}


@pytest.fixture(autouse=True)
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login of whoever runs the tests."""
    for name in (USER_KNOB, PASSWORD, "REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits before another attempt, which tests do not wait."""
    waits: list[float] = []
    for module in (registry, registry_http):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
    return waits


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "registry") as running:
        yield running


@pytest.fixture
def proxy(server: Server, slept: list[float]) -> Iterator[Proxy]:
    with Proxy(server) as running:
        yield running


def methods(server: Server, since: int = 0) -> list[str]:
    return [method for method, _, _ in server.requests()[since:]]


# What is there


def test_others_pull_the_same_bytes(server: Server, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a", LICENSE="free\n", **STATEMENT)
    url = publish(at(server.host), made)
    said = server.manifest(REPO, "latest")
    assert said is not None and said == server.manifest(REPO, made.tag) == server.manifest(REPO, url.rpartition("@")[2])
    assert said["artifactType"] == "application/vnd.cncf.model.manifest.v1+json" and said["schemaVersion"] == 2
    layers = {layer["annotations"]["org.cncf.model.filepath"]: layer for layer in said["layers"]}
    assert layers.keys() == made.files.keys() and len(layers) == len(said["layers"])
    for name, layer in layers.items():
        status, _, raw = server.ask("GET", f"/v2/{REPO}/blobs/{layer['digest']}")
        assert status == 200 and raw == (made.tree / name).read_bytes() and layer["size"] == len(raw)
    kinds = {name: layer["mediaType"].removeprefix("application/vnd.cncf.model.") for name, layer in layers.items()}
    assert kinds[WEIGHTS] == "weight.v1.raw" and kinds["config.json"] == kinds["deploy/lmdeploy.yaml"] == "weight.config.v1.raw"
    assert kinds["LICENSE"] == kinds["provenance/statement.json"] == "doc.v1.raw"
    _, _, raw = server.ask("GET", f"/v2/{REPO}/blobs/{said['config']['digest']}")
    config = json.loads(raw)
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in said["layers"]]}
    assert config["descriptor"] == {"name": "tiny", "version": made.tag} and config["config"]["format"] == "safetensors"
    assert said["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"


def test_the_config_says_how_it_is_quantized(server: Server, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a")
    (made.tree / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "awq", "bits": 4}}')
    made = described(made.tree)
    publish(at(server.host), made)
    said = server.manifest(REPO, "latest")
    assert said is not None
    config = json.loads(server.ask("GET", f"/v2/{REPO}/blobs/{said['config']['digest']}")[2])
    assert config["descriptor"]["family"] == "llama"
    assert (config["config"]["quantization"], config["config"]["precision"]) == ("awq", "int4")


def test_oras_pulls_the_same_files(server: Server, tmp_path: Path) -> None:
    client = pytest.importorskip("oras.client")
    made = release(tmp_path / "tree", "a")
    publish(at(server.host), made)
    pulled = client.OrasClient(insecure=True).pull(f"{server.host}/{REPO}:latest", outdir=str(tmp_path / "pulled"))
    assert len(pulled) == len(made.files)
    for name, digest in made.files.items():
        assert sha256((tmp_path / "pulled" / name).read_bytes()).hexdigest() == digest


def test_small_and_equal_files(server: Server, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a", empty="", single="x", twin="x", two="xy")
    publish(at(server.host), made)
    assert verify(at(server.host), made)
    before = len(server.requests())
    publish(at(server.host), made)
    assert set(methods(server, before)) == {"GET", "HEAD"}, "nothing is sent twice"


def test_equal_files_of_two_releases_are_sent_once(server: Server, tmp_path: Path) -> None:
    publish(at(server.host), release(tmp_path / "one", "a"))
    before = len(server.requests())
    publish(at(server.host), release(tmp_path / "two", "a", notes="new"))
    assert methods(server, before).count("POST") == 2, "the new file and the artifact's config"


def test_plan_tells_what_would_be_sent_and_only_asks(server: Server, tmp_path: Path) -> None:
    one, two = release(tmp_path / "one", "a", gone="soon"), release(tmp_path / "two", "b", notes="new")
    knobs = at(server.host)
    first = oci.plan(knobs, one, "to")
    assert "push 4 of 4 files" in first[0] and one.tag in first[0] and first[1] == "tag it latest"
    publish(knobs, one)
    before = len(server.requests())
    assert "send nothing" in oci.plan(knobs, one, "to")[0]
    lines = oci.plan(knobs, two, "to")
    assert "push 3 of 4 files" in lines[0] and lines[1] == f"move latest from {one.tag} to it" and lines[2:] == ("drop gone",)
    assert set(methods(server, before)) == {"GET", "HEAD"}


def test_another_tag(server: Server, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a")
    publish(at(server.host, tag="v1.0"), made)
    assert server.tags(REPO) == sorted([made.tag, "v1.0"])
    assert "holds nothing" in refused(verify, at(server.host), made).what


# Provenance


@pytest.mark.parametrize(("files", "kind"), [(STATEMENT, IN_TOTO), (SIGNED, "application/vnd.dsse.envelope.v1+json")])
def test_the_statement_refers_to_the_manifest_by_a_tag(files: dict[str, str], kind: str, server: Server, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a", **files)
    digest = publish(at(server.host), made).rpartition("@")[2]
    index = server.manifest(REPO, digest.replace(":", "-"))
    assert index is not None and [entry["artifactType"] for entry in index["manifests"]] == [kind]
    referrer = server.manifest(REPO, index["manifests"][0]["digest"])
    assert referrer is not None and referrer["subject"]["digest"] == digest and referrer["artifactType"] == kind
    name = sorted(files)[0].replace("__", "/")
    assert server.ask("GET", f"/v2/{REPO}/blobs/{referrer['layers'][0]['digest']}")[2] == (made.tree / name).read_bytes()


def test_what_others_attached_stays(server: Server, tmp_path: Path) -> None:
    made, knobs = release(tmp_path / "tree", "a", **STATEMENT), at(server.host)
    bare = release(tmp_path / "bare", "a")
    digest = publish(knobs, made).rpartition("@")[2]
    tag = digest.replace(":", "-")
    theirs = server.manifest(REPO, publish(at(server.host, tag="other"), bare).rpartition("@")[2])
    assert theirs is not None
    index = {"schemaVersion": 2, "mediaType": registry.INDEX, "manifests": [{"mediaType": registry.MANIFEST, **_entry(server, "other")}]}
    server.put_manifest(REPO, tag, index)
    assert "provenance is not attached" in refused(verify, knobs, made).what
    publish(knobs, made)
    kept = server.manifest(REPO, tag)
    assert kept is not None and len(kept["manifests"]) == 2 and kept["manifests"][0]["digest"] == _entry(server, "other")["digest"]
    assert verify(knobs, made)


def _entry(server: Server, tag: str) -> dict[str, Any]:
    _, headers, raw = server.ask("GET", f"/v2/{REPO}/manifests/{tag}", Accept=registry.MANIFEST)
    return {"digest": headers["Docker-Content-Digest"], "size": len(raw)}


def test_the_statement_refers_to_the_manifest_by_the_api(server: Server, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a", **STATEMENT)
    with Proxy(server, referrers=True) as proxy:
        digest = publish(at(proxy.host), made).rpartition("@")[2]
        assert proxy.referrers is not None and [entry["artifactType"] for entry in proxy.referrers[digest]] == [IN_TOTO]
        assert server.manifest(REPO, digest.replace(":", "-")) is None, "no tag stands in for an API that is there"
        assert publish(at(proxy.host), made) and verify(at(proxy.host), made)
        assert len(proxy.referrers[digest]) == 1


# What is not trusted


def test_a_damaged_blob_is_found(server: Server, tmp_path: Path) -> None:
    knobs, one, two = at(server.host), release(tmp_path / "one", "a", notes="1"), release(tmp_path / "two", "a", notes="2")
    publish(knobs, one)
    path = server.blob(one.files[WEIGHTS])
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    error = refused(verify, knobs, one)
    assert WEIGHTS in error.what and one.files[WEIGHTS][:12] in error.what
    assert WEIGHTS in refused(publish, knobs, two).what
    assert sorted(server.tags(REPO)) == sorted([one.tag, "latest"]), "what does not read back is never tagged"
    path.unlink()
    assert WEIGHTS in refused(verify, knobs, one).what
    publish(knobs, two)
    assert verify(knobs, two), "a blob that is gone is sent again"


def test_digests_that_do_not_match(proxy: Proxy, tmp_path: Path) -> None:
    knobs, made = at(proxy.host), release(tmp_path / "tree", "a")
    wrong = "sha256:" + "0" * 64
    proxy.fail("PUT .*/manifests/", status=201, headers={"Docker-Content-Digest": wrong})
    error = refused(publish, knobs, made)
    assert wrong in error.what
    publish(knobs, made)
    proxy.fail("GET .*/manifests/sha256:", status=200, body=b'{"schemaVersion": 2}')
    assert "when asked for sha256:" in refused(verify, knobs, made).what


def test_a_tag_that_somebody_else_moved_meanwhile_is_left_there(proxy: Proxy, tmp_path: Path) -> None:
    knobs, one, two, theirs = at(proxy.host), release(tmp_path / "1", "a"), release(tmp_path / "2", "b"), release(tmp_path / "3", "c")
    publish(knobs, one)
    proxy.fail(f"GET .*/blobs/sha256:{two.files[WEIGHTS]}", before=lambda: publish(at(proxy.server.host), theirs))
    error = refused(publish, knobs, two)
    assert "by someone else meanwhile" in error.what and verify(knobs, theirs)


def test_a_release_tag_that_was_moved_is_refused(server: Server, tmp_path: Path) -> None:
    knobs, one, two = at(server.host), release(tmp_path / "1", "a"), release(tmp_path / "2", "b")
    publish(knobs, one)
    publish(knobs, two)
    server.replace(REPO, one.tag, WEIGHTS, b"tampered")
    assert "somebody moved" in refused(publish, knobs, one).what
    assert "somebody moved" in refused(oci.rollback, knobs, one.digest, "to", quiet).what
    assert verify(knobs, two)


def test_an_image_is_not_replaced(server: Server, tmp_path: Path) -> None:
    image = {"schemaVersion": 2, "mediaType": registry.MANIFEST, "layers": []}
    raw = b"{}"
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": server.put_blob(REPO, raw), "size": 2}
    server.put_manifest(REPO, "latest", {**image, "config": config})
    made = release(tmp_path / "tree", "a")
    for what in (lambda: oci.plan(at(server.host), made, "to"), lambda: publish(at(server.host), made)):
        assert "which no publish made" in refused(what).what
    assert server.tags(REPO) == ["latest"]


SHORT = {"mediaType": "x.raw", "size": 1, "digest": "sha256:x"}


@pytest.mark.parametrize("broken", [{"layers": {}}, {"layers": [{}]}, {"layers": ["x"]}, {"layers": [SHORT]}, {"config": None}])
def test_manifests_that_are_broken(broken: dict[str, Any], proxy: Proxy, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a")
    publish(at(proxy.host), made)
    said = {**(proxy.server.manifest(REPO, "latest") or {}), **broken}
    proxy.fail("GET .*/manifests/", status=200, body=json.dumps(said).encode(), times=9)
    for what in (verify, publish):
        assert "which no publish made" in refused(what, at(proxy.host), made).what
    refused(oci.rollback, at(proxy.host), made.digest, "to", quiet)


def test_rollback_by_a_prefix_that_is_none(server: Server, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a")
    publish(at(server.host), made)
    for digest in (made.digest[:7], "not hex at all", made.digest[:16] + "0" * 48, made.digest.upper()):
        refused(oci.rollback, at(server.host), digest, "to", quiet)


# Names


GOOD = ["ghcr.io/my-org/model-4bit", "localhost:5000/m", "localhost/m", "registry:5000/a/b_c/d--e.f", "docker.io/a/x", "[::1]:5000/x"]
BAD = ["m", "my-org/m", "https://ghcr.io/a/b", "ghcr.io/A/b", "ghcr.io/a:latest", "u:p@ghcr.io/a", "ghcr.io/", "ghcr.io/a//b", ""]


@pytest.mark.parametrize("repo", GOOD)
def test_names_that_are_repositories(repo: str) -> None:
    assert oci.Knobs(repo=repo).repo == repo


@pytest.mark.parametrize("repo", BAD)
def test_names_that_are_none(repo: str) -> None:
    with pytest.raises(ValidationError):
        oci.Knobs(repo=repo)


def test_tags_that_are_none() -> None:
    for tag in ("", "a b", "-x", "sha256-0123456789abcdef", "x" * 129):
        with pytest.raises(ValidationError):
            oci.Knobs(repo="ghcr.io/a/b", tag=tag)


def test_where_it_goes() -> None:
    assert oci.destination(oci.Knobs(repo="ghcr.io/a/b", tag="v1"), Path("/w")) == "oci://ghcr.io/a/b:v1"

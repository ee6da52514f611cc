"""The registry client against Debian's docker-registry: uploads that are cut, logins of every kind, and hosts that are none."""

from __future__ import annotations

import base64
import json
import ssl
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from publishers.ociuser import REPO, WEIGHTS, at, large, publish, refused, verify
from publishers.places import release
from registry import SECRET, USER, Proxy, Server, serving
from tokenserver import TokenServer, certified

from buildsys.hubs import registry, registry_http
from buildsys.hubs.registry_login import PASSWORD, challenge
from buildsys.hubs.registry_login import USER as USER_KNOB
from buildsys.publishers import Release, oci

STATEMENT = {"provenance__statement.json": '{"_type": "https://in-toto.io/Statement/v1"}\n'}


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


# Cuts and faults


def patches(proxy: Proxy) -> list[dict[str, str]]:
    return [headers for method, _, headers in proxy.requests if method == "PATCH"]


def large_alone(server: Server, folder: Path) -> Release:
    """A release of whose files the registry lacks the large one only."""
    made = large(folder)
    for name in made.files.keys() - {WEIGHTS}:
        server.put_blob(REPO, (made.tree / name).read_bytes())
    return made


def test_a_cut_upload_goes_on_from_what_arrived(proxy: Proxy, tmp_path: Path) -> None:
    made = large_alone(proxy.server, tmp_path / "tree")
    proxy.fail("PATCH", cut_request_after=0, skip=2)
    publish(at(proxy.host, chunk_mib=1), made)
    sent = [headers["Content-Range"] for headers in patches(proxy) if "Content-Range" in headers]
    assert sent == ["0-1048575", "1048576-2097151", "2097152-3145727", "2097152-3145727", "3145728-3670015"]
    assert verify(at(proxy.host), made)


def test_a_registry_that_forgets_a_cut_upload_gets_it_anew(proxy: Proxy, tmp_path: Path) -> None:
    made = large_alone(proxy.server, tmp_path / "tree")
    proxy.fail("PATCH", cut_request_after=2 << 20)
    publish(at(proxy.host), made)
    sent = [headers for headers in patches(proxy) if headers["Content-Length"] == str(made.sizes[WEIGHTS])]
    assert len(sent) == 2 and not any("Content-Range" in headers for headers in sent)
    assert verify(at(proxy.host), made)


def test_what_is_cut_for_good_has_no_tag_and_is_kept(proxy: Proxy, tmp_path: Path) -> None:
    made, knobs = large(tmp_path / "tree"), at(proxy.host)
    last = max(made.files.values())  # blobs go in the order of their digests
    proxy.fail(f"PUT .*{last}", status=500, times=99)
    error = refused(publish, knobs, made)
    assert "500" in error.what and "4 times" in error.what and proxy.server.tags(REPO) == []
    assert "holds nothing" in refused(verify, knobs, made).what
    proxy.faults.clear()
    began = len(proxy.requests)
    publish(knobs, made)
    begun = [path for method, path, _ in proxy.requests[began:] if method == "POST"]
    assert len(begun) == 2, "the one file that was not there, and the artifact's config"
    assert verify(knobs, made)


def test_a_run_that_dies_before_the_tag_leaves_the_old_release(proxy: Proxy, tmp_path: Path) -> None:
    knobs, one, two = at(proxy.host), release(tmp_path / "one", "a"), release(tmp_path / "two", "b")
    publish(knobs, one)
    proxy.fail("PUT .*/manifests/latest", status=503, times=99)
    assert "503" in refused(publish, knobs, two).what
    assert verify(knobs, one)
    proxy.faults.clear()
    assert publish(knobs, two) == verify(knobs, two)


def test_pieces(proxy: Proxy, tmp_path: Path) -> None:
    made = large(tmp_path / "tree")
    publish(at(proxy.host, chunk_mib=1), made)
    ranges = [headers["Content-Range"] for headers in patches(proxy) if "Content-Range" in headers]
    assert ranges == ["0-1048575", "1048576-2097151", "2097152-3145727", "3145728-3670015"]
    assert verify(at(proxy.host), made)


def test_a_busy_registry_is_asked_again(proxy: Proxy, tmp_path: Path, slept: list[float]) -> None:
    proxy.fail("HEAD .*/blobs/", status=503, times=2)
    proxy.fail("POST .*/blobs/uploads/", status=429, headers={"Retry-After": "7"})
    proxy.fail("PATCH", status=502)
    proxy.fail("PUT .*/manifests/", status=500)
    publish(at(proxy.host), release(tmp_path / "tree", "a"))
    assert slept == [0.5, 2.0, 7.0, 0.5, 0.5]


def test_a_cut_answer_is_taken_up(proxy: Proxy, tmp_path: Path) -> None:
    made = large(tmp_path / "tree")
    publish(at(proxy.host), made)
    proxy.fail(f"GET .*/blobs/sha256:{made.files[WEIGHTS]}", cut_answer_after=1 << 20, times=2)
    began = len(proxy.requests)
    assert verify(at(proxy.host), made)
    assert sum("Range" in headers for _, _, headers in proxy.requests[began:]) == 2


def test_other_bytes_than_were_meant_are_refused(server: Server, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a")
    (made.tree / WEIGHTS).write_text("z" * made.sizes[WEIGHTS])
    error = refused(publish, at(server.host), made)
    assert "DIGEST_INVALID" in error.what and "publish again" in error.fix and server.tags(REPO) == []


def test_a_file_that_is_gone(server: Server, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a")
    (made.tree / WEIGHTS).unlink()
    assert WEIGHTS in refused(publish, at(server.host), made).where and server.tags(REPO) == []


# Who may


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "guarded", htpasswd=True) as running:
        yield running


def docker_config(tmp_path: Path, **config: Any) -> None:
    (tmp_path / "docker").mkdir(exist_ok=True)
    (tmp_path / "docker/config.json").write_text(json.dumps(config))


def test_without_a_login(guarded: Server, tmp_path: Path) -> None:
    error = refused(publish, at(guarded.host), release(tmp_path / "tree", "a"))
    assert "asks for a login, and there is none" in error.what and f"docker login {guarded.host}" in error.fix


def test_a_login_from_the_environment(guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_KNOB, USER)
    monkeypatch.setenv(PASSWORD, SECRET)
    made = release(tmp_path / "tree", "a")
    assert publish(at(guarded.host), made) == verify(at(guarded.host), made)


def test_a_login_from_dockers_file(guarded: Server, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a")
    docker_config(tmp_path, auths={guarded.host: {"auth": base64.b64encode(f"{USER}:{SECRET}".encode()).decode()}})
    assert publish(at(guarded.host), made)
    docker_config(tmp_path, auths={f"http://{guarded.host}": {"username": USER, "password": SECRET}})
    assert verify(at(guarded.host), made)
    docker_config(tmp_path, auths={guarded.host: {"auth": "!!"}})
    assert "docker login" in refused(verify, at(guarded.host), made).fix
    (tmp_path / "docker/config.json").write_text(f'{{"auths": "{SECRET}')
    assert "JSON" in refused(verify, at(guarded.host), made).what


def helper(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_a_login_from_a_credential_helper(guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, knobs = release(tmp_path / "tree", "a"), at(guarded.host)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    answer = json.dumps({"ServerURL": guarded.host, "Username": USER, "Secret": SECRET})
    helper(tmp_path / "bin", "kept", f"read server; test \"$1 $server\" = 'get {guarded.host}' && echo '{answer}'")
    docker_config(tmp_path, credHelpers={guarded.host: "kept"})
    assert publish(knobs, made)
    docker_config(tmp_path, credsStore="kept", auths={guarded.host: {}})
    assert verify(knobs, made)
    docker_config(tmp_path, credHelpers={guarded.host: "absent"})
    assert "docker-credential-absent, which is not on the PATH" in refused(verify, knobs, made).what
    docker_config(tmp_path, credHelpers={guarded.host: "../../bin/sh"})
    assert "no program's name" in refused(verify, knobs, made).what
    helper(tmp_path / "bin", "odd", f"echo {SECRET}")
    docker_config(tmp_path, credHelpers={guarded.host: "odd"})
    assert "not JSON" in refused(verify, knobs, made).what
    helper(tmp_path / "bin", "none", "echo credentials not found in native keychain; exit 1")
    docker_config(tmp_path, credsStore="none")
    assert "there is none" in refused(verify, knobs, made).what


def test_a_wrong_password(guarded: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_KNOB, USER)
    monkeypatch.setenv(PASSWORD, "canary-of-a-password")
    error = refused(publish, at(guarded.host), release(tmp_path / "tree", "a"))
    assert f"refuses the login from {USER_KNOB}" in error.what and "canary" not in str(error)


def test_secrets_that_a_registry_quotes_are_not_shown(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_KNOB, USER)
    monkeypatch.setenv(PASSWORD, SECRET)
    basic = base64.b64encode(f"{USER}:{SECRET}".encode()).decode()
    said = {"errors": [{"code": "DENIED", "message": f"no, {SECRET} ({basic}) may not\u001b[31m"}]}
    proxy.fail("GET", status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
    proxy.fail("GET", status=403, body=json.dumps(said).encode())
    error = refused(publish, at(proxy.host), release(tmp_path / "tree", "a"))
    assert "DENIED: no, *** (***) may not" in error.what and basic not in str(error) and "\u001b" not in str(error)
    assert "may not do this" in error.what and "docker login" in error.fix


def test_a_login_stays_with_its_registry(server: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads may go to a bucket elsewhere, which must not learn the password."""
    monkeypatch.setenv(USER_KNOB, USER)
    monkeypatch.setenv(PASSWORD, SECRET)
    with Proxy(server) as bucket:
        _, headers, _ = server.ask("POST", f"/v2/{REPO}/blobs/uploads/")
        where = urlsplit(headers["Location"])
        proxy.fail("GET", status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        proxy.fail("POST", status=202, headers={"Location": f"http://{bucket.host}{where.path}?{where.query}"})
        publish(at(proxy.host), release(tmp_path / "tree", "a"))
        assert len(bucket.requests) == 2 and not any("Authorization" in headers for _, _, headers in bucket.requests)
        assert sum("Authorization" in headers for _, _, headers in proxy.requests) > 5


# Tokens


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[TokenServer]:
    with TokenServer(tmp_path / "tokens") as running:
        yield running


@pytest.fixture
def bearer(tokens: TokenServer, tmp_path: Path) -> Iterator[Server]:
    said = {"realm": tokens.realm, "service": "tests-registry", "issuer": "tests", "rootcertbundle": str(tokens.bundle)}
    with serving(tmp_path / "bearer", token=said) as running:
        yield running


def test_a_token_for_each_scope(bearer: Server, tokens: TokenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(USER_KNOB, USER)
    monkeypatch.setenv(PASSWORD, SECRET)
    made = release(tmp_path / "tree", "a", **STATEMENT)
    assert publish(at(bearer.host), made) == verify(at(bearer.host), made)
    scopes = [asked["scope"][0].rpartition(":") for _, asked, _ in tokens.asked]
    assert {repository for repository, _, _ in scopes} == {f"repository:{REPO}"}
    assert [set(actions.split(",")) for _, _, actions in scopes] == [{"pull"}, {"pull", "push"}, {"pull"}], "in any order: it is a set"


def test_a_refresh_token(bearer: Server, tokens: TokenServer, tmp_path: Path) -> None:
    docker_config(tmp_path, auths={bearer.host: {"identitytoken": SECRET}})
    made = release(tmp_path / "tree", "a")
    assert publish(at(bearer.host), made)
    assert {method for method, _, _ in tokens.asked} == {"POST"}


def test_a_token_server_that_refuses(bearer: Server, tokens: TokenServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = release(tmp_path / "tree", "a")
    assert "there is none" in refused(publish, at(bearer.host), made).what
    monkeypatch.setenv(USER_KNOB, USER)
    monkeypatch.setenv(PASSWORD, "canary-of-a-password")
    error = refused(publish, at(bearer.host), made)
    assert "refuses the login" in error.what and "canary" not in str(error)


def test_passwords_go_nowhere_without_tls(proxy: Proxy, tmp_path: Path) -> None:
    asked = 'Bearer realm="http://tokens.example.org/token",service="x"'
    proxy.fail("GET", status=401, headers={"WWW-Authenticate": asked})
    # The proxy is this machine; that it may be spoken to in plain http does not extend to others.
    with registry.Registry("registry.example.org", REPO, insecure=False) as strict:
        error = refused(strict._connection._token, "http://tokens.example.org/token", "x", "y")
    assert "without TLS" in error.what and "tokens.example.org" in error.what


def test_challenges() -> None:
    both = 'Basic realm="a, b", Bearer realm="https://t/token?x=1",service="s",scope="repository:a/b:pull,push"'
    found = challenge(both)
    assert found is not None
    assert (found.scheme, found.realm, found.service, found.scope) == ("bearer", "https://t/token?x=1", "s", "repository:a/b:pull,push")
    basic = challenge('basic realm="x"')
    assert basic is not None and basic.scheme == "basic"
    assert challenge("Negotiate") is None and challenge("") is None


# Hosts


def test_a_host_that_nobody_knows(tmp_path: Path, slept: list[float]) -> None:
    error = refused(oci.plan, oci.Knobs(repo="registry.invalid/x"), release(tmp_path / "tree", "a"), "to")
    assert "registry.invalid" in error.what and error.where == "registry.invalid/x"


PROXIES = ["socks5://127.0.0.1:1", "http://canary:secret@[::1"]
CERTIFICATES = ["/nonexistent", "/dev/null"]


@pytest.mark.parametrize(
    ("name", "value"), [*(("HTTPS_PROXY", value) for value in PROXIES), *(("SSL_CERT_FILE", value) for value in CERTIFICATES)]
)
def test_an_environment_that_cannot_be_used(name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    error = refused(oci.plan, oci.Knobs(repo="registry.invalid/x"), release(tmp_path / "tree", "a"), "to")
    assert name in error.what and "canary" not in str(error)


def test_nothing_listens(tmp_path: Path, slept: list[float]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        host = f"127.0.0.1:{closed.server_port}"
    error = refused(publish, at(host), release(tmp_path / "tree", "a"))
    assert "nothing listens there" in error.what and len(slept) == 3


def test_tls_with_what_speaks_plain_http(server: Server, slept: list[float]) -> None:
    with registry.Registry(server.host, REPO, insecure=False) as strict:
        error = refused(strict.manifest, "latest")
    assert "no TLS connection" in error.what and "insecure: true" in error.fix and slept == []


def test_a_certificate_that_nobody_trusts(tmp_path: Path, slept: list[float]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certified(tmp_path / "tls")[2])
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        running.handle_error = lambda *said: None  # type: ignore[method-assign]
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        with registry.Registry(f"127.0.0.1:{running.server_port}", REPO, insecure=False) as strict:
            error = refused(strict.manifest, "latest")
        running.shutdown()
    assert "no TLS connection" in error.what and "SSL_CERT_FILE" in error.fix and slept == []


def test_no_registry_at_all(proxy: Proxy, tmp_path: Path) -> None:
    made = release(tmp_path / "tree", "a")
    proxy.fail("GET", status=200, body=b"<html>welcome</html>")
    assert "no JSON" in refused(publish, at(proxy.host), made).what
    proxy.fail("GET", status=200, body=b"x" * (9 << 20))
    assert "more than" in refused(publish, at(proxy.host), made).what
    proxy.fail("POST", status=404, body=b'{"errors": [{"code": "NAME_UNKNOWN", "message": "repository name not known to registry"}]}')
    assert "NAME_UNKNOWN" in refused(publish, at(proxy.host), made).what
    proxy.fail("POST", status=202, headers={"Location": "http://[::1"})
    assert "address that is none" in refused(publish, at(proxy.host), made).what
    proxy.fail("PATCH", status=413)
    assert "chunk_mib" in refused(publish, at(proxy.host), made).fix

"""Publishing to OpenXLab: up to its client's process always, and through the real client where there is an environment that holds it.

BUILDSYS_OPENXLAB_VENV names one; with `openxlab` in BUILDSYS_TEST_REQUIRE one is made (15 s and a package index).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
from openxlab_server import KEY, SECRET, SECRETS, OpenXLabServer
from publishers.places import release
from pydantic import ValidationError

from buildsys import disk
from buildsys.errors import BuildError
from buildsys.hubs import openxlab as client
from buildsys.publishers import Receipt, Release, openxlab

KNOBS = openxlab.Knobs(repo="me/tiny", code="https://github.com/me/code")
TO = openxlab.destination(KNOBS, Path())


@pytest.fixture
def one(tmp_path: Path) -> Release:
    return release(tmp_path / "one", "a")


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenXLabServer]:
    with OpenXLabServer() as server:
        server.use(monkeypatch, tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield server


def quiet(what: str, done: int, total: int) -> None:
    assert what and 0 <= done <= total


def publish(made: Release, knobs: openxlab.Knobs = KNOBS) -> Receipt:
    return openxlab.publish(knobs, made, TO, quiet)


def verify(made: Release) -> Receipt:
    return openxlab.verify(KNOBS, made, TO, quiet)


def refused(made: Release, knobs: openxlab.Knobs = KNOBS) -> BuildError:
    with pytest.raises(BuildError) as caught:
        publish(made, knobs)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]
    return caught.value


# Up to the process


@pytest.fixture
def bare(server: OpenXLabServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without openxlab: this Python, under a name that brings none of its packages."""
    interpreter = tmp_path / "bare" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    (tmp_path / "bare" / "pyvenv.cfg").write_text(f"home = {Path(sys.base_prefix) / 'bin'}\n")
    interpreter.symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    monkeypatch.setenv("BUILDSYS_OPENXLAB_VENV", str(tmp_path / "bare"))
    return interpreter


def test_an_environment_that_is_none(one: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILDSYS_OPENXLAB_VENV", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert f"pip install {client.PIN}" in refused(one).fix


def test_an_environment_without_the_client(bare: Path, one: Release) -> None:
    error = refused(one)
    assert "cannot be loaded (ModuleNotFoundError)" in error.what, "and buildsys/hubs/openxlab.py was not taken for it"


def test_no_access_key(bare: Path, one: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENXLAB_AK")
    error = refused(one)
    assert "no access key" in error.what and "OPENXLAB_AK" in error.fix
    (tmp_path / "home" / ".openxlab").mkdir(parents=True)
    (tmp_path / "home" / ".openxlab" / "config.json").write_text(f'{{"ak": "{KEY}", "sk": "{SECRET}"}}')
    assert "cannot be loaded" in refused(one).what, "what `openxlab login` has written is found"


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 3\n", "#!/bin/sh\necho no json\n", "neither"])
def test_a_process_that_does_not_answer(script: str, bare: Path, one: Release) -> None:
    bare.unlink()
    bare.write_text(script)
    bare.chmod(0o755)
    error = refused(one)
    assert "ended without an answer" in error.what and str(bare) in error.fix


def test_other_tokens_stay_here(bare: Path, one: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    bare.unlink()
    bare.write_text(f"#!/bin/sh\nenv > {tmp_path}/seen\n")
    bare.chmod(0o755)
    refused(one)
    seen = (tmp_path / "seen").read_text()
    assert KEY in seen and "hf_canary" not in seen and f"HOME={disk.user_cache()}" in seen


def test_the_process_ends_with_whoever_asked(bare: Path, tmp_path: Path) -> None:
    job = '{"do": "read", "repo": "me/tiny", "login": "", "endpoint": "", "store": "", "names": []}\n'
    stuck = "import sys; sys.path.insert(0, '.'); import openxlab_runner as r; r._do = lambda *a: __import__('time').sleep(60); r.main()"
    command = [sys.executable, "-c", stuck]
    runner = subprocess.Popen(command, cwd=client.RUNNER.parent, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert runner.stdin is not None
    runner.stdin.write(job)
    runner.stdin.close()
    assert runner.wait(20) == 1


def test_plan_says_what_it_cannot_do(one: Release, server: OpenXLabServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUILDSYS_OPENXLAB_VENV", raising=False)
    lines = openxlab.plan(KNOBS, one, TO)
    assert "experimental" in lines[0] and "no rollback" in lines[1] and "make a Python environment" in lines[2]
    assert any("deploy/lmdeploy.yaml" in line and "as deploy--lmdeploy.yaml" in line for line in lines)
    assert not server.log and not disk.user_cache().exists()
    with pytest.raises(BuildError, match="no earlier release"):
        openxlab.rollback(KNOBS, one.digest, TO, quiet)


def test_what_cannot_be_stored(tmp_path: Path) -> None:
    twice = release(tmp_path / "twice", "a", **{"deploy--lmdeploy.yaml": "x"})
    empty = release(tmp_path / "empty", "a", **{"none.txt": ""})
    for made, what in ((twice, "both be deploy--lmdeploy.yaml"), (empty, "none.txt is one")):
        with pytest.raises(BuildError, match=what):
            openxlab.plan(KNOBS, made, TO)
        assert what in refused(made).what


def test_knobs() -> None:
    with pytest.raises(ValidationError):
        openxlab.Knobs(repo="alone")


# Through the real client


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "BUILDSYS_OPENXLAB_VENV" in os.environ:
        return Path(os.environ["BUILDSYS_OPENXLAB_VENV"])
    if "openxlab" not in os.environ.get("BUILDSYS_TEST_REQUIRE", ""):
        pytest.skip("no environment with openxlab: name one in BUILDSYS_OPENXLAB_VENV, or put openxlab into BUILDSYS_TEST_REQUIRE")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        told = list[tuple[str, int, int]]()
        interpreter = client.python(lambda *step: told.append(step))
        assert told == [(f"install {client.PIN}", 0, 1), (f"install {client.PIN}", 1, 1)] and client.ready()
        assert client.python(quiet) == interpreter
        return client.environment()


@pytest.fixture
def real(server: OpenXLabServer, environment: Path, monkeypatch: pytest.MonkeyPatch) -> OpenXLabServer:
    monkeypatch.setenv("BUILDSYS_OPENXLAB_VENV", str(environment))
    return server


def test_a_repository_is_made_and_read_back(real: OpenXLabServer, one: Release, tmp_path: Path) -> None:
    receipt = publish(one)
    assert receipt == verify(one) == Receipt(f"{TO} (experimental)", one.digest)
    stored = real.repos["tiny"]
    assert stored.keys() == {"config.json", "model.safetensors", "deploy--lmdeploy.yaml", openxlab.LIST}
    assert stored["model.safetensors"].data == (one.tree / "model.safetensors").read_bytes()
    assert list(stored)[-1] == openxlab.LIST and not real.count("", "bury"), "nothing is reported to anybody"
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not [secret for secret in SECRETS if secret.encode() in kept]


def test_a_rerun_sends_nothing_and_another_release_what_differs(real: OpenXLabServer, one: Release, tmp_path: Path) -> None:
    publish(one)
    real.log.clear()
    publish(one)
    assert not real.count("PUT", "") and not real.count("POST", "updateFileUploadStatus")
    two = release(tmp_path / "two", "b")
    assert publish(two).digest == two.digest
    sent = {unquote(path).split("?")[0].rpartition("/")[2] for method, path in real.log if method == "PUT"}
    assert sent == {"config.json", "model.safetensors", openxlab.LIST}
    with pytest.raises(BuildError, match=r"config\.json has sha256"):
        verify(one)


def test_an_altered_file_is_found_and_mended(real: OpenXLabServer, one: Release) -> None:
    publish(one)
    real.repos["tiny"]["config.json"].data = b"tampered"
    with pytest.raises(BuildError, match=r"config\.json has sha256"):
        verify(one)
    publish(one)
    assert verify(one).digest == one.digest


def test_a_cut_upload_goes_on_where_it_stopped(real: OpenXLabServer, tmp_path: Path) -> None:
    one = release(tmp_path / "large", "a" * 60)  # 300 kB: three parts
    real.faults.append(("partNumber=2", 403))
    assert "upload a file: HTTP 403" in refused(one).what
    assert [list(parts) for parts in real.uploads.values()] == [[1]]
    real.log.clear()
    publish(one)
    assert not real.count("PUT", r"model\.safetensors\?.*partNumber=1\b") and real.count("PUT", r"model\.safetensors\?.*partNumber=2\b")
    assert verify(one).digest == one.digest


def test_another_file_does_not_take_a_cut_ones_parts(real: OpenXLabServer, tmp_path: Path) -> None:
    real.faults.append(("partNumber=2", 403))
    refused(release(tmp_path / "large", "a" * 60))
    two = release(tmp_path / "two", "b" * 60)
    publish(two)
    assert verify(two).digest == two.digest


def test_a_server_that_stumbles(real: OpenXLabServer, one: Release) -> None:
    real.faults += [("getRepositoryModelList", 502), ("updateFileUploadStatus", 500)]
    publish(one)
    real.faults += [("getRepositoryModelList", 503)] * 3
    assert "HTTP 503" in refused(one).what


def test_who_may_not(real: OpenXLabServer, one: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused(one, KNOBS.model_copy(update={"code": ""}))
    assert "publish.openxlab.code" in error.fix and not real.repos
    monkeypatch.setenv("OPENXLAB_SK", "sk-wrong-secret")
    error = refused(one)
    assert "log in" in error.what and "OPENXLAB_AK" in error.fix and "sk-wrong-secret" not in str(error)
    monkeypatch.setenv("OPENXLAB_SK", SECRET)
    real.faults.append(("getRepositoryModelList", 403))
    assert "does not let this account in" in refused(one).what


def test_nobody_there(real: OpenXLabServer, one: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILDSYS_OPENXLAB_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in refused(one).what


def test_an_environment_that_cannot_be_filled(real: OpenXLabServer, one: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUILDSYS_OPENXLAB_VENV")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nonexistent")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    error = refused(one)
    assert "cannot be installed" in error.what and "pip install openxlab==0.1.3" in error.fix and not client.ready()

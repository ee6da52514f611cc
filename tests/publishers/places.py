"""A place to publish to for each publisher, for the contract test: add an entry to PLACES with each new publisher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hubserver import WRITER, HubServer
from modelscope_server import WRITER as MODELSCOPE_WRITER
from modelscope_server import ModelScopeServer
from registry import serving

from buildsys.publishers import Release, directory, hf_hub, modelscope, oci


@dataclass(frozen=True)
class Place:
    """The other side, empty at first, as one publisher sees it."""

    module: ModuleType
    knobs: Any
    to: Any  # what `destination` answers, or another of its type
    state: Callable[[], object]  # everything there; equal states mean that nothing was changed
    tamper: Callable[[str], None]  # alters a published file behind the publisher's back


def release(folder: Path, text: str, **more: str) -> Release:
    """A folder as it is published: small files, a large one, a file in a folder. `more` adds files, with __ for a slash."""
    contents = {"config.json": f'{{"made": "{text}"}}', "model.safetensors": text * 5000, "deploy/lmdeploy.yaml": "tp: 1\n"}
    contents |= {name.replace("__", "/"): content for name, content in more.items()}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return described(folder)


def described(folder: Path) -> Release:
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hashes = {name: sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    return Release("tiny", folder, hashes, {name: path.stat().st_size for name, path in paths.items()})


@contextmanager
def in_a_folder(tmp: Path, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    to = tmp / "out" / "model"

    def state() -> object:
        return sorted((str(path), path.lstat().st_mtime_ns) for path in to.parent.rglob("*") if path.name != "lock")

    def tamper(name: str) -> None:
        (to / name).write_text("tampered")

    yield Place(directory, directory.Knobs(path="out/model"), to, state, tamper)


@contextmanager
def on_a_hub(tmp: Path, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    with HubServer() as hub:
        hub.use(patch, tmp / "home", WRITER)
        knobs = hf_hub.Knobs(repo="my-org/tiny-4bit")

        def state() -> object:
            return {key: (dict(repo.refs), len(repo.commits), sorted(repo.stored)) for key, repo in hub.repos.items()}

        def tamper(name: str) -> None:
            hub.add("model", knobs.repo, {name: b"tampered"})

        yield Place(hf_hub, knobs, hf_hub.destination(knobs, tmp), state, tamper)


@contextmanager
def in_a_registry(tmp: Path, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    with serving(tmp / "registry") as server:
        knobs = oci.Knobs(repo=f"{server.host}/my-org/tiny-4bit")

        def tamper(name: str) -> None:
            server.replace("my-org/tiny-4bit", "latest", name, b"tampered")

        yield Place(oci, knobs, oci.destination(knobs, tmp), server.state, tamper)


@contextmanager
def on_modelscope(tmp: Path, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    with ModelScopeServer() as server:
        server.use(patch, tmp / "home", MODELSCOPE_WRITER)
        knobs = modelscope.Knobs(repo="my-org/tiny-4bit")

        def state() -> object:
            return {name: (dict(repo.branches), dict(repo.tags), sorted(server.objects)) for name, repo in server.repos.items()}

        def tamper(name: str) -> None:
            server.repos[knobs.repo].commit(knobs.branch, {name: (b"tampered", False)})

        yield Place(modelscope, knobs, modelscope.destination(knobs, tmp), state, tamper)


@contextmanager
def on_openxlab(tmp: Path, patch: pytest.MonkeyPatch) -> Iterator[Place]:
    pytest.skip("experimental: it keeps no earlier release, and its client needs an environment of its own (test_openxlab.py)")
    yield


PLACES: Mapping[str, Callable[[Path, pytest.MonkeyPatch], AbstractContextManager[Place]]] = {
    "directory": in_a_folder,
    "hf_hub": on_a_hub,
    "modelscope": on_modelscope,
    "openxlab": on_openxlab,
    "oci": in_a_registry,
}
"""A factory calls pytest.skip with the reason where its tool or server is absent."""

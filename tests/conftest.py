"""The built workspaces that tests share. Nobody alters them: a test that changes something works on a copy (runs.copy)."""

from __future__ import annotations

import os
from pathlib import Path

# As in a worker, and before anything imports torch: on models this small OpenMP's threads spend their time waiting for each other, which
# takes ten times as long where the processors are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from collections.abc import Callable
from dataclasses import asdict

import lmdeploys
import pytest
import runs
from filelock import FileLock


def shared(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], runs.Ran]) -> tuple[Path, runs.Ran]:
    """A workspace that the first of pytest's workers builds, and all of them use."""
    alone = os.environ.get("PYTEST_XDIST_WORKER") is None
    folder = (factory.getbasetemp() if alone else factory.getbasetemp().parent) / f"shared-{name}"
    said = folder / "said.json"
    with FileLock(f"{folder}.lock"):
        if not said.exists():
            ran = build(folder / "workspace")
            said.write_text(json.dumps(asdict(ran)))
    return folder / "workspace", runs.Ran(**json.loads(said.read_text()))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, runs.Ran]:
    """The shipped demo, built once: its workspace and what the build said."""
    return shared(tmp_path_factory, "demo", lambda folder: runs.doit(runs.demo(folder), "build", "recipe=demo"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe `tiny` of runs.py, built with one thread and a batch of one."""
    build = ("build", "recipe=tiny", "threads=1", "batch=1")
    workspace, ran = shared(tmp_path_factory, "tiny", lambda folder: runs.doit(runs.tiny(folder), *build))
    ran.fine()
    return workspace


@pytest.fixture(scope="session")
def schemes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, runs.Ran]:
    """Every variant of the recipe `schemes` of runs.py, built two steps at a time, and what the build said."""
    build = ("-n", "2", "build", "recipe=schemes@*")
    return shared(tmp_path_factory, "schemes", lambda folder: runs.doit(runs.schemes(folder), *build))


@pytest.fixture(scope="session")
def backends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, runs.Ran]:
    """Every variant of the recipe `both`: one scheme, one text, by buildsys and by LMDeploy."""
    lmdeploys.needed()
    build = ("build", "recipe=both@*", "threads=1")
    return shared(tmp_path_factory, "backends", lambda folder: runs.doit(runs.both(folder), *build))

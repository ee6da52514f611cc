"""The two built workspaces that tests share. Nobody alters them: a test that changes something works on a copy (runs.copy)."""

from __future__ import annotations

import os
from pathlib import Path

# As in a worker, and before anything imports torch: on models this small OpenMP's threads spend their time waiting for each other, which
# takes ten times as long where the processors are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import runs


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, runs.Ran]:
    """The shipped demo, built once: its workspace and what the build said."""
    workspace = runs.demo(tmp_path_factory.mktemp("demo") / "workspace")
    return workspace, runs.doit(workspace, "build", "recipe=demo")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe `tiny` of runs.py, built with one thread and a batch of one."""
    workspace = runs.tiny(tmp_path_factory.mktemp("tiny") / "workspace")
    runs.doit(workspace, "build", "recipe=tiny", "threads=1", "batch=1").fine()
    return workspace

"""The action that builds on a runner: its scripts run as GitHub's runner runs them, with a store that outlives the job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import runs
from workflows import Runner, clean

pytestmark = pytest.mark.slow

INSTALL = "Install buildsys as of this action's commit"


def job(folder: Path, cache: Path, number: int) -> tuple[Runner, dict[str, str]]:
    """One job: a fresh checkout and a fresh RUNNER_TEMP, on a runner whose tool cache stays."""
    place = folder / str(number)
    workspace = runs.tiny(place / "clone")
    (workspace / ".gitignore").write_text("/artifacts/\n")
    for words in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *words], cwd=workspace, env=clean(), check=True)
    bin = place / "temp" / "build" / "venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "doit").write_text(f'#!/usr/bin/env bash\nPYTHONPATH={runs.ROOT} exec {sys.executable} -m doit "$@"\n')
    (bin / "doit").chmod(0o755)
    runner = Runner(workspace, place / "temp", clean() | {"RUNNER_TOOL_CACHE": str(cache)})
    status, outputs = runner.run("build", {INSTALL: "true"}, recipes="tiny")
    assert status == 0, runner.log
    return runner, outputs


def test_the_store_outlives_the_job_and_reviewers_get_report_and_lock(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, kept = job(tmp_path, cache, 1)
    assert "tiny: built" in first.log and (cache / "buildsys" / "pull").is_dir() and not (cache / "buildsys" / "main").exists()
    folder = Path(kept["folder"])
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"recipes/tiny.lock", "tiny.html"} <= files <= {"recipes/tiny.lock", "tiny.html", "recipes/toolchain.lock"}
    assert (first.workspace / "artifacts" / "tiny" / "config.json").is_file()
    second, _ = job(tmp_path, cache, 2)
    assert "all cached" in second.log
    assert kept["doit"].endswith("/bin/doit")

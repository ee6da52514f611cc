"""The child process that begins before anything is planned: where a command line builds what has no artifact, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from buildsys import early

ROOT = Path(__file__).resolve().parent.parent
SAYS = "from buildsys import early; print(early.CHILD._process.pid if early.CHILD else 0, flush=True); input()"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    for name in ("new", "built"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text("schema: 1\n")
    (tmp_path / "artifacts").mkdir()
    for name in ("built", "new@one"):
        (tmp_path / "artifacts" / name).symlink_to("nowhere")
    return tmp_path


def driver(workspace: Path, *line: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SAYS, *line], cwd=workspace, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def began(workspace: Path, *line: str) -> bool:
    with driver(workspace, *line) as process:
        return process.communicate("\n")[0].strip() != "0"


def test_a_child_begins_for_what_was_never_built(workspace: Path) -> None:
    assert began(workspace, "build", "recipe=new")
    assert began(workspace, "-n", "2", "build", "recipe=built,new@two", "threads=1")
    (workspace / "recipes" / "team").mkdir()
    (workspace / "recipes" / "new.yaml").rename(workspace / "recipes" / "team" / "new.yaml")
    assert began(workspace, "build", "recipe=new")


@pytest.mark.parametrize(
    "line",
    [
        ("build", "recipe=built"),
        ("build", "recipe=new@one"),
        ("build", "recipe=nwe"),
        ("build", "recipe=*"),
        ("build", "recipe=\0"),
        ("build", "recipe="),
        ("build",),
        ("plan", "recipe=new"),
        ("list",),
    ],
)
def test_no_child_begins_for_anything_else(workspace: Path, line: tuple[str, ...]) -> None:
    assert early._child(workspace, list(line)) is None


def test_the_child_ends_with_its_driver(workspace: Path) -> None:
    process = driver(workspace, "build", "recipe=new")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    for _ in range(500):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.01)
    raise AssertionError("it still runs")


def test_a_folder_that_cannot_be_written_is_told_of_later(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "new.yaml").write_text("schema: 1\n")
    (tmp_path / "artifacts").write_text("a file where a folder belongs")
    assert not began(tmp_path, "build", "recipe=new")


def test_a_child_that_cannot_begin_keeps_no_command_from_running(workspace: Path) -> None:
    """No more files may be opened than importing takes: a channel to a child needs two."""
    program = """
import os, resource, sys
import buildsys.workers
free = os.dup(0)
os.close(free)
resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, free + 1))
from buildsys import early
print(early.CHILD)
"""
    line = [sys.executable, "-c", program, "build", "recipe=new"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=workspace, env=environment, text=True, capture_output=True)
    assert (done.stdout, done.returncode) == ("None\n", 0), done.stderr

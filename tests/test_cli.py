"""`python -m buildsys`: the same commands without doit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import toy
from test_tasks import ALL, HERE, Place

from buildsys import cli
from buildsys.driver import Settings
from buildsys.errors import BuildError


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    place.recipe("demo")
    return place


def run(place: Place, *words: str, status: int = 0) -> str:
    said = subprocess.run(
        [sys.executable, toy.__file__, *words], cwd=place.root, env=place.environment, text=True, capture_output=True, timeout=120
    )
    assert said.returncode == status, said.stdout + said.stderr
    assert "Traceback" not in said.stderr
    return said.stdout + said.stderr


def test_build_plan_why_forget_clean_gc(place: Place) -> None:
    assert "0 cached, 4 to run" in run(place, "plan", "demo")
    assert "demo: built 4 of 4" in run(place, "build", "demo", "--threads", "1")
    assert place.ran() == ALL
    assert run(place, "why", "demo").count("cached") == 5
    assert "all cached" in place.doit("build", "recipe=demo"), "one store for both"
    assert "published demo" in run(place, "publish", "demo")
    assert "removed artifacts/demo" in run(place, "clean", "demo")
    assert run(place, "forget", "demo").count("forgot") == 4
    assert "kept what 1 recipe needs" in run(place, "gc")
    assert "demo" in run(place, "names")


def test_bad_input(place: Place) -> None:
    assert "did you mean demo?" in run(place, "build", "dmeo", status=1)
    assert "auto, cpu, cuda" in run(place, "build", "demo", "--device", "tpu", status=1)
    place.recipe("demo", limit=5)
    assert "the limit is max 5" in run(place, "build", "demo", status=1)
    assert "invalid choice" in run(place, "bulid", status=2)


def test_schema_is_what_editors_read(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capfd.readouterr().out)["title"] == "buildsys recipe"


def test_check_of_the_shipped_recipes_needs_no_torch() -> None:
    code = "import sys; from buildsys.cli import main; status = main(['check']); sys.exit(status or 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, text=True, capture_output=True)
    assert said.returncode == 0 and "no mistakes" in said.stdout, said.stdout + said.stderr


def test_settings_are_read() -> None:
    assert Settings.read({"threads": "3", "batch": "2", "device": "cpu"}) == Settings(3, 2, "cpu")
    assert Settings.read({}).threads >= 1 and Settings.read({}).device == "auto"
    with pytest.raises(BuildError, match="threads=-1"):
        Settings.read({"threads": "-1"})

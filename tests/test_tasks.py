"""doit over toy steps: what runs, what is said, and what the exit status is."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import runs
import toy

HERE = Path(__file__).parent


def steps(**changed: dict[str, Any]) -> dict[str, Any]:
    """source -> blocks (heavy) -> folder, and one check of the folder's size."""
    made: dict[str, Any] = {
        "source": {"kind": "fetch", "knobs": {"text": "s"}},
        "blocks": {"kind": "quantize", "knobs": {"text": "b", "group_size": 128}, "needs": {"source": "source"}, "heavy": True},
        "folder": {"kind": "assemble", "knobs": {"text": "f"}, "needs": {"packed": "blocks"}},
        "size": {"kind": "measure", "knobs": {"text": "m"}, "needs": {"packed": "folder"}},
    }
    for name, knobs in changed.items():
        made[name] = {**made[name], "knobs": {**made[name]["knobs"], **knobs}}
    return made


class Place:
    """A workspace with toy recipes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "recipes").mkdir(parents=True)
        (root / "dodo.py").write_text(toy.DODO)
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(runs.ROOT)]), "TOY_MARKS": str(root / "marks")}

    def recipe(self, name: str, limit: int = 100, **changed: dict[str, Any]) -> None:
        graph = {"steps": steps(**changed), "artifact": "folder", "measures": {"size": "size"}, "limits": {"size": limit}}
        graph["publish"] = {"directory": "published"}
        (self.root / "recipes" / f"{name}.yaml").write_text(json.dumps(graph))

    def start(self, *words: str) -> subprocess.Popen[str]:
        said = [sys.executable, "-m", "doit", *words]
        return subprocess.Popen(said, cwd=self.root, env=self.environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def doit(self, *words: str, status: int = 0) -> str:
        running = self.start(*words)
        said = running.communicate(timeout=120)[0]
        assert running.returncode == status, said
        assert "Traceback" not in said, said
        return said

    def ran(self) -> list[str]:
        """Steps that ran since this was last asked."""
        marks = self.root / "marks"
        names = marks.read_text().split() if marks.exists() else []
        marks.unlink(missing_ok=True)
        return names

    @property
    def store(self) -> Path:
        return self.root / "artifacts" / ".store"


ALL = ["source", "blocks", "folder", "size"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(tmp_path)
    place.recipe("demo")
    return place


# Building


def test_build_then_everything_is_cached(place: Place) -> None:
    said = place.doit("build", "recipe=demo")
    assert place.ran() == ALL
    assert re.search(r"^built +quantize +blocks .* s +\d+ B  artifacts/.store/logs/quantize-[0-9a-f]{12}\.log$", said, re.M), said
    assert re.search(r"^passed +size +size is \d+ bytes, the limit is max 100$", said, re.M)
    assert re.search(r"^demo: built 4 of 4 steps in [\d.]+ s -> artifacts/demo$", said, re.M)
    assert (place.root / "artifacts" / "demo" / "out.txt").read_text() == "f(b(s()))"
    said = place.doit("build", "recipe=demo")
    assert place.ran() == [] and said.count("cached") == 5 and said.endswith("demo: 4 steps, all cached -> artifacts/demo\n")
    assert "artifacts/.store/logs" not in said


def test_task_of_one_recipe_and_plain_doit(place: Place) -> None:
    assert "built 4 of 4" in place.doit("build:demo")
    assert "all cached" in place.doit("recipe=demo")
    assert "all cached" in place.doit("build", "recipe=recipes/demo.yaml")


def test_deleting_what_only_remembers_changes_nothing(place: Place) -> None:
    place.doit("build", "recipe=demo")
    place.ran()
    for name in ("stat.sqlite", "recipes", "logs", "locks"):
        path = place.store / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert "all cached" in place.doit("build", "recipe=demo")


def test_two_recipes_share_what_is_equal(place: Place) -> None:
    place.recipe("other", folder={"text": "g"}, source={"sleep_s": 0.0})
    place.recipe("same")
    said = place.doit("-n", "2", "build", "recipe=demo,same")
    assert place.ran() == ALL and "demo: built 4 of 4" in said and "same: built 4 of 4" in said
    place.recipe("third", folder={"text": "h"})
    said = place.doit("-n", "2", "build", "recipe=*")
    ran = place.ran()
    assert sorted(ran) == ["folder", "folder", "size", "size", "source"] and "third: built 2 of 4" in said, "other's source comes out equal"
    assert place.doit("build", "recipe=demo,same,other,third").count("all cached") == 4


def test_parallel_steps_overlap_and_lines_stay_whole(place: Place) -> None:
    for name in ("a", "b"):
        place.recipe(name, blocks={"sleep_s": 4, "text": name})
    said = place.doit("-n", "2", "build", "recipe=a,b")
    took_s = [float(amount) for amount in re.findall(r"^built +quantize +blocks +([\d.]+) s", said, re.M)]
    whole_s = max(float(amount) for amount in re.findall(r"built 4 of 4 steps in ([\d.]+) s", said))
    assert len(took_s) == 2 and sum(took_s) > whole_s
    assert all(re.match(r"(built|cached|passed|a:|b:) ", line) for line in said.splitlines()), said


def test_always_runs_what_the_store_has(place: Place) -> None:
    place.doit("build", "recipe=demo")
    place.ran()
    assert "built 4 of 4" in place.doit("-a", "build", "recipe=demo") and place.ran() == ALL


def test_early_cutoff(place: Place) -> None:
    """A step that comes out equal under another key stops the change there."""
    place.doit("build", "recipe=demo")
    place.ran()
    place.recipe("demo", blocks={"group_size": 64})
    said = place.doit("build", "recipe=demo")
    assert place.ran() == ["blocks"] and "built 1 of 4" in said


def test_settings_change_no_key(place: Place) -> None:
    place.doit("build", "recipe=demo", "threads=1", "batch=1", "device=cpu")
    assert "all cached" in place.doit("build", "recipe=demo", "threads=2", "batch=7")


# Judging


def test_check_and_gc_refuse_a_folder_that_is_no_workspace(tmp_path: Path) -> None:
    (tmp_path / "dodo.py").write_text("from buildsys.tasks import *\n")
    for task in ("check", "gc"):
        ran = subprocess.run([sys.executable, "-m", "doit", task], cwd=tmp_path, text=True, capture_output=True)
        assert ran.returncode == 1 and "is no workspace" in ran.stdout + ran.stderr and "Traceback" not in ran.stderr


def test_failed_gate(place: Place) -> None:
    place.recipe("demo", limit=5)
    said = place.doit("build", "recipe=demo", status=1)
    assert "recipes/demo.yaml:1  demo fails check size: size is 12 bytes, the limit is max 5" in said
    assert "the measurements are kept" in said
    assert "there is no artifacts/demo" in said and not (place.root / "artifacts" / "demo").exists()
    assert place.ran() == ALL
    place.recipe("demo", limit=50)
    assert "all cached" in place.doit("build", "recipe=demo") and place.ran() == []
    place.recipe("demo", limit=5)
    assert "runs    judge" in (why := place.doit("why", "recipe=demo")) and "size.max_bytes 50 -> 5" in why
    place.doit("build", "recipe=demo", status=1)
    assert not (place.root / "artifacts" / "demo").exists(), "what failed is not what artifacts/demo shows"


def test_failed_gate_leaves_the_earlier_build(place: Place) -> None:
    place.doit("build", "recipe=demo")
    place.recipe("demo", limit=5, folder={"text": "longer"})
    assert "artifacts/demo still leads to an earlier build" in place.doit("build", "recipe=demo", status=1)
    assert (place.root / "artifacts" / "demo" / "out.txt").read_text() == "f(b(s()))"


def test_continue_builds_the_other_recipe(place: Place) -> None:
    place.recipe("bad", blocks={"fault": "error"})
    said = place.doit("-c", "build", "recipe=bad,demo", status=2)
    assert "toy.yaml:3  toys do not float\n    fix: get a boat" in said and "skipped assemble" in said
    assert "demo: built" in said and "bad: not complete; 1 of 4 steps are done and kept" in said


def test_publish_without_a_place_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    workspace = runs.tiny(tmp_path / "workspace")
    recipe = workspace / "recipes/tiny.yaml"
    recipe.write_text(recipe.read_text().replace("publish: {directory: {path: ../published}}", ""))
    ran = runs.doit(workspace, "publish", "recipe=tiny")
    assert ran.status == 1 and "names no place to publish to" in ran.out + ran.err and not ran.rows("built")


def test_publish_is_never_a_side_effect(place: Place) -> None:
    place.doit("build", "recipe=demo")
    published = place.root / "published"
    assert not published.exists()
    assert "published demo -> " in place.doit("publish", "recipe=demo")
    assert (published / "out.txt").read_text() == "f(b(s()))"
    assert "published demo -> " in place.doit("publish:demo"), "the other side may have changed"
    place.recipe("demo", limit=5, folder={"text": "g"})
    place.doit("publish", "recipe=demo", status=1)
    assert (published / "out.txt").read_text() == "f(b(s()))"


# Damage and interruption


def test_damaged_store_is_mended(place: Place) -> None:
    place.doit("build", "recipe=demo")
    place.ran()
    file = place.root / "artifacts" / "demo" / "out.txt"
    file.chmod(0o644)
    file.write_text("altered")
    assert "damaged: out.txt is missing, or is no longer what was built" in place.doit("why", "recipe=demo")
    place.doit("build", "recipe=demo")
    assert place.ran() == ["folder"] and file.read_text() == "f(b(s()))"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("parallel", [False, True])
def test_interrupted_build_goes_on(place: Place, number: signal.Signals, parallel: bool) -> None:
    place.recipe("demo", blocks={"sleep_s": 60})
    running = place.start(*(["-n", "2"] if parallel else []), "build", "recipe=demo")
    while not (place.root / "marks").exists() or "blocks" not in (place.root / "marks").read_text():
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.02)
    children = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(number)
    said = running.communicate(timeout=20)[0]
    until = time.monotonic() + 2
    while any(map(alive, children)) and time.monotonic() < until:
        time.sleep(0.01)
    assert children and not any(map(alive, children))
    assert running.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number != signal.SIGKILL:
        assert said.count("interrupted: what is finished is kept") == 1 and "Traceback" not in said, said
        assert "demo: not complete; 1 of 4 steps are done and kept" in said
    assert place.ran() == ["source", "blocks"]
    place.recipe("demo")
    place.doit("build", "recipe=demo")
    assert place.ran() == ["blocks", "folder", "size"]


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(
    ("fault", "told"), [("full", "cannot be written: No space left"), ("bug", "internal error: ValueError: a toy broke")]
)
def test_error_is_told_without_a_traceback(place: Place, fault: str, told: str, heavy: bool) -> None:
    place.recipe("demo", **{"blocks" if heavy else "folder": {"fault": fault}})
    said = place.doit("build", "recipe=demo", status=2 if fault == "bug" and not heavy else 1)
    assert told in said and "\n    fix: " in said
    if fault == "bug":
        log = re.search(r"artifacts/\S+\.log", said.partition("report it with ")[2])
        assert log is not None and "Traceback" in (place.root / log[0]).read_text()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk takes root")
def test_full_disk(place: Place) -> None:
    small = place.root / "artifacts"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for room in range(0, 128, 8):
            filler = small / "filler"
            filler.write_bytes(b"x" * max(124 - room, 0) * 1024)
            running = place.start("build", "recipe=demo")
            said = running.communicate(timeout=60)[0]
            assert "Traceback" not in said and running.returncode in (0, 1), said
            if running.returncode == 0:
                break
            assert "No space left on device" in said and "fix: make room" in said
        filler.unlink()
        place.doit("build", "recipe=demo")
    finally:
        subprocess.run(["umount", str(small)], check=True)


# Asking


def test_plan_and_why(place: Place) -> None:
    said = place.doit("plan", "recipe=demo")
    assert re.search(r"runs +fetch +source +never built", said) and said.count("runs unless its inputs come out equal") == 3
    assert place.ran() == [] and "4 steps: 0 cached, 4 to run" in said
    place.doit("build", "recipe=demo")
    assert place.doit("why", "recipe=demo").count("cached") == 5
    place.recipe("demo", blocks={"group_size": 64})
    said = place.doit("why", "recipe=demo")
    assert re.search(r"cached +fetch", said) and "group_size 128 -> 64" in said
    assert re.search(r"runs\? +assemble +folder +runs unless its inputs come out equal", said)


def test_why_names_the_file_that_changed(place: Place) -> None:
    graph = json.loads((place.root / "recipes" / "demo.yaml").read_text())
    (place.root / "weights").write_text("1")
    graph["steps"]["source"]["reads"] = str(place.root / "weights")
    (place.root / "recipes" / "demo.yaml").write_text(json.dumps(graph))
    place.doit("build", "recipe=demo")
    (place.root / "weights").write_text("2")
    assert re.search(r"runs +fetch +source +sha256 changed \(\w{8} -> \w{8}\)", place.doit("why", "recipe=demo"))
    graph["steps"]["source"]["version"] = 2
    (place.root / "recipes" / "demo.yaml").write_text(json.dumps(graph))
    assert "VERSION 1 -> 2; sha256 changed" in place.doit("why", "recipe=demo")


def test_list_info_clean_forget(place: Place) -> None:
    place.recipe("other", folder={"text": "g"})
    said = place.doit("list")
    assert "build:demo" in said and "build:other" in said and "recipes/demo.yaml" in said and "quantize" not in said
    said = place.doit("info", "build:demo", status=1)
    assert "never built" in said and "recipes/demo.yaml" in said
    assert "is not there" in place.doit("clean", "build:demo")
    place.doit("build", "recipe=demo,other")
    place.ran()
    assert "status     : up-to-date" in place.doit("info", "build:demo")
    assert "would remove artifacts/demo" in place.doit("clean", "-n", "build:demo") and (place.root / "artifacts" / "demo").exists()
    assert "removed artifacts/demo" in place.doit("clean", "recipe=demo")
    assert not (place.root / "artifacts" / "demo").exists() and (place.root / "artifacts" / "other").exists()
    assert "all cached" in place.doit("build", "recipe=demo")
    said = place.doit("forget", "build:demo")
    assert "forgot quantize blocks" in said and said.count("forgot") == 4
    place.doit("build", "recipe=demo")
    assert place.ran() == ALL
    assert place.doit("forget", "recipe=demo").count("forgot") == 4
    assert "which recipe?" in place.doit("forget", status=1)


def test_gc(place: Place) -> None:
    place.recipe("other", folder={"text": "g" * 5000}, size={"text": "n"})
    place.recipe("other", limit=10**6, folder={"text": "g" * 5000})
    place.doit("build", "recipe=demo,other")
    (place.root / "recipes" / "other.yaml").unlink()
    said = place.doit("gc")
    assert "removed artifacts/other: there is no such recipe" in said and re.search(r"freed \d", said) and "what 1 recipe needs" in said
    place.ran()
    assert "all cached" in place.doit("build", "recipe=demo") and place.ran() == []


# Bad lines


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["build"], "which recipe?"),
        (["publish"], "which recipe?"),
        (["plan"], "write doit plan recipe=demo"),
        ([], "recipes: demo"),
        (["build", "recipe=dmeo"], "did you mean demo?"),
        (["build:dmeo"], "did you mean demo?"),
        (["build", "recipe=x*"], "matches none"),
        (["build", "recipe="], "is empty"),
        (["build", "recpie=demo"], "did you mean recipe=?"),
        (["build", "recipe=demo", "xq=red"], "the variables are recipe="),
        (["build", "recipe=demo", "threads=0"], "no number from 1"),
        (["build", "recipe=demo", "batch=many"], "no number from 1"),
        (["build", "recipe=demo", "device=tpu"], "auto, cpu, cuda"),
        (["-n", "2", "-P", "process", "build", "recipe=demo"], "use -P thread"),
    ],
)
def test_bad_line_is_refused(place: Place, words: list[str], told: str) -> None:
    said = place.doit(*words, status=1)
    assert told in said and "fix: " in said and place.ran() == []


def test_mistake_in_one_recipe_stops_all_before_the_first_step(place: Place) -> None:
    (place.root / "recipes" / "bad.yaml").write_text("{")
    (place.root / "recipes" / "worse.yaml").write_text("[")
    said = place.doit("build", "recipe=demo,bad,worse", status=1)
    assert "recipes/bad.yaml:1" in said and "recipes/worse.yaml:1" in said and place.ran() == []


def test_progress_without_a_terminal_is_plain_lines(place: Place) -> None:
    place.recipe("demo", blocks={"sleep_s": 6})
    said = place.doit("build", "recipe=demo")
    assert re.search(r"^  \.\.\.   quantize blocks: sleep \d+/60, 5\.\d s, about \d\.\d s left$", said, re.M), said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    "words",
    [
        ("publish:demo", "dry=1"),
        ("publish:demo", "to=12345678"),
        ("publish", "recipe=demo", "dry=1", "to=12345678"),
        ("publish", "recipe=demo", "to="),
        ("build", "recipe=demo", "dry=1"),
        ("build", "recipe=demo", "key="),
        ("recipe=demo", "to=12345678"),
        ("gc", "recipe=demo"),
        ("verify", "recipe=demo"),
        ("verify", "path=", "key=x"),
    ],
    ids=" ".join,
)
def test_a_variable_that_would_be_passed_over_is_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.recipe("demo")
    said = place.doit(*words, status=1)
    assert "fix:" in said and not (tmp_path / "published").exists() and place.ran() == []


def test_a_dry_run_moves_no_link_and_refuses_what_publish_would(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.recipe("demo")
    place.doit("build", "recipe=demo")
    before = os.readlink(tmp_path / "artifacts" / "demo")
    assert "nothing is sent" in place.doit("publish", "recipe=demo", "dry=1")
    place.recipe("demo", limit=5)
    assert "would not be published" in place.doit("publish", "recipe=demo", "dry=1", status=1)
    assert os.readlink(tmp_path / "artifacts" / "demo") == before and not (tmp_path / "published").exists()


def test_a_publish_that_fails_is_not_called_done(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.recipe("demo")
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "mine.txt").write_text("not to be touched")
    said = place.doit("publish", "recipe=demo", status=1)
    assert "not published" in said.splitlines()[-1] and (tmp_path / "published" / "mine.txt").exists()

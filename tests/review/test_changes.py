"""Which recipes a branch touches, asked of real `doit diff`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import scripted
from scripted import Team


@pytest.fixture
def folder(team: Team, tmp_path: Path) -> Path:
    return runs.copy(team.folder, tmp_path / "repository", built=False)


def told(team: Team, folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    said = json.loads(team.diff("format=json", *arguments, folder=folder).fine().out)
    assert said["same"] + sum(change["kind"] in ("changed",) for change in said["changes"]) == 12 or arguments
    return {change["name"]: change for change in said["changes"]}


def test_words_that_mean_the_same_are_no_change(team: Team, folder: Path) -> None:
    base = folder / "recipes" / "bases" / "w4.yaml"
    base.write_text("# said at length\nformat: {awq: {}}\nquantization:\n  method: [awq, gptq]\n  bits: 4\n  group_size: 64\n")
    assert told(team, folder) == {}


def test_text_in_git_is_content(team: Team, folder: Path) -> None:
    path = folder / "recipes" / "text" / "train.txt"
    path.write_text(path.read_text() + "and more words\n")
    found = told(team, folder)
    assert len(found) == 11 and "bravo" not in found, "it reads the hub's"
    assert found["hotel"]["files"] == ["recipes/text/train.txt"] and not found["hotel"]["knobs"]
    assert {step["kind"]: step["state"] for step in found["hotel"]["steps"]}["calibrate"] == "unless"


def test_a_file_that_no_step_reads_is_none(team: Team, folder: Path) -> None:
    (folder / "recipes" / "models" / "llama" / "NOTES.txt").write_text("for people")
    scripted.commit(folder, "notes")
    assert told(team, folder) == {}


def test_what_a_new_recipe_shares_is_kept(team: Team, folder: Path) -> None:
    like = (folder / "recipes" / "lab" / "hotel.yaml").read_text().replace("published/hotel", "published/lima")
    (folder / "recipes" / "lab" / "lima.yaml").write_text(like.replace("max_nats: 9.0", "max_nats: 2.0"))
    said = json.loads(team.diff("format=json", folder=folder).fine().out)
    (change,) = said["changes"]
    assert (change["name"], change["kind"], change["steps"]) == ("lima", "added", []) and change["kept"] == 16
    assert [gate["name"] for gate in change["gates"]] == ["kl.max_nats"] and said["same"] == 12


def test_a_recipe_that_is_none_is_told_beside_the_others(team: Team, folder: Path) -> None:
    runs.edit(folder / "recipes" / "lab" / "hotel.yaml", "samples: 4\n  seqlen: 32\n  kl", "samples: none\n  seqlen: 32\n  kl")
    runs.edit(folder / "recipes" / "lab" / "india.yaml", "max_nats: 9.0", "max_nats: 8.0")
    ran = team.diff("format=markdown", folder=folder)
    assert ran.status == 1 and "recipes/lab/hotel.yaml:12" in ran.err and "fix:" in ran.err and "Traceback" not in ran.err
    assert "1 broken, 1 changed; 10 as before" in ran.out and "9.0 -&gt; 8.0: tightened" in ran.out


def test_a_recipe_that_was_none_is_told_as_mended(team: Team, folder: Path) -> None:
    hotel = folder / "recipes" / "lab" / "hotel.yaml"
    right = hotel.read_text()
    hotel.write_text(right.replace("samples: 4", "samples: none"))
    scripted.git(folder, "switch", "-q", "main")
    scripted.commit(folder, "broken")
    scripted.git(folder, "switch", "-q", "-c", "mended")
    hotel.write_text(right)
    (change,) = told(team, folder).values()
    assert change["name"] == "hotel" and "no valid recipe" in change["notes"][0] and ".review-" not in change["notes"][0]


def test_a_misfit_of_the_branch_fails_and_one_of_the_base_does_not(team: Team, folder: Path) -> None:
    hotel = folder / "recipes" / "lab" / "hotel.yaml"
    runs.edit(hotel, "session_len: 256", "session_len: 100000")
    ran = team.diff(folder=folder)
    assert ran.status == 1 and "session_len" in ran.err and "changed hotel" in ran.out
    scripted.git(folder, "switch", "-q", "main")
    scripted.commit(folder, "a misfit")
    scripted.git(folder, "switch", "-q", "-c", "mended")
    runs.edit(hotel, "session_len: 100000", "session_len: 256")
    ran = team.diff(folder=folder).fine()
    assert "the base cannot be planned here" in ran.out and "main:recipes" not in ran.err and ".review-" not in ran.out


def test_only_some_recipes(team: Team, folder: Path) -> None:
    scripted.CHANGES["group-size"](folder, team.newer)
    scripted.CHANGES["deleted"](folder, team.newer)
    assert set(told(team, folder, "recipe=charlie*,kilo")) == {"charlie", "charlie@kv8", "kilo"}
    ran = team.diff("recipe=nobody", folder=folder)
    assert ran.status == 1 and "recipe=nobody" in ran.err and "fix:" in ran.err


def test_without_doit(team: Team, folder: Path) -> None:
    """`python -m buildsys` takes the same."""
    scripted.CHANGES["deleted"](folder, team.newer)
    line = [sys.executable, "-m", "buildsys", "diff", "--base", "main", "--format", "text"]
    ran = subprocess.run(line, cwd=folder, env=runs.environment(), capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0 and "deleted kilo" in ran.stdout and "stays there" in ran.stdout

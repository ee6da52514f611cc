"""A change is built before and after: what runs is what `doit diff` named, and what came out equal early was labelled so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
import scripted
from scripted import Team

pytestmark = pytest.mark.slow

CASES = {"kv-policy": "alpha", "group-size": "alpha,charlie@kv8", "loosened": "hotel", "revision": "bravo", "renamed": "golf"}
RENAMED = {"golf": "golf-2"}


def named(team: Team, folder: Path) -> dict[str, Any]:
    """What the diff says, as JSON."""
    said: dict[str, Any] = json.loads(team.diff("format=json", folder=folder).fine().out)
    return said


@pytest.mark.parametrize("name", CASES)
def test_what_runs_is_what_was_named(name: str, team: Team, tmp_path: Path) -> None:
    folder = runs.copy(team.folder, tmp_path / "repository", built=False)
    recipes = CASES[name]
    team.doit("build", f"recipe={recipes}", "threads=1", folder=folder).fine()
    scripted.CHANGES[name](folder, team.newer)
    wanted = [RENAMED.get(recipe, recipe) for recipe in recipes.split(",")]
    told = [step for change in named(team, folder)["changes"] if change["name"] in wanted for step in change["steps"]]
    ran = team.doit("build", f"recipe={','.join(wanted)}", "threads=1", folder=folder).fine()
    built = set(ran.rows("built"))
    by_state = {state: {(step["kind"], step["title"]) for step in told if step["state"] == state} for state in ("runs", "unless")}
    assert built <= by_state["runs"] | by_state["unless"], "a step ran that nobody was told of"
    assert by_state["runs"] <= built, "a step was told of as certain, and did not run"
    early = (by_state["runs"] | by_state["unless"]) - built
    assert early <= by_state["unless"]
    if name == "revision":
        assert ("tokens", "calibration hub_dataset 4 x 32, seed 0") in built, "there is more text on the hub"
        assert {kind for kind, _ in early} >= {"calibrate", "quantize", "pack", "assemble"}, "and no token of it is read"
    elif name in ("loosened", "renamed"):
        assert not built and not told

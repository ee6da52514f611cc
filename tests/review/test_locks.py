"""Measurements before and after, from the locks of two real builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
import scripted
from scripted import Team

pytestmark = pytest.mark.slow


def test_locks_tell_how_the_numbers_moved(team: Team, tmp_path: Path) -> None:
    folder = runs.copy(team.folder, tmp_path / "repository", built=False)
    for command in ("build", "lock"):
        team.doit(command, "recipe=echo", folder=folder).fine()
    scripted.git(folder, "switch", "-q", "main")
    scripted.commit(folder, "locked")
    scripted.git(folder, "switch", "-q", "-C", "change")
    runs.edit(folder / "recipes" / "edge" / "echo.yaml", "bases/w8.yaml", "bases/w4.yaml")
    (early,) = json.loads(team.diff("format=json", folder=folder).fine().out)["changes"]
    assert "before this change" in early["measured"], "an old lock says nothing of new codes"
    for command in ("build", "lock"):
        team.doit(command, "recipe=echo", folder=folder).fine()
    (change,) = json.loads(team.diff("format=json", folder=folder).fine().out)["changes"]
    states = {(one["check"], one["name"]): one["state"] for one in change["measurements"]}
    assert states["kl", "kl"] == "worse" and states["lint", "findings"] == "equal"
    assert "not paired" in change["measured"]
    comment = team.diff("format=markdown", folder=folder).fine().out
    assert "| <code>kl: kl (nats)</code> |" in comment and "| worse |" in comment


def test_a_lock_alone_is_told_as_one(team: Team, tmp_path: Path) -> None:
    folder = runs.copy(team.folder, tmp_path / "repository", built=False)
    team.doit("lock", "recipe=hotel", folder=folder).fine()
    scripted.commit(folder, "locked")
    comment = team.diff("format=markdown", folder=folder).fine().out
    assert "| <code>hotel</code> | its lock alone | 16 kept<br>nothing |" in comment

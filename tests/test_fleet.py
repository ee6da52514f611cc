"""Many recipes at a glance: a line for each, what they share counted once, and what cannot be planned beside what can."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import runs

from buildsys import fleet
from buildsys.console import Console
from buildsys.driver import Session, Settings
from buildsys.errors import BuildError
from buildsys.fleet import Fleet, Refused, Row
from buildsys.store import Store
from buildsys.workspace import Workspace

VARIANTS = """\
target: {gpu: a10, session_len: 64}
matrix:
  kv8: {kv_cache: {policy: int8}}
  rtn: {quantization: {method: [rtn]}, target: {count: 2}}
  none: {target: null, verify: {kl: {max_nats: null}}}
"""
BROKEN = "extends: tiny.yaml\ntarget: {session_len: 999999}\nquantization: {skip: [lm_head, downproj]}\n"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = runs.tiny(tmp_path_factory.mktemp("fleet") / "workspace")
    path = folder / "recipes/tiny.yaml"
    path.write_text(path.read_text() + VARIANTS)
    (folder / "recipes/broken.yaml").write_text(BROKEN)
    runs.doit(folder, "build", "recipe=tiny").fine()
    return folder


def session(workspace: Path) -> Session:
    return Session(Workspace(workspace), Store(workspace / "artifacts"), Settings.read({"threads": "2", "device": "cpu"}), Console())


def surveyed(workspace: Path) -> Fleet:
    here = session(workspace)
    return fleet.survey(here, list(here.workspace.names()))


def rows(found: Fleet) -> dict[str, Row]:
    return {row.name: row for row in found.rows if isinstance(row, Row)}


def test_a_row_for_each_recipe_in_the_order_asked_for(workspace: Path) -> None:
    found = surveyed(workspace)
    assert [row.name for row in found.rows] == ["broken", "tiny", "tiny@kv8", "tiny@none", "tiny@rtn"]
    broken = found.rows[0]
    assert isinstance(broken, Refused) and len(broken.errors) == 2
    tiny, kv8, none, rtn = rows(found).values()
    assert (tiny.run, tiny.cached, tiny.seconds) == (0, len(tiny.steps), 0), "it is built"
    assert kv8.cached >= 8 and {found.steps[key].kind for key in kv8.steps if found.steps[key].state != "cached"} == {
        "assemble",
        "score",
        "measure",
    }
    assert "quantize" in {found.steps[key].kind for key in rtn.steps if found.steps[key].state == "runs"}
    assert {found.steps[key].state for key in rtn.steps if found.steps[key].kind == "pack"} == {"runs?"}
    assert tiny.gates == ("kl.max_nats 9",) and none.gates == () and any("no gate on quality" in note for note in none.notes)
    assert none.target is None and rtn.target is not None and rtn.target.count == 2 and rtn.target.fits


def test_what_is_shared_counts_once(workspace: Path) -> None:
    found = surveyed(workspace)
    every = [key for row in rows(found).values() for key in row.steps]
    total = found.total
    assert total.steps == len(set(every)) == len(found.steps) < len(every)
    assert total.cached + total.run == total.steps and (total.recipes, total.refused) == (5, 1)
    missing = {key for row in rows(found).values() for key in row.steps if found.steps[key].state != "cached"}
    assert total.seconds == pytest.approx(sum(found.steps[key].seconds for key in missing))
    assert total.seconds < total.seconds_apart
    packs = {key for key in every if found.steps[key].kind == "pack"}
    assert len(packs) == 2 and total.artifact_bytes == sum(found.steps[key].bytes for key in packs)


def test_the_table_is_aligned_and_says_what_a_reader_needs(workspace: Path) -> None:
    heads, broken, tiny, kv8, none, rtn, total = fleet.table(surveyed(workspace))
    assert heads.split() == ["recipe", "cached", "to", "run", "takes", "weights", "GPU", "of", "it", "tokens/s", "gates", "notes"]
    assert broken.startswith("broken     CANNOT BE PLANNED: recipes/broken.yaml:3  quantization.skip: downproj") and "(and 1 more" in broken
    assert all(line[heads.index("GPU") :].startswith(("a10", "-", "2 x a10")) for line in (tiny, kv8, none, rtn))
    assert re.search(r"2 x a10 +\d\.\d/22\.0 GiB +[\d,]+ at 32", rtn) and "none" in none
    assert total.startswith("5 recipes, ") and total.endswith("; 1 cannot be planned")


def test_json_has_the_keys_that_its_page_names(workspace: Path) -> None:
    told = json.loads(fleet.document(surveyed(workspace)))
    page = (runs.ROOT / "docs/fleet.md").read_text().partition("## `doit impact`")[0]
    named = set(re.findall(r"`([a-z_?]+)`", page))
    keys = {*told, *told["sum"], *(key for row in told["recipes"] for key in row), *(key for row in told["steps"].values() for key in row)}
    keys |= {key for row in told["recipes"] if row.get("target") for key in row["target"]}
    assert keys <= named, f"docs/fleet.md lacks {sorted(keys - named)}"
    assert all(key in told["steps"] for row in told["recipes"] if row["planned"] for key in row["steps"])
    assert {error["where"] for error in told["recipes"][0]["errors"]} == {"recipes/broken.yaml:2", "recipes/broken.yaml:3"}


def test_it_ends_with_an_error_where_a_recipe_cannot_be_planned(workspace: Path) -> None:
    lines = []
    with pytest.raises(BuildError, match="1 of 2 recipes cannot be planned: broken"):
        lines += [*fleet.told(session(workspace), ["tiny"], "table")]
        for line in fleet.told(session(workspace), ["broken", "tiny"], "table"):
            lines.append(line)
    assert len(lines) == 3 + 4


def test_doit_shows_one_recipe_by_steps_and_several_as_a_table(workspace: Path) -> None:
    one = runs.doit(workspace, "plan", "recipe=tiny").fine()
    assert "16 steps: 16 cached, 0 to run" in one.out
    several = runs.doit(workspace, "plan", "recipe=tiny,tiny@kv8").fine()
    assert several.out.splitlines()[0].startswith("recipe") and len(several.out.splitlines()) == 4
    every = runs.doit(workspace, "plan", "recipe=*", "format=json")
    assert every.status == 1 and json.loads(every.out)["sum"]["refused"] == 1
    assert "1 of 5 recipes cannot be planned" in every.err and "Traceback" not in every.err
    text = runs.doit(workspace, "plan", "recipe=tiny,tiny@kv8", "format=text").fine()
    assert text.out.count(" to run") == 2
    wrong = runs.doit(workspace, "plan", "recipe=tiny", "format=xml")
    assert wrong.status == 1 and "say one of text, table, json" in wrong.err

"""Which recipes an upgrade or a moved VERSION touches: read from real manifests and from a real repository, and held against real keys."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import runs

from buildsys import graph, impact, quant, step, versions
from buildsys.console import Console
from buildsys.driver import Session, Settings
from buildsys.errors import BuildError
from buildsys.fleet import seconds_of
from buildsys.impact import Impact
from buildsys.plan import Plan
from buildsys.slots import SLOTS, modules
from buildsys.store import Artifact, Store
from buildsys.workspace import Workspace

VARIANTS = """\
target: {gpu: h200, session_len: 64}
matrix:
  kv8: {kv_cache: {policy: int8}}
  rtn: {quantization: {method: [rtn]}}
  w8a8:
    quantization: {bits: 8, group_size: -1, symmetric: true, activations: int8, method: [smoothquant, rtn]}
    format: smooth_quant
  own: {target: null, quantization: {symmetric: true, overrides: {down_proj: {method: rtn}}}, format: gptq}
  mixed: {target: null, quantization: {mixed: {budget_bits: 4.6, bits: [3, 4, 8]}}, format: gptq}
  written: {verify: {text: self_generated}}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with recipes and buildsys' own source, in which one recipe is built."""
    folder = runs.tiny(tmp_path_factory.mktemp("impact") / "workspace")
    path = folder / "recipes/tiny.yaml"
    path.write_text(path.read_text() + VARIANTS)
    runs.doit(folder, "build", "recipe=tiny").fine()
    shutil.copytree(runs.ROOT / "buildsys", folder / "buildsys", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".gitignore").write_text("artifacts\n")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "base")
    return folder


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=folder, check=True)


@pytest.fixture
def branch(workspace: Path, tmp_path: Path) -> Path:
    return runs.copy(workspace, tmp_path / "branch")


def session(workspace: Path) -> Session:
    return Session(Workspace(workspace), Store(workspace / "artifacts"), Settings.read({"threads": "2", "device": "cpu"}), Console())


def upgraded(workspace: Path, said: str) -> Impact:
    here = session(workspace)
    return impact.upgrade(here, list(here.workspace.names()), said)


def moved(workspace: Path, ref: str = "main") -> Impact:
    here = session(workspace)
    return impact.base(here, list(here.workspace.names()), ref)


# Versions of source, and the keys that they are in


def running() -> dict[str, int]:
    """VERSIONs as Python has them."""
    found = {f"{slot}.{name}": module.VERSION for slot in SLOTS for name, module in modules(slot).items()}
    found |= {f"steps.{kind}": version for kind, version in graph.VERSIONS.items()}
    return found | {"quant": quant.VERSION, "keys": step.KEY_FORMAT}


def test_versions_read_as_text_are_those_that_run() -> None:
    found = versions.of_tree(runs.ROOT)
    assert {part: version for part, version in found.items() if part in running()} == running()


def keys(workspace: Path, name: str) -> list[tuple[str, str]]:
    return [(one.kind + " " + one.title, one.planned_key) for one in runs.planned(workspace, name).steps]


def parts(plan: Plan) -> set[str]:
    return {part for one in plan.steps for part in impact._parts(plan, one)}


def bump(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Moves the VERSION of a part in this process."""
    slot, _, name = part.partition(".")
    if part == "keys":
        monkeypatch.setattr(step, "KEY_FORMAT", 99)
    elif part == "quant":
        monkeypatch.setattr(graph, "QUANT", 99)
    elif slot == "steps":
        monkeypatch.setattr(graph, "VERSIONS", {**graph.VERSIONS, name: 99})
    else:
        monkeypatch.setattr(modules(slot)[name], "VERSION", 99)


@pytest.mark.parametrize("name", ["tiny", "tiny@kv8", "tiny@rtn", "tiny@w8a8", "tiny@own", "tiny@mixed", "tiny@written"])
def test_a_bump_touches_exactly_the_steps_whose_keys_move(name: str, workspace: Path) -> None:
    plan, before = runs.planned(workspace, name), keys(workspace, name)
    candidates = sorted(set(running()) - {part for part in running() if part.startswith(("publishers.", "sources."))})
    assert {"quant", "keys", "archs.llama", "checks.kl", "steps.pack"} <= parts(plan) <= set(candidates)
    for part in candidates:
        direct = [one for one in plan.steps if part in impact._parts(plan, one)]
        with pytest.MonkeyPatch.context() as patch:
            bump(patch, part)
            after = keys(workspace, name)
        changed = {said for (said, old), (_, new) in zip(before, after, strict=True) if old != new}
        assert changed == {f"{one.kind} {one.title}" for one in impact._after(plan.steps, direct)}, part


def test_a_moved_version_is_told_with_the_recipes_that_it_touches(branch: Path) -> None:
    assert moved(branch).rows == () and "no VERSION is another than in main" in moved(branch).said[0]
    runs.edit(branch / "buildsys/methods/gptq.py", f"\nVERSION = {modules('methods')['gptq'].VERSION}", "\nVERSION = 99")
    runs.edit(branch / "buildsys/publishers/oci.py", "\nVERSION = 1", "\nVERSION = 2")
    found = moved(branch)
    touched = {row.name for row in found.rows}
    assert touched == {"tiny", "tiny@kv8", "tiny@own", "tiny@mixed", "tiny@written"}
    assert [line.partition(":")[2] for line in found.said] == ["", " in the key of no step of these recipes"]
    tiny, kv8 = found.rows[0], next(row for row in found.rows if row.name == "tiny@kv8")
    assert 0 < tiny.least.seconds < tiny.most.seconds and tiny.machine == "CPU" and tiny.most.gpu_hours == 0
    assert set(tiny.steps) & set(kv8.steps), "they share what is quantized"
    assert found.most.seconds < sum(row.most.seconds for row in found.rows)
    here = session(branch)
    here.plan([row.name for row in found.rows])
    once = {key: seconds_of(plan, one) for plan in here.plans.values() for one in plan.steps if (key := one.planned_key) in _steps(found)}
    assert found.most.seconds == pytest.approx(sum(once.values()), rel=0.2), "built ones by this machine, the others by their target"


def _steps(found: Impact) -> set[str]:
    return {key for row in found.rows for key in row.steps}


def test_the_other_commit_is_neither_imported_nor_run(branch: Path) -> None:
    trap = branch / "ran"
    source = branch / "buildsys/methods/gptq.py"
    source.write_text(f"open({str(trap)!r}, 'w')\n" + source.read_text().replace("\nVERSION = ", "\nVERSION = 1000 + 0 if 0 else "))
    (branch / "buildsys/quant/__init__.py").write_text(f"open({str(trap)!r}, 'w')\nVERSION = 77\n")
    git(branch, "commit", "-q", "-a", "-m", "trap")
    git(branch, "checkout", "-q", "main~1", "--", "buildsys")
    found = moved(branch)
    assert [bump["part"] for bump in found.asked["bumps"]] == ["quant"] and found.asked["bumps"][0]["before"] == 77
    assert "goes BACK" in found.said[0] and len(found.rows) == 7 and not trap.exists()


def test_what_the_base_moved_since_is_not_this_branchs_doing(branch: Path) -> None:
    git(branch, "checkout", "-q", "-b", "change")
    runs.edit(branch / "buildsys/methods/awq.py", f"\nVERSION = {modules('methods')['awq'].VERSION}", "\nVERSION = 55")
    git(branch, "commit", "-q", "-a", "-m", "change")
    git(branch, "checkout", "-q", "main")
    (branch / "buildsys/quant/__init__.py").write_text("VERSION = 88\n")
    git(branch, "commit", "-q", "-a", "-m", "elsewhere")
    git(branch, "checkout", "-q", "change")
    assert [bump["part"] for bump in moved(branch).asked["bumps"]] == ["methods.awq"]


def test_versions_of_an_older_layout_are_found(branch: Path) -> None:
    """graph.py was a part of plan.py once."""
    (branch / "buildsys/graph.py").rename(branch / "buildsys/older.py")
    runs.edit(branch / "buildsys/older.py", '"pack": 4,', '"pack": 2,')
    git(branch, "add", "-A")
    git(branch, "commit", "-q", "-m", "older")
    commit, found = versions.of_base(branch, "HEAD")
    assert re.fullmatch("[0-9a-f]{40}", commit) and found["steps.pack"] == 2 and found["steps.fetch"] == graph.VERSIONS["fetch"]


@pytest.mark.parametrize("ref", ["nosuch", "-x", "--all", "a..b", "HEAD^{tree}", "main:buildsys", "é"])
def test_a_base_that_is_no_commit(ref: str, workspace: Path) -> None:
    with pytest.raises(BuildError, match="names no commit of this repository") as refused:
        moved(workspace, ref)
    assert "git branch -a" in refused.value.fix and refused.value.where == f"base={ref}"


def test_a_base_without_a_repository_or_without_source(workspace: Path, tmp_path: Path) -> None:
    alone = runs.copy(workspace, tmp_path / "alone")
    shutil.rmtree(alone / ".git")
    with pytest.raises(BuildError, match="is in no git repository"):
        moved(alone)
    shutil.rmtree(alone / "buildsys")
    git(alone, "init", "-q", "-b", "main")
    git(alone, "add", "-A")
    git(alone, "commit", "-q", "-m", "recipes alone")
    with pytest.raises(BuildError, match="has no folder buildsys/"):
        moved(alone)
    runs.doit(alone, "impact", "base=main")
    broken = runs.copy(workspace, tmp_path / "broken")
    (broken / "buildsys/quant/__init__.py").write_text("VERSION = (\n")
    with pytest.raises(BuildError, match="is no Python"):
        moved(broken)


# Tools


def test_an_upgrade_touches_what_ran_under_another_version(workspace: Path) -> None:
    built = next(one["meta"]["built"] for one in runs.manifests(workspace).values() if one["meta"].get("built", {}).get("device"))
    torch = built["versions"]["torch"]
    assert upgraded(workspace, f"torch=={torch}").rows == () == upgraded(workspace, f"torch=={torch.partition('+')[0]}").rows
    found = upgraded(workspace, "torch==99.1")
    rows = {row.name: row for row in found.rows}
    assert rows["tiny"].why == (f"torch {torch}",) and rows["tiny"].machine == "CPU" and rows["tiny"].built
    assert 0 < rows["tiny"].least.seconds < rows["tiny"].most.seconds
    kinds = {one.planned_key: one.kind for one in runs.planned(workspace, "tiny").steps}
    assert {"quantize", "pack", "score"} <= {kinds[key] for key in rows["tiny"].steps}
    assert found.most.seconds == rows["tiny"].most.seconds, "the others have nothing that it has not"
    assert not upgraded(workspace, f"python=={built['versions']['python']}").rows and upgraded(workspace, "python==3.99").rows
    assert upgraded(workspace, "Buildsys==99").rows and not upgraded(workspace, "lmdeploy==0.18.0").rows


def test_an_edited_recipe_counts_with_its_last_build_and_an_unbuilt_one_is_named(branch: Path) -> None:
    runs.edit(branch / "recipes/tiny.yaml", "group_size: 32", "group_size: 64")
    tiny = next(row for row in upgraded(branch, "torch==99").rows if row.name == "tiny")
    kinds = {one.planned_key: one.kind for one in runs.planned(branch, "tiny").steps}
    assert "quantize" in {kinds[key] for key in tiny.steps}
    shutil.rmtree(branch / "artifacts")
    found = upgraded(branch, "torch==99")
    assert found.rows == () and len(found.unrecorded) == 7
    assert [*impact.table(found)][-1].startswith("0 of 7 recipes; nothing is built of 7, so nothing tells of tiny, ")


def test_costs_are_of_the_gpu_that_built_else_of_the_target(workspace: Path) -> None:
    plan = runs.planned(workspace, "tiny")

    def on(*built: dict[str, object]) -> str:
        return impact._speed(plan, {str(at): Artifact("k", {}, {"built": one}) for at, one in enumerate(built)}, 2).machine

    assert on({"device": "cuda", "gpu": {"name": "NVIDIA A100-SXM4-40GB"}}) == "a100-40gb"
    assert on({"device": "cpu"}, {}) == "CPU" and on() == "h200"
    hour = impact._cost(3600.0, impact._speed(plan, {}, 2))
    assert (hour.seconds, hour.gpu_hours) == (3600.0, 1.0) and impact._told(hour) == "1 h 00 min (1 GPU-hours)"


def test_a_lock_tells_of_what_is_built_elsewhere(branch: Path) -> None:
    shutil.rmtree(branch / "artifacts")
    here, locks = session(branch), {"tiny": impact.Recorded({"torch": "2.13.0+cu126", "Oddtool": "3"}, "NVIDIA H200")}
    names = list(here.workspace.names())
    found = impact.upgrade(here, names, "torch==2.14.0", locks)
    assert [(row.name, row.why, row.machine, row.built) for row in found.rows] == [("tiny", ("torch 2.13.0+cu126",), "h200", False)]
    assert (
        found.most.gpu_hours == pytest.approx(found.most.seconds / 3600)
        and found.most.gpu_hours > found.least.gpu_hours > 0
        and len(found.unrecorded) == 6
    )
    assert not impact.upgrade(here, names, "torch==2.13", locks).rows and impact.upgrade(here, names, "oddtool==4", locks).rows
    processor = {"tiny": impact.Recorded({"torch": "2.13.0"}, "AMD EPYC 9654")}
    assert impact.upgrade(here, names, "torch==2.14.0", processor).rows[0].machine == "CPU"


@pytest.mark.parametrize(
    ("recorded", "asked", "same"),
    [
        ("2.13.0", "2.13", True),
        ("2.13.0+cpu", "2.13.0", True),
        ("2.13.0+cpu", "2.13.0+cpu", True),
        ("2.13.0+cu126", "2.13.0+cpu", False),
        ("2.13.0", "2.13.0+cpu", False),
        ("2.13.1", "2.13", False),
        ("2.13.0rc1", "2.13.0", False),
        ("2.13.0.post1", "2.13.0.post1", True),
        ("20.0", "2", False),
        ("10", "1", False),
        ("?", "2.13", False),
    ],
)
def test_versions_compare_as_pip_has_it(recorded: str, asked: str, same: bool) -> None:
    assert impact._same(recorded, asked) is same


@pytest.mark.parametrize(
    ("said", "what", "fix"),
    [
        ("torch", "names no tool and version", "write upgrade=torch=="),
        ("torch=2", "names no tool and version", "write upgrade=torch=="),
        ("torch==", "names no tool and version", "write upgrade=torch=="),
        ("torch>=2", "names no tool and version", "write upgrade=torch=="),
        ("torch==two", "two is no version of torch", "as pip does"),
        ("torch==2.*", "is no version of torch", "as pip does"),
        ("torhc==2.14.0", "torhc is no tool that a build records", "did you mean torch==2.14.0"),
        ("zzzz==1", "zzzz is no tool", "name one of "),
    ],
)
def test_an_upgrade_that_says_nothing(said: str, what: str, fix: str, workspace: Path) -> None:
    with pytest.raises(BuildError) as refused:
        upgraded(workspace, said)
    assert refused.value.where == f"upgrade={said}" and what in refused.value.what and fix in refused.value.fix


# Shown


def test_doit_and_the_command_line_say_the_same(branch: Path) -> None:
    (branch / "recipes/broken.yaml").write_text("extends: tiny.yaml\ntarget: {session_len: 999999}\n")
    said = runs.doit(branch, "impact", "upgrade=torch==99", "format=json")
    told = json.loads(said.out)
    assert said.status == 1 and "1 of 8 recipes cannot be planned: broken" in said.err and told["refused"][0]["name"] == "broken"
    page = (runs.ROOT / "docs/fleet.md").read_text().partition("## `doit impact`")[2]
    named = set(re.findall(r"`([a-z_?]+)`", page))
    keys = {*told, *told["sum"], *(key for row in told["recipes"] + told["refused"] for key in row), *told["upgrade"], *told["sum"]["most"]}
    moved_to = json.loads(impact.document(moved(branch)))
    assert keys | set(moved_to) | set(moved_to["base"]) <= named | {"planned"}, f"docs/fleet.md lacks {sorted(keys - named)}"
    (branch / "recipes/broken.yaml").unlink()
    lines = runs.doit(branch, "impact", "upgrade=torch==99").fine().out.splitlines()
    assert re.fullmatch("recipe +verify again +build again +on +because of", lines[0]) and lines[-1].startswith("7 of 7 recipes; what they")
    ours = subprocess.run(
        [*runs.command()[:2], "buildsys", "impact", "--upgrade", "torch==99"],
        cwd=branch,
        env=runs.environment() | {"PYTHONSAFEPATH": "1"},  # the branch has a buildsys of its own
        capture_output=True,
        text=True,
    )
    assert ours.stdout.splitlines() == lines, ours.stderr
    for words, what in (
        ([], "of what?"),
        (["upgrade=torch==1", "base=main"], "of both"),
        (["upgrade=torch==1", "format=text"], "no way to show"),
        (["base="], "is empty"),
        (["recipe=tiny", "base=main"], "says nothing to impact"),
    ):
        refused = runs.doit(branch, "impact", *words)
        assert refused.status == 1 and what in refused.err and "Traceback" not in refused.err, (words, refused)


def test_locks_and_the_toolchain_tell_of_a_build_that_is_gone(tiny: Path, tmp_path: Path) -> None:
    """As a clone has them: the recipe, its lock, recipes/toolchain.lock, and no store."""
    there = runs.copy(tiny, tmp_path / "there")
    runs.doit(there, "lock", "recipe=tiny").fine()
    clone = runs.copy(there, tmp_path / "clone", built=False)
    said = runs.doit(clone, "impact", "upgrade=torch==99.0").fine().out
    assert re.search(r"^ *tiny\b", said, re.M) and "torch" in said, said

"""Locks as a user meets them: written, checked, held to by builds, planned from where there is no hub, refused where they are odd."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
from hubserver import HubServer

pytestmark = pytest.mark.slow

HUB = """\
schema: 1
source: {hf_hub: {repo: org/llama}}
calibration: {dataset: {text_files: {paths: [calibration.txt]}}, samples: 4, seqlen: 32}
quantization: {bits: 4, group_size: 32, method: [rtn]}
format: awq
verify: {text: {text_files: {paths: [verify.txt]}}, samples: 4, seqlen: 32, kl: {max_nats: 9.0}}
matrix: {kv8: {kv_cache: {policy: int8}}}
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    made = runs.tiny(tmp_path / "workspace")
    runs.doit(made, "lock", "recipe=tiny").fine()
    return made


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_lock_that_fits_is_left_alone(workspace: Path) -> None:
    lock = workspace / "recipes" / "tiny.lock"
    before = lock.stat().st_mtime_ns
    assert "unchanged recipes/tiny.lock" in runs.doit(workspace, "lock", "recipe=tiny").fine().out
    assert lock.stat().st_mtime_ns == before
    assert "1 recipe is as locked" in runs.doit(workspace, "lock", "--check").fine().out
    assert "stale" not in runs.doit(workspace, "plan", "recipe=tiny", "locked=required").fine().out


DRIFTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "knob": (lambda at: edit(at / "tiny.yaml", "group_size: 32", "group_size: 64"), r"scheme\.group_size 32 -> 64"),
    "seed": (lambda at: edit(at / "tiny.yaml", "seed: 0", "seed: 7"), r"tokens calibration: seed 0 -> 7"),
    "text": (lambda at: edit(at / "verify.txt", " ", "  "), r"verify text file \S+ [0-9a-f]{12} -> [0-9a-f]{12}"),
    "model": (lambda at: edit(at / "model" / "config.json", "{", "{ "), r"source file config\.json [0-9a-f]{12} -> [0-9a-f]{12}"),
    "check": (
        lambda at: edit(at / "tiny.yaml", "kl: {max_nats: 9.0}", "kl: {max_nats: 9.0}\n  memory: {}"),
        r"step measure memory is new",
    ),
}


@pytest.mark.parametrize("name", DRIFTS)
def test_what_drifted_is_a_note_or_a_refusal(name: str, workspace: Path) -> None:
    change, said = DRIFTS[name]
    change(workspace / "recipes")
    plan = runs.doit(workspace, "plan", "recipe=tiny").fine()
    assert re.search(rf"lock is stale: .*{said}.*; doit lock recipe=tiny", plan.out)
    for words, more in (
        (("lock", "--check"), {}),
        (("build", "recipe=tiny", "locked=required"), {}),
        (("build", "recipe=tiny"), {"BUILDSYS_LOCKED": "required"}),
    ):
        ran = runs.doit(workspace, *words, **more)
        assert ran.status != 0 and re.search(rf"recipes/tiny\.lock  tiny is other than locked: .*{said}", ran.out + ran.err), ran
        assert "fix: undo that, or review it and run `doit lock recipe=tiny`" in ran.out + ran.err
    assert not (workspace / "artifacts" / "tiny").exists()
    assert re.search(said, runs.doit(workspace, "lock", "recipe=tiny").fine().out)
    runs.doit(workspace, "lock", "--check").fine()


def test_a_gate_is_no_input(workspace: Path) -> None:
    edit(workspace / "recipes" / "tiny.yaml", "max_nats: 9.0", "max_nats: 8.0")
    runs.doit(workspace, "lock", "--check").fine()


def test_required_needs_a_lock(workspace: Path) -> None:
    (workspace / "recipes" / "tiny.lock").unlink()
    runs.doit(workspace, "lock", "--check").fine()
    recipe = workspace / "recipes" / "tiny.yaml"
    recipe.write_text(recipe.read_text() + "locked: required\n")
    for words in (("lock", "--check"), ("plan", "recipe=tiny")):
        ran = runs.doit(workspace, *words)
        assert ran.status != 0 and "recipes/tiny.lock  does not lock tiny" in ran.out + ran.err
    runs.doit(workspace, "lock", "recipe=tiny").fine()
    runs.doit(workspace, "plan", "recipe=tiny").fine()


def test_a_build_is_remembered(tiny: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(tiny, copied, symlinks=True)
    ran = runs.doit(copied, "lock", "recipe=tiny").fine()
    text = (copied / "recipes" / "tiny.lock").read_text()
    assert "tools: {" in (copied / "recipes" / "toolchain.lock").read_text()
    assert "built on" in ran.out and "measurements:" in text and "tokens:" in text and "verdicts: {" in text
    shutil.rmtree(copied / "artifacts")  # as a colleague has it, who has built nothing
    assert "unchanged" in runs.doit(copied, "lock", "recipe=tiny").fine().out


SPOILED: dict[str, tuple[Callable[[str], str], str]] = {
    "not YAML": (lambda text: text.replace("recipes:", "recipes: [", 1), r"tiny\.lock:\d+  is not YAML"),
    "duplicate": (lambda text: text.replace("recipe: tiny\n", "recipe: tiny\nrecipe: tiny\n", 1), r"tiny\.lock:5  recipe is written twice"),
    "unknown key": (
        lambda text: text.replace("    steps:\n", "    stpes: 1\n    steps:\n", 1),
        r"tiny\.lock:\d+  tiny stpes: extra inputs",
    ),
    "short digest": (
        lambda text: re.sub(r"(disjoint: \w{63})\w", r"\1", text, count=1),
        r"tiny\.lock:\d+  tiny steps\.disjoint: .*pattern",
    ),
    "wrong type": (lambda text: re.sub(r"bytes: \d+", "bytes: many", text, count=1), r"tiny\.lock:\d+  tiny source\.sizes"),
    "other digest": (
        lambda text: re.sub(r"(disjoint: )\w{64}", rf"\g<1>{'ab' * 32}", text, count=1),
        r"tiny\.lock:3  was changed after it was",
    ),
    "later": (lambda text: text.replace("lock: 1\n", "lock: 2\n", 1), r"tiny\.lock:2  has format 2; this buildsys reads up to 1"),
    "other recipe": (lambda text: text.replace("tiny", "other"), r"tiny\.lock:4  is the lock of 'other'; it lies beside the recipe tiny"),
    "nothing": (lambda text: "", r"tiny\.lock:1  holds nothing"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_lock_is_told_with_its_line(name: str, workspace: Path) -> None:
    spoil, said = SPOILED[name]
    lock = workspace / "recipes" / "tiny.lock"
    good = lock.read_text()
    lock.write_text(spoil(good))
    for words in (("lock", "--check"), ("plan", "recipe=tiny")):
        ran = runs.doit(workspace, *words)
        assert ran.status != 0 and re.search(said, ran.out + ran.err), ran
        assert "Traceback" not in ran.out + ran.err and "fix: " in ran.out + ran.err
    runs.doit(workspace, "lock", "recipe=tiny").fine()
    assert lock.read_text() == good


def test_a_branch_stays_where_it_was_locked_and_a_plan_needs_no_hub(tmp_path: Path) -> None:
    workspace = runs.tiny(tmp_path / "workspace")
    (workspace / "recipes" / "tiny.yaml").unlink()
    (workspace / "recipes" / "far.yaml").write_text(HUB)
    with HubServer() as hub:
        model = {path.name: path.read_bytes() for path in (workspace / "recipes" / "model").iterdir()}
        hub.add("model", "org/llama", model)
        first = hub.repo("model", "org/llama").commit("main").id

        def doit(*words: str, home: str = "hf", **more: str) -> runs.Ran:
            return runs.doit(
                workspace, *words, **hub.environment(), HF_HOME=str(tmp_path / home), HF_HUB_CACHE=str(tmp_path / home), **more
            )

        doit("lock", "recipe=far*").fine()
        text = (workspace / "recipes" / "far.lock").read_text()
        assert text.count(f"pin: {first}") == 1 and "far@kv8:" in text, "what variants share stands once"
        keys = doit("plan", "recipe=far").fine().rows("runs", "runs?", "cached")

        hub.add("model", "org/llama", {**model, "LICENSE": b"new"})
        second = hub.repo("model", "org/llama").commit("main").id
        assert second != first
        doit("lock", "--check").fine()
        assert f"org/llama at {first[:12]}" in doit("plan", "recipe=far", "locked=required").fine().out

        shutil.rmtree(workspace / "artifacts")
        offline = doit("plan", "recipe=far", home="empty", HF_HUB_OFFLINE="1").fine()
        assert "planned from the lock: " in offline.out and "stale" not in offline.out
        assert offline.rows("runs", "runs?", "cached") == keys
        built = doit("build", "recipe=far", home="empty", HF_HUB_OFFLINE="1")
        assert built.status != 0 and "known from the lock alone" in built.out + built.err and "Traceback" not in built.out + built.err

        said = doit("lock", "recipe=far*", "refresh=1").fine().out
        assert f"source commit {first[:12]} -> {second[:12]}" in said and "source file LICENSE is new" in said

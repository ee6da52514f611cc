"""`doit reproduce`: the same bits in another clone, and where they part the step, the tensor and the cause; nothing is left behind."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import models
import pytest
import runs
from hubserver import HubServer
from test_tasks import Place

from buildsys import causes
from buildsys.lock import Lock, of
from buildsys.methods import gptq

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
IDENTICAL = re.compile(r"^tiny: identical, (\d+) steps, digest ([0-9a-f]{64})$", re.MULTILINE)
THEN, NOW = gptq.VERSION, gptq.VERSION + 1
VERSION = (f"VERSION = {THEN}\n", f"VERSION = {NOW}\n")
FEWER_SWEEPS = ("scheme, knobs, devices)\n", 'scheme, knobs.model_copy(update={"sweeps": 1}), devices)\n')


def reproduce(workspace: Path, *words: str, recipe: str = "tiny", **more: str) -> runs.Ran:
    ran = runs.doit(workspace, "reproduce", f"recipe={recipe}", *words, **more)
    assert "Traceback" not in ran.out + ran.err and left(workspace) == [], "a clean store is left"
    return ran


def left(workspace: Path) -> list[str]:
    store = workspace / "artifacts" / ".store"
    return [path.name for path in store.glob(".reproduce-*")]


def refused(ran: runs.Ran) -> str:
    assert ran.status == 1 and "    fix: " in ran.err, ran.out + ran.err
    return ran.err


def package(folder: Path, file: str, old: str, new: str) -> dict[str, str]:
    """buildsys with one line of it changed, and the environment that has doit use it."""
    shutil.copytree(ROOT / "buildsys", folder / "buildsys", ignore=shutil.ignore_patterns("__pycache__"))
    runs.edit(folder / "buildsys" / file, old, new)
    return {"PYTHONPATH": str(folder)}


# Equal


def test_another_clone_another_n_other_threads_another_batch(tiny: Path, tmp_path: Path) -> None:
    other = runs.copy(tiny, tmp_path / "elsewhere", built=False)
    runs.doit(other, "-n", "2", "build", "recipe=tiny", "threads=3", "batch=4").fine()
    before = runs.outputs(other)
    here = reproduce(other, "threads=1", "batch=3").fine()
    beside = runs.doit(other, "-n", "2", "reproduce", "recipe=tiny", "threads=2", f"against={tiny / 'artifacts'}").fine()
    told = [IDENTICAL.search(ran.out) for ran in (here, beside)]
    assert told[0] and told[1] and told[0][0] == told[1][0] and int(told[0][1]) == len(before)
    assert f"artifact  {runs.digest(tiny, 'tiny')}" in here.out
    assert runs.outputs(other) == before, "the store is as it was"


def test_without_doit_and_the_clean_store_kept(tiny: Path, tmp_path: Path) -> None:
    workspace, kept = runs.copy(tiny, tmp_path / "workspace"), tmp_path / "deep" / "kept"
    line = [runs.sys.executable, "-m", "buildsys", "reproduce", "tiny", "--keep", "--folder", str(kept), "--threads", "1"]
    ran = subprocess.run(line, cwd=workspace, env=runs.environment(), capture_output=True, text=True, check=True)
    assert IDENTICAL.search(ran.stdout) and f"kept      {kept}" in ran.stdout
    assert {path.name for path in (kept / ".store" / "manifests").iterdir()} == {f"{key}.json" for key in runs.manifests(tiny)}
    assert "is there already" in refused(reproduce(workspace, f"folder={kept}"))
    assert IDENTICAL.search(reproduce(workspace, f"against={kept}").fine().out), "one reproduction is held against another"


def test_two_at_a_time(tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "workspace")
    line = runs.command("reproduce", "recipe=tiny", "threads=1")
    both = [subprocess.Popen(line, cwd=workspace, env=runs.environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [running.communicate(timeout=120)[0] for running in both]
    assert all(IDENTICAL.search(text) for text in said) and left(workspace) == []


# Not equal: the cause


def test_one_bit_of_the_source(tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "workspace")
    weights = workspace / "recipes" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5000] ^= 1
    weights.chmod(0o644)
    weights.write_bytes(content)
    ran = reproduce(workspace)
    said = refused(ran)
    assert "recipes/tiny.yaml:2  the source is not what the build of " in said and "equal" not in ran.out, "before anything is built"
    assert re.search(r"file model\.safetensors differs \(sha256 [0-9a-f]{12} -> [0-9a-f]{12}\)", said)
    assert re.search(r"layer 1, model\.layers\.1\.\S+: 1 of [\d,]+ values differs, by at most \S+", said), "the first build's file is there"


def test_the_source_of_the_build_is_no_more(tmp_path: Path) -> None:
    workspace = runs.tiny(tmp_path / "workspace")
    runs.doit(workspace, "build", "recipe=tiny").fine()
    model = workspace / "recipes" / "model"
    models.tiny_llama(tmp_path / "other", seed=5)
    shutil.copy(tmp_path / "other" / "model.safetensors", model / "model.safetensors")
    runs.doit(workspace, "plan", "recipe=tiny").fine()  # drops what the store knows of a source that changed
    said = refused(reproduce(workspace))
    assert "file model.safetensors differs (sha256 " in said and "values" not in said
    (model / "generation_config.json").unlink()
    assert "file generation_config.json is gone" in refused(reproduce(workspace))
    shutil.rmtree(model)
    assert "there is no such folder" in refused(reproduce(workspace))


def test_the_text_moved(tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "workspace")
    with (workspace / "recipes" / "calibration.txt").open("a") as text:
        text.write("One sentence more.\n")
    said = refused(reproduce(workspace))
    assert "recipes/tiny.yaml:4  the dataset of calibration text is not what" in said and "00000-calibration.txt differs" in said
    assert "more bytes" not in said and "3,169 bytes -> 3,188 bytes" in said


def test_a_revision_moved(tmp_path: Path) -> None:
    workspace = runs.tiny(tmp_path / "workspace")
    recipe = workspace / "recipes" / "tiny.yaml"
    lines = (workspace / "recipes" / "calibration.txt").read_bytes()
    with HubServer() as hub:
        more = {**hub.environment(), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": str(tmp_path / "hf" / "hub")}
        first = hub.add("dataset", "org/text", {"train.txt": lines})
        runs.edit(recipe, "text_files: {paths: [calibration.txt]}", "hub_dataset: {repo: org/text}")
        runs.doit(workspace, "build", "recipe=tiny", **more).fine()
        assert IDENTICAL.search(reproduce(workspace, **more).fine().out)
        second = hub.add("dataset", "org/text", {"train.txt": lines + b"One sentence more.\n"})
        said = refused(reproduce(workspace, **more))
    assert f"moved from hub_dataset org/text at {first[:12]} to hub_dataset org/text at {second[:12]}; " in said


def test_a_version_alone_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    environment = package(tmp_path / "package", "methods/gptq.py", *VERSION)
    ran = reproduce(runs.copy(tiny, tmp_path / "workspace"), **environment).fine()
    assert f"note      methods/gptq VERSION {THEN} -> {NOW}: its output is the same" in ran.out and IDENTICAL.search(ran.out)


def test_a_method_that_rounds_otherwise(tiny: Path, tmp_path: Path) -> None:
    """With its VERSION bumped that is the cause; without, nothing recorded is, and it says so."""
    workspace = runs.copy(tiny, tmp_path / "workspace")
    environment = package(tmp_path / "package", "methods/gptq.py", *FEWER_SWEEPS)
    ran = reproduce(workspace, **environment)
    said = refused(ran)
    assert "quantize 4-bit g32 asymmetric, awq + gptq is the first step that differs" in said
    assert "recorded as the same" in said and "bug in buildsys" in said
    first = (
        r"first     block-00000\.safetensors, layer 0, self_attn\.q_proj\.codes: \d+ of 16,384 codes differ, by at most 1 times the scale"
    )
    assert re.search(first, ran.out) and "  equal     calibrate" in ran.out and " pack " not in ran.out
    runs.edit(tmp_path / "package" / "buildsys" / "methods" / "gptq.py", *VERSION)
    assert f"differs beside it: methods/gptq VERSION {THEN} -> {NOW}" in refused(reproduce(workspace, **environment))


def test_another_recipe(tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "workspace")
    runs.edit(workspace / "recipes" / "tiny.yaml", "bits: 4, group_size: 32", "bits: 3, group_size: 32")
    runs.edit(workspace / "recipes" / "tiny.yaml", "format: awq", "format: gptq")
    said = refused(reproduce(workspace))
    assert "scheme.bits 4 -> 3" in said and "put the recipe back as it was" in said


# From a lock


def lock(workspace: Path) -> None:
    runs.doit(workspace, "lock", "recipe=tiny").fine()


def test_a_clone_with_a_lock_and_nothing_built(tiny: Path, tmp_path: Path) -> None:
    built = runs.copy(tiny, tmp_path / "built")
    lock(built)
    clone = runs.copy(built, tmp_path / "clone", built=False)
    ran = reproduce(clone, "threads=2", "batch=3").fine()
    assert "tiny: beside the build that tiny.lock tells of" in ran.out
    told = [IDENTICAL.search(text) for text in (ran.out, reproduce(runs.copy(tiny, tmp_path / "store"), "threads=1").fine().out)]
    assert told[0] and told[1] and told[0][0] == told[1][0], "the same digest as against the store"


def test_a_lock_names_the_cause_without_the_build(tiny: Path, tmp_path: Path) -> None:
    built = runs.copy(tiny, tmp_path / "built")
    lock(built)
    clone = runs.copy(built, tmp_path / "clone", built=False)
    environment = package(tmp_path / "package", "methods/gptq.py", *FEWER_SWEEPS)
    said = refused(reproduce(clone, **environment))
    assert "quantize 4-bit g32 asymmetric, awq + gptq is the first step that differs (digest " in said and "against=ARTIFACTS" in said
    runs.edit(tmp_path / "package" / "buildsys" / "methods" / "gptq.py", *VERSION)
    assert f"differs beside it: methods/gptq VERSION {THEN} -> {NOW}" in refused(reproduce(clone, **environment))
    ran = reproduce(built, **environment)
    assert ran.status == 1 and "layer 0, self_attn.q_proj.codes: " in ran.out, "where the files are at hand the tensor is named"
    runs.edit(clone / "recipes" / "tiny.yaml", "seqlen: 32\n  seed: 0", "seqlen: 16\n  seed: 0")
    assert "seqlen 32 -> 16" in refused(reproduce(clone))
    (clone / "recipes" / "model" / "generation_config.json").unlink()
    assert "file generation_config.json is gone" in refused(reproduce(clone))


def test_a_lock_of_another_recipe_or_of_no_build(tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "workspace")
    lock(workspace)
    path = workspace / "recipes" / "tiny.lock"
    path.write_text(path.read_text().replace("tiny", "other"))
    assert re.search(r"recipes/tiny\.lock:\d+ ", refused(reproduce(workspace)))
    made = runs.planned(workspace, "tiny")
    path.write_text(Lock(recipes={"tiny": of(made, None)}).text())
    assert "beside the build of " in reproduce(workspace).fine().out, "the store's own build stands in"
    shutil.rmtree(workspace / "artifacts")
    assert "its lock tells of no verified build" in refused(reproduce(workspace))


# Measured


def test_times_are_numbers_and_fail_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.recipe("demo", size={"clocked": True})
    place.doit("build", "recipe=demo")
    said = place.doit("reproduce", "recipe=demo")
    assert re.search(r"measured  measure   size", said) and "demo: identical, 3 steps, digest " in said
    assert place.doit("reproduce", "recipe=demo").splitlines()[-2] == said.splitlines()[-2], "no time is in the digest"


def test_what_is_recorded_stands_in_the_page(tiny: Path) -> None:
    page = (ROOT / "docs" / "reproducibility.md").read_text()
    table = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", page, re.MULTILINE))
    assert {name: use.strip() for name, use in table.items()} == dict(causes.RECORDED)
    recorded = {name for one in runs.manifests(tiny).values() for name in one["meta"]["built"]}
    assert recorded <= causes.RECORDED.keys() and causes.RECORDED.keys() - recorded <= {"gpu", "peak_gpu_bytes", "hints"}


# Bad days


def test_nothing_to_compare_with(tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "workspace", built=False)
    said = refused(reproduce(workspace))
    assert "recipes/tiny.yaml:1  tiny was never built in artifacts" in said and "run `doit build recipe=tiny` first" in said
    assert "holds no store" in refused(reproduce(workspace, f"against={tmp_path}"))
    assert "which recipe?" in refused(runs.doit(workspace, "reproduce"))
    assert "is neither 0 nor 1" in refused(reproduce(workspace, "keep=yes"))
    assert "says nothing to build" in refused(runs.doit(workspace, "build", "recipe=tiny", "keep=1"))


def test_a_build_that_was_forgotten_in_part(tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "workspace")
    manifests = workspace / "artifacts" / ".store" / "manifests"
    key = next(key for key, one in runs.manifests(workspace).items() if one["meta"]["built"]["kind"] == "pack")
    (manifests / f"{key}.json").unlink()
    assert "pack format awq is no longer recorded in the build of " in refused(reproduce(workspace))


def test_a_check_that_the_build_had_not(tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "workspace")
    runs.edit(workspace / "recipes" / "tiny.yaml", "  kl: {max_nats: 9.0}\n", "  kl: {max_nats: 9.0}\n  kv: {}\n")
    ran = reproduce(workspace).fine()
    assert IDENTICAL.search(ran.out) and "  new       measure   kv" in ran.out
    assert re.search("note      not in the build of .*: score none int8 int4, measure kv$", ran.out, re.MULTILINE)


def test_full_disk(tiny: Path, tmp_path: Path) -> None:
    workspace, limit = runs.copy(tiny, tmp_path / "workspace"), 128 * 1024
    before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    said = refused(runs.doit(workspace, "reproduce", "recipe=tiny", before=before))
    assert "cannot be written: " in said and "keep=1" in said and left(workspace) == []
    assert reproduce(workspace).fine()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("parallel", [False, True])
def test_interrupted(tmp_path: Path, number: signal.Signals, parallel: bool) -> None:
    place = Place(tmp_path)
    place.recipe("demo", blocks={"until": str(tmp_path / "go")})
    (tmp_path / "go").touch()
    place.doit("build", "recipe=demo")
    place.ran()
    (tmp_path / "go").unlink()
    running = place.start(*(["-n", "2"] if parallel else []), "reproduce", "recipe=demo")
    while "blocks" not in ((place.root / "marks").read_text() if (place.root / "marks").exists() else ""):
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.02)
    assert len(left(tmp_path)) == 1
    running.send_signal(number)
    said = running.communicate(timeout=20)[0]
    assert running.returncode == (-number if number == signal.SIGKILL else 128 + number), said
    if number == signal.SIGKILL:
        place.doit("gc")
    else:
        assert said.count("interrupted: nothing was compared to the end") == 1 and "Traceback" not in said
    assert left(tmp_path) == []
    manifests = place.store / "manifests"
    assert len([path for path in manifests.iterdir() if "release" not in json.loads(path.read_text())["meta"]]) == 4

"""The whole way, as a user walks it: the demo and a tiny model through `doit` processes, changed, broken, killed and built again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import readers
import runs
import torch
from safetensors import safe_open
from torch import Tensor

from buildsys.store import Store

Steps = list[tuple[str, str]]
RECIPE = Path("recipes/tiny.yaml")


# The demo


def test_demo_builds(demo: tuple[Path, runs.Ran]) -> None:
    workspace, ran = demo
    ran.fine()
    plan = runs.planned(workspace, "demo")
    assert sorted(ran.rows("built")) == sorted((step.kind, step.title) for step in plan.steps)
    link = workspace / "artifacts" / "demo"
    assert link.is_symlink() and not Path(os.readlink(link)).is_absolute()
    names = {path.relative_to(link).as_posix() for path in link.rglob("*") if path.is_file()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "deploy/lmdeploy.yaml"} <= names
    assert not any(path.is_symlink() for path in link.rglob("*")), "the folder is whole without the store"
    assert "passed  kl " in ran.out and f"demo: built {len(plan.steps)} of {len(plan.steps)} steps" in ran.out


def test_kl_of_an_independent_unpacker_equals_verifys(demo: tuple[Path, runs.Ran]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    workspace, ran = demo
    ran.fine()
    artifact, source = workspace / "artifacts" / "demo", workspace / "recipes" / "demo" / "model"
    config = json.loads((artifact / "config.json").read_text())
    packed = [name for name in read(artifact / "model.safetensors") if name.endswith(".qweight")]
    assert len(packed) == 7 * config["num_hidden_layers"]
    del config["quantization_config"], config["torch_dtype"]
    quantized, original = LlamaForCausalLM(LlamaConfig(**config)).float(), LlamaForCausalLM(LlamaConfig(**config)).float()
    quantized.load_state_dict({name: torch.from_numpy(value) for name, value in readers.weights(artifact).items()}, strict=True)
    original.load_state_dict({name: value.float() for name, value in read(source / "model.safetensors").items()}, strict=True)

    plan = runs.planned(workspace, "demo")
    store = Store(workspace / "artifacts")
    found = store.walk(plan.steps)
    score = next(step for step in plan.steps if step.kind == "score")
    text = next(need.step for need in score.needs if need.role == "tokens")
    tokens = read(located(store, found[text.planned_key].artifact, "tokens.safetensors"))["tokens"].long()
    measured = json.loads(located(store, found[dict(plan.measures)["kl"].planned_key].artifact, "measurements.json").read_text())

    total = 0.0
    with torch.inference_mode():
        for window in tokens:
            ours = quantized(window[None]).logits[0, :-1].double().log_softmax(-1)
            theirs = original(window[None]).logits[0, :-1].double().log_softmax(-1)
            total += float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    kl = total / len(tokens)
    assert 0.01 < kl < 0.12 and [one["name"] for one in measured] == ["kl"]
    assert abs(kl - measured[0]["value"]) < 1e-4


def read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def located(store: Store, artifact: Any, name: str) -> Path:
    assert artifact is not None
    return store.path(artifact, name)


def test_second_build_is_cached_whatever_databases_are_lost(demo: tuple[Path, runs.Ran], tmp_path: Path) -> None:
    workspace = runs.copy(demo[0], tmp_path / "workspace")
    before = runs.outputs(workspace)
    for _ in range(2):
        ran = runs.doit(workspace, "build", "recipe=demo").fine()
        assert not ran.rows("built") and len(ran.rows("cached")) == len(demo[1].rows("built"))
        assert f"demo: {len(ran.rows('cached'))} steps, all cached -> " in ran.out
        lost = [*workspace.glob(".doit*"), *(workspace / "artifacts" / ".store").glob("*.db"), workspace / "artifacts/.store/stat.sqlite"]
        assert any(path.exists() for path in lost)
        for path in lost:
            path.unlink(missing_ok=True)
    assert runs.outputs(workspace) == before and runs.digest(workspace, "demo") == runs.digest(demo[0], "demo")


def test_publish_is_its_own_command_and_idempotent(demo: tuple[Path, runs.Ran], tmp_path: Path) -> None:
    workspace = runs.copy(demo[0], tmp_path / "workspace")
    assert not (workspace / "published").exists(), "building publishes nothing"
    first = runs.doit(workspace, "publish", "recipe=demo").fine()
    assert not first.rows("built") and "published demo -> " in first.out
    there = workspace / "published" / "demo"
    state = {path: path.lstat().st_mtime_ns for path in there.rglob("*")}
    artifact = workspace / "artifacts" / "demo"
    for path in artifact.rglob("*"):
        assert path.is_dir() or (there / path.relative_to(artifact)).read_bytes() == path.read_bytes()
    again = runs.doit(workspace, "publish", "recipe=demo").fine()
    assert again.out.splitlines()[-2:] == first.out.splitlines()[-2:]
    assert {path: path.lstat().st_mtime_ns for path in there.rglob("*")} == state


# Changes


@pytest.fixture(scope="module")
def changed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, runs.Ran, runs.Ran]]:
    """For each change: a workspace that has it, what `doit why` said before the next build, and that build."""
    recipe_changes = {
        "kv": ("policy: none", "policy: int8"),
        "limit": ("max_nats: 9.0", "max_nats: 8.0"),
        "group": ("group_size: 32", "group_size: 64"),
        "seed": ("seed: 0", "seed: 7"),
    }

    def case(name: str) -> tuple[Path, runs.Ran, runs.Ran]:
        workspace = runs.copy(tiny, tmp_path_factory.mktemp(name) / "workspace")
        if name == "byte":
            weights = workspace / "recipes" / "model" / "model.safetensors"
            raw = bytearray(weights.read_bytes())
            raw[-2] ^= 0x10  # of the last weight, by an eighth: a change that survives rounding to half precision
            weights.write_bytes(bytes(raw))
        else:
            runs.edit(workspace / RECIPE, *recipe_changes[name])
        return workspace, runs.doit(workspace, "why", "recipe=tiny").fine(), runs.doit(workspace, "build", "recipe=tiny")

    with ThreadPoolExecutor(2) as pool:
        names = [*recipe_changes, "byte"]
        return dict(zip(names, pool.map(case, names), strict=True))


def titled(**steps: str) -> Steps:
    return list(steps.items())


def measures(*names: str) -> Steps:
    return [("measure", name) for name in names]


PACKED = titled(pack="format awq", assemble="deployable folder", score="predictions beside the source's")
PACKED += measures("agreement", "codes", "kl", "lint", "perplexity")
QUANTIZED = [*titled(calibrate="activation statistics", quantize="4-bit g32 asymmetric, awq + gptq"), *PACKED]
KV = [*titled(assemble="deployable folder", score="predictions beside the source's, KV cache int8"), *measures("kv")]


@pytest.mark.parametrize(
    ("change", "reason", "runs_again"),
    [
        ("kv", "kv_cache.policy none -> int8", KV),
        ("limit", "kl.max_nats 9.0 -> 8.0", []),
        ("group", "scheme.group_size 32 -> 64", [*titled(quantize="4-bit g64 asymmetric, awq + gptq"), *PACKED]),
        ("seed", "seed 0 -> 7", [*titled(tokens="calibration text_files 4 x 32, seed 7", disjoint="verify text is new"), *QUANTIZED]),
        ("byte", "files.model.safetensors changed", [*titled(fetch="source (local)"), *QUANTIZED]),
    ],
)
def test_why_names_the_steps_that_run(changed: dict[str, Any], change: str, reason: str, runs_again: Steps) -> None:
    _, why, build = changed[change]
    build.fine()
    assert reason in why.out
    assert sorted(build.rows("built")) == sorted(runs_again), "and no other runs"
    # Exact even where a source changed: a fetch promises what it brings, so what reads other files of it is known to be cached.
    assert sorted(why.rows("runs", "runs?")) == sorted(runs_again)


def test_limit_alone_is_judged_again_at_once(changed: dict[str, Any]) -> None:
    _, why, build = changed["limit"]
    assert not build.rows("built") and "limit: at most 8" in build.out
    assert any(line.split()[:2] == ["runs", "judge"] and "kl.max_nats 9.0 -> 8.0" in line for line in why.out.splitlines())


# Gates


def test_gate_that_fails(tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "workspace")
    evidence = runs.outputs(workspace)
    runs.edit(workspace / RECIPE, "max_nats: 9.0", "max_nats: 0.0001")
    ran = runs.doit(workspace, "build", "recipe=tiny")
    assert ran.status == 1 and not ran.rows("built") and "Traceback" not in ran.out + ran.err
    plan = runs.planned(workspace, "tiny")
    store = Store(workspace / "artifacts")
    walked = store.walk(plan.steps)
    measured = json.loads(located(store, walked[dict(plan.measures)["kl"].planned_key].artifact, "measurements.json").read_text())[0]
    assert f"{measured['value']:.4g} nats" in ran.err and f"{measured['high']:.4g}" in ran.err and "at most 0.0001" in ran.err
    assert "worst layer: model.layers." in ran.err and "fix: " in ran.err
    assert "recipes/tiny.yaml:" in ran.err, "where the limit stands"
    assert not os.path.lexists(workspace / "artifacts" / "tiny"), "the link never leads to what failed"
    assert runs.outputs(workspace) == evidence, "evidence is kept"


def test_gate_that_fails_leaves_an_earlier_artifact(changed: dict[str, Any], tiny: Path) -> None:
    workspace = changed["kv"][0]  # artifacts/tiny leads to the int8 artifact
    before = runs.digest(workspace, "tiny")
    assert before is not None and before != runs.digest(tiny, "tiny")
    original = (workspace / RECIPE).read_text()
    (workspace / RECIPE).write_text(original.replace("max_nats: 9.0", "max_nats: 0.0001").replace("policy: int8", "policy: none"))
    ran = runs.doit(workspace, "build", "recipe=tiny")
    (workspace / RECIPE).write_text(original)
    assert ran.status == 1 and "still leads to an earlier build" in ran.err
    assert runs.digest(workspace, "tiny") == before and (workspace / "artifacts" / "tiny" / "config.json").is_file()


# Reproducibility


def test_two_recipes_at_once_share_steps_and_threads_change_nothing(tiny: Path, tmp_path: Path) -> None:
    workspace = runs.copy(tiny, tmp_path / "workspace", built=False)
    with (workspace / RECIPE).open("a") as file:
        file.write("matrix:\n  wide: {quantization: {group_size: 64}}\n")
    ran = runs.doit(workspace, "-n", "2", "build", "recipe=tiny,tiny@wide", "threads=2", "batch=8").fine()
    built = ran.rows("built")
    assert len({step for step in built if step[0] in ("fetch", "tokens", "calibrate")}) == 6
    for kind, times in {
        "fetch": 3,
        "tokens": 2,
        "disjoint": 1,
        "calibrate": 1,
        "quantize": 2,
        "pack": 2,
        "assemble": 2,
        "score": 2,
    }.items():
        assert [step[0] for step in built].count(kind) == times, kind
    assert runs.digest(workspace, "tiny") == runs.digest(tiny, "tiny") != runs.digest(workspace, "tiny@wide")
    ours, theirs = runs.outputs(workspace), runs.outputs(tiny)
    assert theirs.items() <= ours.items(), "every step's output is the same with 2 threads, batch 8 as with 1 thread, batch 1"


# Kills


@pytest.fixture
def unquantized(tiny: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A workspace that lacks quantize's output and what comes of it, and the folder that quantize will write into."""
    workspace = runs.copy(tiny, tmp_path / "workspace")
    key = None
    for found, manifest in runs.manifests(workspace).items():
        kind = manifest["meta"]["built"]["kind"]
        if kind in ("quantize", "pack", "assemble"):
            (workspace / "artifacts/.store/manifests" / f"{found}.json").unlink()
            key = found if kind == "quantize" else key
    (workspace / "artifacts" / "tiny").unlink()
    shutil.rmtree(workspace / "artifacts/.store/trees")
    for log in (workspace / "artifacts/.store/logs").iterdir():
        log.unlink()
    assert key is not None
    return workspace, workspace / "artifacts/.store/staging" / key


def begun(stage: Path) -> bool:
    return stage.is_dir()


def block_done(stage: Path) -> bool:
    return (stage / "block-00000.safetensors").exists()  # by name: the folder itself may be made anew meanwhile


@pytest.mark.parametrize("moment", [begun, block_done])
def test_killed_driver_leaves_nobody_and_nothing_wrong(unquantized: tuple[Path, Path], tiny: Path, moment: Callable[[Path], bool]) -> None:
    workspace, stage = unquantized
    # Its output goes to files: a pipe of ours that a child holds open would end only with the child.
    with (workspace / "out.txt").open("w") as out:
        driver = subprocess.Popen(
            runs.command("build", "recipe=tiny"), cwd=workspace, env=runs.environment(), stdout=out, stderr=out, start_new_session=True
        )
    until = time.monotonic() + 60
    while not moment(stage):
        assert driver.poll() is None and time.monotonic() < until, (workspace / "out.txt").read_text()
        time.sleep(0.002)
    children = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(children, timeout=2)
    assert children and not [child for child in alive if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    assert not os.path.lexists(workspace / "artifacts" / "tiny")
    kept = sorted(path.name for path in stage.glob("block-*.safetensors"))
    again = runs.doit(workspace, "build", "recipe=tiny").fine()
    assert [kind for kind, _ in again.rows("built")] == ["quantize", "pack", "assemble"]
    assert runs.digest(workspace, "tiny") == runs.digest(tiny, "tiny")
    assert runs.outputs(workspace) == runs.outputs(tiny)
    quantized = next(one for one in runs.manifests(workspace).values() if one["meta"]["built"]["kind"] == "quantize")
    assert quantized["meta"].get("resumed_blocks", 0) == len(kept)
    assert kept if moment is block_done else True

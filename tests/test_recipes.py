"""The recipes that are shipped: valid as they stand, and each fits its target when planned against its model's recorded config.json.

A stub stands in for each model: its own config.json (tests/configs), its tensors as sparse shards of their real sizes, and what publishers
put beside them. Texts are local. All else is the recipe's own, variants included.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import models
import pytest
import yaml

from buildsys.architecture import Architecture
from buildsys.errors import BuildErrors
from buildsys.io import headers
from buildsys.plan import Plan, plan
from buildsys.store import Store
from buildsys.survey import describe
from buildsys.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = Path(__file__).parent / "configs"
SHIPPED = Workspace(ROOT)
NAMES = [name for name, file in SHIPPED.names().items() if file.parent == ROOT / "recipes"]  # not the demo: it has its own model
FILES = sorted({name.partition("@")[0] for name in NAMES})
TARGETS = {"t4", "a10", "a100-40gb", "a100-80gb", "rtx4090", "l40s", "h100", "h200"}
SHARDS = 4


class Named(Store):
    """Takes a file's name for its content: nobody hashes 16 GB of zeros."""

    def sha256(self, path: Path) -> str:
        return hashlib.sha256(path.name.encode()).hexdigest()


def parameters(architecture: Architecture) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: ("BF16", shape) for name, shape in architecture.tensors().items()}


def stub(folder: Path, config: Path) -> Path:
    """The model's folder, complete to the byte for whoever reads no weights."""
    folder.mkdir(parents=True)
    shutil.copy(config, folder / "config.json")
    said = json.loads(config.read_text())
    layout = parameters(describe(said, "config.json")[0])
    names, weight_map = list(layout), {}
    for at in range(SHARDS):
        shard = f"model-{at + 1:05}-of-{SHARDS:05}.safetensors"
        chosen = names[at * len(names) // SHARDS : (at + 1) * len(names) // SHARDS]
        encoded, header = headers.encode({name: layout[name] for name in chosen}, {"format": "pt"})
        (folder / shard).write_bytes(encoded)
        with (folder / shard).open("r+b") as file:
            file.truncate(max(entry.end for entry in header.tensors.values()))  # sparse
        weight_map |= dict.fromkeys(chosen, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    beside(folder, said)
    return folder


def beside(folder: Path, config: Mapping[str, Any]) -> None:
    """What else publishers put there: a tokenizer, code that must not run, the same weights in a layout of their own."""
    (folder / ("tokenizer.model" if "auto_map" in config else "tokenizer.json")).write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    for module in {value.partition(".")[0] for value in config.get("auto_map", {}).values()}:
        (folder / f"{module}.py").write_text("raise SystemExit('remote code ran')\n")
    (folder / "consolidated.safetensors").write_bytes(b"")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.00.pth").write_bytes(b"")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The shipped recipes over local stubs of their models and local text; gone at the end: 90 GB of holes are a trap for a backup."""
    root = tmp_path_factory.mktemp("shipped")
    shutil.copytree(ROOT / "recipes" / "bases", root / "recipes" / "bases")
    for name in ("calibration", "verify"):
        (root / "recipes" / f"{name}.txt").write_text(models.prose(100, seed=len(name)))
    for name in FILES:
        stub(root / "recipes" / "models" / name, CONFIGS / name / "config.json")
        said = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
        said["source"] = {"local": {"path": f"models/{name}"}}
        for variant in said.get("matrix", {}).values():
            variant.pop("source", None)
        said["calibration"]["dataset"] = {"text_files": {"paths": ["calibration.txt"]}}
        said["verify"]["text"] = {"text_files": {"paths": ["verify.txt"]}}
        (root / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    yield root
    shutil.rmtree(root)


def planned(workspace: Path, name: str) -> Plan:
    return plan(Workspace(workspace).load(name), Named(workspace / "artifacts"))


def test_every_recipe_and_base_is_valid() -> None:
    assert Workspace(ROOT).check() == []


def test_each_model_has_its_recorded_config() -> None:
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == set(FILES)
    assert {SHIPPED.load(name).target.gpu for name in NAMES} == TARGETS, "the table of targets is used, and nothing beside it"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shipped_is_worth_copying(name: str) -> None:
    """Gates on quality, on the KV policy and on memory; text of another split; a pinned model, or one that says that it floats."""
    recipe = SHIPPED.load(name)
    source, checks = recipe.source.knobs.model_dump(), recipe.verify.checks
    assert re.fullmatch("[0-9a-f]{40}|main|master", source["revision"])
    assert checks["kl"].max_nats <= 0.1 and {"memory", "perplexity"} <= set(checks)
    assert recipe.kv_cache.policy == "none" or 0 < checks["kv"].max_increase_nats <= 0.05
    assert recipe.calibration.dataset != recipe.verify.text
    for knobs in recipe.publish.publishers.values():
        assert knobs.repo.startswith("my-org/") and knobs.private


def test_no_two_recipes_publish_to_one_place() -> None:
    places = [(name, str(knobs)) for one in NAMES for name, knobs in SHIPPED.load(one).publish.publishers.items()]
    assert places and len(set(places)) == len(places)


@pytest.mark.parametrize("name", NAMES)
def test_it_plans_and_fits_its_target(name: str, workspace: Path) -> None:
    made = planned(workspace, name)
    assert made.serving is not None and made.serving.fits and made.serving.sessions >= 3
    mistral = "TurboMind does not implement MistralForCausalLM, so deploy/ names LMDeploy's PyTorch engine"
    assert list(made.notes) == ([mistral] if name.startswith("mistral") else [])
    assert {"agreement", "codes", "kl", "lint", "memory", "perplexity"} <= {check for check, _ in made.measures}
    assert ("kv" in {check for check, _ in made.measures}) == ("kv" in made.recipe.verify.checks)


@pytest.mark.parametrize("name", FILES)
def test_variants_share_the_weights(name: str, workspace: Path) -> None:
    """Targets and KV policies change no weight: one download, one calibration and one quantization serve them all."""
    variants = [one for one in NAMES if one.partition("@")[0] == name]
    keys = {next(step.planned_key for step in planned(workspace, one).steps if step.kind == "pack") for one in variants}
    assert len(keys) == 1


# That the tests above can fail


def refused(workspace: Path, name: str, **target: Any) -> list[str]:
    path = workspace / "recipes" / f"{name}.yaml"
    text = path.read_text()
    said = yaml.safe_load(text)
    said["target"] |= target
    path.write_text(yaml.safe_dump(said))
    try:
        with pytest.raises(BuildErrors) as caught:
            planned(workspace, name)
    finally:
        path.write_text(text)
    return [error.what for error in caught.value.errors]


def test_a_target_that_is_too_small_is_refused(workspace: Path) -> None:
    found = refused(workspace, "llama-3.1-8b-instruct", gpu="t4")
    assert len(found) == 1 and "14.6 GiB are there" in found[0] and "131072 tokens" in found[0]


def test_a_dynamic_context_ends_at_the_positions_of_the_model(workspace: Path) -> None:
    """Beyond them dynamic NTK bends the frequencies by the length of each sequence, which planning promises for no session."""
    assert refused(workspace, "internlm2_5-7b-chat", session_len=65536) == ["target.session_len is 65536; the model has 32768 positions"]

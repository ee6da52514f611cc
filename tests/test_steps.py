"""Each step with its declared inputs alone, which are enough; and what fetch, disjoint, pack and assemble promise."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import models
import pytest
import runs
import torch
from safetensors import safe_open

from buildsys import digests, graph, steps
from buildsys.errors import BuildError
from buildsys.formats import awq, gptq
from buildsys.io import checkpoint
from buildsys.io.checkpoint import Checkpoint
from buildsys.plan import Plan, plan
from buildsys.scheme import Scheme, Schemes
from buildsys.serving.guide import shell
from buildsys.serving.settings import Settings
from buildsys.step import Request, Resources, Step, reads
from buildsys.store import Artifact, Store
from buildsys.survey import describe, survey
from buildsys.workspace import Workspace

Built = dict[str, Artifact]


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total or total == 0


class Once(Mapping[str, Path]):
    """Files of one input, which remembers those that were opened by name."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files, self.asked = files, set[str]()

    def __getitem__(self, name: str) -> Path:
        self.asked.add(name)
        return self._files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def build(made: Plan, store: Store) -> tuple[Built, dict[str, dict[str, Once]]]:
    """Every step with the files that it declares, and no others; also what each was given, by planned key."""
    built: Built = {}
    given: dict[str, dict[str, Once]] = {}
    for step in made.steps:
        inputs = {}
        for need in step.needs:
            artifact = built[need.step.planned_key]
            inputs[need.role] = Once({name: store.path(artifact, name) for name in artifact.files if reads(need.files, name)})
        key = store.key(step, built)
        stage = store.stage(key)
        request = Request(step.kind, step.knobs, step.hints, inputs, stage, Resources(threads=2), store.sha256)
        meta = steps.run(request, quiet)
        built[step.planned_key] = store.commit(key, stage, meta)
        given[step.planned_key] = inputs
    return built, given


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Store, Built, dict[str, dict[str, Once]]]:
    """An InternLM2, which asks for code of its own, built step by step in this process."""
    workspace = runs.empty(tmp_path_factory.mktemp("steps") / "workspace")
    models.tiny_internlm2(workspace / "recipes/model")
    said = json.loads((workspace / "recipes/model/tokenizer_config.json").read_text())
    own = {"tokenizer_class": "InternLM2Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}
    (workspace / "recipes/model/tokenizer_config.json").write_text(json.dumps(said | own))
    (workspace / "recipes/model/modeling_internlm2.py").write_text("raise SystemExit('code of the model ran')\n")
    for name, seed in (("calibration", 1), ("verify", 2)):
        (workspace / f"recipes/{name}.txt").write_text(models.prose(600, seed))
    text = runs.TINY.replace("policy: none", "policy: int4").replace("kl: {max_nats: 9.0}", "memory: {}\n  agreement: {}")
    (workspace / "recipes/tiny.yaml").write_text(
        text.replace("group_size: 32", "skip: [lm_head, layers.1.feed_forward.w2], group_size: 32")
    )
    store = Store(workspace / "artifacts")
    made = plan(Workspace(workspace).load("tiny"), store)
    built, given = build(made, store)
    return made, store, built, given


def only(made: Plan, kind: str) -> Step:
    (step,) = (step for step in made.steps if step.kind == kind)
    return step


def test_declared_inputs_are_enough_and_there(done: Any) -> None:
    made, _, built, given = done
    assert set(built) == {step.planned_key for step in made.steps}
    for step in made.steps:
        for need in step.needs:
            files = given[step.planned_key][need.role]
            assert files, f"{step.kind} declares {need.files} of {need.role}, which match nothing"
            if need.role == "source":
                assert not (set(files) - {name for name in files if reads(need.files, name)})
    tokens = next(step for step in made.steps if step.kind == "tokens")
    assert set(given[tokens.planned_key]["source"]) == {"tokenizer.json"}


def test_request_shows_only_what_was_given(tmp_path: Path) -> None:
    request = Request("x", {}, {}, {"source": {"config.json": tmp_path}}, tmp_path, Resources(), digests.sha256)
    assert request.read("source").names() == ("config.json",)
    with pytest.raises(KeyError):
        request.read("source").path("model.safetensors")
    with pytest.raises(KeyError):
        request.read("tokens")


# fetch


def fetch(folder: Path, expected: Mapping[str, str], paths: Mapping[str, Path]) -> None:
    hints = {"paths": {name: str(path) for name, path in paths.items()}}
    steps.run(Request("fetch", {"files": expected}, hints, {}, folder, Resources(), digests.sha256), quiet)


def test_fetch_links_and_refuses_what_changed_since_planning(tmp_path: Path) -> None:
    source, stage = tmp_path / "model.safetensors", tmp_path / "stage"
    stage.mkdir()
    source.write_bytes(b"weights")
    expected = {"model.safetensors": digests.sha256(source)}
    for _ in range(2):  # the second time over what a killed run left
        fetch(stage, expected, {"model.safetensors": source})
    assert (stage / "model.safetensors").is_symlink() and Path(os.readlink(stage / "model.safetensors")) == source
    source.write_bytes(b"Weights")
    with pytest.raises(BuildError, match="changed after the build was planned") as caught:
        fetch(stage, expected, {"model.safetensors": source})
    assert caught.value.where == str(source) and "run the same command again" in caught.value.fix


# disjoint


@pytest.mark.parametrize("shift", [0, 5])
def test_disjoint_refuses_text_that_was_calibrated_on(tmp_path: Path, shift: int) -> None:
    seen = models.tokens(4, 96, seed=1)
    ours = models.tokens(4, 96, seed=2)
    ours[2] = seen[1].roll(shift)
    paths = {}
    for role, tokens in (("calibration", seen), ("verify", ours)):
        checkpoint.save(tmp_path / f"{role}.safetensors", {"tokens": tokens})
        paths[role] = {"tokens.safetensors": tmp_path / f"{role}.safetensors"}
    request = Request("disjoint", {}, {"where": "recipes/x.yaml:9"}, paths, tmp_path, Resources(), digests.sha256)
    with pytest.raises(BuildError) as caught:
        steps.run(request, quiet)
    assert caught.value.where == "recipes/x.yaml:9" and "1 of 4 windows (first: window 2)" in caught.value.what
    ours[2] = models.tokens(1, 96, seed=3)[0]
    checkpoint.save(tmp_path / "verify.safetensors", {"tokens": ours})
    steps.run(request, quiet)
    assert json.loads((tmp_path / "disjoint.json").read_text()) == {"windows": 4, "shared": 0}


# allocate


def allocate(folder: Path, budget_bits: float) -> tuple[dict[str, Any], Request]:
    """The step on a small Llama, after the calibration that it reads."""
    source = models.files(models.tiny_llama(folder / "model"))
    checkpoint.save(folder / "tokens.safetensors", {"tokens": models.tokens(2, 48)})
    inputs: dict[str, dict[str, Path]] = {"source": source, "tokens": {"tokens.safetensors": folder / "tokens.safetensors"}}
    for kind in ("stats", "bits"):
        (folder / kind).mkdir()
    steps.run(Request("calibrate", {}, {}, inputs, folder / "stats", Resources(), digests.sha256), quiet)
    inputs["stats"] = {path.name: path for path in (folder / "stats").iterdir()}
    schemes = Schemes(Scheme(4, 32), frozenset({"model.layers.1.mlp.down_proj"})).to_json()
    methods = [{"name": "awq", "version": 1, "knobs": {"ratios": 3}}]
    knobs = {**schemes, "methods": methods, "mixed": {"budget_bits": budget_bits, "bits": [3, 4, 8]}}
    request = Request("allocate", knobs, {"where": "recipes/x.yaml:9"}, inputs, folder / "bits", Resources(), digests.sha256)
    return steps.run(request, quiet), request


def test_allocate_writes_schemes_that_the_steps_after_it_read(tmp_path: Path) -> None:
    facts, request = allocate(tmp_path, 4.9)
    reader = replace(request, inputs={"bits": {path.name: path for path in request.stage.iterdir()}})
    a, schemes = describe(json.loads((tmp_path / "model/config.json").read_text()), "config.json")[0], steps.schemes(reader)
    names = [a.prefix(layer) + linear.name for layer in range(a.layers) for linear in a.linears]
    found = {name: schemes.of(name) for name in names}
    assert [name for name, scheme in found.items() if scheme is None] == ["model.layers.1.mlp.down_proj"]
    assert len({scheme.bits for scheme in found.values() if scheme}) > 1
    layout = steps.packed_layout(a, gptq, schemes)
    told = {name: (kind, shape) for name, (kind, shape) in layout.items() if name.endswith((".qweight", ".qzeros", ".scales"))}
    stored = sum((4 if kind == "I32" else 2) * prod(shape) for kind, shape in told.values())
    weights = sum(prod(a.block_tensors()[f"{linear.name}.weight"]) for linear in a.linears) * 2 - 256 * 128
    assert 4.6 < 8 * stored / weights <= 4.9 and facts == {"average_bits": round(8 * stored / weights, 4)}
    costs = json.loads((request.stage / "bits.json").read_text())
    assert {name: one["chosen"] for one in costs for name in one["linears"]} == {name: str(found[name]) for name in names if found[name]}


def test_allocate_tells_a_budget_that_is_too_small_at_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"takes 3\.5938 bits a weight") as caught:
        allocate(tmp_path, 3.5)
    assert caught.value.where == "recipes/x.yaml:9"


# pack


def test_pack_lays_tensors_in_the_order_of_the_model(done: Any) -> None:
    made, store, built, _ = done
    artifact = built[only(made, "pack").planned_key]
    assert set(artifact.files) == {"model.safetensors"}
    raw = store.path(artifact, "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    header.pop("__metadata__", None)
    placed = sorted(header, key=lambda name: header[name]["data_offsets"][0])
    a = made.survey.architecture
    skipped = frozenset({"model.layers.1.feed_forward.w2"})
    layout = steps.packed_layout(a, awq, Schemes(Scheme(4, 32), skipped))
    wide_first = sorted(layout, key=lambda name: layout[name][0] != "I32")  # words before halves, so that each lies at its alignment
    assert placed == wide_first
    assert {name: (one["dtype"], tuple(one["shape"])) for name, one in header.items()} == layout
    halves = [name for name in placed if layout[name][0] == "F16"]
    assert halves[:3] == ["model.tok_embeddings.weight", "model.norm.weight", "output.weight"]
    for kind in ("I32", "F16"):
        layers = [int(name.split(".")[2]) for name in placed if name.startswith("model.layers.") and layout[name][0] == kind]
        assert layers == sorted(layers), "an engine that reads from front to back gets one block after another"
    assert "model.layers.1.feed_forward.w2.weight" in layout and "model.layers.0.feed_forward.w2.qweight" in layout
    assert "model.layers.0.attention.wqkv.qweight" in layout and "model.layers.0.attention.wqkv.weight" not in layout
    assert header["model.layers.0.attention.wqkv.qzeros"] | {"data_offsets": 0} == {
        "dtype": "I32",
        "shape": [128 // 32, (128 + 2 * 64) // 8],
        "data_offsets": 0,
    }


def test_pack_keeps_what_lies_outside_of_the_blocks(done: Any) -> None:
    made, store, built, _ = done
    source = made.recipe.folder("source") / "model" / "model.safetensors"
    with safe_open(source, "pt") as theirs, safe_open(store.path(built[only(made, "pack").planned_key], "model.safetensors"), "pt") as ours:
        for name in ("model.tok_embeddings.weight", "model.norm.weight", "output.weight"):
            assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name).half())


def test_what_lies_outside_of_the_blocks_is_packed_once_for_all_variants(
    done: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, store, built, _ = done
    monkeypatch.setattr(graph, "OUTSIDE_BYTES", 0)
    workspace = made.recipe.folder("source").parent
    recipe = workspace / "recipes" / "tiny.yaml"
    other = recipe.with_name("other.yaml")
    other.write_text(recipe.read_text().replace("group_size: 32", "group_size: 64"))
    apart, variant = (plan(Workspace(workspace).load(name), store) for name in ("tiny", "other"))
    step = only(apart, "outside")
    assert step == only(variant, "outside") and only(apart, "pack") != only(variant, "pack")
    assert "outside" not in {one.kind for one in made.steps}
    ours = Store(tmp_path / "artifacts")
    found, _ = build(apart, ours)
    packed, alone = found[only(apart, "pack").planned_key], built[only(made, "pack").planned_key]
    outside = found[step.planned_key]
    assert {file.sha256 for name, file in outside.files.items() if name.endswith(".safetensors")} < {
        file.sha256 for file in packed.files.values()
    }
    whole = Checkpoint({name: store.path(alone, name) for name in alone.files})
    parts = Checkpoint({name: ours.path(packed, name) for name in packed.files})
    assert parts.names() == whole.names()
    assert all(torch.equal(parts.load(name, None, finite=False), whole.load(name, None, finite=False)) for name in whole.names())
    index = json.loads(ours.path(packed, "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {name for name in packed.files if name.endswith(".safetensors")}
    assert index["metadata"]["total_size"] == sum(parts.entry(name).bytes for name in parts.names())
    assert found[apart.artifact.planned_key].files.keys() > packed.files.keys()


def test_packed_layout_of_a_tied_model_has_no_head(tmp_path: Path) -> None:
    folder = models.tiny_qwen2(tmp_path)
    layout = steps.packed_layout(survey(models.files(folder)).architecture, awq, Schemes(Scheme(4, 128)))
    assert "lm_head.weight" not in layout and layout["model.layers.0.self_attn.q_proj.bias"] == ("F16", (128,))
    assert layout["model.layers.0.self_attn.q_proj.scales"] == ("F16", (1, 128))


# assemble


def test_assemble_drops_the_models_own_code(done: Any) -> None:
    made, store, built, _ = done
    artifact = built[made.artifact.planned_key]
    assert not any(name.endswith(".py") for name in artifact.files)
    config = json.loads(store.path(artifact, "config.json").read_text())
    source = json.loads((made.recipe.folder("source") / "model" / "config.json").read_text())
    assert "auto_map" in source and "auto_map" not in config and config["torch_dtype"] == "float16"
    assert config["quantization_config"]["modules_to_not_convert"] == ["model.layers.1.feed_forward.w2", "output"]
    kept = {key: value for key, value in source.items() if key not in ("auto_map", "dtype", "torch_dtype")}
    assert kept.items() <= config.items() and describe(kept, "config.json")[0] == made.survey.architecture
    tokenizer = json.loads(store.path(artifact, "tokenizer_config.json").read_text())
    assert "auto_map" not in tokenizer and tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_assemble_takes_everything_else_as_it_is(done: Any) -> None:
    made, store, built, _ = done
    artifact, packed = built[made.artifact.planned_key], built[only(made, "pack").planned_key]
    source = made.recipe.folder("source") / "model"
    own = {"generation_config.json", "tokenizer.json"}
    served = {"deploy/lmdeploy.yaml", "deploy/README.md", "deploy/compose.yaml"}
    assert set(artifact.files) == {*own, "config.json", "tokenizer_config.json", "model.safetensors", *served}
    for name in own:
        assert artifact.files[name].sha256 == digests.sha256(source / name)
    assert artifact.files["model.safetensors"] == packed.files["model.safetensors"]
    decided = Settings.read(store.path(artifact, "deploy/lmdeploy.yaml"))
    assert decided.backend == "pytorch" and decided.engine["quant_policy"] == 4
    assert shell(decided.chat_arguments()) in store.path(artifact, "deploy/README.md").read_text()
    assert "internlm2-377.5k-w4a16" in store.path(artifact, "deploy/compose.yaml").read_text()


# the rest


def test_measurements_are_plain_json(done: Any) -> None:
    made, store, built, _ = done
    for check, step in made.measures:
        found = json.loads(store.path(built[step.planned_key], "measurements.json").read_text())
        assert found, check
        assert all(
            set(one) == {"name", "value", "unit", "low", "high", "detail"} and one["low"] <= one["value"] <= one["high"] for one in found
        )


def test_quantize_says_which_blocks_it_found(done: Any, tmp_path: Path) -> None:
    """A killed run's finished blocks are used again, and counted."""
    made, store, built, given = done
    step = made.quantized
    finished = built[step.planned_key]
    assert "resumed_blocks" not in finished.meta
    for name in finished.files:
        if name.startswith("block-00000."):
            (tmp_path / name).write_bytes(store.path(finished, name).read_bytes())
    meta = steps.run(Request(step.kind, step.knobs, step.hints, given[step.planned_key], tmp_path, Resources(), store.sha256), quiet)
    assert meta == {"resumed_blocks": 1, "block_errors": finished.meta["block_errors"]}
    assert {path.name: digests.sha256(path) for path in tmp_path.iterdir()} == {name: file.sha256 for name, file in finished.files.items()}


@pytest.mark.parametrize(("gib", "wanted_mib"), [(0.1, 256), (4, 256), (5, 320), (40, 2560), (400, 4096)])
def test_a_large_model_is_packed_into_some_sixteen_files(gib: float, wanted_mib: int) -> None:
    layout = {str(at): ("U8", (int(gib * 2**20),)) for at in range(1024)}
    assert steps._shard_bytes(layout) == wanted_mib << 20

"""Keys that stay what they are, steps that change where what they read changes, and misfits that are refused before anything runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import models
import pytest
import runs

from buildsys import gpus
from buildsys.deployment import serving_with
from buildsys.effort import Building
from buildsys.errors import BuildError, BuildErrors
from buildsys.gpus import KvPolicy
from buildsys.misfits import misfits
from buildsys.outlook import outlook
from buildsys.plan import Plan, plan
from buildsys.scheme import Scheme, Schemes
from buildsys.step import Need, digest, reads
from buildsys.store import Store
from buildsys.survey import describe
from buildsys.workspace import Workspace

GOLDEN = Path(__file__).parent / "golden" / "keys.json"
MODEL = Path("recipes/model")


class Named(Store):
    """Takes a file's name for its content, so that keys depend on no bytes of a random model."""

    def sha256(self, path: Path) -> str:
        return hashlib.sha256(path.name.encode()).hexdigest()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.tiny(tmp_path_factory.mktemp("base") / "workspace", num_attention_heads=2, num_key_value_heads=1)


@pytest.fixture
def workspace(base: Path, tmp_path: Path) -> Path:
    return runs.copy(base, tmp_path / "workspace")


def planned(workspace: Path, *edits: tuple[str, str], store: type[Store] = Store) -> Plan:
    """The plan of the recipe with some text of it replaced; the file itself stays as it is."""
    path = workspace / "recipes/tiny.yaml"
    text = path.read_text()
    for edit in edits:
        runs.edit(path, *edit)
    try:
        return plan(Workspace(workspace).load("tiny"), store(workspace / "artifacts"))
    finally:
        path.write_text(text)


def with_model(workspace: Path, **config: object) -> Path:
    shutil.rmtree(workspace / MODEL)
    models.tiny_llama(workspace / MODEL, **config)
    return workspace


def real_keys(plan: Plan) -> dict[str, str]:
    """Real keys by "kind title", where every step that computes has an output of its own for every key."""
    keys: dict[str, str] = {}

    def seen(need: Need) -> str:
        if need.step.kind == "fetch":  # its output is known: the files that it names
            return digest({name: sha for name, sha in need.step.knobs["files"].items() if reads(need.files, name)})
        return digest([keys[need.step.planned_key], sorted(need.files)])

    for step in plan.steps:
        keys[step.planned_key] = step.key({need.role: seen(need) for need in step.needs})
    return {f"{step.kind} {step.title}": keys[step.planned_key] for step in plan.steps}


def kinds_changed(before: Plan, after: Plan) -> set[str]:
    """Steps of `after` that are not finished where all of `before` is: kinds, and the names of measurements."""
    old, new = real_keys(before), real_keys(after)
    assert len(new) == len(after.steps), "titles tell the steps of one recipe apart"
    return {name.removeprefix("measure ") if name.startswith("measure") else name for name, key in new.items() if key not in old.values()}


TARGET = ("format: awq", "format: awq\ntarget: {gpu: t4}")
POLICY = ("policy: none", "policy: int8")
MEMORY = ("  kl: {max_nats: 9.0}", "  kl: {max_nats: 9.0}\n  memory: {}\n  agreement: {min_share: 0.5}\n  perplexity: {}")


def test_golden_keys(workspace: Path) -> None:
    """Keys are made of the same things, in the same way, as they were when golden/keys.json was written.

    A key that changes makes every store in the world build that step again, so this file changes only together with what explains it: a
    VERSION that was bumped (a slot's, quant's or one in plan.VERSIONS), KEY_FORMAT, a knob or a need that a step has gained or lost. Where
    a step's output is as before and its key is not, mend the code instead. To write it: BUILDSYS_UPDATE_GOLDEN=1 pytest tests/test_plan.py
    """
    made = planned(workspace, POLICY, TARGET, MEMORY, store=Named)
    real = real_keys(made)
    steps = [{"step": f"{s.kind} {s.title}", "planned": s.planned_key, "key": real[f"{s.kind} {s.title}"]} for s in made.steps]
    if os.environ.get("BUILDSYS_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(steps, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert [one["step"] for one in steps] == [one["step"] for one in golden]
    assert steps == golden, test_golden_keys.__doc__


# The graph


def test_graph_has_its_steps_in_order(workspace: Path) -> None:
    made = planned(workspace, POLICY)
    kinds = [step.kind for step in made.steps]
    assert list(dict.fromkeys(kinds)) == ["fetch", "tokens", "disjoint", "calibrate", "quantize", "pack", "assemble", "score", "measure"]
    seen: set[str] = set()
    for step in made.steps:
        assert {before.planned_key for before in (*(need.step for need in step.needs), *step.after)} <= seen
        seen.add(step.planned_key)
    assert made.artifact.kind == "assemble" and made.quantized.kind == "quantize" and made.name == "tiny"
    assert [name for name, _ in made.measures] == ["agreement", "codes", "kl", "kv", "lint", "perplexity"]
    assert kinds.count("score") == 2, "with the KV policy and without"
    assert [step.planned_key for step in planned(workspace, POLICY).steps] == [step.planned_key for step in made.steps]


KV_CHECK = ("  kl: {max_nats: 9.0}", "  kl: {max_nats: 9.0}\n  kv: {max_increase_nats: 1.0}")
ALL_POLICIES = "predictions beside the source's, KV cache none, int8, int4"


def scored(made: Plan) -> list[str]:
    return [step.title for step in made.steps if step.kind == "score"]


def test_named_kv_check_has_its_policies_scored_in_one_walk(workspace: Path) -> None:
    every = {policy: planned(workspace, KV_CHECK, ("policy: none", f"policy: {policy}")) for policy in ("none", "int8", "int4")}
    assert all(scored(made) == [ALL_POLICIES] for made in every.values())
    for before in every.values():
        for after in every.values():
            assert names(kinds_changed(before, after)) == ({"deployable folder", "kv"} if before is not after else set())
    fewer = (KV_CHECK[0], KV_CHECK[1].replace("1.0}", "1.0, policies: [int8]}"))
    assert scored(planned(workspace, fewer)) == ["predictions beside the source's, KV cache none, int8"]
    assert scored(planned(workspace, fewer, ("policy: none", "policy: int4"))) == [ALL_POLICIES], "the recipe's own always is"
    none = (KV_CHECK[0], KV_CHECK[1].replace("1.0}", "1.0, policies: []}"))
    assert scored(planned(workspace, none)) == scored(planned(workspace)) == ["predictions beside the source's"]


def test_policy_alone_is_scored_beside_what_is_scored_without_one(workspace: Path) -> None:
    made = planned(workspace, POLICY)
    assert scored(made) == ["predictions beside the source's", "predictions beside the source's, KV cache int8"]
    other = planned(workspace, ("policy: none", "policy: int4"))
    assert names(kinds_changed(made, other)) == {"deployable folder", "predictions beside the source's, KV cache int4", "kv"}


def test_what_is_read_of_a_walk_over_policies_are_its_files(workspace: Path) -> None:
    made = planned(workspace, KV_CHECK)
    for check, step in made.measures:
        read = {need.role: need.files for need in step.needs if need.step.kind == "score"}
        expected = {"scores": ("scores.safetensors",), "kv_scores": ("scores-int8.safetensors", "scores-int4.safetensors")}
        assert read == {role: files for role, files in expected.items() if role == "scores" or check == "kv"} or check in ("codes", "lint")


def test_paths_and_names_are_in_no_key(workspace: Path, tmp_path: Path) -> None:
    elsewhere = runs.copy(workspace, tmp_path / "elsewhere" / "other")
    (elsewhere / "recipes/tiny.yaml").rename(elsewhere / "recipes/renamed.yaml")
    there = runs.planned(elsewhere, "renamed")
    assert [step.planned_key for step in there.steps] == [step.planned_key for step in planned(workspace).steps]
    assert there.steps[0].hints != planned(workspace).steps[0].hints


def test_steps_declare_what_they_read(workspace: Path) -> None:
    made = {f"{step.kind} {step.title}".split()[0]: step for step in planned(workspace).steps}
    named = {kind: {need.role: need.files for need in step.needs} for kind, step in made.items()}
    weights = ("config.json", "*.safetensors", "*.safetensors.index.json")
    assert named["tokens"] == {"source": ("tokenizer.json",), "text": ("*",)}
    assert named["calibrate"] == {"source": weights, "tokens": ("*",)}
    assert named["quantize"] == {"source": weights, "stats": ("*",), "tokens": ("*",)}
    assert named["pack"] == {"source": weights, "blocks": ("*.safetensors",)}
    assert not any(name.endswith(".safetensors") for name in named["assemble"]["source"]) and "config.json" in named["assemble"]["source"]


def test_rounding_that_sees_no_tokens_reads_none(workspace: Path) -> None:
    for methods, sees in (("[awq, gptq]", True), ("[awq, rtn]", False), ("[rtn]", False)):
        made = planned(workspace, ("[awq, gptq]", methods)) if methods != "[awq, gptq]" else planned(workspace)
        assert ("tokens" in {need.role for need in made.quantized.needs}) == sees


@pytest.mark.parametrize("less, more", [("rtn", "gptq"), ("gptq", "gptaq")])
def test_what_a_build_takes_counts_every_method_that_rounds(workspace: Path, less: str, more: str) -> None:
    def building(method: str, own: str) -> Building:
        return planned(workspace, *overridden(f"down_proj: {{method: {own}}}"), ("[awq, gptq]", f"[awq,  {method}]")).building

    alone, mixed, other = building(less, less), building(less, more), building(more, less)
    assert alone.seconds["quantize"] < mixed.seconds["quantize"] == other.seconds["quantize"]
    assert mixed.host_bytes == other.host_bytes >= alone.host_bytes


# What a change changes

SCORED = {"predictions beside the source's", "agreement", "codes", "kl", "lint", "perplexity"}
BELOW_QUANTIZE = {"format awq", "deployable folder", *SCORED}
BELOW_CALIBRATE = {"activation statistics", "4-bit g32 asymmetric, awq + gptq", *BELOW_QUANTIZE}


def names(steps: set[str]) -> set[str]:
    """Titles without the kinds before them."""
    kinds = ("fetch ", "tokens ", "disjoint ", "calibrate ", "quantize ", "pack ", "assemble ", "score ")
    return {next((step.removeprefix(kind) for kind in kinds if step.startswith(kind)), step) for step in steps}


@pytest.mark.parametrize(
    ("edit", "changed"),
    [
        (POLICY, {"deployable folder", "predictions beside the source's, KV cache int8", "kv"}),
        (("kv_cache: {policy: none}", "kv_cache: {max_entry_count: 0.5}"), {"deployable folder"}),
        (("max_nats: 9.0", "max_nats: 0.5"), set()),
        (("kl: {max_nats: 9.0}", "kl: {}"), set()),
        (("publish: {directory: {path: ../published}}", ""), set()),
        (TARGET, {"deployable folder"}),
        (("group_size: 32", "group_size: 64"), {"4-bit g64 asymmetric, awq + gptq", *BELOW_QUANTIZE}),
        (("[awq, gptq]", "[gptq]"), {"4-bit g32 asymmetric, gptq", *BELOW_QUANTIZE}),
        (("[awq, gptq]}", "[awq, gptq], skip: [lm_head, down_proj]}"), {"4-bit g32 asymmetric, awq + gptq", *BELOW_QUANTIZE}),
        (("seed: 0", "seed: 7"), {"calibration text_files 4 x 32, seed 7", "verify text is new", *BELOW_CALIBRATE}),
        (
            ("  kl: {max", "  seed: 5\n  kl: {max"),
            {"verify text_files 4 x 32, seed 5", "verify text is new", *SCORED - {"codes", "lint"}},
        ),
    ],
    ids=["kv", "kv_share", "limit", "no_limit", "publish", "target", "group", "method", "skip", "seed", "verify_seed"],
)
def test_knob_changes_the_steps_that_read_it(workspace: Path, edit: tuple[str, str], changed: set[str]) -> None:
    assert names(kinds_changed(planned(workspace), planned(workspace, edit))) == changed


def flip(name: str) -> Callable[[Path], None]:
    """Changes a byte of white space or of a weight, so that the file says the same of the model's shape."""

    def change(workspace: Path) -> None:
        path = workspace / "recipes" / name
        raw = path.read_bytes()
        path.write_bytes(raw[:-4] + bytes([raw[-4] ^ 1]) + raw[-3:] if name.endswith(".safetensors") else raw + b" ")

    return change


TOKENS = {"calibration text_files 4 x 32, seed 0", "verify text_files 4 x 32, seed 1", "verify text is new"}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("model/model.safetensors", {"source (local)", *BELOW_CALIBRATE}),
        ("model/generation_config.json", {"source (local)", "deployable folder"}),
        ("model/tokenizer_config.json", {"source (local)", "deployable folder"}),
        ("model/tokenizer.json", {"source (local)", *TOKENS, *BELOW_CALIBRATE}),
        ("model/config.json", {"source (local)", *BELOW_CALIBRATE}),
        ("verify.txt", {"verify text (text_files)", "verify text_files 4 x 32, seed 1", "verify text is new", *SCORED - {"codes", "lint"}}),
    ],
)
def test_file_changes_the_steps_that_read_it(workspace: Path, name: str, changed: set[str]) -> None:
    before = planned(workspace)
    flip(name)(workspace)
    assert names(kinds_changed(before, planned(workspace))) == changed


def test_memory_is_measured_again_for_another_target(workspace: Path) -> None:
    before = planned(workspace, TARGET, MEMORY)
    after = planned(workspace, (TARGET[0], "format: awq\ntarget: {gpu: a10}"), MEMORY)
    assert names(kinds_changed(before, after)) == {"deployable folder", "memory"}


# Misfits


def refused(workspace: Path, *edits: tuple[str, str]) -> list[tuple[str, str, str]]:
    with pytest.raises(BuildErrors) as caught:
        planned(workspace, *edits)
    assert not list((workspace / "artifacts").glob(".store/manifests/*"))
    return [(error.where, error.what, error.fix) for error in caught.value.errors]


def skip(*patterns: str) -> tuple[str, str]:
    return "method: [awq, gptq]}", f"method: [awq, gptq], skip: {json.dumps(patterns)}}}"


def test_group_size_that_does_not_divide(workspace: Path) -> None:
    errors = refused(with_model(workspace, intermediate_size=160), ("group_size: 32", "group_size: 128"))
    what = "quantization.group_size 128 does not divide the 160 input channels of model.layers.0.mlp.down_proj"
    assert errors == [("recipes/tiny.yaml:8", what, "set group_size: 32, or skip down_proj")]
    assert planned(workspace, ("group_size: 32", "group_size: 128"), skip("lm_head", "down_proj")).steps, "the fix works"
    assert planned(workspace).steps, "and so does the other"


def test_width_that_fills_no_words(workspace: Path) -> None:
    errors = refused(with_model(workspace, intermediate_size=100), ("group_size: 32", "group_size: -1"))
    assert [(where, fix) for where, _, fix in errors] == [
        ("recipes/tiny.yaml:9", "skip gate_proj"),
        ("recipes/tiny.yaml:9", "skip up_proj"),
    ]
    assert "cannot hold model.layers.0.mlp.gate_proj: packs 8 output channels a word, 100 channels" in errors[0][1]
    assert planned(workspace, ("group_size: 32", "group_size: -1"), skip("lm_head", "gate_proj", "up_proj")).steps


def test_seqlen_beyond_the_models_positions(workspace: Path) -> None:
    errors = refused(workspace, ("seqlen: 32\n  seed", "seqlen: 257\n  seed"), ("seqlen: 32\n  kl", "seqlen: 512\n  kl"))
    assert errors == [
        ("recipes/tiny.yaml:6", "calibration.seqlen is 257; the model has 256 positions", "set calibration.seqlen: 256"),
        ("recipes/tiny.yaml:14", "verify.seqlen is 512; the model has 256 positions", "set verify.seqlen: 256"),
    ]


@pytest.mark.parametrize(
    ("patterns", "what", "fix"),
    [
        (
            ["lm_head", "down_prj"],
            "down_prj matches no linear",
            "name linears as the model does, for example model.layers.1.mlp.down_proj or down_proj",
        ),
        (["lm_head", "layers.2.*"], "layers.2.* matches no linear", "for example"),
        (["down_proj"], "lacks lm_head", "add lm_head to skip"),
        ([], "lacks lm_head", "add lm_head to skip"),
        (["lm_head", "*_proj"], "matches every linear", "narrow the patterns"),
        (
            ["lm_head", "layers.0.mlp.gate_proj"],
            "leaves model.layers.0.mlp.gate_proj float",
            "skip all of gate_proj, up_proj",
        ),
        (["lm_head", "layers.1.*.k_proj"], "leaves model.layers.1.self_attn.k_proj float", "q_proj, k_proj, v_proj"),
    ],
)
def test_skip_patterns(workspace: Path, patterns: list[str], what: str, fix: str) -> None:
    errors = refused(workspace, skip(*patterns))
    assert len({error[1] for error in errors if what in error[1]}) >= 1, errors
    assert all(where == "recipes/tiny.yaml:8" for where, _, _ in errors)
    assert any(fix in error[2] for error in errors if what in error[1])


def test_skip_names_whole_tails(workspace: Path) -> None:
    made = planned(workspace, skip("lm_head", "layers.0.mlp.*"))
    assert made.quantized.knobs["skip"] == [f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up")]
    assert planned(workspace).quantized.knobs["skip"] == []


def overridden(*lines: str) -> tuple[tuple[str, str], ...]:
    """The tiny recipe in a format that holds several schemes, with overrides."""
    written = f"group_size: 32, symmetric: true, overrides: {{{', '.join(lines)}}}"
    return (("format: awq", "format: compressed_tensors"), ("group_size: 32", written))


def test_overrides_reach_the_linears_that_they_name(workspace: Path) -> None:
    made = planned(workspace, *overridden('"layers.0.*": {bits: 8}', "down_proj: {group_size: 64, method: rtn}", "o_proj: {skip: true}"))
    schemes, knobs = made.layers.schemes, made.quantized.knobs
    assert schemes.of("model.layers.1.mlp.up_proj") == Scheme(4, 32, True)
    assert schemes.of("model.layers.0.mlp.up_proj") == Scheme(8, 32, True)
    assert schemes.of("model.layers.0.mlp.down_proj") == Scheme(8, 64, True), "both patterns name it"
    assert schemes.of("model.layers.1.mlp.down_proj") == Scheme(4, 64, True)
    assert schemes.of("model.layers.1.self_attn.o_proj") is None
    assert Schemes.from_json(knobs) == schemes
    assert {name: said["name"] for name, said in knobs["own_methods"].items()} == {
        f"model.layers.{layer}.mlp.down_proj": "rtn" for layer in (0, 1)
    }
    before = planned(workspace, *overridden("down_proj: {bits: 8}"))
    after = planned(workspace, *overridden("down_proj: {bits: 4}"))
    assert {"calibrate", "tokens"}.isdisjoint(kinds_changed(before, after)) and "quantize" in "".join(kinds_changed(before, after))


def test_an_override_that_is_later_wins(workspace: Path) -> None:
    made = planned(workspace, *overridden('"*_proj": {bits: 8, skip: true}', '"mlp.*": {bits: 4, skip: false}'))
    assert made.layers.schemes.of("model.layers.1.mlp.up_proj") == Scheme(4, 32, True)
    assert made.layers.schemes.of("model.layers.1.self_attn.q_proj") is None


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        ("dwn_proj: {bits: 8}", "quantization.overrides: dwn_proj matches no linear", "model.layers.1.mlp.down_proj or down_proj"),
        ("q_proj: {bits: 8}", "gives linears that engines fuse different schemes", "name all of q_proj, k_proj, v_proj in one pattern"),
        ("gate_proj: {skip: true}", "leaves model.layers.0.mlp.gate_proj float", "skip all of gate_proj, up_proj"),
    ],
)
def test_overrides_that_do_not_fit(workspace: Path, line: str, what: str, fix: str) -> None:
    ((where, said, how),) = refused(workspace, *overridden(line))
    assert what in said and fix in how and where.startswith("recipes/tiny.yaml:")


def test_mixed_bits_are_a_step_that_all_later_ones_read(workspace: Path) -> None:
    edits = (
        ("format: awq", "format: compressed_tensors"),
        ("group_size: 32", "group_size: 32, symmetric: true, mixed: {budget_bits: 5.0, bits: [4, 8]}"),
    )
    made = planned(workspace, *edits)
    (allocate,) = (step for step in made.steps if step.kind == "allocate")
    assert {need.role for need in allocate.needs} == {"source", "stats", "tokens"}
    for step in made.steps:
        if step.kind in ("quantize", "pack", "assemble", "score", "measure"):
            assert any(need.step == allocate and need.role == "bits" for need in step.needs), step.kind


SMALL = gpus.GPU("small", 80, 0.2, 300, 60, "a GPU that does not exist")


def test_target_that_is_too_small_says_what_would_do(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpus.GPUS, "small", SMALL)
    (error,) = refused(workspace, (TARGET[0], "format: awq\ntarget: {gpu: small, count: 1}"))
    where, what, fix = error
    assert (
        where == "recipes/tiny.yaml:10"
        and what.startswith("target small x 1: needs ")
        and "GiB too few" in what
        and "0.2 GiB are there" in what
    )
    assert fix


@pytest.mark.parametrize(
    ("config", "gpu", "policy", "held"),
    [
        ({"num_attention_heads": 4, "num_key_value_heads": 2}, "t4", "none", "64, 128, 256, head_dim is 32"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 192}, "t4", "none", "128, 256, head_dim is 192"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 192}, "a10", "int4", "128, 256, head_dim is 192"),
    ],
)
def test_heads_without_a_kernel(workspace: Path, config: dict[str, int], gpu: str, policy: str, held: str) -> None:
    with_model(workspace, **config)
    target = (TARGET[0], f"format: awq\ntarget: {{gpu: {gpu}}}")
    edits = [target, ("policy: none", f"policy: {policy}")] if policy != "none" else [target]
    made = planned(workspace, *edits)
    assert any(held in note and "PyTorch engine" in note for note in made.notes), made.notes
    assert made.artifact.knobs["engine"] == "pytorch"
    assert not any(held in note for note in planned(workspace).notes), "without a target nothing is asked of a GPU"


def test_each_policy_beside_the_recipes_own_is_planned(workspace: Path) -> None:
    with_model(workspace, num_attention_heads=2, num_key_value_heads=1, head_dim=192)
    made = planned(workspace, ("group_size: 32", "group_size: 128"), (TARGET[0], "format: awq\ntarget: {gpu: a10}"))
    policies: tuple[KvPolicy, ...] = ("none", "int8", "int4")
    served = {policy: serving_with(made.recipe, made.survey, made.layers.schemes, policy) for policy in policies}
    assert [engine for _, engine in served.values()] == ["turbomind", "turbomind", "pytorch"], "192 has no kernel for int4"
    assert served["none"][0] == made.serving
    tokens = [serving.pool_tokens for serving, _ in served.values() if serving is not None]
    assert len(tokens) == 3 and 1.9 < tokens[1] / tokens[0] < 2 and 3.5 < tokens[2] / tokens[0] < 4


def test_session_longer_than_the_models_positions(workspace: Path) -> None:
    errors = refused(workspace, (TARGET[0], "format: awq\ntarget: {gpu: t4, session_len: 1024}"))
    assert errors[0] == ("recipes/tiny.yaml:10", "target.session_len is 1024; the model has 256 positions", "set session_len: 256")


WIDE = ("group_size: 32", "group_size: 128")  # what TurboMind loads


def targeted(text: str) -> tuple[str, str]:
    return TARGET[0], f"format: awq\ntarget: {{gpu: t4, {text}}}"


def test_a_long_session_is_planned_where_positions_can_be_stretched(workspace: Path) -> None:
    errors = refused(workspace, WIDE, targeted("session_len: 1024"))
    said = "target.session_len is 1024; the model has 256 positions"
    assert errors == [("recipes/tiny.yaml:10", said, "set session_len: 256, or rope_scaling: dynamic beside it")]
    made = planned(workspace, WIDE, targeted("session_len: 1024, rope_scaling: dynamic"))
    assert made.artifact.knobs["engine"] == "turbomind" and made.artifact.knobs["target"]["rope_scaling"] == "dynamic"
    assert made.notes == ("prompts of more than 256 tokens are stretched; what verify measures holds for shorter ones",)
    with_model(workspace, num_attention_heads=2, num_key_value_heads=1, rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    assert planned(workspace, WIDE, targeted("session_len: 1024, rope_scaling: dynamic")).artifact.knobs["engine"] == "turbomind"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("config", "edits", "what", "fix"),
    [
        (
            {},
            [WIDE, targeted("rope_scaling: dynamic")],
            "has nothing to stretch: target.session_len is 256; the model has 256",
            "beyond 256",
        ),
        (
            {"rope_scaling": LLAMA3},
            [WIDE, targeted("session_len: 512, rope_scaling: dynamic")],
            "a rule of its own for them, llama3",
            "256",
        ),
        ({}, [targeted("session_len: 512, rope_scaling: dynamic")], "PyTorch engine turns all sessions of a batch by", "256"),
    ],
)
def test_positions_that_are_not_stretched(workspace: Path, config: dict[str, object], edits: list, what: str, fix: str) -> None:
    with_model(workspace, num_attention_heads=2, num_key_value_heads=1, **config)
    ((where, said, how),) = refused(workspace, *edits)
    assert where == "recipes/tiny.yaml:10" and what in said and fix in how and "leave rope_scaling out" in how


def test_tool_calls_need_a_chat_template(workspace: Path) -> None:
    parser = targeted("tool_call_parser: qwen3")
    with pytest.raises(BuildError, match="the model has no chat template, and a server calls tools through it") as raised:
        planned(workspace, parser)
    assert raised.value.where == "recipes/tiny.yaml:10" and raised.value.fix == "leave tool_call_parser out"
    (workspace / MODEL / "chat_template.jinja").write_text("{{ messages }}{{ tools }}")
    before, after = planned(workspace, MEMORY, TARGET), planned(workspace, MEMORY, parser)
    assert names(kinds_changed(before, after)) == {"deployable folder"}, "what memory measures does not depend on it"


def test_every_misfit_is_told_at_once(workspace: Path) -> None:
    errors = refused(
        with_model(workspace, intermediate_size=160),
        ("group_size: 32", "group_size: 128"),
        ("samples: 4\n  seqlen: 32\n  seed", "seqlen: 300\n  seed"),
    )
    assert len(errors) == 2


# Notes and outlook


def test_engine_that_can_serve_it(workspace: Path) -> None:
    assert planned(workspace).artifact.knobs["engine"] == "pytorch"
    assert any("groups of 128 only" in note for note in planned(workspace).notes)
    wide = planned(workspace, ("group_size: 32", "group_size: 128"))
    assert wide.artifact.knobs["engine"] == "turbomind" and wide.notes == ()


def test_outlook_shows_memory_and_what_a_build_takes(workspace: Path) -> None:
    without = "\n".join(outlook(planned(workspace)))
    assert "GiB of memory" in without and "no target GPU named" in without and "note: TurboMind" in without
    made = planned(workspace, TARGET)
    text = "\n".join(outlook(made))
    bar = text[text.index("[") + 1 : text.index("]")]
    assert len(bar) == 48 and set(bar) <= set(".#=+ ") and "=" in bar and "on t4, 14.6 GiB" in text
    assert made.serving is not None and f"{made.serving.kv_bytes_per_token:,} bytes of KV a token" in text


def test_schemes_that_overlapping_patterns_come_to_are_judged_too(workspace: Path) -> None:
    several = 'overrides: {"mlp.*": {skip: true, symmetric: true}, down_proj: {skip: false}}'
    errors = refused(workspace, ("format: awq", "format: gptq"), ("group_size: 32", f"group_size: 32, {several}"))
    assert any("stores zeros less one for a whole model or for none of it" in what for _, what, _ in errors)


def test_each_expert_is_looked_at(workspace: Path) -> None:
    shutil.rmtree(workspace / MODEL)
    models.tiny_mixtral(workspace / MODEL, intermediate_size=96)
    errors = refused(workspace, *overridden("experts.1.w2: {group_size: 64}"))
    assert [what for _, what, _ in errors if "does not divide the 96 input channels" in what and "experts.1.w2" in what], errors


def test_a_budget_for_no_linear(workspace: Path) -> None:
    edits = (("format: awq", "format: gptq"), ("group_size: 32", "group_size: 32, mixed: {budget_bits: 5.0, bits: [4, 8]}"))
    errors = refused(workspace, *edits, skip("lm_head", "*"))
    assert any("matches every linear" in what for _, what, _ in errors)


@pytest.mark.parametrize(
    ("serve", "line", "said"),
    (
        ("{new_tokens: 250}", "asks for 250 tokens after prompts of 32; a session holds 256", "set prompt_tokens: 128 and new_tokens: 128"),
        ("{tools: true}", "asks for a tool call, and the server gets no parser", "target.tool_call_parser"),
    ),
)
def test_what_no_server_could_answer_is_refused(serve: str, line: str, said: str, workspace: Path) -> None:
    ((where, what, fix),) = refused(workspace, ("  kl: {max_nats: 9.0}", f"  kl: {{max_nats: 9.0}}\n  serve: {serve}"))
    assert where.startswith("recipes/tiny.yaml:") and line in what and said in fix


def test_a_speedup_over_a_source_that_does_not_fit_is_refused(workspace: Path) -> None:
    made = planned(workspace, ("format: awq", "format: awq\ntarget: {gpu: a100-80gb, session_len: 256}"))
    runs.edit(workspace / "recipes/tiny.yaml", "format: awq", "format: awq\ntarget: {gpu: a100-80gb, session_len: 256}")
    runs.edit(workspace / "recipes/tiny.yaml", "  kl: {max_nats: 9.0}", "  kl: {max_nats: 9.0}\n  serve: {min_speedup: 1.1}")
    recipe = Workspace(workspace).load("tiny")
    rest = (made.layers.schemes, lambda: made.serving, lambda: [])
    assert not misfits(recipe, made.survey, *rest)
    large, _ = describe(
        {
            "architectures": ["LlamaForCausalLM"],
            "rms_norm_eps": 1e-5,
            "num_hidden_layers": 80,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
        },
        "config.json",
    )
    (error,) = misfits(recipe, replace(made.survey, architecture=large), *rest)
    assert "min_speedup is 1.1" in error.what and "does not fit a100-80gb x 1" in error.what and "target.count: 2" in error.fix

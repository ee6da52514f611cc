"""The model card: complete, true to what was measured, readable by the hub's own library, and broken by no name that it quotes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import released
import runs
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from buildsys import footprint, gpus
from buildsys.linears import linears
from buildsys.located import Located
from buildsys.measurement import Measurement, Verdict
from buildsys.release.card import card, front_matter, license_of, plain
from buildsys.release.facts import Facts, Ran, gather
from buildsys.release.resolved import resolved
from buildsys.step import Need, Step
from buildsys.store import Artifact, File, Store
from buildsys.survey import describe
from buildsys.verdict import judge
from buildsys.workspace import Workspace

GOLDEN = Path(__file__).parent / "golden" / "card.md"
COMMIT = "9b8d9553846b51fb3aa2ee1d4ea1e4ab4d5a8e3f"
SOURCE = f"{{hf_hub: {{repo: my-org/tiny-chat, revision: {COMMIT}}}}}"
TARGET = "target: {gpu: a10, session_len: 8192}\n"
RECIPE = f"""\
schema: 1
source: {SOURCE}
calibration: {{dataset: {{wikitext2: {{split: train}}}}, samples: 128, seqlen: 2048}}
quantization: {{bits: 4, method: [awq, gptq]}}
kv_cache: {{policy: int8, max_entry_count: 0.5}}
{TARGET}format: awq
verify: {{text: {{wikitext2: {{split: test}}}}, kl: {{max_nats: 0.05}}, memory: {{}}}}
publish: {{directory: {{path: ../published}}}}
"""
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MEASURED = {
    "kl": (Measurement("kl", 0.02134, "nats", 0.0199, 0.0228),),
    "lint": (Measurement.exact("findings", 0, "findings"),),
    "memory": (Measurement.exact("free_gib", 9.5, "GiB", "on a10: 32 sessions of 8192 tokens"),),
    "perplexity": (Measurement("quantized_perplexity", 7.25, "perplexity", 7.01, 7.5), Measurement("ratio", 1.013, "ratio", 1.01, 1.016)),
    "serve": (),
}
FETCH = Step("fetch", "source", 1, {}, hints={"how": {"hub": "hf_hub", "repo": "my-org/tiny-chat", "commit": COMMIT}, "module": "hf_hub"})
VERDICTS = (
    Verdict("kl", "passed", "kl 0.02134 nats (95% interval 0.0199 to 0.0228), limit: at most 0.05", "recipes/tiny.yaml:9"),
    Verdict("lint", "passed", "findings 0 findings, limit: at most 0", "recipes/tiny.yaml:9"),
    Verdict("serve", "skipped", "no CUDA device", "recipes/tiny.yaml:9"),
)


def facts(folder: Path, text: str = RECIPE, name: str = "tiny", config: dict[str, Any] | None = None, **more: Any) -> Facts:
    """A finished build, made by hand: the recipe, the architecture and the footprint are real."""
    (folder / "recipes").mkdir(parents=True, exist_ok=True)
    (folder / f"recipes/{name}.yaml").write_text(text)
    recipe = Workspace(folder).load(name)
    config = config or CONFIG
    architecture, module = describe(config, "config.json")
    surveyed = SimpleNamespace(architecture=architecture, turbomind=module.TURBOMIND, config=config)
    target, layers = recipe.target, linears(recipe, surveyed)[0]  # type: ignore[arg-type]
    serving = target and footprint.serving(
        architecture,
        layers.schemes,
        gpus.GPUS[target.gpu],
        kv_policy=recipe.kv_cache.policy,
        max_entry_count=recipe.kv_cache.max_entry_count,
        session_len=target.session_len or architecture.max_positions,
        max_batch_size=target.max_batch_size,
    )
    knobs = {"engine": "turbomind", "format": {"name": recipe.format.name}, "kv_cache": recipe.kv_cache.model_dump()}
    plan = SimpleNamespace(
        name=recipe.name,
        recipe=recipe,
        survey=surveyed,
        layers=layers,
        source=Located(more.pop("files", {}), how={"hub": "hf_hub", "commit": "of today"}),
        artifact=SimpleNamespace(knobs={**knobs, "target": target and target.model_dump()}, needs=(Need("source", FETCH),)),
        serving=serving,
    )
    files = {"model.safetensors": File("a" * 64, 765_432_100), "config.json": File("b" * 64, 900)}
    made = Artifact("c" * 64, MappingProxyType(files))
    errors = {"model.layers.0.self_attn.q_proj": 0.004, "model.layers.9.mlp.down_proj": 0.0123, "model.layers.1.mlp.up_proj": 0.005}
    fetched = Ran(FETCH, Artifact("d" * 64, MappingProxyType({}), {"built": more.pop("built", {})}))
    built = Facts(plan, (fetched,), made, MEASURED, VERDICTS, errors)  # type: ignore[arg-type]
    return replace(built, **more)


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL))


def tables(text: str) -> list[list[list[str]]]:
    """Every rendered table, as rows of cells."""
    found = re.findall(r"<table>.*?</table>", rendered(text), re.DOTALL)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) for table in found]
    return [[re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL) for row in table] for table in rows]


def fences(text: str) -> list[tuple[str, str]]:
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [(token.info, token.content) for token in tokens if token.type == "fence"]


def test_the_card_is_the_golden_one(tmp_path: Path) -> None:
    made = card(facts(tmp_path))
    if "UPDATE_GOLDEN" in os.environ:
        GOLDEN.write_text(made, encoding="utf-8")
    assert made == GOLDEN.read_text(encoding="utf-8"), (
        "read the difference; UPDATE_GOLDEN=1 python -m pytest tests/release/test_card.py writes it"
    )


def test_equal_builds_have_equal_cards_wherever_they_were_made(tmp_path: Path) -> None:
    one, two = card(facts(tmp_path / "a")), card(facts(tmp_path / "somewhere" / "else"))
    assert one == two and str(tmp_path) not in one and os.uname().nodename not in one


def test_the_hub_reads_the_front_matter(tmp_path: Path) -> None:
    text = card(facts(tmp_path, files={"LICENSE": write(tmp_path / "LICENSE", "Apache License\n  Version 2.0, January 2004\n")}))
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.base_model == "my-org/tiny-chat" and data.base_model_relation == "quantized" and data.quantized_by == "buildsys"
    assert data.license == "apache-2.0" and data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert {"awq", "4-bit", "gptq", "lmdeploy", "kv-cache-int8"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.dataset_type, result.dataset_split) == ("Salesforce/wikitext", "test")
    assert (result.task_type, result.metric_type, result.metric_value) == ("text-generation", "perplexity", 7.25)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_local_source_has_no_base_model(tmp_path: Path) -> None:
    text = RECIPE.replace(SOURCE, "{local: {path: /home/ann/models/secret-name, outside: true}}")
    made = facts(tmp_path, text)
    assert "base_model" not in front_matter(made)
    shown = card(made)
    assert "/home/ann" not in shown and "ann" not in re.findall(r"\w+", shown) and COMMIT not in shown


@pytest.mark.parametrize(
    ("hints", "said"),
    [
        ({"how": {"repo": "my-org/tiny-chat", "commit": "1" * 40}, "module": "hf_hub"}, f"my-org/tiny-chat at {'1' * 40}"),
        ({"how": {"repo": "Other/Tiny", "commit": "2" * 40}, "module": "modelscope"}, f"Other/Tiny at {'2' * 40}"),
        ({"pin": "my-org/tiny-chat at 111111111111", "module": "hf_hub"}, "my-org/tiny-chat at 111111111111"),
        ({"pin": f"my-org/tiny-chat at {COMMIT[:12]}", "module": "hf_hub"}, f"my-org/tiny-chat at {COMMIT}"),
        ({}, f"my-org/tiny-chat at {COMMIT}"),
    ],
)
def test_it_names_the_commit_that_was_fetched_and_not_todays(hints: dict[str, Any], said: str, tmp_path: Path) -> None:
    shown = card(facts(tmp_path, built={"hints": hints} if hints else {}))
    assert f"\n{said}, quantized to" in shown and f"- Source: {said};" in shown and "of today" not in shown


def test_its_own_commands_check_it_outside_of_a_checkout(tiny: Path, tmp_path: Path) -> None:
    folder = released.release(tiny, tmp_path / "release")
    (commands,) = [content for info, content in fences(card(facts(tmp_path))) if "verify --path" in content]
    (verify,) = [line for line in commands.splitlines() if "verify --path . " in line and "--key" not in line]
    words = verify.partition("#")[0].split()
    ran = subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, check=False)
    assert words[0] == "python" and ran.returncode == 0 and "nothing wrong was found" in ran.stdout, ran.stderr


def test_measurements_and_gates_are_tables(tmp_path: Path) -> None:
    measured, gates, memory = tables(card(facts(tmp_path)))
    assert measured[0] == ["check", "measured", "value", "95% interval", "note"]
    assert ["kl", "kl", "0.02134 nats", "0.0199 to 0.0228", ""] in measured
    assert ["serve", "nothing was measured", "", "", ""] in measured
    assert ["lint", "findings", "0", "exact", ""] in measured
    assert [row[:2] for row in gates[1:]] == [["kl", "passed"], ["lint", "passed"], ["serve", "<em>skipped: not checked</em>"]]
    assert [row[0] for row in memory[1:]] == ["context", "weights", "KV pool", "workspace"]


def test_what_was_skipped_never_reads_as_passed(tmp_path: Path) -> None:
    shown = card(facts(tmp_path))
    assert "2 passed, 1 skipped." in shown
    failed = card(facts(tmp_path, verdicts=(replace(VERDICTS[0], state="failed"),)))
    assert "1 failed." in failed and "passed |" not in failed
    assert "None: no measurement was held to a limit." in card(facts(tmp_path, verdicts=()))


def test_it_says_how_to_serve_it(tmp_path: Path) -> None:
    made = facts(tmp_path)
    (serve, *_) = [content for info, content in fences(card(made)) if "api_server" in content]
    words = serve.replace("\\\n", " ").split("\n")
    flags = "--backend turbomind --dtype float16 --tp 1 --session-len 8192 --cache-max-entry-count 0.5 --quant-policy 8"
    assert " ".join(words[1].split()) == f"lmdeploy serve api_server $MODEL {flags} --max-batch-size 32 --model-format awq"
    assert " ".join(words[2].split()) == f"lmdeploy chat $MODEL {flags} --model-format awq"
    assert "vllm serve $MODEL --max-model-len 8192" in card(made) and "AutoModelForCausalLM" in card(made)


def test_a_model_with_code_of_its_own_is_not_for_transformers(tmp_path: Path) -> None:
    shown = card(facts(tmp_path, config={**CONFIG, "auto_map": {"AutoModel": "x.Y"}}))
    assert "AutoModelForCausalLM" not in shown and "vLLM loads" in shown and "library_name: lmdeploy" in shown


def test_a_model_written_as_a_llama_is_for_transformers(tmp_path: Path) -> None:
    theirs = {
        **CONFIG,
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "bias": False,
        "auto_map": {"AutoModel": "x.Y"},
    }
    kept = card(facts(tmp_path / "kept", config=theirs))
    assert "; InternLM2ForCausalLM, 22 layers" in kept and "AutoModelForCausalLM" not in kept and "library_name: lmdeploy" in kept
    made = card(facts(tmp_path / "made", RECIPE.replace("format: awq", "format: {awq: {as: llama}}"), config=theirs))
    assert "; InternLM2ForCausalLM, written as LlamaForCausalLM, 22 layers" in made
    assert "AutoModelForCausalLM" in made and "library_name: transformers" in made


MIXTRAL = {**CONFIG, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
EVEN, OTHER = "bits: 4, symmetric: true", 'overrides: {"layers.0.*": {bits: 8}}'
LOADED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    # format, quantization, model: what transformers is told, nothing where it reads no such model
    "awq": ("awq", "bits: 4", CONFIG, 'from_pretrained(".", device_map="auto")'),
    "gptq": ("gptq", EVEN, CONFIG, 'from_pretrained(".", device_map="auto")'),
    "gptq of two schemes": ("gptq", f"{EVEN}, {OTHER}", CONFIG, ""),
    "gptq, mixed": ("gptq", f"{EVEN}, mixed: {{budget_bits: 5.0}}", CONFIG, ""),
    "gptq, a layer float": ("gptq", f"{EVEN}, skip: [lm_head, layers.0.*]", CONFIG, ""),
    "compressed_tensors": ("compressed_tensors", f"{EVEN}, {OTHER}", CONFIG, 'from_pretrained(".", device_map="auto")'),
    "zeros": ("compressed_tensors", "bits: 4", CONFIG, 'device_map="auto", quantization_config=CompressedTensorsConfig(dequantize=True))'),
    "experts, awq": ("awq", "bits: 4", MIXTRAL, ""),
    "experts, gptq": ("gptq", EVEN, MIXTRAL, ""),
    "experts, compressed_tensors": ("compressed_tensors", EVEN, MIXTRAL, 'from_pretrained(".", device_map="auto")'),
    "experts of two schemes": ("compressed_tensors", f"{EVEN}, {OTHER}", MIXTRAL, ""),
}


@pytest.mark.parametrize(("format", "quantization", "config", "load"), LOADED.values(), ids=LOADED)
def test_what_transformers_is_told(format: str, quantization: str, config: dict[str, Any], load: str, tmp_path: Path) -> None:
    text = RECIPE.replace("format: awq", f"format: {format}").replace("bits: 4", quantization)
    shown = card(facts(tmp_path, text, config=config))
    assert "vllm serve" in shown and f"library_name: {'transformers' if load else 'lmdeploy'}\n" in shown
    python = [content for info, content in fences(shown) if info == "python"]
    assert len(python) == bool(load) and all(load in content for content in python)
    for content in python:
        compile(content, "card", "exec")


def test_the_recipe_is_there_in_full(tmp_path: Path) -> None:
    made = facts(tmp_path)
    (recipe,) = [content for info, content in fences(card(made)) if info == "yaml"]
    assert yaml.safe_load(recipe) == resolved(made.plan.recipe)


def test_without_a_target(tmp_path: Path) -> None:
    shown = card(facts(tmp_path, RECIPE.replace(TARGET, "")))
    assert "names no target GPU" in shown and "--session-len 32768" in shown


# Names that would be markup

HOSTILE = "a|b `c` ```d``` <script>alert(1)</script> [x](http://e) *e* _f_ $g$ &lt; \\ ~~h~~\n# i\u202e\x1b[31m"


def test_hostile_strings_stay_text(tmp_path: Path) -> None:
    measured = {HOSTILE: (Measurement(HOSTILE, 1.0, HOSTILE, 0.5, 1.5, HOSTILE),)}
    verdicts = (Verdict(HOSTILE, "passed", HOSTILE, HOSTILE),)
    plainly = card(
        facts(tmp_path, measurements={"x": (Measurement("x", 1.0, "y", 0.5, 1.5),)}, verdicts=(Verdict("x", "passed", "x", "x"),))
    )
    made = card(facts(tmp_path, measurements=measured, verdicts=verdicts, layer_errors={HOSTILE: 0.1}))
    html = rendered(made)
    assert [[len(row) for row in table] for table in tables(made)] == [[len(row) for row in table] for table in tables(plainly)]
    assert "<script" not in html and '<a href="http://e' not in html and "\x1b" not in made and "\u202e" not in made
    assert html.count("<h1>") == 1 and len(fences(made)) == len(fences(plainly)) and html.count("<code") == rendered(plainly).count("<code")
    assert "<em>e" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "&amp;lt;" in html


def test_a_recipe_with_a_fence_in_it_ends_no_block(tmp_path: Path) -> None:
    text = RECIPE.replace("method: [awq, gptq]}", 'method: [awq, gptq], skip: [lm_head, "```", "~~~~"]}')
    made = facts(tmp_path, text)
    (recipe,) = [content for info, content in fences(card(made)) if info == "yaml"]
    assert yaml.safe_load(recipe)["quantization"]["skip"] == ["lm_head", "```", "~~~~"]
    assert "<h2>Provenance</h2>" in rendered(card(made))


@pytest.mark.parametrize("text", ["model.layers.0.self_attn.q_proj", "LlamaForCausalLM", "4-bit g128", "a (b), c/d: e"])
def test_ordinary_names_are_left_readable(text: str) -> None:
    assert plain(text) == text


# Licences


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, {}),
        ({"LICENSE": "MIT License\n\nCopyright (c) 2024"}, {"license": "mit"}),
        ({"LICENSE.txt": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\nLlama 3.1 Version"}, {"license": "llama3.1"}),
        ({"LICENSE": "Terms of our own"}, {"license": "other", "license_link": "LICENSE"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: x\nlicense_link: y\ntags: [a]\n---\n# X"},
            {"license": "other", "license_name": "x", "license_link": "y"},
        ),
        ({"README.md": "---\nlicense: [a: b\n---\n", "LICENSE": "Apache License\nVersion 2.0"}, {"license": "apache-2.0"}),
        ({"README.md": "no front matter", "NOTICE": "Apache License Version 2.0"}, {}),
    ],
)
def test_licences(files: dict[str, str], found: dict[str, str], tmp_path: Path) -> None:
    assert license_of({name: write(tmp_path / name, text) for name, text in files.items()}) == found


# A real build


def test_the_demo_has_a_card(demo: tuple[Path, runs.Ran]) -> None:
    workspace, ran = demo
    ran.fine()
    plan, store = runs.planned(workspace, "demo"), Store(workspace / "artifacts")
    built = gather(plan, store, judge(plan, store))
    shown = card(built)
    measured, gates, _ = tables(shown)
    assert len(measured) - 1 == sum(map(len, built.measurements.values())) and len(gates) - 1 == len(built.verdicts)
    assert all(f"{one.value:.4g}" in shown for found in built.measurements.values() for one in found)
    assert str(workspace) not in shown and "license" not in front_matter(built) and built.artifact.digest() in shown
    assert ModelCard(shown, ignore_metadata_errors=False).data.tags

"""What every architecture keeps: its tensors are the model's, streaming its blocks is the whole forward, and what it cannot do it refuses.

The oracle is transformers' own model; for InternLM2 and InternLM3, which transformers lacks, a Llama of the same function: with queries,
keys and values fused by a loop, or with biases of zero where InternLM3 has none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from buildsys.architecture import ROPE_KINDS, SITES
from buildsys.errors import BuildError
from buildsys.quant.model import Model
from buildsys.slots import Frozen, modules
from buildsys.survey import describe, survey
from tests import models

LENGTH = 40  # tokens; longer than each sliding window below
NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
LLAMAS = {"InternLM2ForCausalLM", "InternLM3ForCausalLM"}  # transformers lacks them; held to a Llama of the same function
SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HERE = Path(__file__).resolve().parent
CONFIGS = {path.parent.name: path for folder in (HERE.parent, HERE) for path in folder.glob("configs/*/config.json")}
"""Recorded from real models."""
SMALL: dict[str, Any] = {**SIZES, "bos_token_id": 0, "eos_token_id": 1}
SMALL.pop("max_position_embeddings")  # theirs
NOT_COMPUTED = ("architectures", "auto_map", "model_type", "pad_token_id", "torch_dtype", "transformers_version")
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
PHI3 = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}  # its defaults are no ids of so small a vocabulary
MIXTURES = ("mixtral", "qwen3_moe")  # transformers fuses their experts in memory, and saves them apart: what it saves is surveyed below
NARROW = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "head_dim": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama one head each": ("llama", {"num_key_value_heads": 8, "rms_norm_eps": 1e-2}),
    "llama biases, tied, head_dim": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12}),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral full attention": ("mistral", {"sliding_window": None, "head_dim": 16, "num_key_value_heads": 1}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen2 window switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 windows, biases": ("qwen3", {"head_dim": 8, "attention_bias": True, **WINDOWS}),
    "phi3": ("phi3", PHI3),
    "phi3 window, one head each, tied": (
        "phi3",
        PHI3 | {"sliding_window": 9, "num_key_value_heads": 8, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "mixtral window, one head each, three of five": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 7, "num_key_value_heads": 8, "head_dim": 16},
    ),
    "qwen3_moe": ("qwen3_moe", {**NARROW, "norm_topk_prob": True}),
    "qwen3_moe shares of all, tied": ("qwen3_moe", {**NARROW, "norm_topk_prob": False, "tie_word_embeddings": True}),
    "qwen3_moe windows, biases": ("qwen3_moe", {**NARROW, "attention_bias": True, **WINDOWS}),
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic beyond": {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 16},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 32},
    "yarn": YARN,
    "yarn exact ends": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    "yarn own amplitude": YARN | {"attention_factor": 0.7},
    "yarn mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
}


def oracle(model_type: str, changed: dict[str, Any]) -> Any:
    """transformers' model with random norms and biases too: those that it would start as ones and zeros hide their absence."""
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | {"bos_token_id": 0, "eos_token_id": 1} | changed))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    made = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            drawn = torch.randn(parameter.shape, generator=made)
            matrix = drawn * (0.5 if "embed" in name else parameter.shape[-1] ** -0.5)
            parameter.copy_(1 + 0.3 * drawn if "norm" in name else 0.5 * drawn if drawn.dim() == 1 else matrix)
    return model


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    models.write_tokenizer(folder)
    return folder


def ids() -> Tensor:
    return models.tokens(2, LENGTH, vocab=SIZES["vocab_size"])


@torch.no_grad()
def whole(model: Any) -> Tensor:  # -> [windows, tokens, vocab]
    return torch.stack([model(window[None].long()).logits[0] for window in ids()])


@torch.no_grad()
def streamed(model: Model) -> Tensor:  # -> [windows, tokens, vocab]
    return models.streamed(model, ids())


def agree(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.3, "the oracle says nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5 * max(1.0, float(theirs.std())))


def edit(folder: Path, **changed: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changed
    (folder / "config.json").write_text(json.dumps(config))


def test_every_architecture_has_a_case_here() -> None:
    covered = {NAMES[model_type] for model_type, _ in CASES.values()} | LLAMAS
    assert {module.HANDLES for module in modules("archs").values()} == covered, "add a case of yours to CASES"
    assert set(models.FAMILIES) == set(modules("archs")), "add yours to tests/models.py"
    assert {said["rope_type"] for said in ROPES.values()} == set(ROPE_KINDS)


@pytest.mark.parametrize("name", sorted(modules("archs")))
def test_a_module_is_what_the_slot_asks_for(name: str, tmp_path: Path) -> None:
    module = modules("archs")[name]
    assert issubclass(module.Knobs, Frozen) and isinstance(module.VERSION, int) and "hidden_act" in module.EXPECTS
    found = survey(models.files(models.FAMILIES[name](tmp_path)))
    assert found.version == module.VERSION and found.architecture.model_type == name
    a = found.architecture
    assert tuple(linear for site in a.sites for linear in a.at(site)) == a.linears
    assert (a.sites == a.scale_sites == SITES) if a.experts is None else a.scale_sites[:3] == SITES[:3]


@pytest.mark.parametrize("case", [case for case, (model_type, _) in CASES.items() if model_type not in MIXTURES])
def test_tensors_are_those_of_the_model(case: str) -> None:
    model_type, changed = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **(SIZES | changed))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    architecture, _ = describe(json.loads(config.to_json_string()) | {"architectures": [NAMES[model_type]]}, "config.json")
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    assert architecture.tensors() == theirs
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert {architecture.prefix(at) + linear.name for at in range(architecture.layers) for linear in architecture.linears} == linears


@pytest.mark.parametrize("case", CASES)
def test_streaming_the_blocks_is_the_whole_forward(case: str, tmp_path: Path) -> None:
    model = oracle(*CASES[case])
    survey(models.files(saved(model, tmp_path)))
    agree(streamed(models.opened(tmp_path)), whole(model))


@pytest.mark.parametrize("rope", ROPES)
def test_rope_scaling_is_that_of_transformers_in_either_spelling(rope: str, tmp_path: Path) -> None:
    said = dict(ROPES[rope])
    sizes = {key: said.pop(key) for key in ("max_position_embeddings",) if key in said}
    model = oracle("llama", {"rope_parameters": {"rope_theta": 500.0, **said}, "hidden_size": 128, **sizes})
    new = streamed(models.opened(saved(model, tmp_path)))
    agree(new, whole(model))
    kind = said.pop("rope_type")
    edit(tmp_path, rope_parameters=None, rope_theta=500, rope_scaling=None if kind == "default" else {"type": kind, **said})
    assert torch.equal(streamed(models.opened(tmp_path)), new)
    edit(tmp_path, rope_theta=501)
    assert not torch.equal(streamed(models.opened(tmp_path)), new)


def test_rope_kinds_differ_from_each_other(tmp_path: Path) -> None:
    """Else the test above could pass without any rule."""
    saved(oracle("llama", {"hidden_size": 128}), tmp_path)
    seen = []
    for said in ROPES.values():
        edit(tmp_path, rope_parameters={"rope_theta": 500.0, **said}, max_position_embeddings=said.get("max_position_embeddings", 64))
        seen.append(streamed(models.opened(tmp_path)))
    same = [(a, b) for a in range(len(seen)) for b in range(a) if (seen[a] - seen[b]).abs().max() < 1e-3]
    assert same == [(2, 0)]  # dynamic within max_position_embeddings is the default


def test_llama3_without_an_original_length_means_max_position_embeddings(tmp_path: Path) -> None:
    said = LLAMA3 | {"rope_theta": 500.0}
    model = oracle("llama", {"rope_parameters": said, "max_position_embeddings": 32})
    saved(model, tmp_path)
    edit(tmp_path, rope_parameters=said)
    agree(streamed(models.opened(tmp_path)), whole(model))


def factors(count: int, top: float) -> list[float]:
    return torch.linspace(1.0, top, count).tolist()


LONG: dict[str, dict[str, Any]] = {
    "within the original context": {"original_max_position_embeddings": LENGTH},
    "beyond it": {"original_max_position_embeddings": LENGTH - 1},
    "some channels stand still": {"original_max_position_embeddings": 16, "partial_rotary_factor": 0.75},
    "own amplitude": {"original_max_position_embeddings": 16, "attention_factor": 0.7},
    "own factor": {"original_max_position_embeddings": 16, "factor": 32.0},
    "not stretched": {"original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("spelling", ["longrope", "su", "yarn", "rope_parameters"])
@pytest.mark.parametrize("case", LONG)
def test_longrope_is_that_of_transformers(case: str, spelling: str, tmp_path: Path) -> None:
    said = dict(LONG[case])
    top = {key: said.pop(key) for key in ("original_max_position_embeddings", "partial_rotary_factor") if key in said}
    count = int(16 * top.get("partial_rotary_factor", 1.0)) // 2
    rule = {"rope_type": "longrope", "short_factor": factors(count, 2.0), "long_factor": factors(count, 9.0), **said}
    model = oracle("phi3", PHI3 | {"rope_parameters": {"rope_theta": 500.0, **rule}, "hidden_size": 128, **top})
    saved(model, tmp_path)
    if spelling != "rope_parameters":
        scaling = {"type": spelling, **{key: value for key, value in rule.items() if key != "rope_type"}}
        edit(tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=scaling, **top)
    survey(models.files(tmp_path))
    agree(streamed(models.opened(tmp_path)), whole(model))


def test_longrope_kinds_differ_from_each_other(tmp_path: Path) -> None:
    """Else the test above could pass without any rule."""
    saved(oracle("phi3", PHI3 | {"hidden_size": 128}), tmp_path)
    seen = [streamed(models.opened(tmp_path))]
    for said in LONG.values():
        count = int(16 * said.get("partial_rotary_factor", 1.0)) // 2
        scaling = {"type": "longrope", "short_factor": factors(count, 2.0), "long_factor": factors(count, 9.0)}
        scaling |= {key: said[key] for key in ("attention_factor", "factor") if key in said}
        top = {"original_max_position_embeddings": said["original_max_position_embeddings"]}
        edit(tmp_path, rope_parameters=None, rope_theta=1e4, rope_scaling=scaling, partial_rotary_factor=None, **top)
        edit(tmp_path, partial_rotary_factor=said.get("partial_rotary_factor"))
        seen.append(streamed(models.opened(tmp_path)))
    assert all((seen[a] - seen[b]).abs().max() > 1e-3 for a in range(len(seen)) for b in range(a))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16}}, "long_factor is None; 16 numbers"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 15, "long_factor": [1.0] * 16}}, "a list of 15; 16 numbers"),
        ({"rope_scaling": {"type": "su", "short_factor": [1.0] * 16, "long_factor": ["x"] * 16}}, "long_factor is 'x'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"sliding_window": "wide"}, "sliding_window is 'wide'"),
    ],
)
def test_phi3_refuses_what_it_does_not_compute(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    models.tiny_phi3(tmp_path)
    edit(tmp_path, **changed)
    assert said in refusal(tmp_path).what


def test_windows_left_out_of_config_json_are_transformers_defaults() -> None:
    sizes = SIZES | {"num_hidden_layers": 30}
    mistral, _ = describe(sizes | {"architectures": ["MistralForCausalLM"]}, "config.json")
    assert mistral.window(0) == transformers.MistralConfig().sliding_window == 4096
    qwen, _ = describe(sizes | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "config.json")
    theirs = transformers.Qwen2Config(**sizes, use_sliding_window=True)
    assert [window is not None for window in qwen.sliding_window] == [kind == "sliding_attention" for kind in theirs.layer_types]
    every, _ = describe(sizes | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 0}, "config.json")
    assert every.sliding_window == (4096,) * 30


# Sources


def reread(folder: Path) -> Any:
    """transformers' own reading of the files, in float32: a model that was cast has cast rotary tables too."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["llama biases, tied, head_dim", "qwen3", "phi3 window, one head each, tied"])
def test_sources_of_every_float_type(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model_type, changed = CASES[case]
    model = oracle(model_type, changed | {"max_position_embeddings": 128}).to(dtype)
    saved(model, tmp_path)
    survey(models.files(tmp_path))
    opened = models.opened(tmp_path)
    assert {opened.checkpoint.dtype(name) for name in opened.checkpoint.names()} == {dtype}
    agree(streamed(opened), whole(reread(tmp_path)))


def test_a_source_whose_norms_are_wider_than_its_matrices(tmp_path: Path) -> None:
    model = oracle("llama", {})
    saved(model.to(torch.bfloat16), tmp_path)
    change_weights(tmp_path, lambda held: held.update({name: held[name].float() for name in held if "norm" in name}))
    survey(models.files(tmp_path))
    agree(streamed(models.opened(tmp_path)), whole(reread(tmp_path)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_source_in_forty_shards(dtype: torch.dtype, tmp_path: Path) -> None:
    model = oracle("llama", {"num_hidden_layers": 8}).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="1KB")  # a file for each matrix
    models.write_tokenizer(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) >= 40 and not (tmp_path / "model.safetensors").exists()
    assert survey(models.files(tmp_path)).architecture.layers == 8
    agree(streamed(models.opened(tmp_path)), whole(reread(tmp_path)))
    lost = next(path for path in shards if "model.layers.5.mlp.up_proj.weight" in load_file(path))
    lost.unlink()
    assert lost.name in refusal(tmp_path).what + refusal(tmp_path).where


# InternLM2


def fused(llama: dict[str, Tensor], heads: int, kv_heads: int, head_dim: int) -> dict[str, Tensor]:
    """A Llama's tensors as InternLM2 stores them, row by row."""
    renamed = {
        "model.embed_tokens": "model.tok_embeddings",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    found: dict[str, Tensor] = {}
    for name, tensor in llama.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            q, k, v = (llama[name.replace("q_proj", f"{part}_proj")] for part in "qkv")
            rows = []
            for kv_head in range(kv_heads):
                for head in range(heads):
                    if head // (heads // kv_heads) == kv_head:
                        rows += [q[head * head_dim + at] for at in range(head_dim)]
                rows += [k[kv_head * head_dim + at] for at in range(head_dim)]
                rows += [v[kv_head * head_dim + at] for at in range(head_dim)]
            found[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.stack(rows)
            continue
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        found[name] = tensor.clone()
    return found


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_internlm2_is_a_llama_with_fused_rows(kv_heads: int, bias: bool, tmp_path: Path) -> None:
    model = oracle("llama", {"num_key_value_heads": kv_heads, "attention_bias": bias, "rope_theta": 1e6})
    saved(model, tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file(fused(held, SIZES["num_attention_heads"], kv_heads, 8), tmp_path / "model.safetensors")
    auto_map = {"AutoModel": "modeling_internlm2.X"}
    edit(tmp_path, architectures=["InternLM2ForCausalLM"], model_type="internlm2", bias=bias, auto_map=auto_map)
    found = survey(models.files(tmp_path))
    assert [linear.name for linear in found.architecture.at("attn_in")] == ["attention.wqkv"]
    agree(streamed(models.opened(tmp_path)), whole(model))


# InternLM3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_internlm3_is_a_llama_with_two_switches_for_biases(qkv_bias: bool, bias: bool, tmp_path: Path) -> None:
    model = oracle("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "rope_theta": 5e7})
    absent = {"qkv": not qkv_bias, "o": not bias, "gate": not bias, "up": not bias, "down": not bias}
    gone = [name for name, _ in model.named_parameters() if name.endswith("_proj.bias") and absent[role_of(name)]]
    with torch.no_grad():
        for name in gone:
            model.get_parameter(name).zero_()
    saved(model, tmp_path)
    change_weights(tmp_path, lambda held: [held.pop(name) for name in gone])
    auto_map = {"AutoModel": "modeling_internlm3.X"}
    edit(tmp_path, architectures=["InternLM3ForCausalLM"], model_type="internlm3", bias=bias, qkv_bias=qkv_bias, auto_map=auto_map)
    survey(models.files(tmp_path))
    agree(streamed(models.opened(tmp_path)), whole(model))


def role_of(name: str) -> str:
    role = name.split(".")[-2].removesuffix("_proj")
    return "qkv" if role in "qkv" else role


# Real models


def small(config: dict[str, Any]) -> dict[str, Any]:
    """The same config of a small model. LongRoPE has a number for each frequency: there heads keep their width."""
    long = (config.get("rope_scaling") or {}).get("long_factor", ())
    heads = {"hidden_size": round(2 * len(long) / config.get("partial_rotary_factor", 1.0)) * SMALL["num_attention_heads"]} if long else {}
    narrow = {"head_dim": 8} if config.get("head_dim") else {}
    return config | SMALL | heads | narrow


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_a_publishers_own_config_computes_the_same(name: str, tmp_path: Path) -> None:
    """The recorded config.json with every key that its publisher wrote, as it is spelled there, and smaller sizes."""
    written = small(json.loads(CONFIGS[name].read_text()))
    said = {key: value for key, value in written.items() if key not in NOT_COMPUTED}
    kind = "llama" if written["architectures"][0] in LLAMAS else written["model_type"]
    model = oracle(kind, said | ({"pad_token_id": 0} if kind == "phi3" else {}))
    saved(model, tmp_path)
    if written["model_type"] == "internlm2":
        held = load_file(tmp_path / "model.safetensors")
        save_file(fused(held, SMALL["num_attention_heads"], SMALL["num_key_value_heads"], 8), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(written))
    survey(models.files(tmp_path))
    agree(streamed(models.opened(tmp_path)), whole(model))


# Refusals


def refusal(folder: Path) -> BuildError:
    with pytest.raises(BuildError) as caught:
        survey(models.files(folder))
    assert caught.value.where and caught.value.fix
    return caught.value


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = models.tiny_llama(tmp_path / "model")
    survey(models.files(folder))
    return folder


@pytest.mark.parametrize("name", sorted(modules("archs")))
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"partial_rotary_factor": 0.5}, "0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "0.25"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, "longrope"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "two"}}, "two"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 8}}, "factor"),
        ({"rope_scaling": ["linear", 2]}, "object"),
        ({"rope_theta": "big"}, "big"),
        ({"rms_norm_eps": None, "rope_theta": -1}, "rope_theta"),
        ({"rms_norm_eps": "small"}, "small"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"hidden_size": True}, "hidden_size"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantized already (awq)"),
        ({"quantization_config": "fp8"}, "fp8"),
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused(name: str, changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    models.FAMILIES[name](tmp_path)
    edit(tmp_path, **changed)
    found = refusal(tmp_path)
    assert said in found.what and "config.json" in found.where


def test_layer_types_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    models.tiny_qwen2(tmp_path)
    for kinds in (["full_attention"], ["full_attention", "chunked_attention"], "full_attention"):
        edit(tmp_path, use_sliding_window=True, sliding_window=8, layer_types=kinds)
        assert "layer_types" in refusal(tmp_path).what


def test_an_unknown_architecture_lists_the_known(llama: Path) -> None:
    for named in (["GPT2LMHeadModel"], [], None, [["LlamaForCausalLM"]], "LlamaForCausalLM"):
        edit(llama, architectures=named)
        assert "Qwen3ForCausalLM" in refusal(llama).what


def test_remote_code_is_refused_where_it_would_be_needed_and_ignored_elsewhere(llama: Path) -> None:
    edit(llama, auto_map={"AutoModelForCausalLM": "modeling_x.XForCausalLM"})
    survey(models.files(llama))
    edit(llama, architectures=["XForCausalLM"])
    found = refusal(llama)
    assert "auto_map" in found.what and "refused" in found.what and "XForCausalLM" in found.what


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors")


def test_a_missing_tensor_is_named(llama: Path) -> None:
    change_weights(llama, lambda held: held.__delitem__("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in refusal(llama).what


def test_an_extra_tensor_is_named(llama: Path) -> None:
    change_weights(llama, lambda held: held.update({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)}))
    assert "lora_A" in refusal(llama).what
    change_weights(llama, lambda held: held.__delitem__("model.layers.0.self_attn.q_proj.lora_A.weight"))
    change_weights(llama, lambda held: held.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(16)}))
    survey(models.files(llama))  # a buffer that old checkpoints saved is of no interest


def test_biases_that_config_json_does_not_mention_are_refused(tmp_path: Path) -> None:
    models.tiny_llama(tmp_path, attention_bias=True)
    edit(tmp_path, attention_bias=False)
    assert "_proj.bias" in refusal(tmp_path).what


def test_a_tensor_of_another_shape_or_type_shows_both(llama: Path) -> None:
    change_weights(llama, lambda held: held.update({"model.norm.weight": torch.ones(64)}))
    found = refusal(llama)
    assert "model.norm.weight" in found.what and "[64]" in found.what and "[128]" in found.what
    change_weights(llama, lambda held: held.update({"model.norm.weight": torch.ones(128, dtype=torch.int8)}))
    assert "I8" in refusal(llama).what


@pytest.mark.parametrize("name", ["llama", "internlm2", "internlm3", "phi3"])
def test_tied_embeddings_with_and_without_a_copy_in_the_file(name: str, tmp_path: Path) -> None:
    folder = models.FAMILIES[name](tmp_path / "tied", tie_word_embeddings=True, vocab_size=SIZES["vocab_size"])
    architecture = survey(models.files(folder)).architecture
    assert architecture.lm_head is None
    before = streamed(models.opened(folder))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    head = "output.weight" if name == "internlm2" else "lm_head.weight"
    change_weights(copy, lambda held: held.update({head: held[architecture.embed].clone()}))
    survey(models.files(copy))
    assert torch.equal(streamed(models.opened(copy)), before)
    edit(folder, tie_word_embeddings=False)
    assert head in refusal(folder).what


def test_a_folder_without_a_tokenizer_is_refused(llama: Path) -> None:
    (llama / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(llama).what


@pytest.mark.parametrize("text", ["{", "[]", '"config"', "\udcff"])
def test_a_config_json_that_is_none_is_refused(text: str, llama: Path) -> None:
    (llama / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "JSON" in refusal(llama).what

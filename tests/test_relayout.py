"""Models written as plain Llamas: transformers' Llama computes what the model computed, and each cut of a matrix keeps its rows."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from buildsys.errors import BuildError
from buildsys.formats import awq
from buildsys.io import checkpoint
from buildsys.io.checkpoint import Checkpoint
from buildsys.io.headers import SINGLE
from buildsys.quant.grid import min_max
from buildsys.quant.model import Model
from buildsys.quant.rows import relay, take
from buildsys.relayout import Part, Relayout, relayout
from buildsys.scheme import Scheme, Schemes
from buildsys.survey import describe
from tests import models

LENGTH = 40
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "internlm2": ("internlm2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1e6}),
    "internlm2 beyond its positions": (
        "internlm2",
        {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 32},
    ),
    "internlm2 biases, tied": ("internlm2", {"bias": True, "tie_word_embeddings": True, "num_attention_heads": 8, "pretraining_tp": 1}),
    "internlm2 one head each": ("internlm2", {"num_key_value_heads": 4}),
    "internlm2 one key/value head": ("internlm2", {"num_key_value_heads": 1, "num_attention_heads": 8}),
    "internlm3": ("internlm3", {"qkv_bias": False, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}}),
    "internlm3 biases": ("internlm3", {"qkv_bias": True, "bias": True, "head_dim": 48}),
    "phi3": ("phi3", {"sliding_window": None, "rope_theta": 250000}),
    "phi3 one head each, tied": ("phi3", {"sliding_window": None, "num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "llama": (
        "llama",
        {
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 32}
        },
    ),
    "llama yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "truncate": False}}),
}


def opened(folder: Path, family: str, **config: Any) -> Model:
    return models.opened(models.FAMILIES[family](folder, **config))


def as_llama(model: Model, folder: Path) -> Relayout:
    return relayout(model.architecture, json.loads((folder / "config.json").read_text()), "config.json", "llama")


def write(model: Model, made: Relayout, folder: Path) -> None:
    """What the steps do with it, without quantization."""
    held = {new: model.checkpoint.load(old) for new, old in made.outside().items()}
    for layer in range(made.old.layers):
        block = {name: model.checkpoint.load(made.old.prefix(layer) + name) for name in made.old.block_tensors()}
        linears, floats = relay(made, {}, block)
        assert not linears
        held |= {made.architecture.prefix(layer) + name: tensor for name, tensor in floats.items()}
    assert {name: tuple(tensor.shape) for name, tensor in held.items()} == made.architecture.tensors()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(made.config))
    checkpoint.save(folder / "model.safetensors", held, {"format": "pt"})


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_is_written_and_computes_the_same(case: str, tmp_path: Path) -> None:
    family, changed = CASES[case]
    model, tokens = opened(tmp_path / "model", family, **changed), models.tokens(2, LENGTH)
    before = models.streamed(model, tokens)
    write(model, as_llama(model, tmp_path / "model"), tmp_path / "llama")
    theirs, told = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "llama", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    with torch.no_grad():
        found = torch.stack([theirs.eval()(window[None].long()).logits[0] for window in tokens])
    torch.testing.assert_close(found, before, rtol=0, atol=2e-5)
    torch.testing.assert_close(models.streamed(models.opened(tmp_path / "llama"), tokens), before, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_written_config_describes_the_written_model(case: str, tmp_path: Path) -> None:
    family, changed = CASES[case]
    made = as_llama(opened(tmp_path, family, **changed), tmp_path)
    found, module = describe(made.config, "config.json")
    assert found == made.architecture and module.HANDLES == "LlamaForCausalLM"
    assert "auto_map" not in made.config and "bias" not in made.config and json.loads(json.dumps(made.config)) == made.config
    assert made.config["bos_token_id"] == models.BOS and made.config["eos_token_id"] == models.EOS


def test_without_as_nothing_changes(tmp_path: Path) -> None:
    for family in models.FAMILIES:
        model = opened(tmp_path / family, family)
        said = json.loads((tmp_path / family / "config.json").read_text())
        made = relayout(model.architecture, said, "config.json", None)
        assert made.architecture is made.old is model.architecture and made.config == said
        names = made.modules()
        assert all(new == old for new, old in names.items())
        assert {name.rpartition(".")[0] for name in model.architecture.tensors()} == set(names)
        whole = Schemes(Scheme(4, 64), frozenset(list(names)[:3]), {name: Scheme(8, 32) for name in list(names)[3:5]})
        assert made.schemes(whole) == whole


@given(kv_heads=st.integers(1, 5), group=st.integers(1, 5), head_dim=st.sampled_from([2, 6]), family=st.sampled_from(["internlm2", "phi3"]))
def test_each_row_of_a_fused_matrix_goes_to_one_place(kv_heads: int, group: int, head_dim: int, family: str) -> None:
    heads = kv_heads * group
    sizes = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    names = {"internlm2": "InternLM2ForCausalLM", "phi3": "Phi3ForCausalLM"}
    config = models.SIZES | sizes | {"architectures": [names[family]], "model_type": family}
    made = relayout(describe(config, "config.json")[0], config, "config.json", "llama")
    for old in made.old.linears:
        parts = [part.rows for part in made.parts.values() if part.name == old.name]
        rows = list(chain.from_iterable(chain.from_iterable(part or (range(old.out_features),) for part in parts)))
        assert sorted(rows) == list(range(old.out_features))
    sizes_of = {linear.name: linear.out_features for linear in made.old.linears}
    for new in made.architecture.linears:
        assert len(take(torch.zeros(sizes_of[made.parts[new.name].name]), made.parts[new.name])) == new.out_features


def test_parts_have_the_scheme_of_the_matrix_they_were_in(tmp_path: Path) -> None:
    made = as_llama(opened(tmp_path, "internlm2"), tmp_path)
    own = {"model.layers.1.attention.wqkv": Scheme(8, 64), "model.layers.0.feed_forward.w2": Scheme(8, 32)}
    left = frozenset({"model.layers.0.attention.wqkv", "model.layers.1.feed_forward.w3", "output"})
    found = made.schemes(Schemes(Scheme(4, 128), left, own))
    assert found.left_float == {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"} | {"model.layers.1.mlp.up_proj", "lm_head"}
    assert found.own == {f"model.layers.1.self_attn.{name}_proj": Scheme(8, 64) for name in "qkv"} | {
        "model.layers.0.mlp.down_proj": Scheme(8, 32)
    }
    assert found.default == Scheme(4, 128)


@pytest.mark.parametrize("case", ["internlm2 biases, tied", "internlm3", "phi3"])
def test_packed_as_a_llama_it_computes_what_it_computes_packed_as_itself(case: str, tmp_path: Path) -> None:
    family, changed = CASES[case]
    model, tokens = opened(tmp_path / "model", family, **changed), models.tokens(2, LENGTH)
    as_itself = relayout(model.architecture, {}, "config.json", None)
    said = Schemes(Scheme(4, 32), frozenset({model.architecture.prefix(1) + model.architecture.linears[-1].name}))
    packed = [pack(model, made, said, tmp_path) for made in (as_itself, as_llama(model, tmp_path / "model"))]
    before, found = (models.streamed(one, tokens) for one in packed)
    torch.testing.assert_close(found, before, rtol=0, atol=2e-6)
    assert (before - models.streamed(model, tokens)).abs().max() > 0.01, "nothing was quantized"


def pack(model: Model, made: Relayout, said: Schemes, folder: Path) -> Model:
    """A model rounded to the nearest codes, in AWQ's layout under new names, and opened."""
    schemes, file = made.schemes(said), folder / f"{made.architecture.model_type}.safetensors"
    held = {new: model.checkpoint.load(old) for new, old in made.outside().items()}
    for layer in range(made.old.layers):
        floats = {name: model.checkpoint.load(made.old.prefix(layer) + name) for name in made.old.block_tensors()}
        linears = {}
        for linear in made.old.linears:
            if (scheme := said.of(made.old.prefix(layer) + linear.name)) is not None:
                grid = min_max(weight := floats.pop(f"{linear.name}.weight"), scheme)
                linears[linear.name] = grid.linear(grid.round(weight))
        cut, others = relay(made, linears, floats)
        prefix = made.architecture.prefix(layer)
        held |= {prefix + name: tensor for name, tensor in others.items()}
        for name, quantized in cut.items():
            assert schemes.of(prefix + name) == quantized.scheme
            held |= {f"{prefix}{name}.{part}": tensor for part, tensor in awq.pack(quantized).items()}
    checkpoint.save(file, held)
    return Model(made.architecture, Checkpoint({SINGLE: file}), unpack=awq.unpack, schemes=schemes)


@pytest.mark.parametrize(
    ("family", "changed", "said"),
    [
        ("internlm3", {}, "q, k, v have biases and o have none"),
        ("internlm3", {"qkv_bias": False, "bias": True}, "o have biases and q, k, v have none"),
        ("qwen2", {}, "q, k, v have biases"),
        ("qwen3", {}, "norms of queries and keys"),
        ("mixtral", {}, "experts"),
        ("mistral", {}, "a sliding window"),
        ("phi3", {}, "a sliding window"),
        (
            "phi3",
            {"sliding_window": None, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}},
            "longrope positions",
        ),
    ],
)
def test_another_function_is_not_written_as_a_llama(family: str, changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    model = opened(tmp_path, family, **changed)
    with pytest.raises(BuildError, match=said) as caught:
        as_llama(model, tmp_path)
    assert caught.value.where == "config.json" and "leave `as` out" in caught.value.fix


def test_part_without_rows_is_the_whole() -> None:
    tensor = torch.arange(6)
    assert take(tensor, Part("x")) is tensor
    assert take(tensor, Part("x", (range(4, 6), range(0, 1)))).tolist() == [4, 5, 0]

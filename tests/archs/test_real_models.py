"""Recorded config.json files of real models are accepted, and computed as transformers computes them: tensors, windows, rotary tables.

InternLM2 and InternLM3, which transformers lacks, are held against a Llama of the same shape and the same rotary rule.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from buildsys.architecture import Architecture
from buildsys.quant.rotary import tables
from buildsys.survey import describe

HERE = Path(__file__).resolve().parent
CONFIGS = {path.parent.name: path for folder in (HERE.parent, HERE) for path in sorted(folder.glob("configs/*/config.json"))}
NAMES = sorted(CONFIGS)
LLAMAS = ("internlm2", "internlm3")
WEIGHTS = {  # billions, as the models' pages on the hub round them
    "internlm2-chat-1_8b": 1.89,
    "internlm2_5-1_8b-chat": 1.89,
    "internlm2_5-7b-chat": 7.74,
    "internlm3-8b-instruct": 8.80,
    "llama-3.1-8b-instruct": 8.03,
    "mistral-7b-instruct-v0.3": 7.25,
    "phi-3-mini-4k-instruct": 3.82,
    "phi-3.5-mini-instruct": 3.82,
    "phi-4": 14.66,
    "phi-4-mini-instruct": 3.84,
    "qwen2.5-7b-instruct": 7.62,
    "qwen3-8b": 8.19,
}


def said(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(CONFIGS[name].read_text())
    return config


def described(name: str) -> Architecture:
    return describe(said(name), f"{name}/config.json")[0]


def oracle(name: str, **changed: Any) -> Any:
    """transformers' reading of the same file."""
    config = said(name) | changed
    kind = "llama" if config["model_type"] in LLAMAS else config["model_type"]
    return transformers.AutoConfig.for_model(kind, **{key: value for key, value in config.items() if key not in ("model_type", "auto_map")})


def their_tables(config: Any, length: int) -> tuple[Tensor, Tensor]:
    with torch.device("meta"):
        rotary = transformers.AutoModel.from_config(config).rotary_emb
    made = type(rotary)(config)
    cos, sin = made(torch.zeros(1, length, 1), torch.arange(length)[None])
    return cos[0], sin[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_weights_is_the_publishers(name: str) -> None:
    assert round(sum(prod(shape) for shape in described(name).tensors().values()) / 1e9, 2) == WEIGHTS[name]


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(LLAMAS)])
def test_tensors_and_windows_are_transformers(name: str) -> None:
    config, architecture = oracle(name), described(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    assert architecture.tensors() == {key: tuple(tensor.shape) for key, tensor in model.state_dict().items() if key not in tied}
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    assert set(kinds) == {"full_attention"} and architecture.sliding_window == (() if window is None else (window,) * architecture.layers)
    assert architecture.rms_norm_eps == config.rms_norm_eps and architecture.max_positions == config.max_position_embeddings


@pytest.mark.parametrize("length", [2048, 9000])  # 9,000: beyond the 8,192 positions that Llama 3.1's rule starts from
@pytest.mark.parametrize("name", NAMES)
def test_rotary_tables_are_transformers(name: str, length: int) -> None:
    ours, theirs = tables(described(name), length), their_tables(oracle(name), length)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(LLAMAS)])
def test_dynamic_scaling_is_plain_up_to_the_models_positions_and_not_beyond(name: str) -> None:
    plain = oracle(name, rope_scaling=None)
    for our, their in zip(tables(described(name), 32768), their_tables(plain, 32768), strict=True):
        assert torch.equal(our, their)
    beyond = tables(described(name), 40000)
    torch.testing.assert_close(beyond[0], their_tables(oracle(name), 40000)[0], rtol=0, atol=1e-6)
    assert not torch.allclose(beyond[0], their_tables(plain, 40000)[0], atol=1e-2)

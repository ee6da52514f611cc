"""What an artifact says of itself is what engines read: no code of others, the quantization, and the recipe's engine settings."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from buildsys import deploy
from buildsys.formats import awq
from buildsys.scheme import Scheme, Schemes

SOURCE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "auto_map": {"AutoModel": "x.Y"},
}


def test_config_tells_the_quantization_and_brings_no_code() -> None:
    quantization = awq.config(Schemes(Scheme(4, 128)), ["lm_head"])
    said = deploy.config(SOURCE, quantization)
    assert said == {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "quantization_config": quantization,
    }
    assert SOURCE["auto_map"] and SOURCE["dtype"] == "bfloat16", "the source's own is left alone"


@pytest.mark.parametrize(
    ("source", "fast", "expected"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, True, {"tokenizer_class": "LlamaTokenizer"}),
        ({"tokenizer_class": "Own", "auto_map": {}}, True, {"tokenizer_class": "PreTrainedTokenizerFast"}),
        ({"tokenizer_class": "Own", "auto_map": {}, "bos_token": "<s>"}, False, {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}),
    ],
)
def test_tokenizer_config(source: dict[str, Any], fast: bool, expected: dict[str, Any]) -> None:
    assert deploy.tokenizer_config(source, fast) == expected


@pytest.mark.parametrize(("policy", "number"), [("none", 0), ("int8", 8), ("int4", 4)])
def test_profile_of_turbomind(policy: str, number: int) -> None:
    target = {"gpu": "a10", "count": 2, "session_len": 4096, "max_batch_size": 16}
    said = yaml.safe_load(deploy.profile("turbomind", "awq", {"policy": policy, "max_entry_count": 0.4}, target, 8192))
    assert said == {
        "backend": "turbomind",
        "dtype": "float16",
        "tp": 2,
        "session_len": 4096,
        "cache_max_entry_count": 0.4,
        "quant_policy": number,
        "max_batch_size": 16,
        "model_format": "awq",
    }


def test_profile_without_a_target_takes_the_models_own() -> None:
    text = deploy.profile("pytorch", "awq", {"policy": "none", "max_entry_count": 0.8}, None, 8192)
    said = yaml.safe_load(text)
    assert said["tp"] == 1 and said["session_len"] == 8192 and "max_batch_size" not in said
    assert "model_format" not in said, "PytorchEngineConfig has no such field"
    assert text.startswith("backend: pytorch\n")


def test_every_policy_of_a_recipe_has_its_number() -> None:
    from typing import get_args

    from buildsys.gpus import KvPolicy

    assert set(deploy.QUANT_POLICY) == set(get_args(KvPolicy))

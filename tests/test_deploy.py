"""What an artifact says of itself is what engines read: no code of others, and the quantization."""

from __future__ import annotations

from typing import Any

import pytest

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

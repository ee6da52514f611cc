"""What an artifact says of itself to the programs that load it: config.json and tokenizer_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def config(source: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The source's config.json with the quantization and its type; without `auto_map`, since no code of the source's comes along."""
    said = {key: value for key, value in source.items() if key != "auto_map"}
    said.pop("dtype", None)
    # A model whose own config class stays behind is read by transformers' bare one, which since 5.0 has no defaults for what engines ask.
    bare = {"pad_token_id": None, "tie_word_embeddings": False} if "auto_map" in source else {}
    return bare | said | {"torch_dtype": "float16", "quantization_config": dict(quantization)}


def tokenizer_config(source: Mapping[str, Any], fast: bool) -> dict[str, Any]:
    """Without `auto_map`: the class that reads tokenizer.json, or else the one that reads Llama's kind of sentencepiece, takes the place
    of the model's own."""
    if "auto_map" not in source:
        return dict(source)
    said = {key: value for key, value in source.items() if key != "auto_map"}
    return said | {"tokenizer_class": "PreTrainedTokenizerFast" if fast else "LlamaTokenizer"}

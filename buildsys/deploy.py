"""What an artifact says of itself to the programs that load it: config.json, and the profile that LMDeploy is started with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

PROFILE = "deploy/lmdeploy.yaml"
QUANT_POLICY: Mapping[str, int] = {"none": 0, "int8": 8, "int4": 4}
"""LMDeploy's quant_policy for each of the recipe's KV policies."""


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


def profile(engine: str, format: str, kv_cache: Mapping[str, Any], target: Mapping[str, Any] | None, max_positions: int) -> str:
    """The engine settings that the recipe decides, named as fields of LMDeploy's TurbomindEngineConfig and PytorchEngineConfig."""
    target = target or {}
    settings: dict[str, Any] = {
        "dtype": "float16",
        "tp": target.get("count", 1),
        "session_len": target.get("session_len") or max_positions,
        "cache_max_entry_count": kv_cache["max_entry_count"],
        "quant_policy": QUANT_POLICY[kv_cache["policy"]],
    }
    if target.get("max_batch_size"):
        settings["max_batch_size"] = target["max_batch_size"]
    if engine == "turbomind":
        settings["model_format"] = format
    return yaml.safe_dump({"backend": engine, **settings}, sort_keys=False)

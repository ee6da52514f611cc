"""Qwen3 dense models (arXiv:2505.09388): RMSNorm on each head's queries and keys, no biases by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from buildsys.architecture import Architecture, expect, llama_family, upper_layer_windows
from buildsys.slots import Frozen

VERSION = 1
HANDLES = "Qwen3ForCausalLM"
TURBOMIND = True
EXPECTS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}


class Knobs(Frozen):
    """Nothing to set: a model's config.json says it all."""


def describe(config: Mapping[str, Any], where: str) -> Architecture:
    """Raises BuildError where config.json asks for what is not implemented."""
    expect(config, EXPECTS, where)
    bias = bool(config.get("attention_bias", False))
    architecture = llama_family({"head_dim": 128} | dict(config), where, qkv_bias=bias, o_bias=bias, qk_norm=True)
    return replace(architecture, sliding_window=upper_layer_windows(config, architecture.layers, where))

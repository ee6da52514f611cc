"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama's block with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from buildsys.architecture import Architecture, expect, llama_family, upper_layer_windows
from buildsys.slots import Frozen

VERSION = 1
HANDLES = "Qwen2ForCausalLM"
TURBOMIND = True
EXPECTS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}


class Knobs(Frozen):
    """Nothing to set: a model's config.json says it all."""


def describe(config: Mapping[str, Any], where: str) -> Architecture:
    """Raises BuildError where config.json asks for what is not implemented."""
    expect(config, EXPECTS, where)
    architecture = llama_family(config, where, qkv_bias=True)
    return replace(architecture, sliding_window=upper_layer_windows(config, architecture.layers, where))

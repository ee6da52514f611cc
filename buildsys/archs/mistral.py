"""Mistral 7B (arXiv:2310.06825): Llama's block with a sliding window of attention in its first version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from buildsys.architecture import Architecture, expect, llama_family, size
from buildsys.slots import Frozen

VERSION = 1
HANDLES = "MistralForCausalLM"
TURBOMIND = False
EXPECTS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}


class Knobs(Frozen):
    """Nothing to set: a model's config.json says it all."""


def describe(config: Mapping[str, Any], where: str) -> Architecture:
    """Raises BuildError where config.json asks for what is not implemented."""
    expect(config, EXPECTS, where)
    architecture = llama_family(config, where)
    if config.get("sliding_window", 0) is None:
        return architecture
    window = size(config, "sliding_window", where, 4096)  # transformers' default where the key is left out
    return replace(architecture, sliding_window=(window,) * architecture.layers)

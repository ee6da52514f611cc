"""Llama 1 to 3.2 (arXiv:2302.13971, arXiv:2407.21783), and whatever else ships as LlamaForCausalLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buildsys.architecture import Architecture, expect, llama_family
from buildsys.slots import Frozen

VERSION = 1
HANDLES = "LlamaForCausalLM"
TURBOMIND = True
EXPECTS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}


class Knobs(Frozen):
    """Nothing to set: a model's config.json says it all."""


def describe(config: Mapping[str, Any], where: str) -> Architecture:
    """Raises BuildError where config.json asks for what is not implemented."""
    expect(config, EXPECTS, where)
    bias = bool(config.get("attention_bias", False))
    return llama_family(config, where, qkv_bias=bias, o_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))

"""InternLM3 (internlm3-8b-instruct, January 2025): Llama's block and names, with a switch of its own for the biases of q, k and v.

The repository's remote code is never run. What is needed of it: `qkv_bias` is for q, k and v; `bias` for o and the MLP's three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buildsys.architecture import Architecture, expect, llama_family
from buildsys.slots import Frozen

VERSION = 1
HANDLES = "InternLM3ForCausalLM"
TURBOMIND = True
EXPECTS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}


class Knobs(Frozen):
    """Nothing to set: a model's config.json says it all."""


def describe(config: Mapping[str, Any], where: str) -> Architecture:
    """Raises BuildError where config.json asks for what is not implemented."""
    expect(config, EXPECTS, where)
    bias = bool(config.get("bias", False))
    return llama_family(config, where, qkv_bias=bool(config.get("qkv_bias", False)), o_bias=bias, mlp_bias=bias)

"""Mixtral (arXiv:2401.04088): Mistral's attention, and in place of its MLP eight experts of which each token asks two.

The router's two largest shares are made to sum to one (section 2.1). Checkpoints hold each expert's three matrices apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from buildsys.architecture import Architecture, expect, llama_family, mixture, read_experts, size
from buildsys.slots import Frozen

VERSION = 1
HANDLES = "MixtralForCausalLM"
TURBOMIND = True
EXPECTS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish")}
DEFAULTS: dict[str, Any] = {"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5}  # where config.json leaves a key out


class Knobs(Frozen):
    """Nothing to set: a model's config.json says it all."""


def describe(config: Mapping[str, Any], where: str) -> Architecture:
    """Raises BuildError where config.json asks for what is not implemented."""
    expect(config, EXPECTS, where)
    dense = llama_family(DEFAULTS | dict(config), where)
    experts = read_experts(config, where, "block_sparse_moe.gate.weight", 8, 2, shares_sum_to_one=True)
    expert = "block_sparse_moe.experts.{}."
    architecture = mixture(dense, experts, dense.intermediate_size, (f"{expert}w1", f"{expert}w3", f"{expert}w2"))
    if config.get("sliding_window") is None:
        return architecture
    return replace(architecture, sliding_window=(size(config, "sliding_window", where),) * architecture.layers)

"""Qwen3's mixtures of experts (arXiv:2505.09388, section 2): Qwen3's attention, and many narrow experts in place of the MLP.

The published models have experts in every layer and no shared ones. Checkpoints hold each expert's three matrices apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from buildsys.architecture import Architecture, expect, llama_family, mixture, read_experts, size
from buildsys.slots import Frozen

VERSION = 1
HANDLES = "Qwen3MoeForCausalLM"
TURBOMIND = True
EXPECTS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "norm_topk_prob": (True, False),
    "mlp_only_layers": ([], None),  # dense layers between those with experts
    "decoder_sparse_step": (1,),
}
DEFAULTS: dict[str, Any] = {"num_key_value_heads": 4, "intermediate_size": 6144}  # where config.json leaves a key out


class Knobs(Frozen):
    """Nothing to set: a model's config.json says it all."""


def describe(config: Mapping[str, Any], where: str) -> Architecture:
    """Raises BuildError where config.json asks for what is not implemented."""
    expect(config, EXPECTS, where)
    bias = bool(config.get("attention_bias", False))
    dense = llama_family(DEFAULTS | dict(config), where, qkv_bias=bias, o_bias=bias, qk_norm=True)
    experts = read_experts(config, where, "mlp.gate.weight", 128, 8, shares_sum_to_one=config.get("norm_topk_prob", False))
    width, expert = size(config, "moe_intermediate_size", where, 768), "mlp.experts.{}."
    architecture = mixture(dense, experts, width, (f"{expert}gate_proj", f"{expert}up_proj", f"{expert}down_proj"))
    if not config.get("use_sliding_window", False) or config.get("sliding_window", 0) is None:
        return architecture
    return replace(architecture, sliding_window=(size(config, "sliding_window", where, 4096),) * architecture.layers)

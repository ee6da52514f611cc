"""InternLM2 and InternLM2.5 (arXiv:2403.17297): Llama's function with queries, keys and values fused in one matrix.

Rows of `wqkv`, as in the model's own modeling_internlm2.py: for each key/value head its group of query heads, then its key, then its
value. The repository's remote code is never run: what is needed of it stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buildsys.architecture import Architecture, Linear, common, expect, size
from buildsys.errors import BuildError
from buildsys.slots import Frozen

VERSION = 1
HANDLES = "InternLM2ForCausalLM"
TURBOMIND = True
EXPECTS: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "pretraining_tp": (1, None)}


class Knobs(Frozen):
    """Nothing to set: a model's config.json says it all."""


def describe(config: Mapping[str, Any], where: str) -> Architecture:
    """Raises BuildError where config.json asks for what is not implemented."""
    expect(config, EXPECTS, where)
    hidden, inner = size(config, "hidden_size", where), size(config, "intermediate_size", where)
    heads = size(config, "num_attention_heads", where)
    kv_heads = size(config, "num_key_value_heads", where, heads)
    if heads % kv_heads or hidden % heads:
        what = f"{heads} heads, {kv_heads} key/value heads and width {hidden} do not divide"
        raise BuildError(where, what, "repair the model's config.json")
    head_dim, bias = hidden // heads, bool(config.get("bias", True))
    linears = (
        Linear("attention.wqkv", "qkv", "attn_in", hidden, (heads + 2 * kv_heads) * head_dim, bias),
        Linear("attention.wo", "o", "o_in", heads * head_dim, hidden, bias),
        Linear("feed_forward.w1", "gate", "mlp_in", hidden, inner),
        Linear("feed_forward.w3", "up", "mlp_in", hidden, inner),
        Linear("feed_forward.w2", "down", "down_in", inner, hidden),
    )
    return Architecture(
        **common(config, where),
        hidden_size=hidden,
        intermediate_size=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        linears=linears,
        block_prefix="model.layers.{}.",
        attn_norm="attention_norm.weight",
        mlp_norm="ffn_norm.weight",
        embed="model.tok_embeddings.weight",
        final_norm="model.norm.weight",
        lm_head=None if config.get("tie_word_embeddings", False) else "output.weight",
    )

"""Phi-3, Phi-3.5 and Phi-4 (arXiv:2404.14219, arXiv:2412.08905): Llama's block with q, k and v in one matrix and gate and up in another.

Both are stacked: all rows of q, then of k, then of v; all of the gate, then all of up. Those with long contexts turn by LongRoPE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from buildsys.architecture import Architecture, Linear, common, expect, number, size
from buildsys.errors import BuildError
from buildsys.longrope import read_longrope
from buildsys.slots import Frozen

VERSION = 1
HANDLES = "Phi3ForCausalLM"
TURBOMIND = False
EXPECTS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "lm_head_bias": (False, None),
}
ROPES = ("default", "longrope")


class Knobs(Frozen):
    """Nothing to set: a model's config.json says it all."""


def describe(config: Mapping[str, Any], where: str) -> Architecture:
    """Raises BuildError where config.json asks for what is not implemented."""
    expect(config, EXPECTS, where)
    hidden, inner = size(config, "hidden_size", where), size(config, "intermediate_size", where)
    heads = size(config, "num_attention_heads", where)
    kv_heads = size(config, "num_key_value_heads", where, heads)
    head_dim = size(config, "head_dim", where, hidden // heads)
    if heads % kv_heads:
        what = f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        raise BuildError(where, what, "repair the model's config.json")
    shared = _shared(config, head_dim, where)
    window = None if config.get("sliding_window") is None else size(config, "sliding_window", where)
    linears = (
        Linear("self_attn.qkv_proj", "qkv", "attn_in", hidden, (heads + 2 * kv_heads) * head_dim),
        Linear("self_attn.o_proj", "o", "o_in", heads * head_dim, hidden),
        Linear("mlp.gate_up_proj", "gate_up", "mlp_in", hidden, 2 * inner),
        Linear("mlp.down_proj", "down", "down_in", inner, hidden),
    )
    return Architecture(
        **shared,
        hidden_size=hidden,
        intermediate_size=inner,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        linears=linears,
        block_prefix="model.layers.{}.",
        attn_norm="input_layernorm.weight",
        mlp_norm="post_attention_layernorm.weight",
        embed="model.embed_tokens.weight",
        final_norm="model.norm.weight",
        lm_head=None if config.get("tie_word_embeddings", False) else "lm_head.weight",
        qkv_rows="stacked",
        sliding_window=() if window is None else (window,) * shared["layers"],
    )


def _shared(config: Mapping[str, Any], head_dim: int, where: str) -> dict[str, Any]:
    """What every decoder says, with the defaults of transformers' configuration_phi3.py and the family's rotary rules."""
    longrope = read_longrope(config, head_dim, where)
    plain = config if longrope is None else {**config, **dict.fromkeys(("rope_scaling", "rope_parameters", "partial_rotary_factor"))}
    shared = common(plain, where)
    rope = longrope or shared["rope"]
    if rope.kind not in ROPES:
        what = f"rope_type is {rope.kind!r}; this architecture is implemented for {' or '.join(map(repr, ROPES))}"
        raise BuildError(where, what, "use a model of another family")
    positions = size(config, "max_position_embeddings", where, 4096)
    return shared | {"rope": rope, "max_positions": positions, "rms_norm_eps": number(config, "rms_norm_eps", where, 1e-5)}

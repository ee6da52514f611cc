"""The same function under another architecture's names: `format: {awq: {as: llama}}` writes InternLM2 as a plain Llama.

Whatever loads LlamaForCausalLM then serves the model, and nobody runs its publisher's code for it. A fused matrix is cut by rows: the
layouts are those of the models' own code, told by `Architecture.qkv_rows`. Rows are quantized apart, so cutting changes no code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from buildsys.architecture import ROPE_KINDS, Architecture, Linear, llama_family
from buildsys.errors import BuildError
from buildsys.scheme import Schemes

As = Literal["llama"]
"""Architectures that a model can be written as."""

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache", "torch_dtype", "dtype", "transformers_version")
_INSTEAD = "leave `as` out: the model then keeps its own names"
_ATTENTION, _MLP = ("q", "k", "v", "qkv", "o"), ("gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class Part:
    """Where a linear's rows were: of which linear of the block, and which of its rows (None: all)."""

    name: str
    rows: tuple[range, ...] | None = None


@dataclass(frozen=True)
class Relayout:
    """A model's new names and where each thing was. Where nothing changes, both architectures are one."""

    config: Mapping[str, Any]  # config.json of what is written
    old: Architecture
    architecture: Architecture  # what `config` describes
    parts: Mapping[str, Part]  # linears, by their new names in the block

    def norms(self) -> dict[str, str]:
        """Tensors of a block that belong to no linear: new name -> old name."""
        new, old = self.architecture, self.old
        pairs = ((new.attn_norm, old.attn_norm), (new.mlp_norm, old.mlp_norm), (new.q_norm, old.q_norm), (new.k_norm, old.k_norm))
        routers = {} if new.experts is None or old.experts is None else {new.experts.router: old.experts.router}
        return {ours: theirs for ours, theirs in pairs if ours is not None and theirs is not None} | routers

    def outside(self) -> dict[str, str]:
        """Tensors outside of the blocks: new name -> old name."""
        new, old = self.architecture, self.old
        heads = {} if new.lm_head is None or old.lm_head is None else {new.lm_head: old.lm_head}
        return {new.embed: old.embed, new.final_norm: old.final_norm} | heads

    def modules(self) -> dict[str, str]:
        """Everything that has a name of its own, by whole names without `.weight`: new name -> name of what it was or was a part of."""
        found = {new.removesuffix(".weight"): old.removesuffix(".weight") for new, old in self.outside().items()}
        inside = {new.removesuffix(".weight"): old.removesuffix(".weight") for new, old in self.norms().items()}
        inside |= {new: part.name for new, part in self.parts.items()}
        for layer in range(self.old.layers):
            found |= {self.architecture.prefix(layer) + new: self.old.prefix(layer) + old for new, old in inside.items()}
        return found

    def schemes(self, said: Schemes) -> Schemes:
        """What was said of the old names, of the new ones: each part has the scheme of the matrix it was in."""
        was = self.modules()
        own = {new: said.own[old] for new, old in was.items() if old in said.own}
        return replace(said, own=own, left_float=frozenset(new for new, old in was.items() if old in said.left_float))


def relayout(architecture: Architecture, config: Mapping[str, Any], where: str, as_: As | None) -> Relayout:
    """Raises BuildError where the model's function is not that of the architecture it is to be written as."""
    if as_ is None:
        return Relayout(config, architecture, architecture, {linear.name: Part(linear.name) for linear in architecture.linears})
    attention_bias, mlp_bias = _biases(architecture, _ATTENTION, where), _biases(architecture, _MLP, where)
    for what, held in (
        ("experts", architecture.experts is not None),
        ("norms of queries and keys", architecture.q_norm is not None),
        ("a sliding window of attention", any(window is not None for window in architecture.sliding_window)),
        (f"{architecture.rope.kind} positions", architecture.rope.kind not in ROPE_KINDS),
    ):
        if held:
            raise BuildError(where, f"the model has {what}, which a Llama has not: it cannot be written as one", _INSTEAD)
    written = _llama_config(architecture, config, attention_bias, mlp_bias)
    new = llama_family(written, where, qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias)
    return Relayout(written, architecture, new, {linear.name: _part(architecture, linear) for linear in new.linears})


def _biases(architecture: Architecture, roles: tuple[str, ...], where: str) -> bool:
    """Llama has one switch for attention's four linears, and one for the MLP's three."""
    biased = [linear.role for linear in architecture.linears if linear.role in roles and linear.bias]
    bare = [linear.role for linear in architecture.linears if linear.role in roles and not linear.bias]
    if biased and bare:
        what = f"{', '.join(biased)} have biases and {', '.join(bare)} have none; a Llama has all or none: it cannot be written as one"
        raise BuildError(where, what, _INSTEAD)
    return bool(biased)


def _llama_config(a: Architecture, config: Mapping[str, Any], attention_bias: bool, mlp_bias: bool) -> dict[str, Any]:
    """Written from what is known, and nothing that is not carried along: another architecture's key may mean something else here."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    numbers = {key: value for key, value in rope.items() if key in a.rope.numbers}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.intermediate_size,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_positions,
        "rms_norm_eps": a.rms_norm_eps,
        "rope_theta": a.rope.theta,
        "rope_scaling": None if a.rope.kind == "default" else {"rope_type": a.rope.kind, **numbers},
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "tie_word_embeddings": a.lm_head is None,
    } | {key: config[key] for key in _KEPT if key in config}


def _part(old: Architecture, new: Linear) -> Part:
    """Where the rows of a Llama's linear were."""
    same = old.linear(new.role)
    if same is not None:
        return Part(same.name)
    fused = old.linear("qkv" if new.role in ("q", "k", "v") else "gate_up")
    assert fused is not None, f"{old.model_type} has no linear for {new.role}"
    if fused.role == "gate_up":
        return Part(fused.name, (_gate(old) if new.role == "gate" else _after(_gate(old), old.intermediate_size),))
    return Part(fused.name, tuple(rows[("q", "k", "v").index(new.role)] for rows in _qkv(old)))


def _gate(a: Architecture) -> range:
    return range(a.intermediate_size)


def _qkv(a: Architecture) -> list[tuple[range, range, range]]:
    """Rows of queries, keys and values: of each key/value head where they are grouped, else of all at once."""
    pieces, heads, kv_heads = (a.kv_heads, a.heads // a.kv_heads, 1) if a.qkv_rows == "grouped" else (1, a.heads, a.kv_heads)
    found, start = [], 0
    for _ in range(pieces):
        q = range(start, start + heads * a.head_dim)
        k = _after(q, kv_heads * a.head_dim)
        v = _after(k, kv_heads * a.head_dim)
        found.append((q, k, v))
        start = v.stop
    return found


def _after(rows: range, count: int) -> range:
    return range(rows.stop, rows.stop + count)

"""What a decoder-only model is made of, in canonical names; archs/ writes one from a vendor's config.json, quant/ computes with it.

Covered: pre-norm blocks of RMSNorm (arXiv:1910.07467), rotary positions (arXiv:2104.09864), grouped-query attention (arXiv:2305.13245),
and SwiGLU (arXiv:2002.05202) or a mixture of such experts (arXiv:1701.06538, arXiv:2401.04088). No torch here: planning reads it too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from buildsys.errors import BuildError

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]
QkvRows = Literal["grouped", "stacked"]
"""Rows of a matrix with role `qkv`: for each key/value head its queries, key and value (InternLM2), or all queries, keys, values (Phi-3).
Rows of one with role `gate_up` are all of the gate, then all of up."""
Site = str
SITES: tuple[Site, ...] = ("attn_in", "o_in", "mlp_in", "down_in")
"""The four places in a block where linears read: each has one distribution of activations, and one AWQ scale vector.

In a mixture, expert 3 reads what the router sends it, at `mlp_in.3`, and its down at `down_in.3`. All experts read behind one norm, so the
scale vector of what they read is one too, that of `mlp_in` (`scale_site`)."""


ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
"""The rules that are implemented, each with the numbers that it cannot do without."""
_OTHER = "use a model of another family"
_REPAIR = "repair the model's config.json"


@dataclass(frozen=True)
class Linear:
    """One weight matrix as stored: `<block prefix><name>.weight` is [out_features, in_features]."""

    name: str  # within the block: "self_attn.q_proj"
    role: Role
    site: Site
    in_features: int
    out_features: int
    bias: bool = False
    expert: int | None = None  # the one of a mixture that it belongs to


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `theta` and the scaling rule with its own numbers, named as in config.json's rope_scaling."""

    theta: float
    kind: str = "default"  # one of ROPE_KINDS
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Experts:
    """A mixture in place of the MLP: a router sends each token to `per_token` of `count` experts, and sums their answers by its shares."""

    router: str  # within the block: a weight [count, hidden], never quantized
    count: int
    per_token: int
    shares_sum_to_one: bool  # else they are the chosen experts' shares of the softmax over all


@dataclass(frozen=True)
class Architecture:
    """Shapes and names of one model. Names of block tensors are relative to `block_prefix` formatted with the layer's index."""

    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int  # of a mixture: of one expert
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope: Rope
    max_positions: int
    linears: tuple[Linear, ...]
    block_prefix: str  # "model.layers.{}."
    attn_norm: str  # "input_layernorm.weight"
    mlp_norm: str
    embed: str  # whole names from here on
    final_norm: str
    lm_head: str | None  # None: tied to `embed`
    q_norm: str | None = None  # per-head RMSNorm of queries and keys (Qwen3)
    k_norm: str | None = None
    qkv_rows: QkvRows = "grouped"
    sliding_window: tuple[int | None, ...] = ()  # one entry a layer; empty: full attention everywhere
    experts: Experts | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def prefix(self, layer: int) -> str:
        return self.block_prefix.format(layer)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Where linears read, in the order in which a block computes; without experts SITES."""
        return tuple(dict.fromkeys(linear.site for linear in self.linears))

    @cached_property
    def scale_sites(self) -> tuple[Site, ...]:
        """Where a scale vector can be folded in, in the same order."""
        return tuple(dict.fromkeys(scale_site(site) for site in self.sites))

    def at(self, site: Site) -> tuple[Linear, ...]:
        """The linears that read at `site`, or whose inputs are scaled there, in stored order."""
        return self._at[site]

    @cached_property
    def _at(self) -> dict[Site, tuple[Linear, ...]]:
        found: dict[Site, list[Linear]] = {}
        for linear in self.linears:
            for site in {linear.site, scale_site(linear.site)}:
                found.setdefault(site, []).append(linear)
        return {site: tuple(linears) for site, linears in found.items()}

    def linear(self, role: Role, expert: int | None = None) -> Linear | None:
        """The linear of that role; None where another one holds its rows."""
        return self._by_role.get((role, expert))

    @cached_property
    def _by_role(self) -> dict[tuple[Role, int | None], Linear]:
        return {(linear.role, linear.expert): linear for linear in self.linears}

    def routers(self) -> tuple[str, ...]:
        """Whole names of what decides between experts, as modules: linears that no scheme is for."""
        if self.experts is None:
            return ()
        return tuple(self.prefix(layer) + self.experts.router.removesuffix(".weight") for layer in range(self.layers))

    def window(self, layer: int) -> int | None:
        return self.sliding_window[layer] if self.sliding_window else None

    def width(self, site: Site) -> int:
        """Input features of the linears at `site`."""
        return self.at(site)[0].in_features

    def block_tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of one block with its shape, as the checkpoint must hold it."""
        found: dict[str, tuple[int, ...]] = {self.attn_norm: (self.hidden_size,), self.mlp_norm: (self.hidden_size,)}
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                found[norm] = (self.head_dim,)
        if self.experts is not None:
            found[self.experts.router] = (self.experts.count, self.hidden_size)
        for linear in self.linears:
            found[f"{linear.name}.weight"] = (linear.out_features, linear.in_features)
            if linear.bias:
                found[f"{linear.name}.bias"] = (linear.out_features,)
        return found

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the model with its shape."""
        return dict(self._tensors)

    @cached_property
    def _tensors(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {self.embed: (self.vocab_size, self.hidden_size), self.final_norm: (self.hidden_size,)}
        if self.lm_head is not None:
            found[self.lm_head] = (self.vocab_size, self.hidden_size)
        block = self.block_tensors()
        for layer in range(self.layers):
            found |= {self.prefix(layer) + name: shape for name, shape in block.items()}
        return found


def scale_site(site: Site) -> Site:
    """Where the scale of what is read at `site` is folded in."""
    return "mlp_in" if site.startswith("mlp_in.") else site


def fused(a: Architecture) -> Iterator[tuple[Linear, ...]]:
    """Linears of a block that engines make one matrix of when they load: queries, keys and values; gate with up, of each expert."""
    for roles in (("q", "k", "v"), ("gate", "up")):
        for expert in dict.fromkeys(linear.expert for linear in a.linears):
            together = tuple(linear for linear in a.linears if linear.role in roles and linear.expert == expert)
            if len(together) > 1:
                yield together


def read_rope(config: Mapping[str, Any], where: str) -> Rope:
    """Rotary settings from either spelling: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (before)."""
    written = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(written, Mapping):
        raise BuildError(where, f"the rotary settings are {written!r}; an object was expected", _REPAIR)
    said = dict(written)
    kind = said.pop("rope_type", None) or said.pop("type", None) or "default"
    said.pop("type", None)
    theta = number({"rope_theta": said.pop("rope_theta", None) or config.get("rope_theta")}, "rope_theta", where, 10000.0)
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise BuildError(where, f"rope_type {kind!r} is not implemented; implemented: {', '.join(ROPE_KINDS)}", _OTHER)
    partial = said.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise BuildError(where, f"partial_rotary_factor is {partial}; only 1.0 is implemented", _OTHER)
    odd = {key: value for key, value in said.items() if not isinstance(value, (int, float, type(None)))}
    if odd:
        name, value = next(iter(odd.items()))
        raise BuildError(where, f"rope setting {name} is {value!r}; a number was expected", _OTHER)
    numbers = {key: float(value) for key, value in said.items() if value is not None}
    for key in ROPE_KINDS[kind]:
        if key not in numbers:
            raise BuildError(where, f"rope_type {kind} has no {key}", _REPAIR)
    return Rope(theta, kind, numbers)


def expect(config: Mapping[str, Any], expects: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """Refuses a config whose setting differs from what the implementation computes: nothing guesses."""
    for key, allowed in expects.items():
        if key in config and config[key] not in allowed:
            wanted = " or ".join(repr(value) for value in allowed)
            raise BuildError(where, f"{key} is {config[key]!r}; this architecture is implemented for {wanted}", _OTHER)


def size(config: Mapping[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A positive whole number of config.json, or `default` where it is absent or null."""
    value = config.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BuildError(where, f"{key} is {value!r}; a positive whole number was expected", _REPAIR)
    return value


def number(config: Mapping[str, Any], key: str, where: str, default: float) -> float:
    """A positive number of config.json, or `default` where it is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise BuildError(where, f"{key} is {value!r}; a positive number was expected", _REPAIR)
    return float(value)


def llama_family(
    config: Mapping[str, Any], where: str, *, qkv_bias: bool = False, o_bias: bool = False, mlp_bias: bool = False, qk_norm: bool = False
) -> Architecture:
    """The names and shapes that Llama set and Mistral, Qwen2 and Qwen3 kept (transformers' modeling_llama.py)."""
    hidden, inner = size(config, "hidden_size", where), size(config, "intermediate_size", where)
    heads = size(config, "num_attention_heads", where)
    kv_heads = size(config, "num_key_value_heads", where, heads)
    head_dim = size(config, "head_dim", where, hidden // heads)
    if heads % kv_heads:
        raise BuildError(where, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}", _REPAIR)
    q, kv = heads * head_dim, kv_heads * head_dim
    linears = (
        Linear("self_attn.q_proj", "q", "attn_in", hidden, q, qkv_bias),
        Linear("self_attn.k_proj", "k", "attn_in", hidden, kv, qkv_bias),
        Linear("self_attn.v_proj", "v", "attn_in", hidden, kv, qkv_bias),
        Linear("self_attn.o_proj", "o", "o_in", q, hidden, o_bias),
        Linear("mlp.gate_proj", "gate", "mlp_in", hidden, inner, mlp_bias),
        Linear("mlp.up_proj", "up", "mlp_in", hidden, inner, mlp_bias),
        Linear("mlp.down_proj", "down", "down_in", inner, hidden, mlp_bias),
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
        attn_norm="input_layernorm.weight",
        mlp_norm="post_attention_layernorm.weight",
        embed="model.embed_tokens.weight",
        final_norm="model.norm.weight",
        lm_head=None if config.get("tie_word_embeddings", False) else "lm_head.weight",
        q_norm="self_attn.q_norm.weight" if qk_norm else None,
        k_norm="self_attn.k_norm.weight" if qk_norm else None,
    )


def mixture(dense: Architecture, experts: Experts, width: int, names: tuple[str, str, str]) -> Architecture:
    """`dense` with experts, each `width` wide, in place of its MLP. `names`: of gate, up and down, with {} for an expert's number."""
    hidden, gate, up, down = dense.hidden_size, *names
    linears = [linear for linear in dense.linears if linear.site in ("attn_in", "o_in")]
    for at in range(experts.count):
        linears.append(Linear(gate.format(at), "gate", f"mlp_in.{at}", hidden, width, expert=at))
        linears.append(Linear(up.format(at), "up", f"mlp_in.{at}", hidden, width, expert=at))
        linears.append(Linear(down.format(at), "down", f"down_in.{at}", width, hidden, expert=at))
    return replace(dense, linears=tuple(linears), experts=experts, intermediate_size=width)


def read_experts(config: Mapping[str, Any], where: str, router: str, count: int, per_token: int, shares_sum_to_one: bool) -> Experts:
    """A mixture's numbers; `count` and `per_token` are the family's own, for what config.json leaves out.

    The number of experts has two spellings, and transformers 5 writes either for either family."""
    known = "num_experts" if config.get("num_local_experts") is None else "num_local_experts"
    found = Experts(router, size(config, known, where, count), size(config, "num_experts_per_tok", where, per_token), shares_sum_to_one)
    if found.per_token > found.count:
        raise BuildError(where, f"num_experts_per_tok {found.per_token} is more than {known} {found.count}", _REPAIR)
    return found


def common(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What every decoder's config.json says under the same names."""
    eos, bos = config.get("eos_token_id"), config.get("bos_token_id")
    ends = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    vocab_size = size(config, "vocab_size", where)
    for token in (*ends, *(() if bos is None else (bos,))):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise BuildError(where, f"bos_token_id {bos!r} or eos_token_id {eos!r} is no token id below {vocab_size}", _REPAIR)
    return {
        "model_type": str(config.get("model_type", "")),
        "layers": size(config, "num_hidden_layers", where),
        "vocab_size": vocab_size,
        "rms_norm_eps": number(config, "rms_norm_eps", where, 1e-6),
        "rope": read_rope(config, where),
        "max_positions": size(config, "max_position_embeddings", where, 2048),
        "bos_token_id": bos,
        "eos_token_ids": ends,
    }


def upper_layer_windows(config: Mapping[str, Any], layers: int, where: str) -> tuple[int | None, ...]:
    """Qwen's rule: full attention below `max_window_layers`, a sliding window from there on, where it is switched on at all.

    Defaults are those of transformers' configuration_qwen2.py, which a config.json that leaves a key out relies on.
    """
    if not config.get("use_sliding_window", False) or config.get("sliding_window", 0) is None:
        return ()
    window, kinds = size(config, "sliding_window", where, 4096), config.get("layer_types")
    if kinds is None:
        first = 0 if config.get("max_window_layers") == 0 else size(config, "max_window_layers", where, 28)
        return tuple(window if layer >= first else None for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise BuildError(where, f"layer_types is {kinds!r}; {layers} of full_attention or sliding_attention were expected", _REPAIR)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)

"""The arithmetic of one decoder block, cut at the sites where linears read.

    h -> attn_norm -> [attn_in] q k v -> attention -> [o_in] o -> + h
      -> mlp_norm -> [mlp_in] gate up -> silu(gate) * up -> [down_in] down -> + h

Where experts stand in place of the MLP the second line is, for each token and each expert E that the router chooses for it,

      -> mlp_norm -> router -> [mlp_in.E] gate up -> silu(gate) * up -> [down_in.E] down -> times E's share -> + h

Our own few lines and not a library's module: the same code serves calibration, rounding, scoring and sampling, computes what a checkpoint
holds under whatever names, and keeps one block in memory. tests/archs/test_contract.py holds it to transformers' models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from buildsys.architecture import Architecture, Experts, Role, Site
from buildsys.quant.activations import fake_quantize
from buildsys.quant.rotary import rotate
from buildsys.scheme import Activations

Rotary = tuple[Tensor, Tensor]  # cos, sin: [tokens, head_dim]
See = Callable[[Site, Tensor], None]
"""Is shown what is read at each site."""


def unseen(site: Site, x: Tensor) -> None:
    """Looks away."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [..., width] -> same
    """RMSNorm with the mean in float32, whatever the type of x (arXiv:1910.07467)."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed.mul_(weight) if torch.result_type(normed, weight) == x.dtype else weight * normed


@dataclass(frozen=True)
class Block:
    """One block's weights by their names in the block, on one device and, where it is to compute, of one dtype. `keep_kv` stands in for
    a quantized KV cache; `activations` says which linears round what they read, and to what."""

    architecture: Architecture
    layer: int
    weights: Mapping[str, Tensor]
    keep_kv: Callable[[Tensor], Tensor] | None = None
    activations: Mapping[str, Activations] = field(default_factory=lambda: MappingProxyType({}))

    def to(self, where: torch.dtype | str) -> Block:
        """Of another type, or on another device."""
        return replace(self, weights={name: tensor.to(where) for name, tensor in self.weights.items()})

    def with_weights(self, changed: Mapping[str, Tensor]) -> Block:
        return replace(self, weights={**self.weights, **changed})

    def alone(self, expert: int) -> Block:
        """What one expert computes with, and nothing else: a mixture is too large to bring to another type for each of its sites."""
        a = self.architecture
        names = {a.attn_norm, a.mlp_norm} | {f"{linear.name}.weight" for linear in (*a.at(f"mlp_in.{expert}"), *a.at(f"down_in.{expert}"))}
        return replace(self, weights={name: self.weights[name] for name in names})

    def linear(self, role: Role, x: Tensor, expert: int | None = None) -> Tensor:  # [tokens, in] -> [tokens, out]
        linear = self.architecture.linear(role, expert)
        assert linear is not None, role
        x = fake_quantize(x, self.activations.get(linear.name, "none"))
        return F.linear(x, self.weights[f"{linear.name}.weight"], self.weights.get(f"{linear.name}.bias"))

    @property
    def dtype(self) -> torch.dtype:
        """Of what linears read and write. The sum that runs past them, `h`, keeps its own, wider type."""
        return self.weights[self.architecture.attn_norm].dtype

    def attn_in(self, h: Tensor) -> Tensor:  # [tokens, hidden] -> same
        return rms_norm(h, self.weights[self.architecture.attn_norm], self.architecture.rms_norm_eps).to(self.dtype)

    def qkv(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:  # [tokens, hidden] -> [heads, tokens, head_dim] each
        """Queries, keys and values, normed and rotated: what attention reads and the KV cache holds."""
        a = self.architecture
        if a.linear("qkv") is None:
            q, k, v = (torch.unflatten(self.linear(role, x), -1, (-1, a.head_dim)) for role in ("q", "k", "v"))
        elif a.qkv_rows == "stacked":
            fused = torch.unflatten(self.linear("qkv", x), -1, (-1, a.head_dim))
            q, k, v = torch.split(fused, [a.heads, a.kv_heads, a.kv_heads], -2)
        else:
            fused = torch.unflatten(self.linear("qkv", x), -1, (a.kv_heads, a.heads // a.kv_heads + 2, a.head_dim))
            q, k, v = fused[..., :-2, :].flatten(-3, -2), fused[..., -2, :], fused[..., -1, :]
        if a.q_norm is not None and a.k_norm is not None:
            q, k = rms_norm(q, self.weights[a.q_norm], a.rms_norm_eps), rms_norm(k, self.weights[a.k_norm], a.rms_norm_eps)
        q, k, v = q.transpose(-3, -2), k.transpose(-3, -2), v.transpose(-3, -2)
        cos, sin = rotary
        return rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v

    def o_in(self, x: Tensor, rotary: Rotary) -> Tensor:  # [tokens, hidden] -> [tokens, heads * head_dim]
        """What attention makes of its input."""
        return self.attend(*self.qkv(x, rotary))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [heads, tokens, head_dim] each -> [tokens, heads * head_dim]
        """Causal grouped-query attention over one sequence, or each of several."""
        if self.keep_kv is not None:
            k, v = self.keep_kv(k), self.keep_kv(v)
        group = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
        mask = self._window_mask(q.shape[-2], q.device)
        several = q.dim() == 4
        q, k, v = (x if several else x[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return (out if several else out[0]).transpose(-3, -2).flatten(-2)

    def after_attention(self, h: Tensor, o_in: Tensor) -> Tensor:  # -> [tokens, hidden]
        return h + self.linear("o", o_in)

    def mlp_in(self, h: Tensor) -> Tensor:  # [tokens, hidden] -> same
        return rms_norm(h, self.weights[self.architecture.mlp_norm], self.architecture.rms_norm_eps).to(self.dtype)

    def down_in(self, x: Tensor, expert: int | None = None) -> Tensor:  # [tokens, hidden] -> [tokens, intermediate]
        if self.architecture.linear("gate_up") is not None:
            gate, up = torch.chunk(self.linear("gate_up", x), 2, -1)
        else:
            gate, up = self.linear("gate", x, expert), self.linear("up", x, expert)
        return F.silu(gate, inplace=True).mul_(up)

    def after_mlp(self, h: Tensor, down_in: Tensor) -> Tensor:  # -> [tokens, hidden]
        return h + self.linear("down", down_in)

    def routed(self, x: Tensor, experts: Experts) -> list[tuple[Tensor, Tensor]]:  # [tokens, hidden] -> experts x ([sent], [sent])
        """For each expert which tokens it is sent, in their order, and its share of the answer to each.

        In float32: who answers is a step of the logits, and a router is too small for its type to cost anything."""
        logits = F.linear(x.float(), self.weights[experts.router].float())
        shares, chosen = logits.softmax(-1).topk(experts.per_token, -1)  # [tokens, per_token] each
        if experts.shares_sum_to_one:
            shares = shares / shares.sum(-1, keepdim=True)
        order = chosen.flatten().argsort(stable=True)
        sizes = torch.bincount(chosen.flatten(), minlength=experts.count).tolist()  # the one wait for a GPU
        tokens, shares = order // experts.per_token, shares.flatten()[order]
        return list(zip(torch.split(tokens, sizes), torch.split(shares, sizes), strict=True))

    def mlp(self, h: Tensor, see: See = unseen) -> Tensor:  # [tokens, hidden] -> same
        """The second half: the MLP, or those experts that are sent a token, one after the other."""
        x, experts = self.mlp_in(h), self.architecture.experts
        see("mlp_in", x)
        if experts is None:
            inner = self.down_in(x)
            see("down_in", inner)
            return self.after_mlp(h, inner)
        answer = torch.zeros_like(h)
        for expert, (tokens, shares) in enumerate(self.routed(x, experts)):
            if len(tokens):
                sent = x[tokens]
                see(f"mlp_in.{expert}", sent)
                inner = self.down_in(sent, expert)
                see(f"down_in.{expert}", inner)
                said = self.linear("down", inner, expert)
                answer.index_add_(0, tokens, said.to(h.dtype) * shares[:, None].to(h.dtype))
        return h + answer

    def forward(self, h: Tensor, rotary: Rotary) -> Tensor:  # [tokens, hidden] -> same
        return self.mlp(self.after_attention(h, self.o_in(self.attn_in(h), rotary)))

    def _window_mask(self, tokens: int, device: torch.device) -> Tensor | None:  # -> bool [tokens, tokens], True: attends
        window = self.architecture.window(self.layer)
        if window is None or window >= tokens:
            return None
        distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)[None, :]
        return (distance >= 0) & (distance < window)

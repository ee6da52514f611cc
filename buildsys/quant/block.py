"""The arithmetic of one decoder block, cut at the four sites where linears read.

    h -> attn_norm -> [attn_in] q k v -> attention -> [o_in] o -> + h
      -> mlp_norm -> [mlp_in] gate up -> silu(gate) * up -> [down_in] down -> + h

Our own few lines and not a library's module: the same code serves calibration, rounding, scoring and sampling, computes what a checkpoint
holds under whatever names, and keeps one block in memory. tests/archs/test_contract.py holds it to transformers' models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from buildsys.architecture import Architecture, Role
from buildsys.quant.rotary import rotate

Rotary = tuple[Tensor, Tensor]  # cos, sin: [tokens, head_dim]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:  # [..., width] -> same
    """RMSNorm with the mean in float32, whatever the type of x (arXiv:1910.07467)."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@dataclass(frozen=True)
class Block:
    """One block's weights by their names in the block, on one device and, where it is to compute, of one dtype. `keep_kv` stands in for
    a quantized KV cache."""

    architecture: Architecture
    layer: int
    weights: Mapping[str, Tensor]
    keep_kv: Callable[[Tensor], Tensor] | None = None

    def to(self, where: torch.dtype | str) -> Block:
        """Of another type, or on another device (from pinned memory without waiting for the copy)."""
        return replace(self, weights={name: tensor.to(where, non_blocking=True) for name, tensor in self.weights.items()})

    def with_weights(self, changed: Mapping[str, Tensor]) -> Block:
        return replace(self, weights={**self.weights, **changed})

    def linear(self, role: Role, x: Tensor) -> Tensor:  # [tokens, in] -> [tokens, out]
        name = next(linear.name for linear in self.architecture.linears if linear.role == role)
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    @property
    def dtype(self) -> torch.dtype:
        """Of what linears read and write. The sum that runs past them, `h`, keeps its own, wider type."""
        return self.weights[self.architecture.attn_norm].dtype

    def attn_in(self, h: Tensor) -> Tensor:  # [tokens, hidden] -> same
        return rms_norm(h, self.weights[self.architecture.attn_norm], self.architecture.rms_norm_eps).to(self.dtype)

    def qkv(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:  # [tokens, hidden] -> [heads, tokens, head_dim] each
        """Queries, keys and values, normed and rotated: what attention reads and the KV cache holds."""
        a = self.architecture
        if any(linear.role == "qkv" for linear in a.linears):
            fused = torch.unflatten(self.linear("qkv", x), -1, (a.kv_heads, a.heads // a.kv_heads + 2, a.head_dim))
            q, k, v = fused[:, :, :-2].flatten(1, 2), fused[:, :, -2], fused[:, :, -1]
        else:
            q, k, v = (torch.unflatten(self.linear(role, x), -1, (-1, a.head_dim)) for role in ("q", "k", "v"))
        if a.q_norm is not None and a.k_norm is not None:
            q, k = rms_norm(q, self.weights[a.q_norm], a.rms_norm_eps), rms_norm(k, self.weights[a.k_norm], a.rms_norm_eps)
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        cos, sin = rotary
        return rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v

    def o_in(self, x: Tensor, rotary: Rotary) -> Tensor:  # [tokens, hidden] -> [tokens, heads * head_dim]
        """Causal grouped-query attention over one sequence."""
        q, k, v = self.qkv(x, rotary)
        if self.keep_kv is not None:
            k, v = self.keep_kv(k), self.keep_kv(v)
        group = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        mask = self._window_mask(x.shape[0], x.device)
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None)[0]
        return out.transpose(0, 1).flatten(1)

    def after_attention(self, h: Tensor, o_in: Tensor) -> Tensor:  # -> [tokens, hidden]
        return h + self.linear("o", o_in)

    def mlp_in(self, h: Tensor) -> Tensor:  # [tokens, hidden] -> same
        return rms_norm(h, self.weights[self.architecture.mlp_norm], self.architecture.rms_norm_eps).to(self.dtype)

    def down_in(self, x: Tensor) -> Tensor:  # [tokens, hidden] -> [tokens, intermediate]
        return F.silu(self.linear("gate", x)) * self.linear("up", x)

    def after_mlp(self, h: Tensor, down_in: Tensor) -> Tensor:  # -> [tokens, hidden]
        return h + self.linear("down", down_in)

    def forward(self, h: Tensor, rotary: Rotary) -> Tensor:  # [tokens, hidden] -> same
        h = self.after_attention(h, self.o_in(self.attn_in(h), rotary))
        return self.after_mlp(h, self.down_in(self.mlp_in(h)))

    def _window_mask(self, tokens: int, device: torch.device) -> Tensor | None:  # -> bool [tokens, tokens], True: attends
        window = self.architecture.window(self.layer)
        if window is None or window >= tokens:
            return None
        distance = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)[None, :]
        return (distance >= 0) & (distance < window)

"""Moving a scale across a site without changing the function: what reads is multiplied, what wrote is divided.

The identity behind SmoothQuant (arXiv:2211.10438, eq. 3) and AWQ (arXiv:2306.00978, section 3.2): (X / s) (s W)^T = X W^T.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from buildsys.architecture import Architecture, Site


def tied_channels(architecture: Architecture, site: Site) -> Tensor | None:  # -> [in] indices of the scale that each channel must share
    """Channels of `site` that one earlier row feeds must share a scale: query heads of one group read the same value head."""
    if site != "o_in" or architecture.heads == architecture.kv_heads:
        return None
    value = torch.arange(architecture.kv_heads * architecture.head_dim).view(architecture.kv_heads, 1, architecture.head_dim)
    return value.expand(-1, architecture.heads // architecture.kv_heads, -1).flatten()


def fold(architecture: Architecture, weights: Mapping[str, Tensor], site: Site, scale: Tensor) -> dict[str, Tensor]:
    """The tensors of a block that change when the inputs at `site` are divided by `scale` [in] and its readers multiplied by it."""
    readers = [f"{linear.name}.weight" for linear in architecture.at(site)]
    if site == "mlp_in" and architecture.experts is not None:
        readers.append(architecture.experts.router)
    changed = {name: weights[name] * scale for name in readers}
    if site in ("attn_in", "mlp_in"):
        norm = architecture.attn_norm if site == "attn_in" else architecture.mlp_norm
        return changed | {norm: weights[norm] / scale}
    writer, rows, divisor = _writer(architecture, site, scale)
    for name in (f"{writer}.weight", f"{writer}.bias"):
        if name in weights:
            changed[name] = weights[name].float().clone()
            changed[name][rows] = (changed[name][rows].t() / divisor).t()  # rows of a matrix, entries of a bias
    return changed


def _writer(architecture: Architecture, site: Site, scale: Tensor) -> tuple[str, Tensor, Tensor]:
    """Which linear's rows write what is read at `site`, which of its rows, and what each is divided by."""
    a = architecture
    if site.startswith("down_in"):
        expert = a.at(site)[0].expert
        up = a.linear("up", expert) or a.linear("gate_up")
        assert up is not None
        return up.name, torch.arange(up.out_features)[-len(scale) :], scale  # of a fused matrix the lower half
    group = a.heads // a.kv_heads
    per_value = scale.view(a.kv_heads, group, a.head_dim)[:, 0].flatten()  # equal within a group: see tied_channels
    value = a.linear("v") or a.linear("qkv")
    assert value is not None
    rows = torch.arange(value.out_features)
    if value.role == "v":
        return value.name, rows, per_value
    if a.qkv_rows == "stacked":
        return value.name, rows[-len(per_value) :], per_value
    return value.name, rows.view(a.kv_heads, group + 2, a.head_dim)[:, -1].flatten(), per_value

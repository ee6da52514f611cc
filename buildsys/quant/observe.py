"""What calibration keeps of the activations at each site: enough to weigh any error of the weights, and independent of bit widths.

For a weight error E and inputs X the squared output error is ||X E^T||^2 = tr(E G E^T) with the Gram matrix G = X^T X, so a search over
scales needs G and no forward passes. Only the 128 x 128 blocks on G's diagonal are kept: exact for every group inside a block if errors of
different groups do not correlate, which rounding errors hardly do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from buildsys.architecture import SITES, Site
from buildsys.io.checkpoint import load, save
from buildsys.quant.block import Block, Rotary
from buildsys.quant.model import Model
from buildsys.quant.parallel import ordered
from buildsys.quant.rotary import tables
from buildsys.step import Resources

GRAM_BLOCK = 128  # input channels; the widest group size other than a whole row

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SiteStats:
    """absmean, absmax: [in]; gram: [blocks, 128, 128], the mean over tokens of x x^T, zero-padded at the end."""

    absmean: Tensor
    absmax: Tensor
    gram: Tensor

    def divided(self, scale: Tensor) -> SiteStats:
        """The statistics of x / scale, `scale` [in]."""
        blocks = torch.nn.functional.pad(scale, (0, -len(scale) % GRAM_BLOCK), value=1.0).view(-1, GRAM_BLOCK)
        return SiteStats(self.absmean / scale, self.absmax / scale, self.gram / (blocks[:, :, None] * blocks[:, None, :]))


def gram_blocks(x: Tensor) -> Tensor:  # [tokens, in] -> [blocks, 128, 128]
    """Sums of x x^T over tokens, by blocks of 128 channels."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % GRAM_BLOCK))
    by_block = torch.unflatten(padded, 1, (-1, GRAM_BLOCK)).transpose(0, 1)  # [blocks, tokens, 128]
    if x.dtype == torch.float32:
        return by_block.transpose(1, 2) @ by_block
    return torch.bmm(by_block.transpose(1, 2), by_block, out_dtype=torch.float32)


def gram(x: Tensor) -> Tensor:  # [tokens, in] -> float32 [in, in]
    """The sum of x x^T over tokens; half-precision inputs are summed in float32 by tensor cores."""
    return x.t() @ x if x.dtype == torch.float32 else torch.mm(x.t(), x, out_dtype=torch.float32)


def calibrate(model: Model, tokens: Tensor, folder: Path, resources: Resources, progress: Progress) -> None:
    """One float forward over `tokens` [windows, tokens], block by block; writes block-NNNNN.safetensors of statistics into `folder`.

    Sums run window by window in their order, so neither threads nor batch change a bit.
    """
    architecture, model = model.architecture, model.at_speed()
    rotary = tables(architecture, tokens.shape[1], resources.device)
    hidden = model.embed(tokens)
    for layer, block in enumerate(model.blocks(range(architecture.layers))):
        total: dict[str, Tensor] = {}
        for at, (seen, after) in enumerate(ordered(partial(_observe, block, rotary), hidden, resources)):
            hidden[at] = after
            _add(total, seen)
        count = tokens.numel()
        save(folder / f"block-{layer:05d}.safetensors", {n: t if _is_extreme(n) else t / count for n, t in total.items()})
        progress("calibrate", layer + 1, architecture.layers)


def load_stats(path: Path, device: str = "cpu") -> dict[Site, SiteStats]:
    """One block's statistics by site."""
    found = load(path)
    return {site: SiteStats(*(found[f"{site}.{part}"].to(device) for part in ("absmean", "absmax", "gram"))) for site in SITES}


def _is_extreme(name: str) -> bool:
    return name.endswith(("absmax", "min", "max"))


def _observe(block: Block, rotary: Rotary, h: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics of one window, [tokens, hidden], and the block's output."""
    home = h.device
    h = h.to(rotary[0].device)
    seen: dict[str, Tensor] = {}

    def see(site: Site, x: Tensor) -> Tensor:
        magnitude = x.abs()
        seen[f"{site}.absmean"] = magnitude.sum(0, dtype=torch.float32)
        seen[f"{site}.absmax"], seen[f"{site}.gram"] = magnitude.amax(0).float(), gram_blocks(x)
        return x

    x = see("attn_in", block.attn_in(h))
    _, k, v = block.qkv(x, rotary)
    for name, cached in (("k", k), ("v", v)):
        seen[f"{name}.min"], seen[f"{name}.max"] = cached.amin((1, 2)).float(), cached.amax((1, 2)).float()  # [kv_heads]
    h = block.after_attention(h, see("o_in", block.o_in(x, rotary)))
    return seen, block.after_mlp(h, see("down_in", block.down_in(see("mlp_in", block.mlp_in(h))))).to(home)


def _add(total: dict[str, Tensor], seen: Mapping[str, Tensor]) -> None:
    for name, value in seen.items():
        if name not in total:
            total[name] = value.clone()
        elif name.endswith("min"):
            total[name] = torch.minimum(total[name], value)
        elif _is_extreme(name):
            total[name] = torch.maximum(total[name], value)
        else:
            total[name] += value

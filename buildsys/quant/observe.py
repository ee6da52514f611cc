"""What calibration keeps of the activations at each site: enough to weigh any error of the weights, and independent of bit widths.

For a weight error E and inputs X the squared output error is ||X E^T||^2 = tr(E G E^T) with the Gram matrix G = X^T X, so a search over
scales needs G and no forward passes. Only the 128 x 128 blocks on G's diagonal are kept: exact for every group inside a block if errors of
different groups do not correlate, which rounding errors hardly do.

An expert of a mixture has statistics of the tokens that it is sent, and where those are too few, of all tokens: else its scales and codes
would fit a handful of words. How many it was sent is kept beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from buildsys.architecture import Site
from buildsys.io.checkpoint import load, save
from buildsys.quant.block import Block, Rotary
from buildsys.quant.model import Model
from buildsys.quant.parallel import has_matrix_units, on_each, ordered, spread, within
from buildsys.quant.rotary import tables
from buildsys.quant.sums import in_parts
from buildsys.step import Resources, nobody_waits

GRAM_BLOCK = 128  # input channels; the widest group size other than a whole row
FEWEST = 1 / 16  # tokens for each input channel of an expert; below it its second moments are those of a few words, of low rank
SENT = "experts.sent"  # int64 [experts]

UNIT_TOKENS = 8192  # that a GPU is given at a time

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SiteStats:
    """absmean, absmax: [in]; gram: [blocks, 128, 128], the mean over tokens of x x^T, zero-padded at the end. `sent`: how many tokens came
    to an expert's site; where they are `few` the statistics are of all tokens."""

    absmean: Tensor
    absmax: Tensor
    gram: Tensor
    sent: int | None = None

    def divided(self, scale: Tensor) -> SiteStats:
        """The statistics of x / scale, `scale` [in]."""
        blocks = torch.nn.functional.pad(scale, (0, -len(scale) % GRAM_BLOCK), value=1.0).view(-1, GRAM_BLOCK)
        return SiteStats(self.absmean / scale, self.absmax / scale, self.gram / (blocks[:, :, None] * blocks[:, None, :]), self.sent)


def few(sent: int, width: int) -> bool:
    """Whether so many tokens say too little of what is read at a site `width` channels wide."""
    return sent < FEWEST * width


def gram_blocks(x: Tensor) -> Tensor:  # [tokens, in] -> [blocks, 128, 128]
    """Sums of x x^T over tokens, by blocks of 128 channels."""
    return _squares(_by_block(x))


def _by_block(x: Tensor) -> Tensor:  # [tokens, in] -> [blocks, tokens, 128]
    missing = -x.shape[1] % GRAM_BLOCK
    padded = torch.nn.functional.pad(x, (0, missing)) if missing else x  # to pad by nothing would copy
    by_block = torch.unflatten(padded, 1, (-1, GRAM_BLOCK)).transpose(0, 1)
    if not x.is_cuda and has_matrix_units():  # which take blocks that lie together, and give float32 for float32 alone
        return by_block.to(torch.float32, memory_format=torch.contiguous_format).contiguous()
    return by_block


def _squares(by_block: Tensor) -> Tensor:  # [blocks, tokens, 128] -> [blocks, 128, 128]
    if by_block.dtype == torch.float32:
        return by_block.transpose(1, 2) @ by_block
    return torch.bmm(by_block.transpose(1, 2), by_block, out_dtype=torch.float32)


def units(model: Model, tokens: Tensor, devices: Sequence[str]) -> list[Tensor]:  # [windows, tokens] -> units x [(windows,) tokens, hidden]
    """What enters the first block, in the units that are computed at a time: windows one by one, and on GPUs, each of which gets its share,
    several together where that is cheap, so that launching the work takes less time than the work."""
    windows = model.embed(tokens)
    if windows[0].device.type == "cpu":
        return windows
    many = max(1, UNIT_TOKENS // tokens.shape[1]) if model.architecture.experts is None else 1
    found = []
    for start in range(0, len(windows), many):
        found.append(torch.stack(windows[start : start + many]) if many > 1 else windows[start])
        windows[start : start + many] = [found[-1][:0]] * len(windows[start : start + many])  # one of each is enough
    return spread(found, devices)


def calibrate(
    model: Model,
    tokens: Tensor,
    folder: Path,
    resources: Resources,
    progress: Progress,
    tell: Callable[[Path], None] = nobody_waits,
) -> None:
    """One float forward over `tokens` [windows, tokens], block by block; writes block-NNNNN.safetensors of statistics into `folder`,
    and tells of each when it is there.

    Sums run window by window in their order, so neither threads nor batch change a bit.
    """
    architecture, model = model.architecture, model.at_speed()
    rotary = {device: tables(architecture, tokens.shape[1], device) for device in resources.devices}
    hidden, every = units(model, tokens, resources.devices), tokens.numel()
    for layer, block in enumerate(model.blocks(range(architecture.layers))):
        total = _sums(partial(_observe_on, block, rotary), hidden, resources)
        sent: list[int] = total[SENT].tolist() if SENT in total else []
        came = {linear.site: sent[linear.expert] for linear in architecture.linears if linear.expert is not None}
        starved = [site for site, tokens_sent in came.items() if few(tokens_sent, architecture.width(site))]
        if sent:
            unit_bytes = sum(4 * GRAM_BLOCK * architecture.width(site) for site in architecture.sites)
            shown = partial(_experts_on, block, starved)
            total |= _sums(shown, hidden, within(resources, unit_bytes))
        for name in total:
            if name.endswith(("absmean", "gram")):
                site = name.rpartition(".")[0]
                total[name] /= every if site in starved else came.get(site, every)
        save(path := folder / f"block-{layer:05d}.safetensors", total)
        tell(path)
        progress("calibrate", layer + 1, architecture.layers)


def load_stats(path: Path, device: str = "cpu") -> dict[Site, SiteStats]:
    """One block's statistics by site: those where linears read, and those where scales are folded in."""
    found = load(path, device)
    sent: list[int] = load(path, only=SENT)[SENT].tolist() if SENT in found else []  # without waiting for what a GPU computes
    stats: dict[Site, SiteStats] = {}
    for site in (name.removesuffix(".gram") for name in found if name.endswith(".gram")):
        absmean, absmax, gram = (found[f"{site}.{part}"] for part in ("absmean", "absmax", "gram"))
        expert = site.partition(".")[2]
        stats[site] = SiteStats(absmean, absmax, gram, sent[int(expert)] if expert else None)
    return stats


Observe = Callable[[Tensor], tuple[Mapping[str, Tensor], Tensor]]


def _sums(on: Callable[[str], Observe], hidden: list[Tensor], resources: Resources) -> dict[str, Tensor]:
    """What `on(device)` sees of all windows, summed in their order; each window's hidden state becomes what that returns."""

    def share(device: str, windows: Sequence[int]) -> dict[str, Tensor]:
        see = on(device)

        def observed(part: Sequence[int]) -> dict[str, Tensor]:
            summed: dict[str, Tensor] = {}
            for at in part:
                seen, hidden[at] = see(hidden[at])
                _add(summed, seen)
            return summed

        total: dict[str, Tensor] = {}
        for summed in ordered(observed, in_parts(windows, device), resources):
            _add(total, summed)
        return total

    first, *others = on_each(share, len(hidden), resources.devices)
    home = torch.device(resources.devices[0])
    for other in others:  # of few units a device may have none, and of few tokens an expert
        _add(first, {name: value if value.device.type == "cpu" else value.to(home) for name, value in other.items()})
    return first


def _summary(seen: dict[str, Tensor], site: Site, x: Tensor) -> None:
    """One window's sums and extremes of what is read at a site."""
    x = x.flatten(0, -2)
    by_block = _by_block(x)
    seen[f"{site}.gram"] = _squares(by_block)
    own = by_block.dtype != x.dtype  # a copy, and as float32, whose sums a CPU need not convert one number at a time
    magnitude = by_block.abs_() if own else by_block.abs()
    for name, of in (("absmean", magnitude.sum(1, dtype=torch.float32)), ("absmax", magnitude.amax(1).float())):
        seen[f"{site}.{name}"] = of.flatten()[: x.shape[1]]


def _observe(block: Block, rotary: Rotary, h: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics of one window, [tokens, hidden], and the block's output; of a mixture those before the experts, and what enters them."""
    home, experts = h.device, block.architecture.experts
    h = h.to(rotary[0].device)
    seen: dict[str, Tensor] = {}
    see = partial(_summary, seen)
    x = block.attn_in(h)
    see("attn_in", x)
    q, k, v = block.qkv(x, rotary)
    for name, cached in (("k", k), ("v", v)):
        by_head = cached.movedim(-3, 0).flatten(1)
        seen[f"{name}.min"], seen[f"{name}.max"] = by_head.amin(1).float(), by_head.amax(1).float()  # [kv_heads]
    o_in = block.attend(q, k, v)
    see("o_in", o_in)
    h = block.after_attention(h, o_in)
    if experts is None:
        return seen, block.mlp(h, see).to(home)
    x = block.mlp_in(h)
    see("mlp_in", x)
    seen[SENT] = torch.tensor([len(tokens) for tokens, _ in block.routed(x, experts)])
    return seen, h.to(home)


def _observe_on(block: Block, rotary: Mapping[str, Rotary], device: str) -> Observe:
    return partial(_observe, block.to(device), rotary[device])


def _experts_on(block: Block, starved: Sequence[Site], device: str) -> Observe:
    return partial(_observe_experts, block.to(device), torch.device(device), starved)


def _observe_experts(block: Block, device: torch.device, starved: Sequence[Site], h: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics of one window at the experts' sites, and the block's output. `starved` sites are shown all tokens."""
    home, h = h.device, h.to(device)
    seen: dict[str, Tensor] = {}

    def see(site: Site, x: Tensor) -> None:
        if site != "mlp_in" and site not in starved:
            _summary(seen, site, x)

    after, x = block.mlp(h, see), block.mlp_in(h)
    for site in starved:
        _summary(seen, site, x if site.startswith("mlp_in") else block.down_in(x, block.architecture.at(site)[0].expert))
    return seen, after.to(home)


def _add(total: dict[str, Tensor], seen: Mapping[str, Tensor]) -> None:
    for name, value in seen.items():
        if name not in total:
            total[name] = value.clone()
        elif name.endswith("min"):
            total[name] = torch.minimum(total[name], value)
        elif name.endswith("max"):
            total[name] = torch.maximum(total[name], value)
        else:
            total[name] += value

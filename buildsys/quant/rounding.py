"""One decoder block: the scales that the rescaling methods choose folded in, then its linears rounded site by site.

A rounding method that asks for tokens sees what each site really reads: the outputs of the quantized blocks before it and of the linears
already rounded in this one (GPTQ's sequential order, arXiv:2210.17323, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from buildsys.architecture import Architecture, Linear, Site
from buildsys.errors import BuildError
from buildsys.quant.block import Block
from buildsys.quant.fold import fold, tied_channels
from buildsys.quant.linear import QuantizedLinear, Rounding
from buildsys.quant.observe import GRAM_BLOCK, SiteStats, few
from buildsys.quant.search import gram_norm, output_norms
from buildsys.quant.stream import Moments, Walk
from buildsys.scheme import Activations, Scheme, Schemes


@dataclass(frozen=True)
class Method:
    """A module of methods/ with its knobs."""

    module: ModuleType
    knobs: Any


@dataclass(frozen=True)
class Job:
    """What to do to every block: rescale in order, then round each linear in its scheme. `own`: some linears' rounders by whole name."""

    schemes: Schemes
    rescalers: tuple[Method, ...]
    rounder: Method
    own: Mapping[str, Method] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def sees_tokens(self) -> bool:
        return any(method.module.SEES_TOKENS for method in (self.rounder, *self.own.values()))

    @property
    def sees_floats(self) -> bool:
        """Whether a method asks what the float model reads where the quantized one does."""
        return any(method.module.SEES_FLOATS for method in (self.rounder, *self.own.values()))

    def rounder_of(self, name: str) -> Method:
        return self.own.get(name, self.rounder)


@dataclass(frozen=True)
class Rounded:
    """A block after the walk: its linears' codes, everything else of it in float16, and what a manifest tells of each linear: its relative
    output error, and what its method noted."""

    linears: Mapping[str, QuantizedLinear]
    floats: Mapping[str, Tensor]
    notes: Mapping[str, Mapping[str, float]]

    def weights(self) -> dict[str, Tensor]:
        """In float32, as an engine dequantizes them."""
        floats = {name: tensor.float() for name, tensor in self.floats.items()}
        return floats | {f"{name}.weight": linear.dequantize() for name, linear in self.linears.items()}


def activations(block: Block, job: Job) -> dict[str, Activations]:
    """What the linears of a block round their inputs to, by their names in it; those that do not are left out."""
    prefix = block.architecture.prefix(block.layer)
    found = {linear.name: job.schemes.of(prefix + linear.name) for linear in block.architecture.linears}
    return {name: scheme.activations for name, scheme in found.items() if scheme is not None and scheme.activations != "none"}


def rescale(block: Block, stats: Mapping[Site, SiteStats], job: Job) -> tuple[Block, dict[Site, Tensor]]:
    """The block with every rescaler's scales folded in, and the product of the scales by the site where each is folded in."""
    architecture = block.architecture
    scales = {site: torch.ones(architecture.width(site), device=stats[site].absmean.device) for site in architecture.scale_sites}
    for method in job.rescalers:
        for site in reversed(architecture.scale_sites):  # what reads before what writes: a folded writer is searched in its final form
            chosen = _rounded_at(block, site, job)
            if not chosen:
                continue
            readers = [block.weights[f"{linear.name}.weight"] for linear, _ in chosen]
            seen, scheme = stats[site].divided(scales[site]), chosen[0][1]  # engines fuse what reads one input, so its schemes are equal
            scale = method.module.rescale(readers, seen, tied_channels(architecture, site), scheme, method.knobs)
            block = block.with_weights(fold(architecture, block.weights, site, scale))
            scales[site] = scales[site] * scale
    return block, scales


def round_block(
    block: Block,
    job: Job,
    stats: Mapping[Site, SiteStats],
    walk: Walk | None,
    devices: Sequence[str],
    meanwhile: Callable[[], None] = lambda: None,
) -> tuple[Rounded, dict[str, Tensor]]:
    """Codes for every linear of a rescaled block that is not skipped, and the block's weights as an engine sees them, in float32. `stats`
    are those of the rescaled sites, where no `walk` is asked; `devices` share the work. `meanwhile` is called before the last site is
    rounded, when nobody waits for the windows."""
    architecture, prefix = block.architecture, block.architecture.prefix(block.layer)
    block, floats = stored(block, job)
    source = block if job.sees_floats else None
    block = replace(block, activations=activations(block, job))
    linears: dict[str, QuantizedLinear] = {}
    notes: dict[str, dict[str, float]] = {}
    norms: list[Tensor] = []
    for site in architecture.sites:
        moments = stats[site] if walk is None else walk.gram(block, site, source)
        if site == architecture.sites[-1]:
            meanwhile()
        for linear, made in _round_site(block, _rounded_at(block, site, job), moments, job, devices):
            notes[prefix + linear.name] = {**made.notes, **_sent(moments.sent, linear)}
            norms.append(made.norms)
            linears[linear.name] = made.linear
            block = block.with_weights({f"{linear.name}.weight": made.weight})
    for noted, (off, of) in zip(notes.values(), torch.stack(norms).tolist() if norms else (), strict=True):  # a GPU is waited for once
        noted["error"] = off / max(of, 1e-30)
    return Rounded(linears, floats, notes), dict(block.weights)


def stored(block: Block, job: Job) -> tuple[Block, dict[str, Tensor]]:
    """The block with all that is not rounded as an artifact holds it, and those tensors, float16."""
    chosen = {linear.name for site in block.architecture.sites for linear, _ in _rounded_at(block, site, job)}
    prefix, kept = block.architecture.prefix(block.layer), (name for name in block.weights if name.removesuffix(".weight") not in chosen)
    floats = {name: to_half(block.weights[name], prefix + name) for name in kept}
    return block.with_weights({name: tensor.float() for name, tensor in floats.items()}), floats


def _sent(sent: int | None, linear: Linear) -> dict[str, float]:
    """What is told of an expert's linear: how many tokens it saw, and whether all tokens stood in because those were few."""
    if sent is None:
        return {}
    return {"tokens": float(sent)} | ({"stood_in": 1.0} if few(sent, linear.in_features) else {})


def to_half(tensor: Tensor, name: str) -> Tensor:
    """float16, the type of an artifact's unquantized tensors; refuses what it cannot hold."""
    half = tensor.half()
    if bool(torch.isinf(half).any()):
        what = f"holds {float(tensor.abs().max()):.4g}; float16 holds at most 65504"
        raise BuildError(name, what, "skip a scale method for this model, or use another source")
    return half


def _rounded_at(block: Block, site: Site, job: Job) -> list[tuple[Linear, Scheme]]:
    """The linears of a site that do not stay float, each with its scheme."""
    prefix = block.architecture.prefix(block.layer)
    found = ((linear, job.schemes.of(prefix + linear.name)) for linear in block.architecture.at(site))
    return [(linear, scheme) for linear, scheme in found if scheme is not None]


@dataclass(frozen=True)
class _Made:
    """A rounded linear, what it stands for (float32 [out, in]), what is told of it, and the squared error of its outputs and their square
    (float32 [2])."""

    linear: QuantizedLinear
    weight: Tensor
    notes: Mapping[str, float]
    norms: Tensor


def _round_site(
    block: Block, chosen: Sequence[tuple[Linear, Scheme]], moments: Moments | SiteStats, job: Job, devices: Sequence[str]
) -> Iterator[tuple[Linear, _Made]]:
    """Rounds the linears of one site that have one scheme and one method together, since they share inputs: rows are independent."""
    prefix, gram = block.architecture.prefix(block.layer), moments.matrix if isinstance(moments, Moments) else moments
    alike: dict[tuple[Scheme, str], list[Linear]] = {}
    for linear, scheme in chosen:
        method = job.rounder_of(prefix + linear.name)
        alike.setdefault((scheme, repr((method.module.__name__, method.knobs))), []).append(linear)
    for (scheme, _), linears in alike.items():
        method = job.rounder_of(prefix + linears[0].name)
        stacked = torch.cat([block.weights[f"{linear.name}.weight"].float() for linear in linears])
        found = _round(stacked, moments, scheme, method, devices)
        sizes, rounded = [linear.out_features for linear in linears], found.linear.dequantize()
        norms = _norms(stacked, found, rounded, sizes, gram)
        parts = zip(*(torch.split(part, sizes) for part in (found.linear.codes, found.linear.scale, found.linear.zero)), strict=True)
        for linear, (codes, scale, zero), weight, both in zip(linears, parts, torch.split(rounded, sizes), norms, strict=True):
            made = QuantizedLinear(codes.contiguous(), scale.contiguous(), zero.contiguous(), scheme)
            yield linear, _Made(made, weight, found.notes, both)


def _round(weight: Tensor, moments: Moments | SiteStats, scheme: Scheme, method: Method, devices: Sequence[str]) -> Rounding:
    """Codes for `weight` [out, in], or for what a method aims at instead of it; `norms` are of the weight's own outputs."""
    gram = moments.matrix if isinstance(moments, Moments) else moments
    if not (method.module.SEES_FLOATS and isinstance(moments, Moments) and moments.apart is not None):
        made: Rounding = method.module.round_weights(weight, gram, scheme, method.knobs, devices)
        return made
    wanted, notes = method.module.aim(weight, moments.matrix, moments.apart, method.knobs)
    made = method.module.round_weights(wanted, gram, scheme, method.knobs, devices)
    return replace(made, notes={**made.notes, **notes}, norms=None)


def _norms(weight: Tensor, made: Rounding, rounded: Tensor, sizes: list[int], gram: Tensor | SiteStats) -> list[Tensor]:
    """Of each of the linears stacked in `weight` [out, in] the squared error of its outputs and their square, [2]."""
    if isinstance(gram, SiteStats):
        pairs = zip(torch.split(rounded, sizes), torch.split(weight, sizes), strict=True)
        return [torch.stack([gram_norm(after - before, gram), gram_norm(before, gram)]) for after, before in pairs]
    norms = made.norms if made.norms is not None else output_norms(weight, rounded, gram)
    return [part.sum(1) for part in torch.split(norms, sizes, 1)]


def toys(job: Job, a: Architecture, dtype: torch.dtype) -> list[Callable[[str], None]]:
    """What every block will be asked, on a device of a few weights of the same types: a GPU's code is loaded, and some of it compiled, when
    it is first asked for, which takes as long as reading the first block."""
    schemes = {job.schemes.of(a.prefix(0) + linear.name) for linear in a.linears}
    outs = {of([sum(linear.out_features for linear in a.at(site)) for site in a.sites]) for of in (min, max)}

    def rescaled(method: Method, scheme: Scheme, rows: int, device: str) -> None:
        gram = torch.eye(GRAM_BLOCK, device=device).repeat(2, 1, 1)
        seen = SiteStats(gram.sum(1).flatten(), gram.sum(1).flatten(), gram)
        method.module.rescale([_ramp(rows, device).to(dtype)], seen, None, scheme, method.knobs)

    def rounded(method: Method, scheme: Scheme, rows: int, device: str) -> None:
        method.module.round_weights(_ramp(rows, device), torch.eye(2 * GRAM_BLOCK, device=device), scheme, method.knobs, (device,))

    rounders = {repr((method.module.__name__, method.knobs)): method for method in (job.rounder, *job.own.values())}.values()
    kinds = [*((rescaled, method) for method in job.rescalers), *((rounded, method) for method in rounders)]
    return [partial(work, method, scheme, rows) for scheme in schemes if scheme is not None for rows in outs for work, method in kinds]


def _ramp(rows: int, device: str) -> Tensor:
    """[rows, 2 * GRAM_BLOCK]"""
    return torch.linspace(-1, 1, rows * 2 * GRAM_BLOCK, device=device).view(rows, -1)

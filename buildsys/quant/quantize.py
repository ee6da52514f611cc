"""The walk that turns a float model into codes: one decoder block in memory, each finished block kept on disk.

For every block: fold in the scales that the rescaling methods choose from the calibration statistics, then round its linears site by site.
A rounding method that asks for tokens sees what each site really reads: the outputs of the quantized blocks before it and of the linears
already rounded in this one (GPTQ's sequential order, arXiv:2210.17323, section 4). A killed walk replays the forwards of its finished
blocks and goes on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor

from buildsys import disk
from buildsys.architecture import Linear, Site, scale_site
from buildsys.errors import BuildError
from buildsys.quant.block import Block
from buildsys.quant.blocks import load_block, packed
from buildsys.quant.fold import fold, tied_channels
from buildsys.quant.linear import QuantizedLinear, Rounding
from buildsys.quant.model import Model
from buildsys.quant.observe import Progress, SiteStats, few, load_stats
from buildsys.quant.parallel import Behind, ahead, on_each
from buildsys.quant.search import gram_norm
from buildsys.quant.stream import Moments, Walk
from buildsys.scheme import Activations, Scheme, Schemes
from buildsys.step import Resources


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


def block_name(layer: int) -> str:
    return f"block-{layer:05d}.safetensors"


def errors_name(layer: int) -> str:
    return f"block-{layer:05d}.errors.json"


def quantize(
    model: Model, job: Job, stats: Callable[[int], Path], tokens: Tensor | None, folder: Path, resources: Resources, progress: Progress
) -> None:
    """Writes one block file and its errors for each layer into `folder`; what is already there is kept."""
    architecture, model = model.architecture, model.at_speed()
    left = [layer for layer in range(architecture.layers) if not (folder / block_name(layer)).exists()]  # files appear whole or not at all
    if tokens is None or not job.sees_tokens:
        done = itertools.count(1 + architecture.layers - len(left))  # what devices share is done in no order

        def share(device: str, places: range) -> None:
            here, layers = replace(resources, device=device, gpus=1), [left[at] for at in places]
            observed = ahead(lambda layer: load_stats(stats(layer), device), layers, device)
            with Behind(device) as writer:
                for block, seen in zip(replace(model, device=device).blocks(layers), observed, strict=True):
                    _round(block, job, seen, None, partial(_write, writer, folder), here)
                    progress("quantize", next(done), architecture.layers)

        on_each(share, len(left), resources.devices)
        return
    walk, blocks = Walk(model, tokens, resources), model.blocks(left)
    observed = ahead(lambda layer: load_stats(stats(layer), resources.device), left, resources.device)
    with Behind(resources.device) as writer:
        for layer in range(architecture.layers):
            last = layer + 1 == architecture.layers
            if layer in left:
                weights = _round(next(blocks), job, next(observed), walk, partial(_write, writer, folder), resources)
            elif not last:
                weights = quantized_weights(folder / block_name(layer), resources.device)
            if not last:
                finished = Block(architecture, layer, weights)
                finished = replace(finished, activations=_activations(finished, job))
                (walk.finish if layer in left else walk.replay)(finished)
            weights = {}  # a GPU holds the next block's instead
            progress("quantize", layer + 1, architecture.layers)


def _round(
    block: Block,
    job: Job,
    observed: Mapping[Site, SiteStats],
    walk: Walk | None,
    write: Callable[[int, Rounded], None],
    resources: Resources,
) -> dict[str, Tensor]:
    """One block rescaled, rounded and written; its weights as an engine sees them."""
    source, entering = block, walk.first_windows() if walk is not None else []
    block, scales = rescale(block, observed, job)
    seen = {site: observed[site].divided(scales[scale_site(site)]) for site in block.architecture.sites}
    rounded = round_block(block, job, seen, walk, resources.devices)
    weights: dict[str, Tensor] = {}
    if walk is not None:
        weights = rounded.weights()
        error = walk.error(source, replace(block, weights=weights, activations=_activations(block, job)), entering)
        rounded = replace(rounded, notes={**rounded.notes, source.architecture.prefix(source.layer).rstrip("."): {"block_error": error}})
    write(block.layer, rounded)
    return weights


def _write(writer: Behind, folder: Path, layer: int, rounded: Rounded) -> None:
    """Packed at once, so that the codes themselves are not kept; saved behind the computing."""
    block = packed(rounded.linears, rounded.floats)
    notes = json.dumps(rounded.notes, sort_keys=True, allow_nan=False).encode()

    def save() -> None:
        disk.write(folder / errors_name(layer), notes)
        block.save(folder / block_name(layer))

    writer.do(save)


def _activations(block: Block, job: Job) -> dict[str, Activations]:
    """What the linears of a block round their inputs to, by their names in it; those that do not are left out."""
    prefix = block.architecture.prefix(block.layer)
    found = {linear.name: job.schemes.of(prefix + linear.name) for linear in block.architecture.linears}
    return {name: scheme.activations for name, scheme in found.items() if scheme is not None and scheme.activations != "none"}


def quantized_weights(path: Path, device: str) -> dict[str, Tensor]:
    """A finished block's weights in float32."""
    linears, floats = load_block(path, device)
    return Rounded(linears, floats, {}).weights()


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


def round_block(block: Block, job: Job, stats: Mapping[Site, SiteStats], walk: Walk | None, devices: Sequence[str] = ()) -> Rounded:
    """Codes for every linear of a rescaled block that is not skipped. `stats` are those of the rescaled sites; `devices` share the work."""
    architecture, prefix = block.architecture, block.architecture.prefix(block.layer)
    chosen = {linear.name for site in architecture.sites for linear, _ in _rounded_at(block, site, job)}
    floats = {name: to_half(tensor, prefix + name) for name, tensor in block.weights.items() if name.removesuffix(".weight") not in chosen}
    block = block.with_weights({name: tensor.float() for name, tensor in floats.items()})
    block = replace(block, activations=_activations(block, job))
    linears: dict[str, QuantizedLinear] = {}
    notes: dict[str, Mapping[str, float]] = {}
    for site in architecture.sites:
        moments = stats[site] if walk is None else walk.gram(block, site)
        gram = moments.matrix if isinstance(moments, Moments) else moments
        for linear, rounding in _round_site(block, _rounded_at(block, site, job), gram, job, devices):
            weight = block.weights[f"{linear.name}.weight"].float()
            rounded = rounding.linear.dequantize()
            error = _output_norm(rounded - weight, gram) / max(_output_norm(weight, gram), 1e-30)
            notes[prefix + linear.name] = {"error": error, **rounding.notes, **_sent(moments.sent, linear)}
            linears[linear.name] = rounding.linear
            block = block.with_weights({f"{linear.name}.weight": rounded})
    return Rounded(linears, floats, notes)


def _sent(sent: int | None, linear: Linear) -> dict[str, float]:
    """What is told of an expert's linear: how many tokens it saw, and whether all tokens stood in because those were few."""
    if sent is None:
        return {}
    return {"tokens": float(sent)} | ({"stood_in": 1.0} if few(sent, linear.in_features) else {})


def told(folder: Path) -> dict[str, dict[str, float]]:
    """What a manifest says, by whole names: each block's error; and of linears that could not be done in the usual way the damping that a
    Hessian took where it was more than for the others, input channels that the text never reached, tokens of experts that saw so few that
    all stood in for them."""
    notes: dict[str, Mapping[str, float]] = {}
    for path in sorted(folder.glob("block-*.errors.json")):
        notes |= json.loads(path.read_text())
    usual = min((noted["damping"] for noted in notes.values() if "damping" in noted), default=0.0)
    found = {
        "raised_damping": {name: noted["damping"] for name, noted in notes.items() if noted.get("damping", 0.0) > usual},
        "unseen_channels": {name: noted["unseen_channels"] for name, noted in notes.items() if noted.get("unseen_channels")},
        "experts_of_few_tokens": {name: noted["tokens"] for name, noted in notes.items() if "stood_in" in noted},
        "block_errors": {name: noted["block_error"] for name, noted in notes.items() if "block_error" in noted},
    }
    return {what: names for what, names in found.items() if names}


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


def _round_site(
    block: Block, chosen: Sequence[tuple[Linear, Scheme]], gram: Tensor | SiteStats, job: Job, devices: Sequence[str]
) -> Iterator[tuple[Linear, Rounding]]:
    """Rounds the linears of one site that have one scheme and one method together, since they share inputs: rows are independent."""
    prefix = block.architecture.prefix(block.layer)
    alike: dict[tuple[Scheme, str], list[Linear]] = {}
    for linear, scheme in chosen:
        method = job.rounder_of(prefix + linear.name)
        alike.setdefault((scheme, repr((method.module.__name__, method.knobs))), []).append(linear)
    for (scheme, _), linears in alike.items():
        method = job.rounder_of(prefix + linears[0].name)
        stacked = torch.cat([block.weights[f"{linear.name}.weight"].float() for linear in linears])
        found: Rounding = method.module.round_weights(stacked, gram, scheme, method.knobs, devices)
        sizes = [linear.out_features for linear in linears]
        parts = zip(*(torch.split(part, sizes) for part in (found.linear.codes, found.linear.scale, found.linear.zero)), strict=True)
        for linear, (codes, scale, zero) in zip(linears, parts, strict=True):
            rounded = QuantizedLinear(codes.contiguous(), scale.contiguous(), zero.contiguous(), scheme)
            yield linear, Rounding(rounded, found.notes)


def _output_norm(weight: Tensor, gram: Tensor | SiteStats) -> float:  # [out, in] -> mean over tokens of ||W x||^2
    return gram_norm(weight, gram) if isinstance(gram, SiteStats) else float(((weight @ gram) * weight).sum())

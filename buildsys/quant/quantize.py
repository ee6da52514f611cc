"""The walk that turns a float model into codes: one decoder block in memory, each finished block kept on disk.

For every block: fold in the scales that the rescaling methods choose from the calibration statistics, then round its linears site by site.
A rounding method that asks for tokens sees what each site really reads: the outputs of the quantized blocks before it and of the linears
already rounded in this one (GPTQ's sequential order, arXiv:2210.17323, section 4). A killed walk replays the forwards of its finished
blocks and goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from buildsys import disk
from buildsys.architecture import SITES, Linear, Site
from buildsys.errors import BuildError
from buildsys.quant.block import Block
from buildsys.quant.blocks import Packed, load_block, packed
from buildsys.quant.fold import fold, tied_channels
from buildsys.quant.linear import QuantizedLinear
from buildsys.quant.model import Model
from buildsys.quant.observe import Progress, SiteStats, load_stats
from buildsys.quant.parallel import Behind
from buildsys.quant.search import gram_norm
from buildsys.quant.stream import Walk
from buildsys.scheme import Scheme
from buildsys.step import Resources


@dataclass(frozen=True)
class Method:
    """A module of methods/ with its knobs."""

    module: ModuleType
    knobs: Any


@dataclass(frozen=True)
class Job:
    """What to do to every block: rescale in order, then round, all linears but the skipped (by whole names)."""

    scheme: Scheme
    rescalers: tuple[Method, ...]
    rounder: Method
    skipped: frozenset[str]

    @property
    def sees_tokens(self) -> bool:
        return bool(self.rounder.module.SEES_TOKENS)


@dataclass(frozen=True)
class Rounded:
    """A block after the walk: its linears' codes, everything else of it in float16, and each linear's relative output error."""

    linears: Mapping[str, QuantizedLinear]
    floats: Mapping[str, Tensor]
    errors: Mapping[str, float]

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
    walk = None if tokens is None or not job.sees_tokens else Walk(model, tokens, resources)
    left = [layer for layer in range(architecture.layers) if not (folder / block_name(layer)).exists()]  # files appear whole or not at all
    blocks = model.blocks(left)
    with Behind(resources.device) as writer:
        for layer in range(architecture.layers):
            leaves = walk is not None and layer + 1 < architecture.layers
            weights: dict[str, Tensor] = {}
            if layer in left:
                observed = load_stats(stats(layer), resources.device)
                block, scales = rescale(next(blocks), observed, job)
                rounded = round_block(block, job, {site: observed[site].divided(scales[site]) for site in SITES}, walk)
                writer.do(partial(_write, folder, layer, rounded.errors, packed(rounded.linears, rounded.floats)))
                weights = rounded.weights() if leaves else {}
                del block, rounded  # a GPU holds the next block's instead
            elif leaves:
                weights = quantized_weights(folder / block_name(layer), resources.device)
            if walk is not None and leaves:
                (walk.finish if layer in left else walk.replay)(Block(architecture, layer, weights))
            del weights
            progress("quantize", layer + 1, architecture.layers)


def _write(folder: Path, layer: int, errors: Mapping[str, float], block: Packed) -> None:
    disk.write(folder / errors_name(layer), json.dumps(errors, sort_keys=True, allow_nan=False).encode())
    block.save(folder / block_name(layer))


def quantized_weights(path: Path, device: str) -> dict[str, Tensor]:
    """A finished block's weights in float32."""
    linears, floats = load_block(path, device)
    return Rounded(linears, floats, {}).weights()


def rescale(block: Block, stats: Mapping[Site, SiteStats], job: Job) -> tuple[Block, dict[Site, Tensor]]:
    """The block with every rescaler's scales folded in, and the product of the scales by site."""
    architecture = block.architecture
    scales = {site: torch.ones(architecture.width(site), device=stats[site].absmean.device) for site in SITES}
    for method in job.rescalers:
        for site in reversed(SITES):  # what reads before what writes: a folded writer is searched in its final form
            readers = [block.weights[f"{linear.name}.weight"] for linear in _rounded_at(block, site, job)]
            if not readers:
                continue
            seen = stats[site].divided(scales[site])
            scale = method.module.rescale(readers, seen, tied_channels(architecture, site), job.scheme, method.knobs)
            block = block.with_weights(fold(architecture, block.weights, site, scale))
            scales[site] = scales[site] * scale
    return block, scales


def round_block(block: Block, job: Job, stats: Mapping[Site, SiteStats], walk: Walk | None) -> Rounded:
    """Codes for every linear of a rescaled block that is not skipped. `stats` are those of the rescaled sites."""
    prefix = block.architecture.prefix(block.layer)
    chosen = {linear.name for site in SITES for linear in _rounded_at(block, site, job)}
    floats = {name: to_half(tensor, prefix + name) for name, tensor in block.weights.items() if name.removesuffix(".weight") not in chosen}
    block = block.with_weights({name: tensor.float() for name, tensor in floats.items()})
    linears: dict[str, QuantizedLinear] = {}
    errors: dict[str, float] = {}
    for site in SITES:
        gram = stats[site] if walk is None else walk.gram(block, site)
        for linear, found in _round_site(block, _rounded_at(block, site, job), gram, job):
            weight = block.weights[f"{linear.name}.weight"].float()
            rounded = found.dequantize()
            errors[prefix + linear.name] = _output_norm(rounded - weight, gram) / max(_output_norm(weight, gram), 1e-30)
            linears[linear.name] = found
            block = block.with_weights({f"{linear.name}.weight": rounded})
    return Rounded(linears, floats, errors)


def to_half(tensor: Tensor, name: str) -> Tensor:
    """float16, the type of an artifact's unquantized tensors; refuses what it cannot hold."""
    half = tensor.half()
    if bool(torch.isinf(half).any()):
        what = f"holds {float(tensor.abs().max()):.4g}; float16 holds at most 65504"
        raise BuildError(name, what, "skip a scale method for this model, or use another source")
    return half


def _rounded_at(block: Block, site: Site, job: Job) -> list[Linear]:
    prefix = block.architecture.prefix(block.layer)
    return [linear for linear in block.architecture.at(site) if prefix + linear.name not in job.skipped]


def _round_site(block: Block, chosen: Sequence[Linear], gram: Tensor | SiteStats, job: Job) -> Iterator[tuple[Linear, QuantizedLinear]]:
    """Rounds the linears of one site together, since they share inputs: rows are independent."""
    if not chosen:
        return
    stacked = torch.cat([block.weights[f"{linear.name}.weight"].float() for linear in chosen])
    found: QuantizedLinear = job.rounder.module.round_weights(stacked, gram, job.scheme, job.rounder.knobs)
    sizes = [linear.out_features for linear in chosen]
    parts = zip(*(torch.split(part, sizes) for part in (found.codes, found.scale, found.zero)), strict=True)
    for linear, (codes, scale, zero) in zip(chosen, parts, strict=True):
        yield linear, QuantizedLinear(codes.contiguous(), scale.contiguous(), zero.contiguous(), job.scheme)


def _output_norm(weight: Tensor, gram: Tensor | SiteStats) -> float:  # [out, in] -> mean over tokens of ||W x||^2
    return gram_norm(weight, gram) if isinstance(gram, SiteStats) else float(((weight @ gram) * weight).sum())

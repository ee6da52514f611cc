"""The walk that turns a float model into codes: one decoder block in memory, each finished block kept on disk.

What happens to a block is in rounding.py. Where a rounding method sees tokens, blocks are walked in turn, and a killed walk replays the
forwards of its finished blocks and goes on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from buildsys import disk
from buildsys.architecture import scale_site
from buildsys.quant.block import Block
from buildsys.quant.blocks import load_block, packed
from buildsys.quant.model import Model
from buildsys.quant.observe import Progress, load_stats
from buildsys.quant.parallel import Behind, ahead, aside, beforehand, on_each
from buildsys.quant.rounding import Job, Rounded, activations, rescale, round_block, toy
from buildsys.quant.stream import Walk
from buildsys.step import Resources

WRITERS = 4
"""Blocks that are written at a time where one is computed faster than one thread copies it from the GPU and a disk takes it in."""


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
    warm = beforehand(partial(toy, job, architecture, model.dtype), resources.devices)
    if tokens is None or not job.sees_tokens:
        _each(model, job, stats, left, folder, resources, progress, warm)
    elif left:
        walk = Walk(model, tokens, resources)
        _in_turn(walk, _Rescaled(model, job, stats, left, resources, warm), model, job, left, folder, resources, progress)


def _each(
    model: Model,
    job: Job,
    stats: Callable[[int], Path],
    left: Sequence[int],
    folder: Path,
    resources: Resources,
    progress: Progress,
    warm: Callable[[], None],
) -> None:
    """Blocks that know nothing of one another: devices share them."""
    architecture = model.architecture
    done = itertools.count(1 + architecture.layers - len(left))  # what devices share is done in no order

    def share(device: str, places: range) -> None:
        layers = [left[at] for at in places]
        observed = ahead(lambda layer: load_stats(stats(layer), device), layers, device)
        with Behind(device, WRITERS) as writer:
            for block, seen in zip(replace(model, device=device).blocks(layers), observed, strict=True):
                warm()
                block, scales = rescale(block, seen, job)
                moments = {site: seen[site].divided(scales[scale_site(site)]) for site in architecture.sites}
                _write(writer, folder, block.layer, round_block(block, job, moments, None, (device,))[0])
                progress("quantize", next(done), architecture.layers)

    on_each(share, len(left), resources.devices)


def _in_turn(
    walk: Walk,
    rescaled: _Rescaled,
    model: Model,
    job: Job,
    left: Sequence[int],
    folder: Path,
    resources: Resources,
    progress: Progress,
) -> None:
    """Blocks that see what those before them became, and so are done one after the other."""
    architecture = model.architecture
    with Behind(resources.device, 1) as writer:  # a layer takes ten times as long, and a block that waits is GPU memory
        for layer in range(left[-1] + 1):
            if layer in left:
                finished, rounded = _walked(rescaled, job, walk, resources)
                _write(writer, folder, layer, rounded)
            else:
                finished = Block(architecture, layer, quantized_weights(folder / block_name(layer), resources.device))
                finished = replace(finished, activations=activations(finished, job))
            if layer < left[-1]:
                (walk.finish if layer in left else walk.replay)(finished)
            del finished  # a GPU holds the next one instead
            progress("quantize", layer + 1, architecture.layers)


def _walked(rescaled: _Rescaled, job: Job, walk: Walk, resources: Resources) -> tuple[Block, Rounded]:
    """The next block rounded where the walk stands: as an engine computes it, and as it is written."""
    source, block = rescaled.next()
    wanted = walk.answers(source)
    del source  # as large as anything that is to come
    rounded, weights = round_block(block, job, {}, walk, resources.devices, rescaled.begin)
    finished = replace(block, weights=weights, activations=activations(block, job))
    error = {"block_error": walk.error(finished, wanted)}
    return finished, replace(rounded, notes={**rounded.notes, block.architecture.prefix(block.layer).rstrip("."): error})


class _Rescaled:
    """The blocks of some layers in turn, each as it is and rescaled. No rescaler asks what the blocks before it became: of several GPUs the
    last begins with the next one as soon as it may, while the first factors what only one can."""

    def __init__(
        self, model: Model, job: Job, stats: Callable[[int], Path], layers: Sequence[int], resources: Resources, warm: Callable[[], None]
    ) -> None:
        self._home, self._there = resources.devices[0], resources.devices[-1]
        self._job, self._left, self._warm = job, len(layers), warm
        self._blocks = replace(model, device=self._there).blocks(layers)
        self._stats = ahead(lambda layer: load_stats(stats(layer), self._there), layers, self._there)
        self._begun: Callable[[], tuple[Block, Block]] | None = None
        self._aside = self._there != self._home

    def begin(self) -> None:
        """The next one, beside what the caller does, where there is a GPU for it."""
        if self._aside and self._left and self._begun is None:
            self._begun = aside(self._next, self._there)

    def next(self) -> tuple[Block, Block]:
        self.begin()
        begun, self._begun = self._begun or self._next, None
        self._left -= 1
        return begun()

    def _next(self) -> tuple[Block, Block]:
        block = next(self._blocks)
        self._warm()
        rescaled, _ = rescale(block, next(self._stats), self._job)
        return block.to(self._home), rescaled.to(self._home)


def _write(writer: Behind, folder: Path, layer: int, rounded: Rounded) -> None:
    """Packed at once, so that the codes themselves are not kept; saved behind the computing."""
    block = packed(rounded.linears, rounded.floats)
    notes = json.dumps(rounded.notes, sort_keys=True, allow_nan=False).encode()

    def save() -> None:
        disk.write(folder / errors_name(layer), notes)
        block.save(folder / block_name(layer))

    writer.do(save)


def quantized_weights(path: Path, device: str) -> dict[str, Tensor]:
    """A finished block's weights in float32."""
    linears, floats = load_block(path, device)
    return Rounded(linears, floats, {}).weights()


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

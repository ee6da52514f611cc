"""The walk that turns a float model into codes: one decoder block in memory, each finished block kept on disk.

What happens to a block is in rounding.py. Where a rounding method sees tokens, blocks are walked in turn, and a killed walk replays the
forwards of its finished blocks and goes on.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from buildsys import disk
from buildsys.architecture import Site, scale_site
from buildsys.quant.block import Block
from buildsys.quant.blocks import load_block, packed
from buildsys.quant.model import BLOCKS_AHEAD, Model
from buildsys.quant.observe import Progress, SiteStats, load_stats
from buildsys.quant.parallel import Behind, ahead, aside, beforehand, on_each
from buildsys.quant.rounding import Job, Rounded, activations, rescale, round_block, stored, toys
from buildsys.quant.stream import Walk
from buildsys.step import Resources, nobody_waits

WRITERS = 4
"""Blocks that are written at a time where one is computed faster than one thread copies it from the GPU and a disk takes it in."""


def block_name(layer: int) -> str:
    return f"block-{layer:05d}.safetensors"


def errors_name(layer: int) -> str:
    return f"block-{layer:05d}.errors.json"


def quantize(
    model: Model,
    job: Job,
    stats: Callable[[int], Path],
    tokens: Tensor | None,
    folder: Path,
    resources: Resources,
    progress: Progress,
    tell: Callable[[Path], None] = nobody_waits,
) -> None:
    """Writes one block file and its errors for each layer into `folder`, telling of each; what is already there is kept."""
    layers, model = range(model.architecture.layers), model.at_speed()
    left = [layer for layer in layers if not (folder / block_name(layer)).exists()]  # files appear whole or not at all
    if not left:  # all was done when a commit was killed: a GPU would be warm for nobody
        return
    warm = beforehand(toys(job, model.architecture, model.dtype), resources.devices)
    work = _Work(model, job, stats, left, folder, resources, progress, tell, warm)
    if tokens is None or not job.sees_tokens:
        work.shared_out()
    else:
        work.in_turn(Walk(model, tokens, resources, job.sees_floats))


@dataclass(frozen=True)
class _Work:
    """The blocks that are left to do, and what is asked of each."""

    model: Model
    job: Job
    stats: Callable[[int], Path]
    left: Sequence[int]
    folder: Path
    resources: Resources
    progress: Progress
    tell: Callable[[Path], None]
    warm: Callable[[], None]

    def shared_out(self) -> None:
        """Blocks that know nothing of one another: devices share them."""
        architecture = self.model.architecture
        done = itertools.count(1 + architecture.layers - len(self.left))  # what devices share is done in no order

        def share(device: str, places: range) -> None:
            with Behind(device, WRITERS) as writer:
                for block, seen in self.observed(device, [self.left[at] for at in places], BLOCKS_AHEAD):
                    block, scales = rescale(block, seen, self.job)
                    moments = {site: seen[site].divided(scales[scale_site(site)]) for site in architecture.sites}
                    self._write(writer, block.layer, round_block(block, self.job, moments, None, (device,))[0])
                    self.progress("quantize", next(done), architecture.layers)

        on_each(share, len(self.left), self.resources.devices)

    def in_turn(self, walk: Walk) -> None:
        """Blocks that see what those before them became."""
        architecture, home, every = self.model.architecture, self.resources.device, range(self.left[-1] + 1)
        rescaled = _Rescaled(self, every if self.job.sees_floats else self.left)
        with Behind(home, 1) as writer:  # a layer takes ten times as long, and a block that waits is GPU memory
            for layer in every:
                if layer in self.left:
                    finished, source = self._walked(rescaled, walk, writer)
                else:
                    finished = Block(architecture, layer, quantized_weights(self.folder / block_name(layer), home))
                    finished = replace(finished, activations=activations(finished, self.job))
                    source = stored(rescaled.next()[1], self.job)[0] if self.job.sees_floats else None
                if layer < self.left[-1]:
                    (walk.finish if layer in self.left else walk.replay)(finished, source)
                del finished, source  # a GPU holds the next one instead
                self.progress("quantize", layer + 1, architecture.layers)

    def _walked(self, rescaled: _Rescaled, walk: Walk, writer: Behind) -> tuple[Block, Block | None]:
        """The next block rounded where the walk stands, and written: as an engine computes it, and as it was where the float model is still
        before its experts. Its codes end here, packed."""
        architecture = self.model.architecture
        source, block = rescaled.next()
        wanted = walk.answers(source)
        del source  # as large as anything that is to come
        rounded, weights = round_block(block, self.job, {}, walk, self.resources.devices, rescaled.while_rounding)
        rescaled.once_rounded()
        finished = replace(block, weights=weights, activations=activations(block, self.job))
        error = {"block_error": walk.error(finished, wanted)}
        notes = {**rounded.notes, block.architecture.prefix(block.layer).rstrip("."): error}
        self._write(writer, block.layer, replace(rounded, notes=notes))
        left_behind = self.job.sees_floats and architecture.experts is not None  # of a dense block all sites moved the float model on
        return finished, stored(block, self.job)[0] if left_behind else None

    def observed(self, device: str, layers: Sequence[int], blocks_ahead: int) -> Iterator[tuple[Block, Mapping[Site, SiteStats]]]:
        """These blocks on a device, each with its statistics, from when the device is warm."""
        blocks = replace(self.model, device=device).blocks(layers, blocks_ahead)

        def coming() -> Block:  # which nobody here holds on to, as zip would
            block = next(blocks)
            self.warm()
            return block

        for seen in ahead(lambda layer: load_stats(self.stats(layer), device), layers, device):
            yield coming(), seen

    def _write(self, writer: Behind, layer: int, rounded: Rounded) -> None:
        """Packed at once, so that the codes themselves are not kept; saved behind the computing."""
        block = packed(rounded.linears, rounded.floats)
        notes = json.dumps(rounded.notes, sort_keys=True, allow_nan=False).encode()

        def settle(appear: Callable[[], None]) -> None:
            disk.write(self.folder / errors_name(layer), notes)
            appear()
            self.tell(self.folder / block_name(layer))

        writer.do(lambda: partial(settle, block.write(self.folder / block_name(layer))))


class _Rescaled:
    """These blocks in turn: each as it is, wherever that may be, and rescaled, where the walk is. No rescaler asks what the
    blocks before it became: of several GPUs the last begins with the next one while the first factors what only one can. A GPU alone has
    room for it when the one before is rounded, and not for a mixture's, which is larger than all that rounding takes."""

    def __init__(self, work: _Work, layers: Sequence[int]) -> None:
        self._home, self._there = work.resources.devices[0], work.resources.devices[-1]
        self._job, self._left = work.job, len(layers)
        self._apart, self._mixture = self._there != self._home, work.model.architecture.experts is not None
        self._blocks = work.observed(self._there, layers, BLOCKS_AHEAD if self._apart else 0)
        self._begun: Callable[[], tuple[Block, Block]] | None = None

    def while_rounding(self) -> None:
        """Begins the next one on a GPU that the walk leaves alone, where there is one."""
        if self._apart:
            self._begin()

    def once_rounded(self) -> None:
        """Begins the next one beside what the caller does."""
        if not self._mixture:
            self._begin()

    def _begin(self) -> None:
        if self._there != "cpu" and self._left and self._begun is None:
            self._begun = aside(self._next, self._there)

    def next(self) -> tuple[Block, Block]:
        self._begin()
        begun, self._begun = self._begun or self._next, None
        self._left -= 1
        source, rescaled = begun()
        return source, rescaled.to(self._home)

    def _next(self) -> tuple[Block, Block]:
        block, seen = next(self._blocks)
        return block, rescale(block, seen, self._job)[0]


def quantized_weights(path: Path, device: str) -> dict[str, Tensor]:
    """A finished block's weights in float32."""
    linears, floats = load_block(path, device)
    return Rounded(linears, floats, {}).weights()


def told(folder: Path) -> dict[str, dict[str, float]]:
    """What a manifest says, by whole names: each block's error; and of linears that could not be done in the usual way the damping that a
    Hessian took where it was more than for the others, input channels that the text never reached, tokens of experts that saw so few that
    all stood in for them; linears that were rounded as they are, since the text said too little of what to aim at instead."""
    notes: dict[str, Mapping[str, float]] = {}
    for path in sorted(folder.glob("block-*.errors.json")):
        notes |= json.loads(path.read_text())
    usual = min((noted["damping"] for noted in notes.values() if "damping" in noted), default=0.0)
    found = {
        "raised_damping": {name: noted["damping"] for name, noted in notes.items() if noted.get("damping", 0.0) > usual},
        "unseen_channels": {name: noted["unseen_channels"] for name, noted in notes.items() if noted.get("unseen_channels")},
        "experts_of_few_tokens": {name: noted["tokens"] for name, noted in notes.items() if "stood_in" in noted},
        "unaimed": {name: 1.0 for name, noted in notes.items() if noted.get("aim_ridge") == 0},
        "block_errors": {name: noted["block_error"] for name, noted in notes.items() if "block_error" in noted},
    }
    return {what: names for what, names in found.items() if names}

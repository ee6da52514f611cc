"""buildsys's own walk: one decoder block in memory at a time, each finished one kept; see quant/quantize.py."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from buildsys.backends import Asked, Misfit, Progress, Work
from buildsys.slots import Frozen

if TYPE_CHECKING:
    from buildsys.architecture import Architecture

VERSION = 1
TOOL = ""
READS = ("stats", "tokens")
RESUMES = True


class Knobs(Frozen):
    """Nothing to set: methods have knobs of their own."""


def misfits(asked: Asked) -> Iterator[Misfit]:
    """It does whatever a recipe can say."""
    return iter(())


def unfit(config: Mapping[str, Any], architecture: Architecture, left_float: Collection[str]) -> Iterator[Misfit]:
    """To every model that there is a description of."""
    return iter(())


def ready(where: str) -> None:
    """It needs no more than a build does."""


def quantize(knobs: Knobs, work: Work, progress: Progress) -> dict[str, Any]:
    """Codes for every block, and each linear's relative output error beside them."""
    from buildsys.io import checkpoint
    from buildsys.quant import quantize as walk
    from buildsys.quant.parallel import tensor_cores

    request, model, job = work.request, work.model, work.job
    stats, stage = request.read("stats"), request.stage
    seen = checkpoint.load(request.read("tokens").path("tokens.safetensors"))["tokens"] if job.sees_tokens else None
    resumed = sum((stage / walk.block_name(layer)).exists() for layer in range(model.architecture.layers))
    with tensor_cores(request.resources.device):
        of = lambda layer: stats.path(walk.block_name(layer))  # noqa: E731
        walk.quantize(model, job, of, seen, stage, request.resources, progress, request.finished)
    return ({"resumed_blocks": resumed} if resumed else {}) | walk.told(stage)

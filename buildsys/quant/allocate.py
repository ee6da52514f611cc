"""What fewer bits cost, part by part of a model: the KL divergence that each part's rounding alone brings, measured by forwards.

Each block is cut where its linears read. A part of it is rounded to the fewest bits of the choice while the rest of the model stays float,
and what this changes in the residual stream is carried through the blocks after it; at the end KL(float || one part rounded) is taken over
the whole vocabulary. Output errors of single layers do not compare across layers (docs/LOG.md); this does: for small errors the KL of all
parts together is about the sum of theirs. For the other bits, and for the experts that share a part, it is scaled by the squared output
error that the Gram matrix tells, to which KL is nearly proportional. budget.py decides what to do with the errors.

Cost: 4 parts a block, each forwarded through half of the model on average: of an 8B with 32 layers 2,112 forwards of one block over 2,048
tokens, 1.9 PFLOP, beside one search of the rescalers. One block is in memory, and of each part only the change, in bfloat16.

Engines that read such artifacts: vLLM (format gptq through GPTQModel's `dynamic`; compressed_tensors as several `config_groups`, of 4 and 8
bits) and GPTQModel (gptq). LMDeploy 0.18 reads one scheme a model: TurboMind looks at `group_0` alone and wants 4 bits, its PyTorch engine
refuses any second group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from buildsys.architecture import SITES, Architecture, Linear, Site, scale_site
from buildsys.errors import BuildError
from buildsys.quant.block import Block, Rotary
from buildsys.quant.budget import Group, Option, choices, size_bits
from buildsys.quant.grid import least_error
from buildsys.quant.model import Head, Model, chunks
from buildsys.quant.observe import Progress, SiteStats, load_stats
from buildsys.quant.parallel import ordered
from buildsys.quant.rotary import tables
from buildsys.quant.rounding import Job, rescale
from buildsys.quant.search import gram_norm
from buildsys.scheme import Bits, Scheme
from buildsys.step import Resources

SEEN_TOKENS, SEEN_LENGTH = 2048, 512  # four windows tell a model's parts apart as well as sixteen do (docs/LOG.md)
CHANGES_BYTES = 4 << 30  # of all parts' changes of the residual stream together

Changes = list[Tensor]
"""Of each window what one part's rounding changes in the residual stream: bfloat16 [tokens, hidden]."""


@dataclass(frozen=True)
class Candidate:
    """A group of one block: its linears, the schemes to choose from, and the squared output error of each."""

    linears: tuple[Linear, ...]
    schemes: tuple[Scheme, ...]
    errors: tuple[float, ...]


def measure(
    model: Model,
    job: Job,
    together: Sequence[tuple[Linear, ...]],
    bits: Sequence[Bits],
    stats: Callable[[int], Path],
    tokens: Tensor,
    resources: Resources,
    progress: Progress,
) -> tuple[Group, ...]:
    """Every group of linears that the job quantizes (budget.choices) with what each of `bits` costs there. The job's rescalers are applied
    first; its rounder, which may take longer than all of this, is not asked: grids of least error stand in for it."""
    a = model.architecture
    seen = sample(tokens, a)
    rotary = tables(a, seen.shape[1], resources.device)
    hidden = [h.to(resources.device) for h in model.embed(seen)]
    changes: dict[tuple[int, Site], Changes] = {}
    found: dict[tuple[int, Site], list[Candidate]] = {}
    for layer, block in enumerate(model.at_speed().blocks(range(a.layers))):
        observed = load_stats(stats(layer), resources.device)
        block, scales = rescale(block.to(torch.float32), observed, job)
        rescaled = {site: observed[site].divided(scales[scale_site(site)]) for site in a.sites}
        after = list(ordered(partial(block.forward, rotary=rotary), hidden, resources))
        for key, change in changes.items():
            changes[key] = _changes(block, rotary, hidden, after, resources, change)
        offered = choices(a, layer, job.schemes, together, bits)
        for site in SITES:
            groups = {linears: schemes for linears, schemes in offered.items() if part(linears[0]) == site}
            if groups:
                found[layer, site], least = _weigh(block, groups, rescaled)
                changes[layer, site] = _changes(least, rotary, hidden, after, resources)
        hidden = after
        progress("allocate", layer + 1, a.layers)
    nats = divergences(model.head(), hidden, changes, resources)
    return tuple(group for key, groups in found.items() for group in _priced(groups, nats[key], a.prefix(key[0])))


def sample(tokens: Tensor, a: Architecture) -> Tensor:  # [windows, tokens] -> [fewer, shorter]
    """The windows to measure on; fewer of a large model. What they are depends on the model alone, never on the machine."""
    length = min(tokens.shape[1], SEEN_LENGTH)
    fit = CHANGES_BYTES // (2 * a.hidden_size * len(SITES) * a.layers)
    return tokens[: max(1, min(SEEN_TOKENS, fit) // length), :length]


def part(linear: Linear) -> Site:
    """The part of a block that a linear is rounded with; all experts' are one."""
    return linear.site.partition(".")[0]


def _weigh(
    block: Block, groups: Mapping[tuple[Linear, ...], tuple[Scheme, ...]], stats: Mapping[Site, SiteStats]
) -> tuple[list[Candidate], Block]:
    """The groups of one part with their squared output errors, and the block with that part in the fewest bits."""
    found, least = [], dict[str, Tensor]()
    for linears, schemes in groups.items():
        errors = []
        for scheme in schemes:
            error = 0.0
            for linear in linears:
                weight, seen = block.weights[f"{linear.name}.weight"], stats[linear.site]
                grid = least_error(weight, scheme, seen.gram.diagonal(dim1=1, dim2=2).flatten()[: linear.in_features])
                rounded = grid.dequantize(grid.round(weight))
                error += float(gram_norm(rounded - weight, seen)) * (1.0 if seen.sent is None else seen.sent)
                if scheme == schemes[0]:
                    least[f"{linear.name}.weight"] = rounded
            errors.append(error)
        found.append(Candidate(linears, schemes, tuple(errors)))
    return found, block.with_weights(least)


def _changes(
    block: Block, rotary: Rotary, hidden: Sequence[Tensor], after: Sequence[Tensor], resources: Resources, before: Changes | None = None
) -> Changes:
    """How far `block`'s outputs are from `after`, where its inputs are `hidden` and what was changed in it `before`."""

    def change(at: int) -> Tensor:
        h = hidden[at] if before is None else hidden[at] + before[at]
        return (block.forward(h, rotary) - after[at]).bfloat16()

    return list(ordered(change, range(len(hidden)), resources))


def divergences(
    head: Head, hidden: Sequence[Tensor], changes: Mapping[tuple[int, Site], Changes], resources: Resources
) -> dict[tuple[int, Site], float]:
    """For each part the mean KL(float || part rounded) of all windows' predictions, in nats a token; `hidden` leaves the last block."""

    def window(at: int) -> dict[tuple[int, Site], float]:
        total = dict.fromkeys(changes, 0.0)
        for chunk in chunks(len(hidden[at])):
            p = head.logits(hidden[at][chunk]).log_softmax(-1)
            share = p.exp()
            for key, change in changes.items():
                q = head.logits(hidden[at][chunk] + change[at][chunk]).log_softmax(-1)
                total[key] += float((share * (p - q)).sum())
        return total

    windows = list(ordered(window, range(len(hidden)), resources))
    tokens = sum(len(h) for h in hidden)
    return {key: sum(one[key] for one in windows) / tokens for key in changes}


def _priced(groups: Sequence[Candidate], nats: float, prefix: str) -> list[Group]:
    """A part's groups with errors in nats: its own, shared out by squared output error."""
    least = sum(group.errors[0] for group in groups)
    if not (isfinite(nats) and isfinite(least)):
        where = prefix + groups[0].linears[0].name
        raise BuildError(where, f"rounding it gives predictions {nats:g} nats away: no finite number", "check the source model for NaN")
    price = max(nats, 0.0) / least if least else 0.0
    found = []
    for group in groups:
        sizes = (sum(size_bits(linear, scheme) for linear in group.linears) for scheme in group.schemes)
        options = tuple(Option(*each) for each in zip(group.schemes, sizes, (price * error for error in group.errors), strict=True))
        weights = sum(linear.out_features * linear.in_features for linear in group.linears)
        found.append(Group(tuple(prefix + linear.name for linear in group.linears), weights, options))
    return found

"""Spends a budget of bits where they save the most: one choice a group of linears, the least summed error that fits. No torch here.

A multiple-choice knapsack, as Shoham and Gersho's bit allocation (IEEE Trans. ASSP 36(9), 1988): walk down the convex hulls of all groups'
(size, error) points, steepest step first, then fill up what is left. At most one step's saving above the optimum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Any

from buildsys.architecture import Architecture, Linear
from buildsys.errors import BuildError
from buildsys.scheme import Bits, Scheme, Schemes

SCALE_BITS = 16


@dataclass(frozen=True)
class Option:
    """One way to hold a group: `size_bits` of it as packed, and the error that this brings, in nats of KL."""

    scheme: Scheme
    size_bits: int
    error: float


@dataclass(frozen=True)
class Group:
    """Linears that get one scheme, because engines make one matrix of them: whole names, weights in all, and the ways to hold them."""

    names: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]

    def hull(self) -> tuple[Option, ...]:
        """The options on the lower convex hull, smallest first: each saves less error a bit than the one before."""
        kept: list[Option] = []
        for option in sorted(self.options, key=lambda option: (option.size_bits, option.error)):
            if kept and option.error >= kept[-1].error:
                continue
            while len(kept) > 1 and saving(kept[-1], option) >= saving(kept[-2], kept[-1]):
                kept.pop()
            kept.append(option)
        return tuple(kept)


def size_bits(linear: Linear, scheme: Scheme) -> int:
    """Codes, and for each group of each row a float16 scale and a zero of `bits` (a symmetric scheme's too: most layouts store it)."""
    codes, groups = linear.out_features * linear.in_features, linear.out_features * scheme.groups(linear.in_features)
    return codes * scheme.bits + groups * (SCALE_BITS + scheme.bits)


def choices(
    a: Architecture, layer: int, schemes: Schemes, together: Sequence[tuple[Linear, ...]], bits: Sequence[Bits]
) -> dict[tuple[Linear, ...], tuple[Scheme, ...]]:
    """The quantized groups of a block with the schemes that each may get, fewest bits first. `together`: linears of a block that get one
    scheme; each other chooses alone. What an override gave other bits than the default keeps them: somebody chose."""
    grouped = {linear.name: group for group in together for linear in group}
    found: dict[tuple[Linear, ...], tuple[Scheme, ...]] = {}
    for linear in a.linears:
        scheme = schemes.of(a.prefix(layer) + linear.name)
        if scheme is not None:
            free = tuple(replace(scheme, bits=one) for one in sorted(set(bits)))
            found[grouped.get(linear.name, (linear,))] = free if scheme.bits == schemes.default.bits else (scheme,)
    return found


def least_bits(a: Architecture, schemes: Schemes, together: Sequence[tuple[Linear, ...]], bits: Sequence[Bits]) -> float:
    """Bits a weight of the smallest choice, which planning knows before anything runs."""
    size = weights = 0
    for layer in range(a.layers):
        for linears, offered in choices(a, layer, schemes, together, bits).items():
            size += sum(size_bits(linear, offered[0]) for linear in linears)
            weights += sum(linear.out_features * linear.in_features for linear in linears)
    return size / weights


def too_small(budget_bits: float, least: float, where: str) -> BuildError:
    """What a budget below the smallest choice is told."""
    what = f"the smallest choice takes {least:.4f} bits a weight with its scales and zeros, budget_bits is {budget_bits:g}"
    fix = f"set budget_bits: {ceil(least * 100) / 100:g}, add fewer bits to mixed.bits, or share scales in larger groups"
    return BuildError(where, what, fix)


def saving(smaller: Option, larger: Option) -> Fraction:
    """Error that one more bit saves between the two; exact, so that equal steps sort alike on every machine."""
    return Fraction(smaller.error - larger.error) / (larger.size_bits - smaller.size_bits)


def average_bits(groups: Sequence[Group], chosen: Sequence[Option]) -> float:
    """Bits a weight, scales and zeros counted in."""
    return sum(option.size_bits for option in chosen) / sum(group.weights for group in groups)


def table(groups: Sequence[Group], chosen: Sequence[Option]) -> list[dict[str, Any]]:
    """For people: each group's choice, and what every choice would have taken and cost."""
    return [
        {
            "linears": list(group.names),
            "chosen": str(taken.scheme),
            "options": [{"scheme": str(each.scheme), "bytes": ceil(each.size_bits / 8), "kl_nats": each.error} for each in group.options],
        }
        for group, taken in zip(groups, chosen, strict=True)
    ]


def spend(groups: Sequence[Group], budget_bits: float, where: str) -> tuple[Option, ...]:
    """An option for each group, at most `budget_bits` a weight together. Raises BuildError, told at `where`, if no choice is that small."""
    limit = int(Fraction(budget_bits) * sum(group.weights for group in groups))
    hulls = [group.hull() for group in groups]
    chosen = [hull[0] for hull in hulls]
    spare = limit - sum(option.size_bits for option in chosen)
    if spare < 0:
        raise too_small(budget_bits, average_bits(groups, chosen), where)
    steps = [(at, one, other) for at, hull in enumerate(hulls) for one, other in pairwise(hull)]
    for at, one, other in sorted(steps, key=lambda step: (-saving(step[1], step[2]), step[0], step[1].size_bits)):
        if chosen[at] is one and other.size_bits - one.size_bits <= spare:
            chosen[at], spare = other, spare - (other.size_bits - one.size_bits)
    while (best := max(_fillers(groups, chosen, spare), default=None)) is not None:
        at, option = -best[2], groups[-best[2]].options[-best[3]]
        chosen[at], spare = option, spare - (option.size_bits - chosen[at].size_bits)
    return tuple(chosen)


def _fillers(groups: Sequence[Group], chosen: Sequence[Option], spare: int) -> Iterator[tuple[float, int, int, int]]:
    """Changes of one group that save error and fit: (saved, -bits, -group, -option), the greatest being the best, and the first on ties."""
    for at, (group, now) in enumerate(zip(groups, chosen, strict=True)):
        for index, option in enumerate(group.options):
            more_bits = option.size_bits - now.size_bits
            if more_bits <= spare and option.error < now.error:
                yield now.error - option.error, -more_bits, -at, -index

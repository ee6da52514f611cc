"""Numbers to places on an axis: scales, the ticks that people expect on them, and steps of colour.

Ticks at 1, 2 and 5 times powers of ten: Heckbert, "Nice Numbers for Graph Labels", Graphics Gems, 1990.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDE = 30.0
"""Values that differ by more than this factor are read on a logarithmic axis."""


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`."""

    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def percent(self, value: float) -> float:
        """The place of `value`, 0 to 100; beyond the ends is at the end."""
        low, high, value = (math.log(max(each, 1e-300)) if self.logarithmic else each for each in (self.low, self.high, value))
        return min(max(100 * (value - low) / (high - low), 0.0), 100.0)


def fit(values: Iterable[float], *, zero: bool = False, count: int = 5, room: float = 0.0, allow_log: bool = False) -> Scale:
    """The axis that shows all of `values` (numbers only; none at all give 0 to 1). `zero`: it starts there."""
    shown = sorted(value for value in values if math.isfinite(value))
    low, high = (shown[0], shown[-1]) if shown else (0.0, 1.0)
    if allow_log and low > 0 and high / low > WIDE:
        return _logarithmic(low, high)
    if low == high:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    if zero or 0 <= low <= 0.5 * high:
        low = min(low, 0.0)
    span = room * (high - low)
    return linear(low if low == 0 else low - span, high + span, count)


def linear(low: float, high: float, count: int = 5) -> Scale:
    """About `count` ticks at round numbers between the ends."""
    step = _step((high - low) / max(count - 1, 1))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return Scale(low, high, tuple(_round(each * step) for each in range(first, last + 1)))


def _step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return float(next(nice for nice in (1, 2, 5, 10) if rough <= nice * power * (1 + 1e-9)) * power)


def _round(value: float) -> float:
    """0.30000000000000004 is 0.3."""
    return float(f"{value:.12g}")


def _logarithmic(low: float, high: float) -> Scale:
    least, most = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    nice = [_round(factor * 10.0**power) for power in range(least, most + 1) for factor in (1, 2, 5)]
    start = max((tick for tick in nice if tick <= low), default=low)
    end = min((tick for tick in nice if tick >= high), default=high)
    kept = (1, 3) if most - least <= 3 else (1,)
    every = [_round(factor * 10.0**power) for power in range(least, most + 1) for factor in kept]
    ticks = [tick for tick in every if start <= tick <= end]
    return Scale(start, end, tuple(ticks[:: max(1, math.ceil(len(ticks) / 7))]), True)


def steps(values: Iterable[float], count: int) -> tuple[float, ...]:
    """Edges of at most `count` steps of colour that hold all of `values`, at round numbers; the first starts at zero.

    Where values differ much the steps grow with them (1, 2, 5, 10 …), or a single large one would leave all others one colour.
    """
    shown = sorted(value for value in values if math.isfinite(value) and value > 0)
    high = shown[-1] if shown else 1.0
    if shown and high / shown[len(shown) // 2] > 4:
        power = math.floor(math.log10(high))
        nice = [_round(factor * 10.0 ** (power + by)) for by in range(-count, 2) for factor in (1, 2, 5)]
        last = next(at for at, edge in enumerate(nice) if edge >= high)
        first = max(last - count + 1, next((at for at, edge in enumerate(nice) if edge >= shown[0]), 0))
        return 0.0, *nice[min(first, last) : last + 1]
    width = _step(high / count)
    return tuple(_round(each * width) for each in range(math.ceil(high / width - 1e-9) + 1))


def step_of(value: float, edges: Sequence[float]) -> int:
    """Which step holds `value`."""
    return next((at for at, (_, end) in enumerate(pairwise(edges)) if value <= end), len(edges) - 2)


def every(count: int, at_most: int) -> range:
    """Indices to label on an axis of `count` places: a round stride, from the first on."""
    stride = next(nice for power in range(6) for nice in (10**power, 2 * 10**power, 5 * 10**power) if count <= at_most * nice)
    return range(0, count, stride)

"""95% intervals of what verify measures, from windows of text resampled with replacement.

Percentile bootstrap: Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3. Paired, as both models score the same
tokens: hand in the difference, and what windows have in common cancels. A window is one draw; its tokens depend on each other and are not
draws. The percentile interval is too narrow for few draws (section 13.7), so the interval returned is never tighter than Student's t
over the windows' means, which costs nothing where there are many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from buildsys.errors import BuildError

RESAMPLES = 2000
ONE_WINDOW_BLOCKS = 8
_CHUNK = 200

# Student's t, 97.5%, for 1 to 30 degrees of freedom; more: the expansion in `_student`.
_T: tuple[float, ...] = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448, 2.1314),
    *(2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


@dataclass(frozen=True)
class Interval:
    """A statistic over all windows, with the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def clipped(self, least: float, most: float) -> Interval:
        """The same, cut to the values that the statistic can take (a share: 0 to 1); an end beyond them is Student's, not the data's."""
        return Interval(self.value, min(max(self.low, least), most), min(max(self.high, least), most))


def interval(values: Tensor, statistic: Literal["mean", "exp-mean"] = "mean", seed: int = 0) -> Interval:  # [windows, tokens]
    """The mean of `values`, or its exponential, over windows of equal length; the same `values` and `seed` give the same interval.

    KL and the share of agreement are `mean`s; a perplexity is the `exp-mean` of nats; the ratio of two perplexities is the `exp-mean` of
    their paired difference. Windows that do not differ at all give an interval of no width (a model compared with itself). One window
    says nothing of how texts differ: it is cut into 8 blocks, and their spread gets the multiplier of a single degree of freedom.
    """
    _refuse_unusable(values)
    windows = values.double()
    means = windows.mean(1)
    draws, freedom = (_blocks(windows[0]), 1) if len(means) == 1 else (means, len(means) - 1)
    value = float(means.mean())
    wing = _student(freedom) * float(draws.std()) / math.sqrt(len(draws)) if len(draws) > 1 else 0.0
    low, high = _percentiles(draws, seed)
    ends = (value, min(low, value - wing), max(high, value + wing)) if _differ(draws) else (value, value, value)
    return Interval(*(map(_exp, ends) if statistic == "exp-mean" else ends))


def share(values: Tensor) -> Interval:  # [windows, tokens] of 0 and 1
    """The mean of what holds or does not; never surer than Wilson's interval of as many draws is, also where all of them agree."""
    found = interval(values).clipped(0.0, 1.0)
    low, high = wilson(found.value, values.numel())
    return Interval(found.value, min(found.low, low), max(found.high, high))


def wilson(share: float, count: int) -> tuple[float, float]:
    """The score interval of a share of `count` (Wilson 1927): the least that any interval may claim."""
    z2 = 1.959964**2
    middle, wing = share + z2 / (2 * count), (z2 * (share * (1 - share) / count + z2 / (4 * count**2))) ** 0.5
    return (middle - wing) / (1 + z2 / count), (middle + wing) / (1 + z2 / count)


def _refuse_unusable(values: Tensor) -> None:
    if values.dim() != 2 or values.numel() < 2:
        what = f"scores of shape {list(values.shape)} have no spread to measure: at least two predicted tokens are needed"
        raise BuildError("verify", what, "give verify.text more text, or longer windows")
    odd = int((~torch.isfinite(values)).sum())
    if odd:
        what = f"{odd} of {values.numel()} scores are NaN or infinite: a model's output is broken"
        raise BuildError("verify", what, "look in the report for the layer with the largest error, and give it more bits or skip it")


def _exp(nats: float) -> float:
    """An end that no float can hold (Student's wing over two wild windows) stays a finite number: JSON has no infinity."""
    return math.exp(min(nats, 700.0))


def _blocks(window: Tensor) -> Tensor:  # [tokens] -> [blocks]
    """Means of contiguous pieces of one window: neighbours depend on each other less, the longer the pieces are."""
    return torch.stack([piece.mean() for piece in window.chunk(min(ONE_WINDOW_BLOCKS, len(window)))])


def _differ(draws: Tensor) -> bool:
    return bool((draws != draws[0]).any())


def _student(freedom: int) -> float:
    """The 97.5% quantile; beyond the table two terms of Abramowitz & Stegun 26.7.5, right within 1e-4."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _percentiles(draws: Tensor, seed: int) -> tuple[float, float]:  # [draws] -> 2.5% and 97.5% of the mean of a resample
    generator = torch.Generator().manual_seed(seed)
    count, draws = len(draws), draws.cpu()
    resampled = [draws[torch.randint(count, (_CHUNK, count), generator=generator)].mean(1) for _ in range(RESAMPLES // _CHUNK)]
    ends = torch.quantile(torch.cat(resampled), torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(ends[0]), float(ends[1])

"""GPTQ: round column by column, each error paid back by the columns not yet rounded (Frantar et al., arXiv:2210.17323, algorithm 1).

Columns go in the order of falling diag(H), on grids fixed beforehand ("static groups"), so that order costs nothing at inference. Sweeps of
coordinate descent over scales and codes follow (quant/refine.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from buildsys.methods import Compensating, compensated, whole_numbers_alone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from buildsys.quant.linear import Rounding
    from buildsys.scheme import Scheme

VERSION = 4
KIND = "round"
SEES_TOKENS = True
SEES_FLOATS = False


class Knobs(Compensating):
    """What GPTQ lets a recipe choose."""


def accepts(scheme: Scheme) -> str | None:
    """Why these codes cannot be had, or None."""
    return whole_numbers_alone(scheme)


def round_weights(weight: Tensor, gram: Tensor, scheme: Scheme, knobs: Knobs, devices: Sequence[str] = ()) -> Rounding:
    """Codes for `weight` [out, in] given `gram` [in, in], the second moments of its inputs under the quantized blocks before it."""
    return compensated(weight, gram, scheme, knobs, devices)

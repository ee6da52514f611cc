"""Round to nearest on a min-max grid: the baseline that every method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buildsys.slots import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.quant.linear import QuantizedLinear
    from buildsys.scheme import Scheme

VERSION = 1
KIND = "round"
SEES_TOKENS = False


class Knobs(Frozen):
    """Nothing to set."""


def round_weights(weight: Tensor, gram: Tensor, scheme: Scheme, knobs: Knobs) -> QuantizedLinear:  # [out, in], unused
    """The nearest codes of `weight`."""
    from buildsys.quant.grid import min_max

    grid = min_max(weight, scheme)
    return grid.linear(grid.round(weight))

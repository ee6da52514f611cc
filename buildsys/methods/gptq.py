"""GPTQ: round column by column, each error paid back by the columns not yet rounded (Frantar et al., arXiv:2210.17323, algorithm 1).

Columns go in the order of falling diag(H), on grids fixed beforehand ("static groups"), so that order costs nothing at inference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from buildsys.slots import Frozen

if TYPE_CHECKING:
    from torch import Tensor

    from buildsys.quant.linear import QuantizedLinear
    from buildsys.scheme import Scheme

VERSION = 2
KIND = "round"
SEES_TOKENS = True


class Knobs(Frozen):
    damping: float = Field(0.01, gt=0, le=1, description="share of H's mean diagonal that is added to it before inversion")
    activation_order: bool = Field(True, description="round the columns of largest activation first")
    least_error_grid: bool = Field(True, description="choose each group's range by least squared error instead of min-max")


def round_weights(weight: Tensor, gram: Tensor, scheme: Scheme, knobs: Knobs) -> QuantizedLinear:
    """Codes for `weight` [out, in] given `gram` [in, in], the second moments of its inputs under the quantized blocks before it."""
    from buildsys.quant.compensate import compensated
    from buildsys.quant.grid import least_error, min_max

    importance = gram.diagonal()
    grid = least_error(weight, scheme, importance) if knobs.least_error_grid else min_max(weight, scheme)
    return grid.linear(compensated(weight, gram, grid, knobs.damping, knobs.activation_order))

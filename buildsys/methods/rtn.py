"""Round to nearest on a min-max grid: the baseline that every method has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from buildsys.slots import Frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from buildsys.quant.linear import Rounding
    from buildsys.scheme import Scheme

VERSION = 1
KIND = "round"
SEES_TOKENS = False
SEES_FLOATS = False


class Knobs(Frozen):
    """Nothing to set."""


def accepts(scheme: Scheme) -> str | None:
    """Why the method cannot work in a scheme, or None: it can in every one."""
    return None


def round_weights(weight: Tensor, gram: Tensor, scheme: Scheme, knobs: Knobs, devices: Sequence[str] = ()) -> Rounding:  # [out, in], unused
    """The nearest codes of `weight`."""
    from buildsys.quant.grid import min_max
    from buildsys.quant.linear import Rounding

    grid = min_max(weight, scheme)
    return Rounding(grid.linear(grid.round(weight)))

"""How a weight gets its codes. A module: Knobs, VERSION, KIND, `accepts(scheme)` (why it cannot do a scheme), and `rescale(...)`, or
SEES_TOKENS, SEES_FLOATS and `round_weights(...)`, to which a method that sees floats is given what its `aim(...)` made of the weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from buildsys.slots import Frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from buildsys.quant.linear import Rounding
    from buildsys.scheme import Scheme


class Compensating(Frozen):
    """What GPTQ and its kin let a recipe choose."""

    damping: float = Field(0.01, gt=0, le=1, description="share of H's mean diagonal that is added to it before it is factored")
    activation_order: bool = Field(True, description="round the columns of largest activation first")
    least_error_grid: bool = Field(True, description="choose each group's range by least squared error instead of min-max")
    sweeps: int = Field(2, ge=0, le=20, description="passes of coordinate descent over scales and codes afterwards; 0: none")


def whole_numbers_alone(scheme: Scheme) -> str | None:
    """Why a method that compensates errors cannot make codes of a scheme, or None."""
    return "rounds to whole numbers, quantization.number is fp8" if scheme.number == "fp8" else None


def compensated(weight: Tensor, gram: Tensor, scheme: Scheme, knobs: Compensating, devices: Sequence[str]) -> Rounding:
    """GPTQ's codes for `weight` [out, in], given the second moments `gram` [in, in] of its inputs."""
    from buildsys.quant.gptq import gptq

    return gptq(weight, gram, scheme, devices, **knobs.model_dump(include=set(Compensating.model_fields)))

"""GPTAQ: GPTQ, aimed at what the float model's linear would give instead of what this one gives unrounded (arXiv:2504.02692).

What is aimed at, and how much of it is believed, is in quant/aim.py; rounding is GPTQ's. The float model is walked beside the quantized
one, so a build takes longer and holds the hidden states of both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from buildsys.methods import Compensating, compensated, whole_numbers_alone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from buildsys.quant.linear import Rounding
    from buildsys.quant.stream import Apart
    from buildsys.scheme import Scheme

VERSION = 401  # GPTQ's, whose codes these are too, and its own
KIND = "round"
SEES_TOKENS = True
SEES_FLOATS = True


class Knobs(Compensating):
    """GPTQ's, and how much of what is aimed at may be believed."""

    ridges: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.01, 0.1, 1.0), min_length=1, description="shares of H's mean diagonal of which the one is added that does best on unseen windows"
    )


def accepts(scheme: Scheme) -> str | None:
    """Why these codes cannot be had, or None."""
    return whole_numbers_alone(scheme)


def aim(weight: Tensor, gram: Tensor, apart: Apart, knobs: Knobs) -> tuple[Tensor, dict[str, float]]:
    """What `round_weights` is to be given for `weight` [out, in], and what a manifest should tell."""
    from buildsys.quant.aim import aimed

    found, ridge = aimed(weight, gram, apart, knobs.ridges)
    return found, {} if ridge is None else {"aim_ridge": ridge}


def round_weights(weight: Tensor, gram: Tensor, scheme: Scheme, knobs: Knobs, devices: Sequence[str] = ()) -> Rounding:
    """Codes for what was aimed at, [out, in], given `gram` [in, in], the second moments of its inputs behind quantized blocks."""
    return compensated(weight, gram, scheme, knobs, devices)

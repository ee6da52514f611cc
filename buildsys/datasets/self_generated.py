"""Text that the model writes itself: no data to fetch, no licence to ask, and close to what the model has learned.

Calibration on generated text: LLM-QAT (Liu et al., arXiv:2305.17888, section 3.1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from buildsys.slots import Frozen

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1
READS = "model"
PLACES = ()


class Knobs(Frozen):
    temperature: float = Field(1.0, gt=0, le=10, description="of sampling; 1.0 writes in the model's own distribution")


def floats(knobs: Knobs) -> str:
    """Nothing: the model writes the same text again."""
    return ""


def generate(knobs: Knobs, model: Any, samples: int, seqlen: int, seed: int, resources: Any, progress: Any) -> Tensor:
    """int32 tokens [samples, seqlen] from `model` (quant.model.Model)."""
    from buildsys.quant.sample import sample

    return sample(model, samples, seqlen, seed, knobs.temperature, resources, progress)

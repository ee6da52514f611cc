"""Rotary position embedding and the rules that stretch it to longer contexts.

RoPE: arXiv:2104.09864. linear: arXiv:2306.15595. dynamic NTK and YaRN: arXiv:2309.00071. llama3: arXiv:2407.21783, section 3.4.
LongRoPE: arXiv:2402.13753. The numbers' names are those of config.json, as transformers' modeling_rope_utils documents them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from buildsys.architecture import Architecture
from buildsys.longrope import LongRope


def tables(architecture: Architecture, length: int, device: str = "cpu") -> tuple[Tensor, Tensor]:  # -> cos, sin: [length, rotated]
    """Cosines and sines for positions 0 .. length-1 of a sequence of `length`, in float32, each frequency twice (first and second half of
    the channels that turn: of the whole head, but for LongRoPE)."""
    frequencies, amplitude = _frequencies(architecture, length)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * amplitude).to(device), (angles.sin() * amplitude).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [..., length, head_dim] -> same
    """Turns each pair (i, i + rotated/2) of `x` by its position's angle; channels from `rotated` on stay as they are."""
    turning, still = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    turning = turning.to(torch.result_type(x, cos))  # once, and not in each of the products
    turned = turning * cos
    half = turning.shape[-1] // 2
    turned[..., :half].addcmul_(turning[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(turning[..., :half], sin[..., half:])
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned


def _frequencies(architecture: Architecture, length: int) -> tuple[Tensor, float]:  # -> [rotated/2], amplitude
    rope, dim = architecture.rope, architecture.head_dim
    if isinstance(rope, LongRope):
        factors = torch.tensor(rope.long if length > rope.original else rope.short)
        return 1.0 / (factors * rope.theta ** (torch.arange(0, rope.rotated, 2, dtype=torch.float32) / rope.rotated)), rope.amplitude
    numbers, theta = rope.numbers, rope.theta
    if rope.kind == "dynamic" and length > architecture.max_positions:
        factor = numbers["factor"]
        theta *= (factor * length / architecture.max_positions - (factor - 1)) ** (dim / (dim - 2))
    plain = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.kind == "linear":
        return plain / numbers["factor"], 1.0
    if rope.kind == "llama3":
        return _llama3(plain, numbers, architecture.max_positions), 1.0
    if rope.kind == "yarn":
        return _yarn(plain, theta, dim, numbers, architecture.max_positions)
    return plain, 1.0


def _llama3(plain: Tensor, numbers: Mapping[str, float], max_positions: int) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = numbers["factor"], numbers["low_freq_factor"], numbers["high_freq_factor"]
    turns = numbers.get("original_max_position_embeddings", max_positions) * plain / (2 * math.pi)  # over the original context
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return plain / factor * (1 - keep) + plain * keep


def _yarn(plain: Tensor, theta: float, dim: int, numbers: Mapping[str, float], max_positions: int) -> tuple[Tensor, float]:
    """Interpolates by parts (section 3.2) and sharpens attention (section 3.3)."""
    factor = numbers["factor"]
    original = numbers.get("original_max_position_embeddings", float(max_positions))

    def index_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index_of(numbers.get("beta_fast", 32.0)), index_of(numbers.get("beta_slow", 1.0))
    if numbers.get("truncate", 1.0):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    blended = plain / factor * ramp + plain * (1 - ramp)
    return blended, numbers.get("attention_factor", _yarn_amplitude(factor, numbers))


def _yarn_amplitude(factor: float, numbers: Mapping[str, float]) -> float:
    def amplitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if numbers.get("mscale") and numbers.get("mscale_all_dim"):
        return amplitude(numbers["mscale"]) / amplitude(numbers["mscale_all_dim"])
    return amplitude(1.0)

"""What a linear reads where its engine rounds activations at run time: each token by a scale of its own, to int8 or fp8 (e4m3).

ZeroQuant's per-token dynamic quantization (arXiv:2206.01861, section 4.1), as LMDeploy 0.18's PyTorch engine does it
(`per_token_quant_int8` and `rms_norm_dynamic_quant` in its w8a8_triton_kernels.py): a token's largest magnitude, in float32 and at least
1e-7, over 127 or 448 is its scale, which is not rounded; halves go away from zero in int8, to even in fp8. Its norm has no least
magnitude, so a token of zeros is NaN there and zeros here. Other kernels send halves to even: a tie, which float activations hardly meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from buildsys.quant.grid import FP8_MAX
from buildsys.scheme import Activations

INT8_MAX = 127.0
SMALLEST = 1e-7  # LMDeploy's eps: a token of zeros still needs a scale
FINEST_STEP: Mapping[Activations, float] = MappingProxyType({"int8": 1 / INT8_MAX, "fp8": 2.0**-9 / FP8_MAX})
"""Next to zero, as a share of the token's largest magnitude: int8's step, and that of fp8's subnormal numbers."""
REACH, POINTS = 8.0, 64  # root mean squares of the loudest channel, which nothing normal exceeds; points of the integral up to there


def fake_quantize(x: Tensor, to: Activations) -> Tensor:  # [..., tokens, in] -> same
    """`x` as the products see it."""
    if to == "none":
        return x
    largest = x.abs().amax(-1, keepdim=True).float().clamp(min=SMALLEST)
    if to == "int8":
        scale = largest / INT8_MAX
        return (_nearest(x / scale).clamp_(-INT8_MAX, INT8_MAX) * scale).to(x.dtype)
    scale = largest / FP8_MAX
    return ((x / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def _nearest(x: Tensor) -> Tensor:
    """Whole numbers, halves away from zero as C's round() has them, where torch.round takes the even one. No step of it rounds."""
    whole = x.trunc()
    return (x - whole).mul_(2).trunc_().add_(whole)


def rounding_noise(mean_square: Tensor, to: Activations) -> Tensor:  # [in] -> [in]
    """The mean square of what rounding adds to each channel, as far as scaling channels changes it: fp8's relative error, the same at any
    scale, is left out. A twelfth of the squared step (Bennett 1948), or all of a channel that is less and so rounded to nothing.
    """
    return torch.minimum(mean_square, expected_peak(mean_square) * (FINEST_STEP[to] ** 2 / 12))


def expected_peak(mean_square: Tensor) -> Tensor:  # [in] -> []
    """The mean over tokens of the largest squared channel, if channels were independent and normal.

    That is the integral of 2 m (1 - P(m)), P(m) = prod_j erf(m / (sqrt(2) rms_j)) being the chance that no channel exceeds m. The absolute
    maximum that calibration keeps would be the loudest token's of thousands, and says little of the others.
    """
    rms = mean_square.sqrt()
    at = torch.linspace(0, REACH, POINTS + 1, device=rms.device) * rms.amax()
    within = torch.erf(at[:, None] / (rms.clamp(min=torch.finfo(rms.dtype).tiny) * 2**0.5)).log_().sum(1).exp_()  # [points]
    return torch.trapezoid(2 * at * (1 - within), at)

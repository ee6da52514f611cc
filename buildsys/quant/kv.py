"""What TurboMind's quantized KV cache does to keys and values, in torch: per head and token, asymmetric, 8 or 4 bits.

From LMDeploy's kernels in src/turbomind/kernels/attention. quantization.h (warp_stats, ConvertKvCache) is the arithmetic, and attention
reads only what that left in the cache: a prefill writes its own tokens (kv_cache_utils_v2.cu, ProcessKV_v2: keys after the rotary
embedding, one scale and zero for each head of each token), reads all of them back into a flat copy (flattenKV_v2) and attends to that; a
decoding step writes its token before it reads (attention_universal.h, Prologue). So no token sees fresh keys and values, not even its own,
and a window whose keys and values are all quantized in one pass scores what serving computes.

A model with 4-bit weights runs in float16 there, so every number below that the kernel holds in `half` is rounded to float16 at the same
place. benchmarks/kv_engine.py holds this to the engine's logits. LMDeploy's PyTorch engine has the same granularity and other roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor


def quantize(x: Tensor, bits: Literal[8, 4]) -> tuple[Tensor, Tensor, Tensor]:  # [..., head_dim] -> codes alike, scale and zero [..., 1]
    """uint8 codes from 0 to 2^bits - 1, float16 scale (max - min) / (2^bits - 1), float16 zero = min; x ~ codes * scale + zero.

    The kernel multiplies by the rounded reciprocal of the scale, and rounds half to even. Where the reciprocal is no finite half (all
    values equal, or closer together than a half can divide by), the product is NaN or infinite, which `cvt.rni.sat` turns to 0 or the top.
    """
    top = 2**bits - 1
    x = x.to(torch.float16)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    # The difference is taken in float32, as in warp_stats: it may pass float16's 65504, its share of `top` does not.
    scale = ((high.float() - low.float()) * (1.0 / top)).to(torch.float16)
    steps = (x - low) * scale.float().reciprocal().to(torch.float16)
    codes = torch.nan_to_num(steps.float(), nan=0.0).round().clamp(0, top)
    return codes.to(torch.uint8), scale, low


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:  # -> [..., head_dim] float16
    """codes * scale + zero with one rounding: the compiler contracts the kernel's product and sum to a fused multiply-add.

    In float32 the product of an 8-bit code and an 11-bit scale is exact, and adding the zero rounds at 2^-24 of the value: far below the
    step of float16, which the second rounding then meets.
    """
    return (codes.float() * scale.float() + zero.float()).to(torch.float16)


def fake_quantize(x: Tensor, bits: Literal[8, 4]) -> Tensor:  # [..., head_dim] -> alike
    """`x` as attention reads it back from the cache, in x's own dtype. Finite input within float16's range is the caller's part."""
    return dequantize(*quantize(x, bits)).to(x.dtype)


def keep(policy: str) -> Callable[[Tensor], Tensor] | None:
    """What stands in for the cache of a policy (none, int8, int4); none: nothing does, it keeps what it is given."""
    bits: dict[str, Literal[8, 4]] = {"int8": 8, "int4": 4}
    return partial(fake_quantize, bits=bits[policy]) if policy != "none" else None

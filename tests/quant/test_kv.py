"""KV cache emulation against a twin of plain loops that rounds with struct, and what any such quantizer must keep."""

from __future__ import annotations

import math
import struct
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from buildsys.quant.kv import dequantize, fake_quantize, quantize

Bits = Literal[8, 4]


def half(x: float) -> float:
    try:
        return float(struct.unpack("e", struct.pack("e", x))[0])
    except OverflowError:
        return math.copysign(math.inf, x)


def single(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def twin(vector: list[float], bits: int) -> list[float]:
    """One head of one token, after the kernel's order of operations."""
    top = 2**bits - 1
    held = [half(x) for x in vector]
    low, high = min(held), max(held)
    scale = half(single(single(high - low) * single(1 / top)))
    inverse = half(single(1 / scale)) if scale else math.inf
    out = []
    for x in held:
        difference = half(x - low)
        step = math.nan if difference == 0 and math.isinf(inverse) else half(difference * inverse)
        code = 0 if math.isnan(step) else top if math.isinf(step) else min(top, max(0, round(step)))  # round() is half to even
        out.append(half(single(single(code * scale) + low)))
    return out


halves = st.floats(-60000, 60000, width=16)
vectors = st.lists(halves, min_size=2, max_size=32)


@given(vectors, st.sampled_from([8, 4]))
def test_the_twin_says_the_same(vector: list[float], bits: Bits) -> None:
    assert fake_quantize(torch.tensor(vector), bits).tolist() == twin(vector, bits)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("spread", [1e-3, 0.1, 1.0, 100.0])
def test_the_twin_says_the_same_of_keys(bits: Bits, spread: float) -> None:
    x = torch.randn(3, 2, 5, 128, generator=torch.Generator().manual_seed(1)) * spread
    ours = fake_quantize(x, bits)
    assert [twin(row, bits) for row in x.reshape(-1, 128).tolist()] == ours.reshape(-1, 128).tolist()


def bound(x: Tensor, bits: int) -> Tensor:  # [..., head_dim] -> [..., 1]
    """Half a step, and what halves lose: the scale and its reciprocal, the product, and the sum (2^-11 of each, over up to `top` steps)."""
    low, high = x.half().float().amin(-1, keepdim=True), x.half().float().amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    largest = torch.maximum(low.abs(), high.abs())
    found: Tensor = 0.5 * step + 4 * 2**-11 * (high - low) + 2 * 2**-11 * largest + 2**-14
    return found


@given(vectors, st.sampled_from([8, 4]))
def test_error_is_half_a_step(vector: list[float], bits: Bits) -> None:
    x = torch.tensor(vector)
    scale = quantize(x, bits)[1]
    if scale >= 2.0**-14 and torch.isfinite(x.half().max() - x.half().min()):  # a reciprocal and a difference that a half can hold
        assert ((fake_quantize(x, bits) - x).abs() <= bound(x, bits)).all()


@given(vectors, st.sampled_from([8, 4]))
def test_again_changes_nothing_but_the_last_bits(vector: list[float], bits: Bits) -> None:
    once = fake_quantize(torch.tensor(vector), bits)
    if torch.isfinite(once.half().max() - once.half().min()) and quantize(once, bits)[1] >= 2.0**-14:
        assert ((fake_quantize(once, bits) - once).abs() <= bound(once, bits)).all()


@given(halves, st.sampled_from([8, 4]))
def test_constant_vectors_are_exact(value: float, bits: Bits) -> None:
    x = torch.full((4, 64), value)
    assert torch.equal(fake_quantize(x, bits), x)


def test_each_head_of_each_token_has_its_own_scale() -> None:
    x = torch.randn(2, 3, 7, 64, generator=torch.Generator().manual_seed(0))
    codes, scale, zero = quantize(x, 4)
    assert codes.shape == x.shape and scale.shape == zero.shape == (2, 3, 7, 1) and scale.dtype == zero.dtype == torch.float16
    assert codes.amin() == 0 and codes.amax() == 15
    louder = x.clone()
    louder[0, 0, 0] *= 100
    assert torch.equal(fake_quantize(louder, 4)[0, 0, 1:], fake_quantize(x, 4)[0, 0, 1:])


def test_dtype_is_kept_and_eight_bits_are_nearer_than_four() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert fake_quantize(x.to(dtype), 8).dtype == dtype
    error = {bits: (fake_quantize(x, bits) - x).abs().mean() for bits in (8, 4)}
    assert 14 < error[4] / error[8] < 19  # 255 / 15 = 17
    assert torch.equal(fake_quantize(x.half(), 8), dequantize(*quantize(x, 8)))
